"""What makes a stream whole, who gets to see its usage, and what is no stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import MODEL, Wire, ask, chat, chunked, payloads, post, text_of
from tests.integration.scripted_node import ScriptedNode, Steps, ok, stream_head, streamed
from tests.integration.stream_dialects import (
    DONE,
    USAGE,
    closes,
    data,
    delta,
    finish,
    openai_code,
)

# -- what a good end is


TOOL_CALL = data({"choices": [{"index": 0, "delta": {"tool_calls": [{}]}, "finish_reason": "tool_calls"}]})
GOOD_ENDS = {
    "two choices": (chat(n=2, stream=True), [delta("a"), delta("b", "stop", 1), delta(None, "length"), DONE]),
    "tools": (chat(stream=True), [TOOL_CALL, DONE]),
    "everything in one event": (chat(stream=True), [delta("x", "stop"), DONE]),
    "no content at all": (chat(stream=True), [delta(""), delta(None, "stop"), DONE]),
    "spacing": (chat(stream=True), [delta("x", "stop").replace(b'": "stop', b'"  :  "stop'), b"data:[DONE]\n\n"]),
    "line ends": (chat(stream=True), [event.replace(b"\n", b"\r\n") for event in (delta("x", "stop"), DONE)]),
}  # fmt: skip
BAD_ENDS = {
    "DONE alone": (chat(stream=True), [DONE]),
    "DONE without a finish": (chat(stream=True), [delta("x"), DONE]),
    "finish of one choice of two": (chat(n=2, stream=True), [delta("a", "stop"), delta("b", index=1), DONE]),
    "the same choice finished twice": (chat(n=2, stream=True), [delta("a"), *[delta(None, "stop")] * 2, DONE]),
    "no DONE": (chat(stream=True), [delta("x"), delta(None, "stop")]),
    "DONE within a text": (chat(stream=True), [delta("[DONE]"), delta('"finish_reason": "stop"')]),
    "an error in the middle": (chat(stream=True), [delta("x"), data({"error": {}}), delta("y", "stop"), DONE]),
    "an error object, then DONE": (chat(stream=True), [delta("x"), data({"error": "no"}), DONE]),
    "a list": (chat(stream=True), [delta("x"), data([1]), DONE]),
}  # fmt: skip


@pytest.mark.parametrize(("body", "events"), GOOD_ENDS.values(), ids=GOOD_ENDS.keys())
async def test_a_stream_with_its_good_end_is_whole(serve: Serve, body: Any, events: list[bytes]) -> None:
    async with ScriptedNode(streamed(*events)) as node:
        answer = await ask(await serve(node), body)
        assert (answer.status, answer.body) == (200, b"".join(events))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("body", "events"), BAD_ENDS.values(), ids=BAD_ENDS.keys())
async def test_a_stream_that_only_looks_whole_is_an_error(
    serve: Serve, body: Any, events: list[bytes], together: bool
) -> None:
    script = Steps(
        *([streamed(*events)] if together else [stream_head(), *(chunked(e)[:-5] for e in events)]), then=finish
    )
    script.go(1 if together else 2)
    async with ScriptedNode(script) as node:
        wire = await Wire.to(await serve(node))
        wire.send(post(body))
        if not together and len(events) > 1:
            await wire.head()
            got = await wire.chunk()
            script.go(len(events))
            *before, error = payloads(got + b"".join([part async for part in wire.chunks()]))
            assert openai_code(error) in ("upstream_truncated", "upstream_bad_answer")
            assert "[DONE]" not in before
        else:
            script.go(len(events))
            answer = await wire.answer()
            assert (answer.status, answer.code) in ((502, "upstream_truncated"), (502, "upstream_bad_answer"))
        assert len(node.requests) == 1


@pytest.mark.parametrize("head", [
    stream_head(),
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n",
    b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; charset=UTF-8\r\ncontent-length: 999999\r\n\r\n",
])  # fmt: skip
async def test_a_good_end_is_good_whatever_the_framing_does_behind_it(serve: Serve, head: bytes) -> None:
    events = [delta("x"), delta(None, "stop"), DONE]
    body = chunked(*events)[:-5] if b"chunked" in head else b"".join(events)
    async with ScriptedNode(Steps(head + body, then=closes)) as node:
        node.answers[0].go(2)  # type: ignore[union-attr]
        answer = await ask(await serve(node), chat(stream=True))
        assert (answer.status, answer.body) == (200, b"".join(events))


async def test_what_comes_behind_the_good_end_is_dropped(serve: Serve) -> None:
    events = [delta("x"), delta(None, "stop"), DONE]
    async with ScriptedNode(streamed(*events, delta("again"), DONE)) as node:
        balancer = await serve(node)
        for _ in range(2):
            assert (await ask(balancer, chat(stream=True, temperature=1))).body == b"".join(events)


# -- usage


@pytest.mark.parametrize("asked", [False, True])
async def test_the_usage_event_reaches_only_a_client_that_asked(
    balancer: Balancer, node: FakeNode, asked: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    events = (await ask(balancer, chat(stream=True, **options))).events
    assert text_of(events) == node.expected_text(chat())
    assert [event["usage"]["completion_tokens"] for event in events[:-1] if event.get("usage")] == [6] * asked
    assert events[-1] == "[DONE]"
    assert node.requests[0].json()["stream_options"] == {"include_usage": True}
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    assert balancer.requests[0]["completion_tokens"] == 6


async def test_usage_beside_a_choice_is_nobodys_to_withhold(serve: Serve) -> None:
    events = [delta("x", usage=USAGE), delta(None, "stop", usage=USAGE), DONE]
    async with ScriptedNode(streamed(*events)) as node:
        assert (await ask(await serve(node), chat(stream=True))).body == b"".join(events)


# -- what is no stream


async def test_events_for_a_request_that_asked_for_none_are_a_bad_answer(serve: Serve) -> None:
    async with ScriptedNode(streamed(delta("x", "stop"), DONE)) as node:
        answer = await ask(await serve(node), chat())
        assert (answer.status, answer.code) == (502, "upstream_bad_answer")


SPEECH = {"model": MODEL, "input": "one two three four five six seven", "voice": "x"}


async def test_sound_is_relayed_from_its_first_byte_and_cut_where_it_breaks(balancer: Balancer, node: FakeNode) -> None:
    whole = (await ask(balancer, SPEECH, "/v1/audio/speech")).body
    node.faults.add(Fault("hang", after_events=2))
    node.faults.add(Fault("close", after_events=2))
    wire = await Wire.to(balancer)
    wire.send(post(SPEECH, "/v1/audio/speech"))
    assert (await wire.head()).header("content-type") == "audio/mpeg"
    got = b""
    while len(got) < 8192:
        got += await wire.chunk()
    assert whole.startswith(got)
    wire.leave()
    node.faults.rules.pop(0)
    wire = await Wire.to(balancer)
    wire.send(post(SPEECH, "/v1/audio/speech"))
    assert not (await wire.breaks()).endswith(b"0\r\n\r\n")


async def test_a_json_answer_over_check_bytes_is_relayed_and_cut_where_it_breaks(serve: Serve) -> None:
    whole = ok({"id": "x", "filler": "y" * 2000})
    async with ScriptedNode(whole, Steps(whole[:-10], then=closes)) as node:
        node.answers[1].go(2)  # type: ignore[union-attr]
        balancer = await serve(node, upstream={"check_bytes": 1000})
        assert (await ask(balancer, chat("1"))).body == whole.partition(b"\r\n\r\n")[2]
        wire = await Wire.to(balancer)
        wire.send(post(chat("2")))
        length = int((await wire.head()).header("content-length") or 0)
        assert len(await wire.breaks()) == length - 10
        assert len(node.requests) == 2


# -- large and many


@pytest.mark.parametrize("size", [200_000, 300_000, 3_000_000])
async def test_an_event_of_any_size_passes_as_it_is(serve: Serve, size: int) -> None:
    events = [delta("x"), delta("y" * size), delta(None, "stop"), DONE]
    async with ScriptedNode(streamed(*events)) as node:
        answer = await ask(await serve(node), chat(stream=True))
        assert answer.body == b"".join(events)


@pytest.fixture
async def paced() -> AsyncIterator[FakeNode]:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.001, slots=64) as node:
        yield node


async def test_streams_side_by_side_do_not_mix(paced: FakeNode, serve: Serve) -> None:
    balancer = await serve(paced)
    bodies = [chat(f"prompt {number}", max_tokens=20, stream=True) for number in range(40)]
    answers = await asyncio.gather(*(ask(balancer, body) for body in bodies))
    assert [text_of(answer.events) for answer in answers] == [paced.expected_text(body) for body in bodies]
    assert all(answer.events[-1] == "[DONE]" for answer in answers)
