"""Equal cacheable requests in flight cost one upstream call, and no client is the worse for it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, post, text_of
from tests.integration.scripted_node import ScriptedNode, Steps, ok, stream_head
from tests.integration.test_clients_that_leave_or_stop import nothing_is_left

STREAM = chat(stream=True)
LONG = {"connect_s": 300.0, "first_byte_s": 300.0, "unary_s": 300.0, "idle_s": 300.0}


def event(text: str, **choice: Any) -> bytes:
    delta = {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **choice}]}
    return b"data: " + json.dumps(delta).encode() + b"\n\n"


def as_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


GOOD_END = as_chunk(event("", delta={}, finish_reason="stop") + b"data: [DONE]\n\n") + b"0\r\n\r\n"


def pieces(*texts: str) -> list[bytes]:
    """A stream in steps: the head with the first text, the other texts, the good end."""
    first, *rest = [as_chunk(event(text)) for text in texts]
    return [stream_head() + first, *rest, GOOD_END]


async def sent(balancer: Balancer, *requests: bytes) -> list[Wire]:
    """Connections on which these were sent one after the other, each taken up before the next."""
    wires = []
    for request in requests:
        before = len(balancer.app.port.working())
        wire = await Wire.to(balancer)
        wire.send(request)
        wires.append(wire)
        await balancer.wait_for(lambda: len(balancer.app.port.working()) == before + 1)
    return wires


async def together(balancer: Balancer, count: int, body: Any = None, *lines: str) -> list[Wire]:
    """So many equal requests that share one flight, in the order in which they joined."""
    wires = []
    for number in range(1, count + 1):
        wire = await Wire.to(balancer)
        wire.send(post(body or chat(), CHAT, *lines))
        wires.append(wire)
        await balancer.wait_for(lambda: balancer.app.flights.sizes() == [number])
    return wires


async def until_finished(balancer: Balancer, count: int) -> list[dict[str, Any]]:
    await balancer.wait_for(lambda: len(balancer.requests) == count)
    return balancer.requests


# -- one call for all


@pytest.mark.parametrize("stream", [False, True])
async def test_equal_requests_in_flight_cost_one_call(balancer: Balancer, node: FakeNode, stream: bool) -> None:
    hang = node.faults.add(Fault("hang", first=1))
    wires = await together(balancer, 5, chat(stream=stream))
    await node.wait_for(lambda: hang.hits == 1)
    node.faults.release()
    answers = [await wire.answer() for wire in wires]
    assert len(node.requests) == 1
    assert [answer.cache for answer in answers] == ["miss", *["coalesced"] * 4]
    assert {answer.body for answer in answers} == {answers[0].body}
    assert {answer.header("x-balancer-node") for answer in answers} == {answers[0].header("x-balancer-node")}
    assert [answer.header("x-balancer-attempts") for answer in answers] == ["1", "0", "0", "0", "0"]
    assert len({answer.header("x-request-id") for answer in answers}) == 5
    if stream:
        assert text_of(answers[4].events) == node.expected_text(chat())
        assert answers[4].events[-1] == "[DONE]"
    await nothing_is_left(balancer)
    facts = await until_finished(balancer, 5)
    assert sorted(fact["cache"] for fact in facts) == ["coalesced"] * 4 + ["miss"]
    assert [fact["prompt_tokens"] is not None for fact in facts].count(True) == 1, "no token counts twice"
    assert balancer.counts("calls_saved") == {("process",): 4}
    assert balancer.counts("cache_lookups") == {("coalesced",): 4, ("miss",): 1}
    assert (await ask(balancer, chat(stream=stream))).cache == "hit"
    assert balancer.app.flights.sizes() == []


async def test_who_joins_a_stream_late_gets_what_came_so_far_and_then_what_comes(serve: Serve) -> None:
    steps = Steps(*pieces("one ", "two ", "three"))
    async with ScriptedNode(steps) as node:
        balancer = await serve(node)
        (first,) = await together(balancer, 1, STREAM)
        steps.go()
        assert (await first.head()).status == 200
        assert text_of(payload(await first.chunk())) == "one "
        steps.go()
        assert text_of(payload(await first.chunk())) == "two "
        (late,) = await sent(balancer, post(STREAM))
        assert (await late.head()).cache == "coalesced"
        assert text_of(payload(await late.chunk())) == "one two "
        steps.go()
        assert [text_of(payload(await wire.chunk())) for wire in (first, late)] == ["three", "three"]
        steps.go()
        rest = [[part async for part in wire.chunks()] for wire in (first, late)]
        assert rest[0] == rest[1]
        assert b"[DONE]" in rest[0][-1]
        assert len(node.requests) == 1
        facts = await until_finished(balancer, 2)
        assert all(fact["ttft_s"] is not None for fact in facts)


def payload(chunk: bytes) -> list[Any]:
    return [json.loads(line[5:]) for line in chunk.split(b"\n") if line.startswith(b"data:")]


async def test_a_long_unary_answer_is_joined_in_its_middle(serve: Serve) -> None:
    body = json.dumps({"id": "x", "choices": [], "text": "y" * 5000}).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    steps = Steps(head + body[:3000], body[3000:])
    async with ScriptedNode(steps) as node:
        balancer = await serve(node, upstream={"check_bytes": 1000})
        (first,) = await together(balancer, 1)
        steps.go()
        assert (await first.head()).status == 200
        (late,) = await sent(balancer, post(chat()))
        assert (await late.head()).header("content-length") == str(len(body))
        steps.go()
        for wire in (first, late):
            assert await wire._reader.readexactly(len(body)) == body
        assert len(node.requests) == 1


async def test_what_is_too_long_to_keep_is_joined_by_nobody(serve: Serve) -> None:
    steps = Steps(*pieces("x" * 3000, "y"))
    async with ScriptedNode(steps, steps) as node:
        balancer = await serve(node, cache={"max_entry_bytes": 2048})
        (first,) = await together(balancer, 1, STREAM)
        steps.go()
        await first.head()
        (late,) = await sent(balancer, post(STREAM))
        await node.wait_for(lambda: len(node.requests) == 2)
        steps.go(6)
        assert [text_of((await wire.answer()).events) if wire is late else None for wire in (late,)] == [
            "x" * 3000 + "y"
        ]


# -- who is never merged


@pytest.mark.parametrize(
    ("settings", "one", "other"),
    [
        ({}, (chat(temperature=1),), (chat(temperature=1),)),
        ({}, (chat(), CHAT, "X-Balancer-Cache: bypass"), (chat(), CHAT, "X-Balancer-Cache: bypass")),
        ({}, (chat(),), (chat(), CHAT, "X-Balancer-Cache: refresh")),
        ({}, (chat(),), (chat(stream=True),)),
        ({}, (chat(stream=True),), (chat(stream=True, stream_options={"include_usage": True}),)),
        ({}, (chat(),), (chat("another"),)),
        ({}, (chat(), CHAT, "X-Balancer-Priority: low"), (chat(), CHAT, "X-Balancer-Priority: high")),
        ({"cache": {"enabled": False}}, (chat(),), (chat(),)),
        ({"cache": {"coalesce": {"enabled": False}}}, (chat(),), (chat(),)),
        (auth(key("acme"), key("globex")), (chat(), CHAT, bearer("acme")), (chat(), CHAT, bearer("globex"))),
    ],
    ids=["sampled", "bypass", "refresh", "form", "usage", "text", "priority", "no cache", "off", "tenant"],
)
async def test_what_may_not_share_an_answer_flies_apart(
    node: FakeNode, serve: Serve, settings: dict[str, Any], one: tuple[Any, ...], other: tuple[Any, ...]
) -> None:
    balancer = await serve(node, **settings)
    node.faults.add(Fault("hang"))
    wires = await sent(balancer, post(*one), post(*other))
    await node.wait_for(lambda: len(node.requests) == 2)
    node.faults.release()
    answers = [await wire.answer() for wire in wires]
    assert [answer.status for answer in answers] == [200, 200]
    assert "coalesced" not in {answer.cache for answer in answers}


async def test_tenants_share_where_the_operator_lets_them(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("acme"), key("globex")), cache={"shared_between_tenants": True})
    node.faults.add(Fault("hang", first=1))
    wires = await sent(balancer, post(chat(), CHAT, bearer("acme")), post(chat(), CHAT, bearer("globex")))
    await balancer.wait_for(lambda: balancer.app.flights.sizes() == [2])
    await node.wait_for(lambda: len(node.requests) == 1)
    node.faults.release()
    assert [(await wire.answer()).status for wire in wires] == [200, 200]
    assert len(node.requests) == 1


async def test_who_joins_pays_no_request_token_and_is_bound_as_hits_are(node: FakeNode, serve: Serve) -> None:
    limits = {"requests_per_minute": 0.001, "burst": 1}
    balancer = await serve(node, limits=limits, cache={"hits_per_second": 1e-6})
    node.faults.add(Fault("hang", first=1))
    wires = await together(balancer, 2)
    refused = await ask(balancer, chat())
    assert (refused.status, refused.code) == (429, "rate_limited")
    node.faults.release()
    assert [(await wire.answer()).cache for wire in wires] == ["miss", "coalesced"]


# -- leaving


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("leaver", [0, 1])
async def test_one_client_leaving_does_not_hurt_the_others(
    balancer: Balancer, node: FakeNode, stream: bool, leaver: int
) -> None:
    hang = node.faults.add(Fault("hang", first=1, after_events=2 if stream else None))
    wires = await together(balancer, 3, chat(stream=stream))
    await node.wait_for(lambda: hang.hits == 1)
    wires[leaver].leave()
    await until_finished(balancer, 1)
    assert balancer.requests[0]["code"] == "client_left"
    node.faults.release()
    for wire in [wire for wire in wires if wire is not wires[leaver]]:
        answer = await wire.answer()
        said = text_of(answer.events) if stream else answer.json["choices"][0]["message"]["content"]
        assert said == node.expected_text(chat())
    assert (len(node.requests), node.cancelled) == (1, 0)
    await nothing_is_left(balancer)
    facts = await until_finished(balancer, 3)
    assert [fact["prompt_tokens"] is not None for fact in facts].count(True) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_call_is_cancelled_when_its_last_client_leaves(
    balancer: Balancer, node: FakeNode, stream: bool
) -> None:
    hang = node.faults.add(Fault("hang", first=1))
    wires = await together(balancer, 3, chat(stream=stream))
    await node.wait_for(lambda: hang.hits == 1)
    for number, wire in enumerate(wires):
        assert node.cancelled == 0
        wire.leave()
        await until_finished(balancer, number + 1)
    await node.wait_for(lambda: node.cancelled == 1)
    await nothing_is_left(balancer)
    assert {fact["code"] for fact in balancer.requests} == {"client_left"}
    assert (await ask(balancer, chat(stream=stream))).status == 200
    assert len(node.requests) == 2


async def test_a_client_that_begins_as_the_last_one_leaves_is_not_lost(balancer: Balancer, node: FakeNode) -> None:
    node.faults.add(Fault("hang", first=5))
    for _ in range(5):
        (wire,) = await together(balancer, 1)
        before = len(balancer.requests)
        newcomer = await Wire.to(balancer)
        wire.leave()
        newcomer.send(post(chat()))
        await until_finished(balancer, before + 1)
        newcomer.leave()
        await until_finished(balancer, before + 2)
    node.faults.clear()
    assert (await ask(balancer, chat())).status == 200
    await nothing_is_left(balancer)


async def test_the_connection_of_one_that_is_done_goes_on(balancer: Balancer, node: FakeNode) -> None:
    """The client that began a flight is served its next request while the flight goes on for others."""
    node.faults.add(Fault("hang", first=1))
    hasty, patient = await sent(
        balancer, post(chat(), CHAT, "X-Balancer-Timeout-S: 0.3"), post(chat(), CHAT, "X-Balancer-Timeout-S: 60")
    )
    assert (await hasty.answer()).code == "deadline_exceeded"
    assert (await hasty.ask(post(chat("next")))).status == 200
    node.faults.release()
    answer = await patient.answer()
    assert (answer.status, answer.cache) == (200, "coalesced")
    assert [request.json()["messages"][0]["content"] for request in node.requests] == ["hello", "next"]


# -- deadlines


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hasty", [0, 1])
async def test_each_client_keeps_its_own_deadline(node: FakeNode, serve: Serve, stream: bool, hasty: int) -> None:
    balancer = await serve(node, timeouts=LONG)
    node.faults.add(Fault("hang", first=1, after_events=2 if stream else None))
    lines = ["X-Balancer-Timeout-S: 0.3" if number == hasty else "X-Balancer-Timeout-S: 60" for number in range(2)]
    wires = await sent(balancer, *[post(chat(stream=stream), CHAT, line) for line in lines])
    short = await wires[hasty].answer()
    if stream:
        assert short.events[-1]["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in short.events
    else:
        assert (short.status, short.code) == (504, "deadline_exceeded")
    node.faults.release()
    long = await wires[1 - hasty].answer()
    said = text_of(long.events) if stream else long.json["choices"][0]["message"]["content"]
    assert said == node.expected_text(chat())
    assert len(node.requests) == 1
    assert balancer.counts("attempts") == {(wires_node(long), "ok"): 1}


def wires_node(answer: Answer) -> str:
    return answer.header("x-balancer-node") or ""


async def test_a_deadline_that_moved_on_still_ends_the_call(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, timeouts=LONG)
    node.faults.add(Fault("hang"))
    wires = await sent(
        balancer, *[post(chat(), CHAT, f"X-Balancer-Timeout-S: {seconds}") for seconds in (0.2, 0.4, 0.3)]
    )
    assert [(await wire.answer()).code for wire in wires] == ["deadline_exceeded"] * 3
    await node.wait_for(lambda: node.cancelled == 1)
    assert len(node.requests) == 1
    await nothing_is_left(balancer)


# -- failures


async def test_a_flight_that_fails_lets_one_waiter_lead_once(serve: Serve) -> None:
    gate = Steps(ok({"error": "x"}, status="500 Oops"), then=lambda writer: None)
    good = Steps(ok({"id": "x", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}))
    async with ScriptedNode(gate, good) as node:
        balancer = await serve(node, retry={"max_attempts": 1})
        wires = await together(balancer, 4)
        gate.go(2)
        await node.wait_for(lambda: len(node.requests) == 2)
        assert (await wires[0].answer()).status == 502
        good.go(2)
        answers = [await wire.answer() for wire in wires[1:]]
        assert [answer.status for answer in answers] == [200] * 3
        assert [answer.cache for answer in answers] == ["miss", "coalesced", "coalesced"]
        assert [answer.header("x-balancer-attempts") for answer in answers] == ["1", "0", "0"]
        assert len(node.requests) == 2
        await nothing_is_left(balancer)


async def test_when_that_fails_too_all_get_the_error(serve: Serve) -> None:
    gate = Steps(ok({"error": "x"}, status="500 Oops"))
    async with ScriptedNode(gate) as node:
        balancer = await serve(node, retry={"max_attempts": 1})
        wires = await together(balancer, 5)
        gate.go(10)
        answers = [await wire.answer() for wire in wires]
        assert [(answer.status, answer.code) for answer in answers] == [(502, "upstream_bad_answer")] * 5
        assert len(node.requests) == 2
        await nothing_is_left(balancer)


async def test_a_prompt_that_kills_nodes_is_led_by_nobody_else(serve: Serve) -> None:
    gates = [Steps(then=lambda writer: writer.transport.abort()) for _ in range(4)]
    async with ScriptedNode(gates[0]) as a, ScriptedNode(gates[1]) as b, ScriptedNode(gates[2]) as c:
        balancer = await serve(a, b, c, retry={"max_attempts": 3})
        wires = await together(balancer, 3)
        for gate in gates:
            gate.go(4)
        assert [(await wire.answer()).code for wire in wires] == ["upstream_unreachable"] * 3
        assert len(a.requests) + len(b.requests) + len(c.requests) == 2


async def test_a_nodes_own_word_about_the_request_goes_to_all(serve: Serve) -> None:
    gate = Steps(ok({"error": {"message": "no", "type": "x", "param": None, "code": "y"}}, status="400 Bad"))
    async with ScriptedNode(gate) as node:
        balancer = await serve(node)
        wires = await together(balancer, 3)
        gate.go(2)
        assert [(await wire.answer()).code for wire in wires] == ["y"] * 3
        assert len(node.requests) == 1


async def test_a_stream_that_breaks_tells_all_of_them(serve: Serve) -> None:
    steps = Steps(*pieces("one ", "two ")[:2], then=lambda writer: writer.transport.abort())
    async with ScriptedNode(steps) as node:
        balancer = await serve(node)
        wires = await together(balancer, 3, STREAM)
        steps.go(3)
        for wire in wires:
            answer = await wire.answer()
            assert text_of(answer.events) == "one two "
            assert answer.events[-1]["error"]["code"] == "upstream_truncated"
            assert "[DONE]" not in answer.events
        assert len(node.requests) == 1
        assert (await until_finished(balancer, 3))[0]["code"] == "upstream_truncated"
        await nothing_is_left(balancer)


async def test_a_node_that_dies_before_the_commit_point_is_replaced_unseen(
    node: FakeNode, other: FakeNode, serve: Serve
) -> None:
    balancer = await serve({"url": node.url, "models": [MODEL], "weight": 64}, other)
    hang = node.faults.add(Fault("hang", first=1))
    wires = await together(balancer, 3)
    await node.wait_for(lambda: hang.hits == 1)
    node.die()
    assert [(await wire.answer()).status for wire in wires] == [200] * 3
    assert len(other.requests) == 1


# -- pace


BIG = "x" * 60_000


async def test_a_client_that_stops_reading_is_cut_off_and_holds_nobody_up(serve: Serve) -> None:
    count = 100  # 6 MB: beyond what sockets hold and what a client may be behind
    steps = Steps(*pieces(*["a", *[BIG] * count, "b"]))
    async with ScriptedNode(steps) as node:
        balancer = await serve(node, cache={"max_entry_bytes": 1 << 24})
        reader = await Wire.to(balancer)
        reader.send(post(STREAM))
        await balancer.wait_for(lambda: balancer.app.flights.sizes() == [1])
        stopped = await Wire.to(balancer, limit=1024)
        stopped.send(post(STREAM))
        await balancer.wait_for(lambda: balancer.app.flights.sizes() == [2])
        steps.go(count + 10)
        answer = await reader.answer()
        assert len(text_of(answer.events)) == count * len(BIG) + 2
        slow = await stopped.answer()
        assert slow.events[-1]["error"]["code"] == "upstream_truncated"
        assert "[DONE]" not in slow.events
        assert len(slow.body) < count * len(BIG)
        await nothing_is_left(balancer)


async def test_when_nobody_reads_the_node_waits(serve: Serve) -> None:
    count = 300
    steps = Steps(*pieces(*["a", *[BIG] * count, "b"]))
    async with ScriptedNode(steps) as node:
        balancer = await serve(node, cache={"max_entry_bytes": 1 << 26})
        wires = [await Wire.to(balancer, limit=1024) for _ in range(2)]
        for number, wire in enumerate(wires):
            wire.send(post(STREAM))
            await balancer.wait_for(lambda: balancer.app.flights.sizes() == [number + 1])
        steps.go(count + 10)
        flight = next(iter(balancer.app.flights._flights.values()))
        await balancer.wait_for(lambda: flight._is_stopped)
        assert len(flight) == 2
        wires[1].leave()
        await until_finished(balancer, 1)
        answer = await wires[0].answer()
        assert len(text_of(answer.events)) == count * len(BIG) + 2
        assert len(node.requests) == 1


# -- shutting down


async def test_a_shutdown_tells_all_of_them(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node)
    node.faults.add(Fault("hang"))
    wires = await together(balancer, 3)
    balancer.app.port.close_listener()
    await asyncio.gather(*balancer.app.port.cut_all(), return_exceptions=True)
    assert [(await wire.answer()).code for wire in wires] == ["draining"] * 3
    await node.wait_for(lambda: node.cancelled == 1)
