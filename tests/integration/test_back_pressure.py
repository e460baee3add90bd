"""Nodes that say "not now": asked elsewhere, left alone for as long as they ask, and never held to be broken."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from balancer.clock import SystemClock
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import chat, client_of, fleet, instant_nodes
from tests.harness import QUIET, running


def push_back(node: FakeNode, status: int = 429, retry_after: Any = None, **fault: Any) -> None:
    """Let a node answer `status` with this Retry-After; numbers and texts alike."""
    node.faults.add(Fault("status", status=status, retry_after_s=retry_after, **fault))


@pytest.mark.parametrize("status", [408, 425, 429, 503])
async def test_a_node_that_pushes_back_is_passed_over_and_not_held_to_be_broken(status: int) -> None:
    async with FakeNode(instant=True) as busy, FakeNode(instant=True) as free:
        push_back(busy, status, 100)
        async with running(*fleet(busy, free), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
            share = balancer.node("a").share(SystemClock.now())
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "b", 2)
        assert balancer.counts("attempts") == {("a", "back_pressure"): 1, ("b", "ok"): 1}
        assert (balancer.node("a").load.failure, balancer.node("a").breaker.state) == (0.0, "closed")
        assert share < balancer.node("a").weight, "its weight is cut"


async def test_a_node_is_left_alone_for_its_retry_after() -> None:
    async with FakeNode(instant=True) as busy, FakeNode(instant=True) as free:
        push_back(busy, retry_after=100)
        async with running(*fleet(busy, free), **QUIET) as balancer, client_of(balancer.url) as client:
            replies = await client.many(40)
        assert all(reply.is_whole for reply in replies)
        assert len(busy.requests) <= 8, "those that were under way when it said so first"
        assert {reply.attempts for reply in replies[8:]} == {1}


async def test_back_pressure_never_opens_a_breaker() -> None:
    async with FakeNode(instant=True) as busy, FakeNode(instant=True) as free:
        push_back(busy, retry_after=0)
        settings = {**QUIET, "routing": {"policy": "round_robin"}}
        async with running(*fleet(busy, free), **settings) as balancer:
            async with client_of(balancer.url) as client:
                replies = await client.many(60, at_once=1)
            assert all(reply.is_whole for reply in replies)
            assert len(busy.requests) == 30
            assert balancer.node("a").breaker.state == "closed"


async def test_a_node_is_asked_again_after_its_retry_after() -> None:
    async with FakeNode(instant=True) as busy, FakeNode(instant=True) as free:
        push_back(busy, retry_after=0.3, first=1)
        async with running(*fleet(busy, free), **QUIET) as balancer, client_of(balancer.url) as client:
            assert (await client.post(chat())).node == "b"
            assert balancer.node("a").state(SystemClock.now()) == "blocked"
            await balancer.wait_for(lambda: balancer.node("a").state(SystemClock.now()) == "ready")
            assert (await client.post(chat())).node == "a"


# -- what the client hears when all say so


async def test_when_all_say_429_the_client_gets_the_smallest_retry_after() -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b, FakeNode(instant=True) as c:
        for node, retry_after in ((a, 50), (b, 30), (c, 40)):
            push_back(node, retry_after=retry_after)
        async with running(*fleet(a, b, c), **QUIET) as balancer, client_of(balancer.url) as client:
            first = await client.post(chat())
            second = await client.post(chat(stream=True))
        assert (first.status, first.code, first.attempts, first.retry_after_s) == (429, "rate_limited", 3, 30)
        assert first.json["error"]["type"] == "rate_limit_error"
        assert (second.status, second.code, second.attempts) == (429, "rate_limited", 0)
        assert second.retry_after_s == 30
        assert [len(node.requests) for node in (a, b, c)] == [1, 1, 1], (
            "nobody is asked while all want to be left alone"
        )


async def test_when_all_say_503_there_is_no_eligible_node() -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        push_back(a, 503, 50)
        push_back(b, 503, 20)
        async with running(*fleet(a, b), **QUIET) as balancer, client_of(balancer.url) as client:
            replies = [await client.post(chat()) for _ in range(2)]
        for reply in replies:
            assert (reply.status, reply.code, reply.retry_after_s) == (503, "no_eligible_node", 20)
            assert b"127.0.0.1" not in reply.body


async def test_without_a_retry_after_the_client_is_told_one_second() -> None:
    async with FakeNode(instant=True) as node:
        push_back(node)
        async with running(*fleet(node), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.code, reply.retry_after_s) == (429, "rate_limited", 1)


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "1e400", ""])
async def test_a_retry_after_that_cannot_be_read_is_none(value: str) -> None:
    async with FakeNode(instant=True) as node:
        push_back(node, retry_after=value)
        async with running(*fleet(node), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.code) == (429, "rate_limited")
        assert 1 <= reply.retry_after_s <= 60


async def test_a_retry_after_may_be_a_date() -> None:
    async with FakeNode(instant=True) as node:
        until = datetime.fromtimestamp(SystemClock.wall(), UTC) + timedelta(seconds=40)
        push_back(node, retry_after=format_datetime(until, usegmt=True))
        async with running(*fleet(node), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.code) == (429, "rate_limited")
        assert 20 <= reply.retry_after_s <= 40


async def test_nodes_that_say_429_do_not_hide_one_that_would_answer() -> None:
    async with instant_nodes(4) as (a, b, c, free):
        for node in (a, b, c):
            push_back(node, retry_after=30)
        nodes = fleet(a, b, c, free)
        async with running(*nodes, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert reply.status == 200, "the client gets 429 when all say so, and one did not"


@pytest.mark.parametrize("order", [(500, 429), (429, 500)])
async def test_a_429_that_not_every_node_says_is_not_the_clients(order: tuple[int, int]) -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        for node, status in zip((a, b), order, strict=True):
            push_back(node, status, 30 if status == 429 else None)
        async with running(*fleet(a, b), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status in (502, 503), reply.attempts) == (True, 2)


async def test_a_node_without_room_for_another_connection_is_passed_over() -> None:
    async with FakeNode(instant=True) as full, FakeNode(instant=True) as free:
        full.faults.add(Fault("hang"))
        upstream = {"max_connections_per_node": 1}
        async with running(*fleet(full, free), upstream=upstream, **QUIET) as balancer:
            async with client_of(balancer.url) as client:
                waiting = client.begin(chat("first"))
                await full.wait_for(lambda: full.in_flight == 1)
                reply = await client.post(chat("second"))
                full.faults.clear()
                full.faults.release()
                assert (await waiting).node == "a"
            assert (reply.is_whole, reply.node) == (True, "b")
            assert balancer.node("a").load.failure == 0.0
