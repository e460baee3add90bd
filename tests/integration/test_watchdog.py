"""Nodes that hang with their health check green: what is moved, what is broken off, and what never sets it off."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from balancer.clock import SystemClock
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Client, chat, client_of, fleet, paced_node
from tests.harness import QUIET, Balancer, running
from tests.integration.raw_http import Wire, post
from tests.process import node_process

# No other limit finds a hung node here: what moves, the watchdog moved.
PATIENT = {"first_byte_s": 300.0, "unary_s": None, "idle_s": 300.0, "commit_s": 0.1, "stall_s": 0.6}
SETTINGS = {**QUIET, "timeouts": PATIENT}


@asynccontextmanager
async def two_nodes(**settings: Any) -> AsyncIterator[tuple[FakeNode, FakeNode, Balancer, Client]]:
    async with (
        paced_node() as a,
        paced_node(seed=1) as b,
        running(*fleet(a, b), **{**SETTINGS, **settings}) as balancer,
        client_of(balancer.url) as client,
    ):
        yield a, b, balancer, client


async def warmed(balancer: Balancer, client: Client) -> None:
    """Show the pace of node a."""
    replies = await client.many(4, lambda number: chat(f"warm {number}", stream=True), at_once=1)
    assert {reply.node for reply in replies} == {"a"}


def wedged(balancer: Balancer, id_: str = "a") -> bool:
    return balancer.node(id_).is_wedged


def outcomes(balancer: Balancer, node: str = "a") -> set[str]:
    return {outcome for at, outcome in balancer.counts("attempts") if at == node}


async def long_after(balancer: Balancer, stall_times: float = 4.0) -> None:
    """Until the watchdog has looked for several times `stall_s`."""
    until_s = SystemClock.now() + stall_times * PATIENT["stall_s"]  # type: ignore[operator]
    await balancer.wait_for(lambda: SystemClock.now() >= until_s)


# -- what it does


async def test_waiting_requests_move_and_streams_that_had_begun_get_an_error_event() -> None:
    async with two_nodes(resume={"enabled": False}) as (a, b, balancer, client):
        await warmed(balancer, client)
        with capture_logs() as logs:
            stream = await client.open(chat("begun", stream=True, max_tokens=2000))
            while b"content" not in await stream.event():
                continue
            a.freeze()
            waiting = [client.begin(chat(f"{n}", stream=n % 2 == 1)) for n in range(8)]
            broken = await stream.rest()
            replies = [await one for one in waiting]
            assert wedged(balancer)
            shown = (await client.get(f"{balancer.ops_url}/admin/nodes/a")).json
            metrics = (await client.get(f"{balancer.ops_url}/metrics")).body
            a.thaw()
            await balancer.wait_for(lambda: not wedged(balancer))
        assert broken.code == "upstream_truncated"
        assert "[DONE]" not in broken.events
        assert all(reply.is_whole and reply.node == "b" for reply in replies)
        assert outcomes(balancer) == {"ok", "wedged"}
        assert (shown["state"], shown["eligible"]) == ("wedged", None)
        assert shown["wedged"]["by"] in ("stream_silent", "first_token_overdue")
        assert b'balancer_node_state{node="a",state="wedged"} 1.0' in metrics
        events = [log["event"] for log in logs if log["event"] in ("node.wedged", "node.unwedged")]
        assert events == ["node.wedged", "node.unwedged"]
        assert len(b.requests) >= 8


async def test_a_stream_that_had_begun_goes_on_elsewhere() -> None:
    async with two_nodes() as (a, b, balancer, client):
        await warmed(balancer, client)
        asked = chat("begun", stream=True, max_tokens=2000)
        stream = await client.open(asked)
        while b"content" not in await stream.event():
            continue
        a.freeze()
        reply = await stream.rest()
        a.thaw()
        assert reply.is_whole
        assert reply.text == b.expected_text(asked)
        assert balancer.counts("resumes") == {("ok",): 1}


async def test_unary_requests_alone_move_once_a_probe_has_failed() -> None:
    async with two_nodes() as (a, _, balancer, client):
        a.freeze()
        reply = await client.post(chat("alone"))
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "b", 2)
        assert balancer.node("a").wedged_by == "probe_failed"
        assert balancer.counts("probes")[("failed",)] >= 1
        assert [request for request in a.requests if b'"max_tokens":1,' in request.body], "a real request"
        a.thaw()
        await balancer.wait_for(lambda: not wedged(balancer))


async def test_a_head_is_held_back_while_its_node_is_silent_so_that_its_stream_can_move() -> None:
    async with two_nodes() as (a, _, balancer, client):
        await warmed(balancer, client)
        a.faults.add(Fault("hang", after_events=0))
        replies = await client.many(12, lambda number: chat(f"{number}", stream=True), at_once=4)
        assert all(reply.is_whole and reply.node == "b" for reply in replies)
        assert outcomes(balancer) == {"ok", "wedged"}
        a.faults.clear()
        a.faults.release()


async def test_a_move_uses_up_no_attempt_no_budget_and_speaks_against_no_prompt() -> None:
    retry = {"max_attempts": 1, "min_retries_per_s": 0.0, "budget_ratio": 0.0}
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(paced_node(seed=seed)) for seed in range(4)]
        settings = {**SETTINGS, "retry": retry}
        balancer = await stack.enter_async_context(running(*fleet(*nodes), **settings))
        client = await stack.enter_async_context(client_of(balancer.url))
        for node in nodes[:3]:
            node.freeze()
        reply = await client.post(chat("three nodes hang"))
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "d", 4)
        for node in nodes[:3]:
            node.thaw()


async def test_what_only_a_wedged_node_could_serve_stays_there_and_ends_well_when_it_moves_again() -> None:
    async with paced_node() as only, running(*fleet(only), **SETTINGS) as balancer, client_of(balancer.url) as client:
        await warmed(balancer, client)
        stream = await client.open(chat("begun", stream=True, max_tokens=200))
        await stream.event()
        only.freeze()
        unary = client.begin(chat("waits"))
        await balancer.wait_for(lambda: wedged(balancer))
        later = client.begin(chat("comes later"))
        await only.wait_for(lambda: any(b"comes later" in request.body for request in only.requests))
        only.thaw()
        assert (await stream.rest()).is_whole
        assert (await unary).is_whole
        assert (await later).is_whole
        await balancer.wait_for(lambda: not wedged(balancer))


async def test_a_process_that_is_stopped_loses_nothing_that_had_not_begun() -> None:
    spec = ("--itl-s", "0.005", "--ttft-s-per-token", "0")
    async with AsyncExitStack() as stack:
        (stopped, first), (_, second) = [await stack.enter_async_context(node_process(*spec)) for _ in range(2)]
        checks = {"health": {"interval_s": 0.1, "timeout_s": 5.0}}
        settings = {**SETTINGS, **checks, "cache": {"enabled": False}}
        balancer = await stack.enter_async_context(running(*fleet(first, second), **settings))
        client = await stack.enter_async_context(client_of(balancer.url))
        await warmed(balancer, client)
        stopped.freeze()
        replies = await client.many(24, lambda number: chat(f"{number}", stream=number % 2 == 1), at_once=8)
        assert all(reply.is_whole and reply.node == "b" for reply in replies)
        assert wedged(balancer)
        stopped.send(signal.SIGCONT)
        await balancer.wait_for(lambda: not wedged(balancer))


# -- what never sets it off


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_prompt_on_an_idle_node_is_left_alone(stream: bool) -> None:
    async with two_nodes() as (a, b, balancer, client):
        a.faults.add(Fault("delay", delay_s=4 * PATIENT["stall_s"], body_has="long"))  # type: ignore[operator]
        reply = await client.post(chat("long", stream=stream))
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "a", 1)
        assert not b.requests
        assert set(balancer.counts("probes")) == {("answered",)}
        assert "wedged" not in outcomes(balancer)


async def test_a_client_that_stops_reading_accuses_nobody() -> None:
    async with (
        FakeNode(instant=True) as a,
        FakeNode(instant=True) as b,
        running(*fleet(a, b), **SETTINGS) as balancer,
        client_of(balancer.url) as client,
    ):
        await warmed(balancer, client)
        a.faults.add(Fault("huge", size_bytes=32 << 20, body_has="much"))
        wire = await Wire.to(balancer, limit=1 << 10)  # it reads a little and stops
        wire.send(post(chat("much", stream=True)))
        await balancer.wait_for(lambda: any((seen := one.seen()) and seen.paused for one in balancer.node("a").live))
        await long_after(balancer)
        assert not wedged(balancer)
        assert (await client.post(chat("meanwhile"))).is_whole


async def test_a_node_that_is_merely_slow_is_left_alone() -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.4) as a, paced_node() as b:
        async with running(*fleet(a, b), **SETTINGS) as balancer, client_of(balancer.url) as client:
            replies = await asyncio.gather(*(client.post(chat(f"{n}", stream=True, max_tokens=5)) for n in range(3)))
        assert Counter(reply.node for reply in replies) == {"a": 3}
        assert all(reply.is_whole for reply in replies)
        assert outcomes(balancer) == {"ok"}


async def test_counters_of_the_agent_that_move_speak_for_the_node() -> None:
    async with two_nodes() as (a, _, balancer, client):
        await warmed(balancer, client)
        a.faults.add(Fault("hang", after_events=2, body_has="quiet"))
        stream = await client.open(chat("quiet", stream=True))
        node = balancer.node("a")
        before_s = SystemClock.now()

        def counters_move() -> bool:
            node.moved_s = SystemClock.now()
            return SystemClock.now() - before_s > 2.0

        await balancer.wait_for(counters_move)
        assert not wedged(balancer)
        stream.leave()


async def test_a_stream_that_is_silent_while_its_node_answers_probes_is_left_to_its_own_limit() -> None:
    async with two_nodes() as (a, _, balancer, client):
        await warmed(balancer, client)
        a.faults.add(Fault("hang", after_events=2, body_has="tool call"))
        stream = await client.open(chat("tool call", stream=True))
        await stream.event()
        await long_after(balancer)
        assert not wedged(balancer)
        assert balancer.counts("probes")[("answered",)] >= 1
        a.faults.release()
        assert (await stream.rest()).is_whole
