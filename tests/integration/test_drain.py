"""SIGTERM on a real process: what is in flight ends, nothing that came in time is lost, and the exit status is 0."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Client, Reply, chat, client_of, fleet, paced_node
from tests.integration.raw_http import Wire, get, post
from tests.process import BalancerProcess, serving

# So long that a test which waits for it has failed.
LONG_S = 1000.0
PATIENT = {"health": {"timeout_s": 30.0}, "cache": {"enabled": False}}
STREAM = chat("a long story", stream=True)


@asynccontextmanager
async def draining(**timeouts: Any) -> AsyncIterator[tuple[FakeNode, BalancerProcess, Client]]:
    """A node and a balancer process in front of it."""
    async with paced_node() as node:
        settings = {"nodes": fleet(node, max_in_flight=8), "timeouts": timeouts, **PATIENT}
        async with serving(settings) as balancer, client_of(balancer.url) as client:
            yield node, balancer, client


async def begun(node: FakeNode, client: Client, fault: Fault, body: Any = STREAM) -> asyncio.Task[Reply]:
    """A request that is held at the node by a fault."""
    before = node.in_flight
    rule = node.faults.add(fault)
    reply = client.begin(body)
    await node.wait_for(lambda: node.in_flight == before + 1 and rule.hits == 1)
    return reply


async def sigterm(balancer: BalancerProcess) -> None:
    balancer.process.send(signal.SIGTERM)
    await balancer.logged("drain.begun")


async def listener_is_closed(balancer: BalancerProcess) -> None:
    """Until connections are refused."""
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection(*balancer.address)
            except (ConnectionRefusedError, ConnectionResetError):
                return
            writer.transport.abort()


# -- under load


async def work(client: Client, replies: list[Reply], stream: bool) -> None:
    """Ask again and again until connections are refused; anything else that breaks is raised."""
    while True:
        try:
            replies.append(await client.post(chat(f"request {len(replies)}", stream=stream)))
        except aiohttp.ClientConnectorError:
            return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_under_load_loses_nothing_with_a_grace(number: signal.Signals) -> None:
    async with draining(drain_grace_s=0.5) as (node, balancer, client):
        replies: list[Reply] = []
        async with asyncio.TaskGroup() as load:
            for worker in range(8):
                load.create_task(work(client, replies, stream=worker % 2 == 0))
            await node.wait_for(lambda: len(node.requests) >= 40)
            balancer.process.send(number)
        assert await balancer.process.ended() == 0
        assert all(reply.is_whole for reply in replies)
        assert len(replies) == len(node.requests) == len(balancer.events("request.finished"))
        assert any(reply.headers.get("Connection") == "close" for reply in replies)
        assert balancer.events("drain.finished")[0]["cut"] == 0


@pytest.mark.parametrize("drain_grace_s", [0.0, 0.3])
async def test_connections_made_anew_for_each_request_lose_nothing_either(drain_grace_s: float) -> None:
    async with draining(drain_grace_s=drain_grace_s) as (node, balancer, _):
        replies: list[Reply] = []

        async def one_connection_each() -> None:
            while True:
                async with client_of(balancer.url) as client:
                    try:
                        replies.append(await client.post(chat("hello")))
                    except aiohttp.ClientConnectorError:
                        return

        async with asyncio.TaskGroup() as load:
            for _ in range(8):
                load.create_task(one_connection_each())
            await node.wait_for(lambda: len(node.requests) >= 40)
            balancer.process.send(signal.SIGTERM)
        assert await balancer.process.ended() == 0
        assert all(reply.is_whole for reply in replies)


@pytest.mark.parametrize("grace_s", [0.0, 0.2])
async def test_what_lay_in_the_sockets_before_the_signal_is_served(grace_s: float) -> None:
    async with draining(drain_grace_s=grace_s) as (_, balancer, _client):
        kept = await Wire.to(balancer)
        assert (await kept.ask(post(chat("before")))).status == 200
        balancer.process.freeze()
        wires = [kept, *[await Wire.to(balancer) for _ in range(8)]]  # made by the kernel, and not accepted yet
        for wire in wires:
            wire.send(post(chat("in time")))
        balancer.process.send(signal.SIGTERM)
        balancer.process.send(signal.SIGCONT)
        assert [(await wire.answer()).status for wire in wires] == [200] * 9
        assert await balancer.process.ended() == 0


# -- during the grace


async def test_during_the_grace_health_says_503_and_new_requests_are_served_on_closing_connections() -> None:
    async with draining(drain_grace_s=LONG_S) as (node, balancer, client):
        kept = await Wire.to(balancer)
        assert (await kept.ask(get("/healthz"))).status == 200
        assert (await client.get(f"{balancer.ops_url}/readyz")).status == 200
        story = await begun(node, client, Fault("hang", after_events=3, first=1))
        await sigterm(balancer)
        ready = await client.get(f"{balancer.ops_url}/readyz")
        assert (ready.status, ready.json["reason"]) == (503, "draining")
        assert (await client.get(f"{balancer.ops_url}/healthz")).status == 200, "the process lives"
        assert (await client.get("/healthz")).status == 503
        for body in (chat("during"), chat("during", stream=True)):
            reply = await client.post(body)
            assert (reply.is_whole, reply.headers["Connection"]) == (True, "close")
        answer = await kept.ask(post(chat("on a kept connection")))
        assert (answer.status, answer.header("connection")) == (200, "close")
        assert await kept.ends() == b""
        node.faults.release()
        assert (await story).is_whole
        assert balancer.process.is_up, "the grace is not over"


# -- after it


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_in_flight_ends_and_then_the_process_does(stream: bool) -> None:
    async with draining(drain_s=LONG_S) as (node, balancer, client):
        body = chat("a long story", stream=stream)
        story = await begun(node, client, Fault("hang", after_events=3 if stream else None), body)
        await sigterm(balancer)
        await listener_is_closed(balancer)
        assert balancer.process.is_up
        assert not story.done()
        node.faults.release()
        reply = await story
        assert (reply.is_whole, reply.text) == (True, node.expected_text(body))
        if not stream:
            assert reply.headers["Connection"] == "close", "or its client would ask here again"
        assert await balancer.process.ended() == 0


async def test_requests_that_wait_in_the_queue_are_served_before_the_end() -> None:
    async with draining(drain_s=LONG_S) as (node, balancer, client):
        node.faults.add(Fault("hang"))
        asked = [client.begin(chat(f"{number}")) for number in range(12)]
        await node.wait_for(lambda: node.in_flight == 8)
        metric = 'balancer_queue_depth{priority="normal"} 4.0'
        async with asyncio.timeout(10):
            while metric not in (await client.get(f"{balancer.ops_url}/metrics")).body.decode():
                pass
        await sigterm(balancer)
        node.faults.clear()
        node.faults.release()
        assert all([(await reply).is_whole for reply in asked])
        assert await balancer.process.ended() == 0


async def test_a_kept_connection_gets_503_draining_once_the_listener_is_closed() -> None:
    async with draining(drain_s=LONG_S) as (node, balancer, client):
        kept = await Wire.to(balancer)
        assert (await kept.ask(post(chat("before")))).status == 200
        story = await begun(node, client, Fault("hang", after_events=3, first=1))
        await sigterm(balancer)
        await listener_is_closed(balancer)
        answer = await kept.ask(post(chat("after")))
        assert (answer.status, answer.code, answer.header("connection")) == (503, "draining", "close")
        assert int(answer.header("retry-after") or 0) >= 1
        assert await kept.ends() == b""
        node.faults.release()
        assert (await story).is_whole


async def test_a_request_that_was_still_arriving_is_answered() -> None:
    async with draining(drain_s=LONG_S) as (node, balancer, client):
        story = await begun(node, client, Fault("hang", after_events=3, first=1))
        wire = await Wire.to(balancer)
        request = post(chat("slowly"))
        wire.send(request[:-10])
        await sigterm(balancer)
        await listener_is_closed(balancer)
        wire.send(request[-10:])
        assert (await wire.answer()).status in (200, 503)
        node.faults.release()
        assert (await story).is_whole


async def test_a_request_behind_another_on_its_connection_is_answered() -> None:
    async with draining(drain_s=LONG_S) as (node, balancer, _):
        held = node.faults.add(Fault("hang", body_has="held"))
        wire = await Wire.to(balancer)
        wire.send(post(chat("held")) + post(chat("behind it")))
        await node.wait_for(lambda: held.hits == 1)
        await sigterm(balancer)
        await listener_is_closed(balancer)
        node.faults.release()
        assert (await wire.answer()).status == 200
        assert (await wire.answer()).status in (200, 503)


# -- cut short


async def cut(node: FakeNode, balancer: BalancerProcess, client: Client, **second: Any) -> None:
    """Hold a stream, a unary request and one in the queue, end the process, and see what each is told."""
    story = await begun(node, client, Fault("hang", after_events=3, first=1))
    node.faults.add(Fault("hang"))
    others = [client.begin(chat(f"{number}")) for number in range(9)]
    await node.wait_for(lambda: node.in_flight == 8)
    await sigterm(balancer)
    if second:
        balancer.process.send(second["signal"])
    told = await story
    assert (told.status, told.code, "[DONE]" in told.events) == (200, "draining", False)
    assert "error" in told.events[-1]
    assert node.expected_text(STREAM).startswith(told.text)
    for reply in [await other for other in others]:
        assert (reply.status, reply.code) == (503, "draining")
        assert reply.retry_after_s >= 1
    assert await balancer.process.ended() == 0
    assert balancer.events("drain.finished")[0]["cut"] == 10


async def test_after_drain_s_what_still_runs_is_cut_with_its_error() -> None:
    async with draining(drain_s=0.2) as (node, balancer, client):
        await cut(node, balancer, client)


@pytest.mark.parametrize("timeouts", [{"drain_s": LONG_S}, {"drain_grace_s": LONG_S}], ids=["draining", "in_grace"])
async def test_a_second_signal_cuts_what_still_runs_with_its_error(timeouts: Any) -> None:
    async with draining(**timeouts) as (node, balancer, client):
        await cut(node, balancer, client, signal=signal.SIGTERM)


async def test_an_idle_process_ends_at_once() -> None:
    async with draining(drain_s=LONG_S) as (_, balancer, client):
        assert (await client.post(chat())).is_whole
        balancer.process.send(signal.SIGTERM)
        assert await balancer.process.ended() == 0
        assert not [line for line in balancer.process.err if "Traceback" in line]
        assert balancer.process.out == []
