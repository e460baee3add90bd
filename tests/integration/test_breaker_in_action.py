"""Breakers on real requests: what opens them, how one probe closes them, and that they never make things worse."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from balancer.clock import SystemClock
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Client, Reply, chat, client_of, fleet
from tests.harness import QUIET, Balancer, running

# Each node in turn, so that a sick one goes on being asked until its breaker opens.
IN_TURN = {"routing": {"policy": "round_robin"}}
PATIENT = {"breaker": {"open_s": 1000.0, "max_open_s": 10_000.0}}


@asynccontextmanager
async def two_nodes(**settings: Any) -> AsyncIterator[tuple[FakeNode, FakeNode, Balancer, Client]]:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        merged = {**QUIET, **IN_TURN, **PATIENT, **settings}
        async with running(*fleet(a, b), **merged) as balancer, client_of(balancer.url) as client:
            await balancer.wait_for(lambda: all(balancer.node(id_).check_up for id_ in "ab"))
            yield a, b, balancer, client


async def checks_turn_good(node: FakeNode, balancer: Balancer) -> None:
    """Let the node's checks fail until it is known to be down, then succeed: evidence that ends an open time."""
    node.faults.add(Fault("status", status=500, path="/health"))
    await balancer.wait_for(lambda: balancer.node("a").check_up is False)
    node.faults.clear()
    await balancer.wait_for(lambda: balancer.node("a").check_up is True)


# -- what opens a breaker


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault("status", status=500), "server_error"),
        (Fault("status", status=401), "misconfigured"),
        (Fault("reset"), "reset_before_head"),
        (Fault("error_body"), "error_object"),
    ],
)
async def test_five_failures_in_a_row_open_the_breaker_and_the_node_is_asked_no_more(
    fault: Fault, outcome: str
) -> None:
    async with two_nodes() as (sick, _, balancer, client):
        sick.faults.add(fault)
        replies = await client.many(40, at_once=1)
        assert all(reply.is_whole for reply in replies)
        assert len(sick.requests) == 5
        assert balancer.counts("attempts")["a", outcome] == 5
        assert balancer.node("a").breaker.state == "open"
        assert {reply.attempts for reply in replies[10:]} == {1}
        shown = (await client.get(f"{balancer.ops_url}/admin/nodes/a")).json
        assert (shown["breaker"], shown["state"], shown["eligible"]) == ("open", "open", None)
        assert b'balancer_breaker_state{node="a"} 2.0' in (await client.get(f"{balancer.ops_url}/metrics")).body


async def test_streams_broken_in_the_middle_open_the_breaker() -> None:
    async with two_nodes() as (sick, _, balancer, client):
        sick.faults.add(Fault("no_done"))
        replies = await client.many(40, lambda number: chat(f"{number}", stream=True), at_once=1)
        assert len(sick.requests) == 5
        assert sum(reply.is_whole for reply in replies) >= 35
        assert balancer.node("a").breaker.state == "open"


async def test_a_success_in_between_begins_the_count_anew() -> None:
    async with two_nodes() as (sick, _, balancer, client):
        for _ in range(3):
            sick.faults.clear()
            sick.faults.add(Fault("status", status=500, first=4))
            await client.many(10, at_once=1)
        assert len(sick.requests) == 15
        assert balancer.node("a").breaker.state == "closed"


async def test_a_share_of_failures_opens_the_breaker_once_there_were_enough_requests() -> None:
    breaker = {"consecutive_failures": 1000, "min_requests": 12, "failure_ratio": 0.75, "open_s": 1000.0}
    async with two_nodes(breaker=breaker) as (sick, _, balancer, client):
        await client.many(6, at_once=1)  # three of them at the node
        sick.faults.add(Fault("status", status=500))
        replies = await client.many(60, at_once=1)
        assert all(reply.is_whole for reply in replies)
        assert len(sick.requests) == 3 + 9, "nine failures of twelve are three quarters"
        assert balancer.node("a").breaker.state == "open"


@pytest.mark.parametrize("status", [400, 422, 429, 503])
async def test_what_is_not_the_nodes_fault_opens_no_breaker(status: int) -> None:
    async with two_nodes() as (node, other, balancer, client):
        for one in (node, other):
            one.faults.add(Fault("status", status=status, retry_after_s=0))
        await client.many(60, at_once=1)
        assert [balancer.node(id_).breaker.state for id_ in "ab"] == ["closed", "closed"]
        assert balancer.node("a").load.failure == 0.0


async def test_clients_that_leave_open_no_breaker() -> None:
    async with two_nodes() as (node, other, balancer, client):
        for one in (node, other):
            one.faults.add(Fault("hang"))
        for number in range(12):
            request = client.begin(chat(f"{number}"))
            await balancer.wait_for(lambda: len(node.requests) + len(other.requests) > number)
            request.cancel()
            await balancer.wait_for(lambda: len(balancer.requests) > number)
        assert balancer.counts("attempts") == {("a", "client_gone"): 6, ("b", "client_gone"): 6}
        assert [balancer.node(id_).breaker.state for id_ in "ab"] == ["closed", "closed"]
        assert [balancer.node(id_).load.rif for id_ in "ab"] == [0, 0]


# -- half-open


async def opened(sick: FakeNode, client: Client, balancer: Balancer) -> None:
    sick.faults.add(Fault("status", status=500))
    await client.many(10, at_once=1)
    assert balancer.node("a").breaker.state == "open"
    sick.forget()


QUICK_CHECKS = {"health": {"interval_s": 0.05, "timeout_s": 5.0, "fall": 1}}


async def test_a_check_that_turns_good_grants_one_probe_whose_success_closes_the_breaker() -> None:
    async with two_nodes(**QUICK_CHECKS) as (sick, _, balancer, client):
        await opened(sick, client, balancer)
        await checks_turn_good(sick, balancer)
        sick.faults.add(Fault("hang"))
        replies = [client.begin(chat(f"beside {number}")) for number in range(12)]
        await sick.wait_for(lambda: sick.in_flight == 1)
        await balancer.wait_for(lambda: len([reply for reply in replies if reply.done()]) == 11)
        assert len(sick.requests) == 1, "one probe at a time"
        assert balancer.node("a").breaker.state == "half-open"
        sick.faults.clear()
        sick.faults.release()
        assert all([(await reply).is_whole for reply in replies])
        assert balancer.node("a").breaker.state == "closed"
        assert sum([(await reply).node == "a" for reply in replies]) == 1


async def test_a_probe_that_fails_opens_the_breaker_again_and_its_client_is_served_elsewhere() -> None:
    async with two_nodes(**QUICK_CHECKS) as (sick, _, balancer, client):
        await opened(sick, client, balancer)
        await checks_turn_good(sick, balancer)
        sick.faults.add(Fault("status", status=500))
        replies = await client.many(20, at_once=4)
        assert all(reply.is_whole for reply in replies)
        assert len(sick.requests) == 1
        assert balancer.node("a").breaker.state == "open"


async def test_a_probe_whose_client_leaves_frees_its_place() -> None:
    async with two_nodes(**QUICK_CHECKS) as (sick, well, balancer, client):
        await opened(sick, client, balancer)
        await checks_turn_good(sick, balancer)
        for node in (sick, well):
            node.faults.add(Fault("hang"))
        asked = [client.begin(chat(f"{number}")) for number in range(2)]
        await sick.wait_for(lambda: sick.in_flight == 1)
        for request in asked:
            request.cancel()
        await balancer.wait_for(lambda: balancer.node("a").load.rif == balancer.node("b").load.rif == 0)
        for node in (sick, well):
            node.faults.clear()
        assert balancer.node("a").breaker.state == "half-open"
        breaker = balancer.node("a").breaker
        await balancer.wait_for(lambda: breaker.admits(SystemClock.now()))  # at most one probe a second
        assert all(reply.is_whole for reply in await client.many(4, at_once=1))
        assert breaker.state == "closed"


async def test_an_open_time_ends_by_itself() -> None:
    async with two_nodes(breaker={"open_s": 0.2}) as (sick, _, balancer, client):
        await opened(sick, client, balancer)
        sick.faults.clear()
        await balancer.wait_for(lambda: balancer.node("a").breaker.admits(SystemClock.now()))
        assert all(reply.is_whole for reply in await client.many(4, at_once=1))
        assert balancer.node("a").breaker.state == "closed"
        assert len(sick.requests) >= 1


# -- never worse than without


async def test_the_only_node_is_asked_even_when_its_breaker_is_open() -> None:
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("status", status=500))
        async with running(*fleet(node), **QUIET, **PATIENT) as balancer, client_of(balancer.url) as client:
            assert {reply.code for reply in await client.many(10, at_once=1)} == {"upstream_bad_answer"}
            assert balancer.node("a").breaker.state == "open"
            node.faults.clear()
            assert all(reply.is_whole for reply in await client.many(20, at_once=4))
            breaker = balancer.node("a").breaker
            await balancer.wait_for(lambda: breaker.admits(SystemClock.now(), alone=True))  # not 1000 s
            assert (await client.post(chat())).is_whole
            assert breaker.state == "closed"


async def four_nodes(count: int, *faults: Fault | None, **settings: Any) -> tuple[list[Reply], list[FakeNode]]:
    """`count` requests to four nodes with a fault each, under least_outstanding."""
    nodes = [FakeNode(instant=True, seed=seed) for seed in range(4)]
    async with nodes[0], nodes[1], nodes[2], nodes[3]:
        for node, fault in zip(nodes, faults, strict=True):
            if fault is not None:
                node.faults.add(fault)
        urls = [{"url": node.url, "id": id_, "models": ["sim-model"]} for node, id_ in zip(nodes, "abcd", strict=True)]
        async with running(*urls, **{**QUIET, **settings}) as balancer, client_of(balancer.url) as client:
            return await client.many(count), nodes


@pytest.mark.parametrize(("probability", "least_success"), [(0.3, 0.95), (0.5, 0.65)])
async def test_when_all_nodes_fail_at_random_most_requests_succeed_at_little_amplification(
    probability: float, least_success: float
) -> None:
    sometimes = Fault("status", status=500, probability=probability)
    replies, nodes = await four_nodes(400, *[sometimes] * 4)  # ten seconds' worth at 40 a second
    succeeded = sum(reply.is_whole for reply in replies)
    assert succeeded >= least_success * len(replies)
    assert sum(len(node.requests) for node in nodes) <= 1.5 * len(replies)


@pytest.mark.parametrize(
    "fault", [Fault("status", status=500), Fault("reset"), Fault("status", status=404), Fault("hang")]
)
async def test_a_black_hole_draws_at_most_one_percent_of_attempts(fault: Fault) -> None:
    timeouts = {"unary_s": 1.0}
    replies, (hole, *well) = await four_nodes(1200, fault, None, None, None, timeouts=timeouts)
    assert all(reply.is_whole for reply in replies)
    attempts = sum(reply.attempts for reply in replies)
    assert len(hole.requests) <= 0.01 * attempts
    assert min(len(node.requests) for node in well) > 0.2 * attempts, "and the others share the rest"
