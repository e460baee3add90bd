"""Clients that leave are felt at the node and leave nothing behind; clients that stop reading hold nobody up."""

from __future__ import annotations

import gc
import hashlib
import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, payloads, post, text_of
from tests.integration.scripted_node import Flood, ScriptedNode, ok, stream_head

SPEECH = {"model": MODEL, "input": "one two three four five six seven", "voice": "x"}


async def nothing_is_left(balancer: Balancer) -> None:
    """No slot, no count and no byte is held by anybody."""
    app = balancer.app
    await balancer.wait_for(lambda: all(node.load.rif == 0 for node in app.registry.nodes.values()))
    await balancer.wait_for(lambda: all(tenant["in_flight"] == 0 for tenant in app.admission.tenants().values()))
    await balancer.wait_for(lambda: app.port.buffered.bytes == 0)
    assert app.port.working() == []


@pytest.mark.parametrize(
    ("path", "body", "fault"),
    [
        (CHAT, chat(), Fault("hang")),
        (CHAT, chat(), Fault("hang", after_events=0)),
        (CHAT, chat(stream=True), Fault("hang")),
        (CHAT, chat(stream=True), Fault("hang", after_events=0)),
        (CHAT, chat(stream=True), Fault("hang", after_events=1)),
        ("/v1/audio/speech", SPEECH, Fault("hang", after_events=0)),
    ],
    ids=["unary", "unary after its head", "stream", "stream after its head", "stream before content", "sound"],
)
async def test_leaving_before_anything_came_is_felt_at_the_node(
    balancer: Balancer, node: FakeNode, path: str, body: Any, fault: Fault
) -> None:
    node.faults.add(fault)
    wire = await Wire.to(balancer)
    wire.send(post(body, path))
    await node.wait_for(lambda: len(node.requests) == 1)
    if fault.after_events:
        await node.wait_for(lambda: node.requests[0].events_sent == fault.after_events)
    wire.leave()
    await node.wait_for(lambda: node.cancelled == 1)
    await nothing_is_left(balancer)
    assert [(facts["code"], facts["attempts"]) for facts in balancer.requests] == [("client_left", 1)]
    assert balancer.counts("attempts") == {(balancer.requests[0]["node"] or node.url[7:], "client_gone"): 1}
    node.faults.clear()
    assert (await ask(balancer, chat("next"))).json["choices"][0]["message"]["content"] == node.expected_text(
        chat("next")
    )


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat(stream=True)), ("/v1/audio/speech", SPEECH)])
@pytest.mark.parametrize("events", [2, 3, 5])
async def test_leaving_in_the_middle_is_felt_at_the_node(
    balancer: Balancer, node: FakeNode, path: str, body: Any, events: int
) -> None:
    node.faults.add(Fault("hang", after_events=events))
    wire = await Wire.to(balancer)
    wire.send(post(body, path))
    assert (await wire.head()).status == 200
    assert await wire.chunk()
    wire.leave()
    await node.wait_for(lambda: node.cancelled == 1)
    await nothing_is_left(balancer)
    assert [(facts["status"], facts["code"]) for facts in balancer.requests] == [(200, "client_left")]


async def test_leaving_the_queue_frees_the_place_and_no_node_hears_of_it(node: FakeNode, serve: Serve) -> None:
    balancer = await serve({"url": node.url, "models": [MODEL], "max_in_flight": 1})
    hang = node.faults.add(Fault("hang", first=1))
    first, second, third = [await Wire.to(balancer) for _ in range(3)]
    first.send(post(chat("first")))
    await node.wait_for(lambda: hang.hits == 1)
    second.send(post(chat("second")))
    await balancer.wait_for(lambda: len(balancer.app.port.working()) == 2)
    second.leave()
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    third.send(post(chat("third")))
    await balancer.wait_for(lambda: len(balancer.app.port.working()) == 2)
    node.faults.release()
    assert [(await wire.answer()).status for wire in (first, third)] == [200, 200]
    asked = [request.json()["messages"][0]["content"] for request in node.requests]
    assert asked == ["first", "third"]
    await nothing_is_left(balancer)


async def test_leaving_while_the_body_is_coming_leaves_nothing(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    wire.send(post(b"x" * 100_000, CHAT, "Content-Length: 200000"))
    await balancer.wait_for(lambda: balancer.app.port.buffered.bytes == 100_000)
    wire.leave()
    await nothing_is_left(balancer)
    assert node.requests == []


async def test_what_was_pipelined_behind_a_request_leaves_with_its_client(balancer: Balancer, node: FakeNode) -> None:
    hang = node.faults.add(Fault("hang", first=1))
    wire = await Wire.to(balancer)
    wire.send(post(chat("first")) + post(chat("second")))
    await node.wait_for(lambda: hang.hits == 1)
    wire.leave()
    await node.wait_for(lambda: node.cancelled == 1)
    await nothing_is_left(balancer)
    assert (await ask(balancer, chat("other"))).status == 200
    assert len(node.requests) == 2


async def test_one_client_that_leaves_does_not_hurt_another(balancer: Balancer, node: FakeNode) -> None:
    node.faults.add(Fault("hang", after_events=3))
    wires = [await Wire.to(balancer) for _ in range(3)]
    for number, wire in enumerate(wires):
        wire.send(post(chat(f"prompt {number}", stream=True)))
        await wire.head()
    wires[1].leave()
    await node.wait_for(lambda: node.cancelled == 1)
    node.faults.release()
    for number in (0, 2):
        events = payloads(b"".join([part async for part in wires[number].chunks()]))
        assert text_of(events) == node.expected_text(chat(f"prompt {number}"))
    assert node.cancelled == 1


# -- clients that stop reading


EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
PARTS = 1024
FLOODS = {
    "events": (CHAT, chat(stream=True), stream_head(), [EVENT % (b"%06d" % n * 10_000) for n in range(PARTS)] + [END]),
    "sound": ("/v1/audio/speech", SPEECH, stream_head(kind="audio/mpeg"), [b"%06d" % n * 10_000 for n in range(PARTS)]),
}


@pytest.fixture
async def bystander() -> AsyncIterator[FakeNode]:
    async with FakeNode(instant=True, models=("other",)) as node:
        yield node


@pytest.mark.parametrize(("path", "body", "head", "parts"), FLOODS.values(), ids=FLOODS.keys())
async def test_a_reader_that_stops_stops_its_node_and_nobody_else(
    serve: Serve, bystander: FakeNode, path: str, body: Any, head: bytes, parts: list[bytes]
) -> None:
    flood = Flood(head, parts)
    async with ScriptedNode(flood) as node:
        balancer = await serve(node, {"url": bystander.url, "models": ["other"]})
        reader = await Wire.to(balancer, limit=65536)
        reader.send(post(body, path))
        await reader.head()
        before, count = -1, 0
        while before != flood.sent:
            before = flood.sent
            for _ in range(5):
                count += 1
                assert (await ask(balancer, {**chat(str(count)), "model": "other"})).status == 200
        assert len(bystander.requests) == count
        assert 0 < flood.sent < len(flood.body) // 2  # what the kernel's buffers on both sides take, and a little
        read = hashlib.sha256()
        async for part in reader.chunks():
            read.update(part)
        assert read.digest() == hashlib.sha256(flood.body).digest()
        await nothing_is_left(balancer)


async def test_a_reader_that_stopped_and_leaves_is_felt_at_the_node(serve: Serve) -> None:
    path, body, head, parts = FLOODS["events"]
    flood = Flood(head, parts)
    async with ScriptedNode(flood) as node:
        balancer = await serve(node)
        reader = await Wire.to(balancer, limit=65536)
        reader.send(post(body, path))
        await reader.head()
        reader.leave()
        await node.wait_for(lambda: node.left == 1)
        await nothing_is_left(balancer)
        assert flood.sent < len(flood.body)
        assert json.loads(node.requests[0].body)["stream"] is True


@pytest.mark.parametrize("cached", [True, False])
async def test_answers_that_nobody_reads_do_not_pile_up(serve: Serve, bystander: FakeNode, cached: bool) -> None:
    async with ScriptedNode(ok({"id": "x", "filler": "y" * 900_000})) as node:
        balancer = await serve(node, {"url": bystander.url, "models": ["other"]}, cache={"enabled": cached})
        assert len((await ask(balancer, chat())).body) > 900_000
        reader = await Wire.to(balancer, limit=65536)
        reader.send(post(chat()) * 200)
        before, count = -1, 0
        while before != len(balancer.requests) - count:
            before = len(balancer.requests) - count
            for _ in range(5):
                count += 1
                assert (await ask(balancer, {**chat(str(count)), "model": "other"})).status == 200
        assert before < 100  # what the kernel's buffers on both sides take, and a little
        for _ in range(200):
            assert len((await reader.answer()).body) > 900_000


# -- what a client may make us remember


async def remembered_after(balancer: Balancer, node: FakeNode, *requests: bytes) -> int:
    """Bytes that are kept when these were answered, but for what the test itself keeps."""
    await (await Wire.to(balancer)).ask(requests[0])
    tracemalloc.start(1)
    try:
        for request in requests[1:]:
            wire = await Wire.to(balancer)
            await wire.ask(request)
            wire.leave()
        await nothing_is_left(balancer)
        balancer.requests.clear()
        node.forget()
        await Wire.cut_all()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


async def test_what_clients_call_their_models_is_not_remembered_at_length(balancer: Balancer, node: FakeNode) -> None:
    requests = [post(chat(model=f"{number}" * 900_000)) for number in range(10)]
    assert await remembered_after(balancer, node, *requests) < 3_000_000


async def test_headers_are_not_remembered_at_length(balancer: Balancer, node: FakeNode) -> None:
    requests = [post(chat(), CHAT, f"OpenAI-Beta: {number}" + "x" * 50_000) for number in range(200)]
    assert await remembered_after(balancer, node, *requests) < 3_000_000
