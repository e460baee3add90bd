"""Balancers that share a Redis share calls: one makes it, the others hand on what it gives, and nobody waits for a
balancer or a Redis that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, post, text_of
from tests.integration.scripted_node import ScriptedNode, Steps, ok
from tests.integration.test_clients_that_leave_or_stop import nothing_is_left
from tests.integration.test_coalescing import STREAM, payload, pieces
from tests.process import BalancerProcess, serving
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

pytestmark = pytest.mark.real("redis")

# Processes have the time limits of production: on a busy machine Redis is found too slow now and then, and a call is
# made alone, as it should be.
TRIES = 50
ACROSS = {"coalesce": {"across": True}}


@pytest.fixture(autouse=True)
def patience(patient_redis: None) -> None:
    """Nothing here is about a Redis that is slow."""


@pytest.fixture
def replicas(serve: Serve, redis_server: RedisServer) -> Any:
    """Starts two balancers with the same nodes and the same Redis."""

    async def start(*nodes: Any, **settings: Any) -> tuple[Balancer, Balancer]:
        settings = {"redis": {"url": redis_server.url}, "cache": ACROSS, **settings}
        return await serve(*nodes, **settings), await serve(*nodes, **settings)

    return start


def flight_keys(server: RedisServer) -> list[bytes]:
    """Flights that are held now."""
    with server.client() as client:
        return [name for name in client.scan_iter(b"balancer:v1:flight:*") if client.type(name) == b"hash"]


async def until(condition: Callable[[], bool]) -> None:
    """Until Redis holds what is waited for."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def flying(balancer: Balancer, body: Any, *lines: str) -> Wire:
    """A request that this balancer has taken up."""
    before = len(balancer.app.port.working())
    wire = await Wire.to(balancer)
    wire.send(post(body, CHAT, *lines))
    await balancer.wait_for(lambda: len(balancer.app.port.working()) == before + 1)
    return wire


async def until_followed(leader: Balancer) -> None:
    await leader.wait_for(lambda: leader.app.flights.is_wanted)


@pytest.mark.parametrize("stream", [False, True])
async def test_balancers_share_one_call(node: FakeNode, replicas: Any, redis_server: RedisServer, stream: bool) -> None:
    one, two = await replicas(node)
    node.faults.add(Fault("hang", first=1))
    first = await flying(one, chat(stream=stream))
    await node.wait_for(lambda: len(node.requests) == 1)
    second, third = [await flying(two, chat(stream=stream)) for _ in range(2)]
    await until_followed(one)
    await two.wait_for(lambda: two.app.flights.sizes() == [2])
    node.faults.release()
    answers = [await wire.answer() for wire in (first, second, third)]
    assert [answer.cache for answer in answers] == ["miss", "coalesced", "coalesced"]
    assert len(node.requests) == 1
    if stream:
        assert {text_of(answer.events) for answer in answers} == {node.expected_text(chat())}
        assert {answer.events[-1] for answer in answers} == {"[DONE]"}
    else:
        assert {answer.body for answer in answers} == {answers[0].body}
    assert two.counts("calls_saved") == {("replicas",): 1, ("process",): 1}
    for balancer in (one, two):
        await nothing_is_left(balancer)
    with redis_server.client() as client:
        assert all(client.pttl(name) > 0 for name in client.scan_iter(b"*")), "every key expires"
        assert client.keys(b"balancer:v1:flight:*}") == []


async def test_who_comes_late_to_another_balancer_gets_what_came_so_far_and_then_what_comes(replicas: Any) -> None:
    steps = Steps(*pieces("one ", "two ", "three"))
    async with ScriptedNode(steps) as node:
        one, two = await replicas(node)
        first = await flying(one, STREAM)
        steps.go()
        assert (await first.head()).status == 200
        assert text_of(payload(await first.chunk())) == "one "
        steps.go()
        assert text_of(payload(await first.chunk())) == "two "
        late = await flying(two, STREAM)
        head = await late.head()
        assert (head.cache, head.header("x-balancer-node")) == ("coalesced", node.url[7:])
        assert text_of(payload(await late.chunk())) == "one two "
        later = await flying(two, STREAM)
        assert (await later.head()).cache == "coalesced"
        assert text_of(payload(await later.chunk())) == "one two "
        steps.go()
        wires = (first, late, later)
        assert [text_of(payload(await wire.chunk())) for wire in wires] == ["three"] * 3
        steps.go()
        rest = [b"".join([part async for part in wire.chunks()]) for wire in wires]
        assert len(set(rest)) == 1
        assert b"[DONE]" in rest[0]
        assert len(node.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_client_that_began_it_may_leave(node: FakeNode, replicas: Any, stream: bool) -> None:
    one, two = await replicas(node)
    node.faults.add(Fault("hang", first=1, after_events=2 if stream else None))
    first = await flying(one, chat(stream=stream))
    await node.wait_for(lambda: len(node.requests) == 1)
    second = await flying(two, chat(stream=stream))
    await until_followed(one)
    first.leave()
    await one.wait_for(lambda: len(one.requests) == 1)
    node.faults.release()
    answer = await second.answer()
    said = text_of(answer.events) if stream else answer.json["choices"][0]["message"]["content"]
    assert (answer.cache, said) == ("coalesced", node.expected_text(chat()))
    assert (len(node.requests), node.cancelled) == (1, 0)
    await nothing_is_left(one)


async def test_the_call_is_cancelled_when_nobody_anywhere_waits(node: FakeNode, replicas: Any) -> None:
    one, two = await replicas(node)
    node.faults.add(Fault("hang", first=1))
    first = await flying(one, chat())
    await node.wait_for(lambda: len(node.requests) == 1)
    second = await flying(two, chat())
    await until_followed(one)
    first.leave()
    await one.wait_for(lambda: len(one.requests) == 1)
    assert node.cancelled == 0
    second.leave()
    await node.wait_for(lambda: node.cancelled == 1)
    await nothing_is_left(one)
    await nothing_is_left(two)
    assert len(node.requests) == 1


async def test_a_call_that_fails_is_made_once_more_elsewhere(replicas: Any) -> None:
    bad = Steps(ok({"error": "x"}, status="500 Oops"), then=lambda writer: None)
    good = Steps(ok({"id": "x", "choices": []}), then=lambda writer: None)
    async with ScriptedNode(bad, good) as node:
        one, two = await replicas(node, retry={"max_attempts": 1})
        first = await flying(one, chat())
        await node.wait_for(lambda: len(node.requests) == 1)
        second = await flying(two, chat())
        await until_followed(one)
        bad.go(2)
        assert (await first.answer()).status == 502
        good.go(2)
        answer = await second.answer()
        assert (answer.status, answer.cache, answer.header("x-balancer-attempts")) == (200, "miss", "1")
        assert len(node.requests) == 2


async def test_a_stream_that_breaks_tells_those_who_follow(replicas: Any) -> None:
    steps = Steps(*pieces("one ", "two ")[:2], then=lambda writer: writer.transport.abort())
    async with ScriptedNode(steps) as node:
        one, two = await replicas(node)
        first = await flying(one, STREAM)
        steps.go()
        await first.head()
        second = await flying(two, STREAM)
        assert (await second.head()).status == 200
        steps.go(2)
        for wire in (first, second):
            events = [event async for part in wire.chunks() for event in payload(part)]
            assert events[-1]["error"]["code"] == "upstream_truncated"
        assert len(node.requests) == 1


async def test_who_follows_keeps_a_deadline_of_its_own(node: FakeNode, replicas: Any) -> None:
    one, two = await replicas(node)
    node.faults.add(Fault("hang", first=1))
    first = await flying(one, chat(), "X-Balancer-Timeout-S: 0.5")
    await node.wait_for(lambda: len(node.requests) == 1)
    long = await flying(two, chat(), "X-Balancer-Timeout-S: 60")
    short = await flying(two, chat(), "X-Balancer-Timeout-S: 0.3")
    await until_followed(one)
    assert (await short.answer()).code == "deadline_exceeded"
    assert (await first.answer()).code == "deadline_exceeded"
    node.faults.release()
    assert (await long.answer()).cache == "coalesced"
    assert len(node.requests) == 1


async def test_by_default_nothing_is_asked_of_redis(node: FakeNode, replicas: Any, redis_server: RedisServer) -> None:
    one, two = await replicas(node, cache={})
    node.faults.add(Fault("hang", first=2))
    wires = [await flying(balancer, chat()) for balancer in (one, two)]
    await node.wait_for(lambda: len(node.requests) == 2)
    assert flight_keys(redis_server) == []
    node.faults.release()
    assert [(await wire.answer()).cache for wire in wires] == ["miss", "miss"]


async def test_forms_and_tenants_fly_apart(node: FakeNode, replicas: Any) -> None:
    one, two = await replicas(node)
    node.faults.add(Fault("hang", first=2))
    wires = [await flying(one, chat()), await flying(two, chat(stream=True))]
    await node.wait_for(lambda: len(node.requests) == 2)
    node.faults.release()
    assert [(await wire.answer()).cache for wire in wires] == ["miss", "miss"]


# -- Redis soiled, frozen, gone


async def test_a_flight_that_was_soiled_is_flown_alone(
    node: FakeNode, replicas: Any, redis_server: RedisServer
) -> None:
    one, _ = await replicas(node)
    hang = node.faults.add(Fault("hang", first=1))
    wire = await flying(one, chat())
    await node.wait_for(lambda: hang.hits == 1)
    (name,) = flight_keys(redis_server)
    wire.leave()
    await until(lambda: flight_keys(redis_server) == [])
    with redis_server.client() as client:
        client.set(name, b"x", px=60_000)
    answer = await ask(one, chat())
    assert (answer.status, answer.cache) == (200, "miss")


@pytest.mark.parametrize("entry", [{b"begin": b"x"}, {b"data": b"x"}, {b"other": b"x"}, {b"end": b"x"}])
async def test_a_stream_that_was_soiled_is_not_followed(
    node: FakeNode, replicas: Any, redis_server: RedisServer, entry: dict[bytes, bytes]
) -> None:
    one, two = await replicas(node)
    node.faults.add(Fault("hang", first=1))
    first = await flying(one, chat())
    await node.wait_for(lambda: len(node.requests) == 1)
    with redis_server.client() as client:
        (name,) = flight_keys(redis_server)
        holder = client.hget(name, b"holder")
        client.xadd(name + b":" + holder, entry, id="1-1")
        client.hset(name, b"holder", b"another")  # so that what is claimed after it is not followed for ever
        client.xadd(name + b":another", entry, id="1-1")
    answer = await ask(two, chat())
    assert (answer.status, answer.cache) == (200, "miss")
    node.faults.release()
    assert (await first.answer()).status == 200


@pytest.mark.parametrize("how", ["freeze", "kill"])
async def test_a_redis_that_goes_while_a_call_is_waited_for_is_not_waited_for(
    node: FakeNode, replicas: Any, redis_server: RedisServer, how: str
) -> None:
    one, two = await replicas(node)
    node.faults.add(Fault("hang", first=1))
    first = await flying(one, chat())
    await node.wait_for(lambda: len(node.requests) == 1)
    second = await flying(two, chat())
    await until_followed(one)
    getattr(redis_server, how)()
    answer = await second.answer()
    assert (answer.status, answer.cache) == (200, "miss")
    node.faults.release()
    assert (await first.answer()).status == 200
    if how == "freeze":
        redis_server.thaw()


# -- balancers that die


async def two_processes(stack: AsyncExitStack, node: Any, server: RedisServer) -> list[BalancerProcess]:
    settings = {
        "nodes": [{"url": node.url, "models": [MODEL]}],
        "redis": {"url": server.url, "timeout_s": 0.03},
        "cache": ACROSS,
        "health": {"interval_s": 1000.0, "timeout_s": 1000.0},
    }
    return [await stack.enter_async_context(serving(settings)) for _ in range(2)]


async def test_a_balancer_that_dies_hands_over_to_one_that_waits(node: FakeNode, redis_server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        one, two = await two_processes(stack, node, redis_server)
        node.faults.add(Fault("hang"))
        with redis_server.client() as client:
            for number in range(TRIES):
                first, second = await Wire.to(one), await Wire.to(two)
                before = len(node.requests)
                first.send(post(chat(f"try {number}")))
                await node.wait_for(lambda: len(node.requests) == before + 1)
                held = flight_keys(redis_server)
                second.send(post(chat(f"try {number}")))
                await until(
                    lambda: len(node.requests) > before + 1 or any(client.hexists(name, b"wanted") for name in held)
                )
                if len(node.requests) == before + 1:
                    break
                first.leave()
                second.leave()
            node.faults.clear()
            one.process.kill()
            answer = await second.answer()
            assert (answer.status, answer.cache) == (200, "miss")
        assert len(node.requests) == before + 2


async def test_a_balancer_that_dies_within_a_stream_is_an_error_event(
    node: FakeNode, redis_server: RedisServer
) -> None:
    async with AsyncExitStack() as stack:
        one, two = await two_processes(stack, node, redis_server)
        node.faults.add(Fault("hang", after_events=2))
        for number in range(TRIES):
            first, second = await Wire.to(one), await Wire.to(two)
            first.send(post(chat(f"try {number}", stream=True)))
            await first.head()
            second.send(post(chat(f"try {number}", stream=True)))
            if (await second.head()).cache == "coalesced":
                break
            first.leave()
            second.leave()
        one.process.kill()
        events = [event async for part in second.chunks() for event in payload(part)]
        assert events[-1]["error"]["code"] == "upstream_truncated"
        assert "[DONE]" not in events


async def test_who_follows_another_balancers_stream_keeps_no_copy_of_it(replicas: Any) -> None:
    steps = Steps(*pieces("one ", "two ", "three"))
    async with ScriptedNode(steps) as node:
        one, two = await replicas(node)
        first = await flying(one, STREAM)
        steps.go()
        await first.head()
        second = await flying(two, STREAM)
        await until_followed(one)
        steps.go(3)
        answer = await second.answer()
        assert answer.cache == "coalesced"
        assert text_of(answer.events) == "one two three"
        await nothing_is_left(two)
        assert len(two.app.port.buffered.collections) == 0
