"""Nodes that die, hang and come back: what is lost, which is nothing that had not begun to answer."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import dead_url
from tests.client import Client, Reply, chat, client_of, fleet, instant_nodes, paced_node
from tests.harness import QUIET, Balancer, running
from tests.process import node_process

# Nothing may be paid for a connection that was refused: no attempt of the few, no retry of the budget.
NO_RETRIES = {"max_attempts": 1, "min_retries_per_s": 0.0, "budget_ratio": 0.0}
QUICK_CHECKS = {"health": {"interval_s": 0.05, "timeout_s": 5.0, "fall": 2}, "cache": {"enabled": False}}


def shows_no_address(reply: Reply) -> bool:
    told = f"{dict(reply.headers)}{reply.body.decode()}"
    return "127.0.0.1" not in told and "http://" not in told


async def all_checked(balancer: Balancer, up: bool) -> None:
    await balancer.wait_for(lambda: {node.check_up for node in balancer.app.registry.nodes.values()} == {up})


# -- refused


@pytest.mark.parametrize("settings", [QUIET, QUICK_CHECKS], ids=["checks_once", "checks_quick"])
async def test_started_with_three_of_four_nodes_dead_nothing_is_lost(settings: Any) -> None:
    async with FakeNode(instant=True) as alive:
        nodes = fleet(dead_url(), dead_url(), dead_url(), alive)
        async with running(*nodes, retry=NO_RETRIES, **settings) as balancer, client_of(balancer.url) as client:
            replies = await client.many(100)
        assert all(reply.is_whole and reply.node == "d" for reply in replies)
        assert len(alive.requests) == 100
        assert balancer.counts("retry_budget_exhausted") == {}


async def test_models_are_known_from_the_one_node_that_lives() -> None:
    async with FakeNode(instant=True) as alive:
        urls = [dead_url(), alive.url, dead_url(), dead_url()]
        async with running(*urls, retry=NO_RETRIES, **QUICK_CHECKS) as balancer, client_of(balancer.url) as client:
            assert all(reply.is_whole for reply in await client.many(20))
            await balancer.wait_for(lambda: "sim-model" in balancer.app.registry.models())
            listed = (await client.get("/v1/models")).json
            assert [card["id"] for card in listed["data"]] == ["sim-model"]
            assert all(reply.is_whole for reply in await client.many(20))


@pytest.mark.parametrize("settings", [QUIET, QUICK_CHECKS], ids=["checks_once", "checks_quick"])
async def test_three_of_four_nodes_killed_under_load_lose_nothing(settings: Any) -> None:
    async with paced_node() as a, paced_node() as b, paced_node() as c, paced_node() as d:
        nodes = fleet(a, b, c, d, weight=1.0)
        async with running(*nodes, **settings) as balancer, client_of(balancer.url) as client:
            load = asyncio.create_task(client.many(120, at_once=12))
            for dying, finished in ((a, 10), (b, 30), (c, 50)):
                # A request that two nodes in a row die under would pass for what kills them.
                await balancer.wait_for(lambda: len(balancer.requests) >= finished)
                await balancer.wait_for(lambda: not balancer.app.verdicts.suspects and dying.in_flight >= 1)
                dying.die()
            replies = await load
        assert all(reply.is_whole for reply in replies)
        assert {reply.text for reply in replies} == {d.expected_text(chat(f"request {n}")) for n in range(120)}
        assert Counter(outcome for _, outcome in balancer.counts("attempts"))["refused"] >= 1


async def test_a_node_that_dies_and_comes_back_between_requests_is_not_even_noticed() -> None:
    async with (
        FakeNode(instant=True) as node,
        running(*fleet(node), retry=NO_RETRIES, **QUIET) as balancer,
        client_of(balancer.url) as client,
    ):
        assert all(reply.is_whole for reply in await client.many(10))  # leaves kept connections behind
        node.die()
        await node.come_back()
        assert all(reply.is_whole for reply in await client.many(10))
        assert balancer.node("a").load.failure == 0.0


# -- everything down, and up again


@pytest.mark.parametrize("known", [False, True], ids=["not_checked_yet", "known_down"])
@pytest.mark.parametrize("stream", [False, True])
async def test_all_nodes_down_is_a_503_that_says_when_to_come_back_and_names_no_address(
    known: bool, stream: bool
) -> None:
    settings = QUICK_CHECKS if known else QUIET
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        async with running(*fleet(a, b), **settings) as balancer, client_of(balancer.url) as client:
            await all_checked(balancer, True)
            a.die()
            b.die()
            if known:
                await all_checked(balancer, False)
            reply = await client.post(chat(stream=stream))
            ready = await client.get(f"{balancer.ops_url}/readyz")
        assert (reply.status, reply.code, reply.retry_after_s) == (503, "no_eligible_node", 1)
        assert reply.attempts == (0 if known else 2)
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}
        assert shows_no_address(reply)
        assert ready.status == (503 if known else 200)


async def test_when_a_check_finds_a_node_back_requests_succeed_at_once_and_go_on_succeeding() -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        breaker = {"open_s": 1000.0, "max_open_s": 1000.0}
        settings = {**QUICK_CHECKS, "breaker": breaker}
        async with running(*fleet(a, b), **settings) as balancer, client_of(balancer.url) as client:
            await all_checked(balancer, True)
            a.die()
            b.die()
            lost = await client.many(40)
            assert {reply.code for reply in lost} == {"no_eligible_node"}
            await all_checked(balancer, False)
            await b.come_back()
            await balancer.wait_for(lambda: balancer.node("b").check_up is True)
            replies = await client.many(20, at_once=1)
            assert all(reply.is_whole and reply.node == "b" for reply in replies)
            assert (await client.get(f"{balancer.ops_url}/readyz")).status == 200


async def test_models_without_any_node_left_are_not_unknown() -> None:
    async with FakeNode(instant=True) as node:
        async with running(node.url, **QUICK_CHECKS) as balancer, client_of(balancer.url) as client:
            await balancer.wait_for(lambda: "sim-model" in balancer.app.registry.models())
            node.die()
            await all_checked(balancer, False)
            here, unknown = await client.post(chat()), await client.post(chat(model="another"))
        assert (here.status, here.code) == (503, "no_eligible_node")
        assert (unknown.status, unknown.code) == (404, "unknown_model")


# -- hung


@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_hangs_with_its_health_check_green_loses_no_request(stream: bool) -> None:
    async with paced_node() as hung, paced_node() as b, paced_node() as c:
        timeouts = {"unary_s": 1.0, "first_byte_s": 1.0, "idle_s": 1.0, "commit_s": 0.5, "stall_s": 0.75}
        settings = {**QUICK_CHECKS, "timeouts": timeouts}
        async with running(*fleet(hung, b, c), **settings) as balancer, client_of(balancer.url) as client:
            hung.freeze()
            replies = await client.many(60, lambda number: chat(f"{number}", stream=stream))
            assert balancer.node("a").check_up is True
            hung.thaw()
        assert len(hung.requests) >= 1
        assert [reply.errors for reply in replies if not reply.is_whole] == []
        assert balancer.node("a").load.rif == 0


# -- prompts that kill


@pytest.mark.parametrize("kept", [False, True], ids=["fresh_connections", "kept_connections"])
async def test_a_prompt_that_kills_nodes_is_sent_to_no_third_one(kept: bool) -> None:
    async with instant_nodes(4) as nodes:
        for node in nodes:
            node.faults.add(Fault("die", body_has="poison"))
        async with running(*fleet(*nodes), **QUIET) as balancer, client_of(balancer.url) as client:
            if kept:  # every node has a connection lying idle
                for id_ in "abcd":
                    others = [other for other in "abcd" if other != id_]
                    for other in others:
                        balancer.app.registry.drain(other, drained=True)
                    assert (await client.post(chat())).node == id_
                    for other in others:
                        balancer.app.registry.drain(other, drained=False)
            reply = await client.post(chat("poison"))
            assert reply.status in (502, 503)
            assert sum(not node.listening for node in nodes) <= 2
            assert (await client.post(chat("harmless"))).is_whole


# -- a process killed under load


async def ask(client: Client, number: int, replies: list[Reply]) -> None:
    """One request of the load, every other a stream; what breaks the connection raises."""
    replies.append(await client.post(chat(f"{number}", stream=number % 2 == 1, max_tokens=24)))


async def test_kill_9_of_a_node_loses_no_request_that_had_not_begun_to_answer() -> None:
    spec = ("--itl-s", "0.005", "--ttft-s-per-token", "0")
    reference = FakeNode()
    async with AsyncExitStack() as stack:
        started = await asyncio.gather(*(stack.enter_async_context(node_process(*spec)) for _ in range(3)))
        nodes = fleet(*(url for _, url in started), weight=1.0)
        balancer = await stack.enter_async_context(running(*nodes, **QUICK_CHECKS))
        client = await stack.enter_async_context(client_of(balancer.url))
        victim, replies = started[0][0], list[Reply]()
        async with asyncio.TaskGroup() as load:
            for number in range(60):
                load.create_task(ask(client, number, replies))
            await balancer.wait_for(lambda: len(balancer.requests) >= 1 and balancer.node("a").load.rif >= 4)
            victim.send(signal.SIGKILL)
            assert await victim.ended() == -signal.SIGKILL
            for number in range(60, 120):
                load.create_task(ask(client, number, replies))
        broken = [reply for reply in replies if not reply.is_whole]
        assert len(replies) == 120
        for reply in broken:
            assert (reply.is_stream, reply.node, reply.code) == (True, "a", "upstream_truncated")
            assert reply.text, "it had begun to answer"
            assert "[DONE]" not in reply.events
            assert "error" in reply.events[-1]
        assert {reply.text for reply in replies if reply.is_whole} <= {
            reference.expected_text(chat(f"{number}", max_tokens=24)) for number in range(120)
        }
        assert [balancer.node(id_).load.rif for id_ in "abc"] == [0, 0, 0]
