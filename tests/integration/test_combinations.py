"""Features together: random faults, clients and settings; every answer is true or an error, and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from balancer.core.hedge import HedgePolicy
from balancer.core.outcome import Outcome
from balancer.hedging import Hedging
from balancer.metrics import Metrics
from balancer.wire import inbound
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Client, Reply, client_of, fleet, paced_node
from tests.harness import Balancer, running
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, chunked, get, post
from tests.integration.scripted_node import ScriptedNode, Steps, ok, stream_head
from tests.integration.test_clients_that_leave_or_stop import nothing_is_left
from tests.integration.test_coalescing import GOOD_END, pieces, together

PROMPTS = 8
BAD_EVENT = b'{"id": "x", "choi\n'  # as the fake node says it
AT_A_POINT = ("hang", "reset", "close", "cut", "garbage", "bad_chunk", "bad_event", "error_event")
INSTEAD = ("bad_json", "error_body", "empty_body", "truncated", "gzip", "informational", "extra_bytes")
HEADERS: tuple[Mapping[str, str], ...] = (
    *[{}] * 8,
    {"X-Balancer-Cache": "refresh"},
    {"X-Balancer-Cache": "bypass"},
    {"X-Balancer-Cache": "only"},
    {"X-Balancer-Timeout-S": "0.15"},
    {"X-Balancer-Priority": "high"},
    {"X-Balancer-Priority": "low"},
    {"X-Balancer-Comments": "off"},
    {"X-Balancer-Session": "one"},
)


# -- one by one


async def test_a_client_that_leaves_while_the_loser_ends_leaves_no_attempt_behind() -> None:
    lost: list[str] = []

    class Tried:
        def __init__(self, name: str) -> None:
            self.name = name
            self.outcome = Outcome.OK

        def lose(self) -> None:
            lost.append(self.name)

    async def slow() -> Tried:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            await asyncio.sleep(0)
        raise AssertionError

    async def quick() -> Tried:
        return Tried("quick")

    attempts = iter([slow(), quick()])
    ending = asyncio.Event()
    hedging = Hedging(HedgePolicy(), {}, Metrics())
    race = asyncio.ensure_future(hedging.race(lambda: next(attempts), 0.0, lambda: True))
    await ending.wait()
    race.cancel()
    await asyncio.gather(race, return_exceptions=True)
    assert race.cancelled()
    assert lost == ["quick"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_ends_with_the_deadline_of_a_passenger_ends_once(serve: Serve, stream: bool) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def begin(node: ScriptedNode, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        if stream:
            writer.write(pieces("one ")[0])
        await asyncio.Event().wait()

    whole = GOOD_END if stream else ok({"choices": [{"message": {"content": "one "}, "finish_reason": "stop"}]})
    async with ScriptedNode(begin) as node:
        balancer = await serve(node)
        first = await Wire.to(balancer)
        first.send(post(chat(stream=stream)))
        await balancer.wait_for(lambda: balancer.app.flights.sizes() == [1] and len(writers) == 1)
        second = await Wire.to(balancer)
        second.send(post(chat(stream=stream), CHAT, "x-balancer-timeout-s: 0.3"))
        await balancer.wait_for(lambda: balancer.app.flights.sizes() == [2])
        if stream:
            await second.head()
            await second.chunk()
        writers[0].write(whole)
        time.sleep(0.4)  # noqa: ASYNC251 - the end and the deadline are felt at once
        if stream:
            parts = [part async for part in second.chunks()]
            assert sum(b"[DONE]" in part for part in parts) + sum(b"error" in part for part in parts) == 1
        else:
            await second.answer()
        health = await second.ask(get("/healthz"))
        assert (health.status, health.json) == (200, {"status": "ok"})
        await balancer.wait_for(lambda: len(balancer.requests) == 2)
        await everything_is_let_go(balancer)


async def test_every_client_of_a_shared_call_that_fails_gets_the_stale_answer(serve: Serve, node: FakeNode) -> None:
    balancer = await serve(
        node, cache={"ttl_s": 0.05, "ttl_jitter": 0.0, "stale_if_error_s": 60.0}, retry={"max_attempts": 1}
    )
    fresh = await ask(balancer, chat())
    await asyncio.sleep(0.06)
    node.faults.add(Fault("hang"))
    wires = await together(balancer, 3)
    await node.wait_for(lambda: len(node.requests) == 2)
    node.die()
    answers = [await wire.answer() for wire in wires]
    assert [(answer.status, answer.cache, answer.body) for answer in answers] == [(200, "stale", fresh.body)] * 3
    await everything_is_let_go(balancer)


async def test_a_stream_without_content_leaves_no_copy_behind(serve: Serve) -> None:
    steps = Steps(stream_head() + chunked(b": hello\n\n")[:-5], then=lambda writer: writer.close())
    async with ScriptedNode(steps) as node:
        balancer = await serve(node, timeouts={"commit_s": 0.05})
        wire = await Wire.to(balancer)
        wire.send(post(chat(stream=True)))
        steps.go()
        assert (await wire.head()).status == 200
        steps.go()
        assert b"error" in b"".join([part async for part in wire.chunks()])
        await everything_is_let_go(balancer)


async def test_a_paced_replay_ends_with_the_deadline_of_its_client(serve: Serve) -> None:
    steps = Steps(*pieces("one ", "two ", "three"))
    async with ScriptedNode(steps) as node:
        balancer = await serve(node, cache={"replay": "recorded"})
        first = await Wire.to(balancer)
        first.send(post(chat(stream=True)))
        steps.go()
        await first.head()
        await first.chunk()
        await asyncio.sleep(0.5)
        steps.go(3)
        assert b"[DONE]" in b"".join([part async for part in first.chunks()])
        await balancer.wait_for(lambda: len(balancer.requests) == 1)
        second = await ask(balancer, chat(stream=True), CHAT, "x-balancer-timeout-s: 0.1")
        assert second.cache == "hit"
        assert (second.events[-1], balancer.requests[-1]["seconds"] < 0.4) == ("[DONE]", True)
        await everything_is_let_go(balancer)


async def test_tokens_of_a_request_that_found_no_slot_are_given_back(serve: Serve, node: FakeNode) -> None:
    balancer = await serve(
        node,
        models=[{"name": MODEL, "max_in_flight": 1}],
        queue={"max_wait_s": 0.05},
        limits={"tokens_per_minute": 1000},
    )
    hang = node.faults.add(Fault("hang", first=1))
    first = await Wire.to(balancer)
    first.send(post(chat("first")))
    await node.wait_for(lambda: hang.hits == 1)
    refused = [await ask(balancer, chat(f"no room {number}", max_tokens=300)) for number in range(5)]
    assert {answer.code for answer in refused} == {"queue_timeout"}
    node.faults.release()
    assert (await first.answer()).status == 200
    assert (await ask(balancer, chat("room", max_tokens=300))).status == 200


async def test_a_client_that_reads_no_hits_is_not_kept_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "KEEP_ALIVE_S", 0.2)
    large = {"choices": [{"message": {"content": "x" * 900_000}, "finish_reason": "stop"}]}
    async with ScriptedNode(ok(large)) as node:
        balancer = await serve(node, limits={"head_timeout_s": 0.1})
        assert (await ask(balancer, chat())).cache == "miss"
        wire = await Wire.to(balancer, limit=1024)
        wire.send(post(chat()) * 20)
        await balancer.wait_for(lambda: any(one.is_write_paused for one in balancer.app.port._connections))
        await balancer.wait_for(lambda: balancer.app.port.connections == 0)
        await everything_is_let_go(balancer)


# -- all at once


def some_settings(rng: Random) -> dict[str, Any]:
    """Any of the features that change the way of a request."""
    return {
        "timeouts": {
            "first_byte_s": 0.5,
            "unary_s": 0.6,
            "idle_s": 0.4,
            "commit_s": 0.1,
            "total_s": 3.0,
            "drain_s": 0.3,
        },
        "cache": {
            "cacheable": rng.choice(["deterministic", "all"]),
            "ttl_s": rng.choice([0.05, 0.3, 60.0]),
            "stale_if_error_s": rng.choice([0.0, 60.0]),
            "replay": rng.choice(["at_once", "recorded"]),
            "coalesce": {"enabled": rng.random() < 0.8},
        },
        "queue": {"max_waiting": rng.choice([2, 100]), "max_wait_s": rng.choice([0.2, 2.0])}
        | ({"comment_after_s": 0.1} if rng.random() < 0.6 else {}),
        "hedge": {"enabled": rng.random() < 0.7},
        "resume": {"enabled": rng.random() < 0.8},
        "retry": {"min_retries_per_s": 1000.0, "base_s": 0.001, "verdict_s": rng.choice([0.0, 0.2])},
        "breaker": {"open_s": 0.1},
        "health": {"interval_s": 0.1, "timeout_s": 1.0},
        "routing": {"policy": rng.choice(["predicted_cost", "least_outstanding", "prefix"])},
        "limits": {"buffered_bytes": 1 << 20},
    }


def some_fault(rng: Random) -> Fault:
    """One that hits some of the requests; a death is rare."""
    chance = rng.choice([0.05, 0.2])
    kind: Any = rng.choice(AT_A_POINT + INSTEAD + ("status", "status", "delay", "die"))
    if kind == "die":
        return Fault("die", after_events=rng.choice([None, 3]), back_after_s=0.05, probability=0.02)
    if kind == "status":
        return Fault("status", status=rng.choice([400, 404, 429, 500, 503]), probability=chance)
    if kind == "delay":
        return Fault("delay", delay_s=0.1, probability=chance, each_event=rng.random() < 0.3)
    if kind in AT_A_POINT:
        return Fault(kind, after_events=rng.choice([None, 0, 1, 3, 6]), probability=chance)
    return Fault(kind, probability=chance)


@dataclass
class World:
    """Clients of all kinds, what they were told, and what was wrong with it."""

    rng: Random
    nodes: list[FakeNode]
    client: Client
    whole: int = 0
    errors: int = 0
    wrong: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        rng = self.rng
        changes: dict[str, Any] = {"stream": rng.random() < 0.6, "max_tokens": 12}
        if changes["stream"] and rng.random() < 0.3:
            changes["stream_options"] = {"include_usage": True}
        return chat(f"prompt {rng.randrange(PROMPTS)}", **changes)

    async def visit(self) -> None:
        """One request of a client that waits, leaves, or is slow."""
        rng, body = self.rng, self.body()
        headers, manner, after = dict(rng.choice(HEADERS)), rng.random(), rng.randrange(8)
        await asyncio.sleep(rng.random() * 0.05)
        try:
            if manner < 0.15:  # leaves, maybe before anything came
                asking = self.client.begin(body, headers=headers)
                await asyncio.sleep(rng.random() * 0.15)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                return
            stream = await self.client.open(body, headers=headers)
            if manner < 0.3:
                for _ in range(after):
                    await stream.event()
                stream.leave()
                return
            if manner < 0.4:
                await asyncio.sleep(0.2)
            self.judge(body, await stream.rest())
        except (aiohttp.ClientError, asyncio.IncompleteReadError):
            self.errors += 1  # cut, and known to be so

    def judge(self, body: dict[str, Any], reply: Reply) -> None:
        """Whole and true, or an error that says so."""
        try:
            if reply.is_whole:
                self.whole += 1
                if reply.text != self.nodes[0].expected_text(body):
                    self.wrong.append(f"another text: {reply}")
                usage = (
                    [event for event in reply.events if event != "[DONE]" and event.get("usage")]
                    if (reply.is_stream)
                    else []
                )
                if usage and "stream_options" not in body:
                    self.wrong.append(f"usage that nobody asked for: {reply}")
            elif reply.code is None or reply.status == 500 or "internal" in str(reply.errors):
                self.wrong.append(f"neither whole nor an error: {reply}")
            else:
                self.errors += 1
        except (ValueError, KeyError, IndexError, AssertionError) as error:
            if BAD_EVENT in reply.body and reply.headers.get("X-Balancer-Cache") != "hit":
                self.errors += 1  # passed by unread, as it may, and not stored
                return
            self.wrong.append(f"{error!r}: {reply}")


async def everything_is_let_go(balancer: Balancer) -> None:
    """No count, no entry and no byte is held for a request that is over."""
    await nothing_is_left(balancer)
    app = balancer.app
    assert {id_: len(node.live) for id_, node in app.registry.nodes.items() if node.live} == {}
    assert app.flights.sizes() == []
    assert not app.admission.is_contended
    assert app.admission._model_in_flight == {}
    assert len(app.admission._queue) == 0
    assert (len(app.port.buffered.collections), len(app.port.buffered.resume_copies)) == (0, 0)
    await balancer.wait_for(lambda: app.attempts._verdicts.suspects == 0)


def requests_of(tasks: Iterable[asyncio.Task[Any]]) -> list[str]:
    """Those of the tasks that carry a request."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in tasks]
    return [name for name in names if name.startswith(("DataPort.", "Passenger.", "Proxy.", "Attempts.", "Flight"))]


async def storm(seed: int, requests: int, at_once: int, caplog: pytest.LogCaptureFixture, *, drains: bool) -> World:
    """Random settings, nodes, faults and clients, from one seed."""
    rng = Random(seed)
    unhandled: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(paced_node(seed=number)) for number in range(3)]
            limit = {"max_in_flight": rng.choice([1, 3])} if rng.random() < 0.5 else {}
            settings = some_settings(rng)
            balancer = await stack.enter_async_context(
                running(*fleet(*nodes, weight=1.0, engine="vllm", **limit), **settings)
            )
            client = await stack.enter_async_context(client_of(balancer.url))
            world = World(rng, nodes, client)
            idle = asyncio.all_tasks()
            numbers = iter(range(requests))

            async def visits() -> None:
                for number in numbers:
                    if number % 40 == 0:
                        for node in nodes:
                            node.faults.release()
                            node.faults.clear()
                            for _ in range(rng.randrange(3)):
                                node.faults.add(some_fault(rng))
                    if number % 50 == 49:
                        await balancer.app.reload()
                    if drains and number == requests - at_once:
                        group.create_task(balancer.app.drain(asyncio.Event()))
                    await world.visit()

            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(visits())
            for node in nodes:
                node.faults.clear()
                node.faults.release()
            try:
                await everything_is_let_go(balancer)
            except (AssertionError, TimeoutError) as error:
                app, nodes_there = balancer.app, balancer.app.registry.nodes.values()
                held = [(node.id, node.load.rif, len(node.live)) for node in nodes_there]
                tenants, suspects = app.admission.tenants(), app.attempts._verdicts.suspects
                world.wrong.append(f"left: {error!r} {held} {tenants} {suspects} {app.port.working()}")
            try:
                await balancer.wait_for(lambda: not requests_of(asyncio.all_tasks() - idle))
            except TimeoutError:
                world.wrong.append(f"tasks: {requests_of(asyncio.all_tasks() - idle)}")
    gc.collect()
    await asyncio.sleep(0)
    world.wrong += [f"logged: {line}" for line in logs if line["log_level"] in ("error", "critical")]
    world.wrong += [f"unhandled: {context}" for context in unhandled]
    world.wrong += [f"asyncio: {one.getMessage()}" for one in caplog.records if one.levelno >= logging.ERROR]
    world.settings = settings
    return world


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_comes_together_every_answer_is_true_and_nothing_is_left(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    world = await storm(seed, 150, 24, caplog, drains=seed % 3 == 2)
    assert world.wrong == [], world.settings
    assert world.whole + world.errors > 40
