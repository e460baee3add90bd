"""Streams of every dialect: whole when they are whole, and ended with one error event wherever they break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, chunked, payloads, post, text_of
from tests.integration.scripted_node import ScriptedNode, Steps, ok, stream_head, streamed

# Failures are what these tests are about: no node is given up on for them, and nothing is continued elsewhere.
PATIENT: dict[str, Any] = {
    "breaker": {"consecutive_failures": 100_000, "min_requests": 100_000},
    "resume": {"enabled": False},
    "cache": {"enabled": False},
}


def data(value: Any, name: str = "") -> bytes:
    event = f"event: {name}\n" if name else ""
    return f"{event}data: {json.dumps(value)}\n\n".encode()


def delta(text: str | None, reason: str | None = None, index: int = 0, **fields: Any) -> bytes:
    said = {} if text is None else {"content": text}
    return data({"id": "c", "choices": [{"index": index, "delta": said, "finish_reason": reason}], **fields})


def named(name: str, **fields: Any) -> bytes:
    return data({"type": name, **fields}, name)


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
USAGE_EVENT = data({"id": "c", "choices": [], "usage": USAGE})


@dataclass(frozen=True)
class Dialect:
    path: str
    body: dict[str, Any]
    events: tuple[bytes, ...]
    content: int  # which event is the first with content
    error: Callable[[Any], str]  # the code in the payload of an error event
    error_begins: bytes = b"data: "


def openai_code(payload: Any) -> str:
    assert set(payload) == {"error"}
    assert set(payload["error"]) == {"message", "type", "param", "code"}
    return str(payload["error"]["code"])


def anthropic_code(payload: Any) -> str:
    assert payload["type"] == "error"
    assert {"type", "message"} <= set(payload["error"])
    return str(payload["error"]["code"])


def responses_code(payload: Any) -> str:
    assert payload["type"] == "error"
    assert {"code", "message", "param"} <= set(payload)
    return str(payload["code"])


def tgi_code(payload: Any) -> str:
    assert set(payload) == {"error", "error_type"}
    return str(payload["error_type"])


ASKED = {"stream": True, "stream_options": {"include_usage": True}}
DIALECTS = {
    "chat": Dialect(
        CHAT,
        chat(**ASKED),
        (delta(""), b": a comment\n\n", delta("Hé"), delta("llo 🙂"), delta(None, "stop"), USAGE_EVENT, DONE),
        2,
        openai_code,
    ),
    "completions": Dialect(
        "/v1/completions",
        {"model": MODEL, "prompt": "x", **ASKED},
        (
            data({"choices": [{"index": 0, "text": "", "finish_reason": None}]}),
            data({"choices": [{"index": 0, "text": "He", "finish_reason": None}]}),
            data({"choices": [{"index": 0, "text": "y", "finish_reason": "length"}], "usage": None}),
            USAGE_EVENT.replace(b"\n", b"\r\n"),
            DONE,
        ),
        1,
        openai_code,
    ),
    "messages": Dialect(
        "/v1/messages",
        {**chat(), "stream": True},
        (
            named("message_start", message={"usage": {"input_tokens": 3, "output_tokens": 0}}),
            named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            named("ping"),
            named("content_block_delta", index=0, delta={"type": "text_delta", "text": "He"}),
            named("content_block_delta", index=0, delta={"type": "text_delta", "text": "message_stop"}),
            named("content_block_stop", index=0),
            named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2}),
            named("message_stop"),
        ),
        3,
        anthropic_code,
        b"event: error\ndata: ",
    ),
    "responses": Dialect(
        "/v1/responses",
        {"model": MODEL, "input": "x", "stream": True},
        (
            named("response.created", response={"status": "in_progress", "error": None}),
            named("response.output_item.added", item={}),
            named("response.output_text.delta", delta="He"),
            named("response.output_text.delta", delta="response.completed"),
            named("response.output_text.done", text="Hello"),
            named("response.completed", response={"usage": {"input_tokens": 3, "output_tokens": 2}, "error": None}),
        ),
        2,
        responses_code,
        b"event: error\ndata: ",
    ),
    "generate_stream": Dialect(
        "/generate_stream",
        {"model": MODEL, "inputs": "x"},
        (
            data({"index": 1, "token": {"text": "He"}, "generated_text": None}).replace(b": ", b":", 1),
            data({"index": 2, "token": {"text": "[DONE]"}, "generated_text": None}),
            data({"index": 3, "token": {"text": "</s>"}, "generated_text": "He[DONE]"}),
        ),
        0,
        tgi_code,
    ),
}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())


@each_dialect
async def test_a_stream_reaches_the_client_byte_for_byte_and_event_by_event(serve: Serve, dialect: Dialect) -> None:
    script = Steps(stream_head(), *(chunked(event)[:-5] for event in dialect.events), then=finish)
    async with ScriptedNode(script) as node:
        wire = await Wire.to(await serve(node))
        wire.send(post(dialect.body, dialect.path))
        script.go(dialect.content + 2)
        head = await wire.head()
        assert (head.status, head.header("content-type")) == (200, "text/event-stream")
        assert (head.header("x-balancer-attempts"), head.header("transfer-encoding")) == ("1", "chunked")
        body = b""
        while body != b"".join(dialect.events[: dialect.content + 1]):
            body += await wire.chunk()
            assert b"".join(dialect.events).startswith(body)
        for event in dialect.events[dialect.content + 1 :]:
            script.go()
            assert await wire.chunk() == event  # on its own, before the next one was sent
        script.go()
        assert await wire.chunk() == b""
        assert (await wire.ask(post({}, "/v1/nothing"))).status == 404  # the connection goes on
        assert node.requests[0].body == json.dumps(dialect.body).encode()


def finish(writer: asyncio.StreamWriter) -> None:
    writer.write(b"0\r\n\r\n")


@each_dialect
async def test_a_stream_may_come_in_any_pieces(serve: Serve, dialect: Dialect) -> None:
    wire_bytes = streamed(*dialect.events)
    cuts = [range(0, len(wire_bytes), size) for size in (1, 2, 3, 7, 64)]
    cuts += [(0, cut) for cut in range(1, len(wire_bytes), 5)]  # type: ignore[misc]

    def in_pieces(begins: list[int]) -> Any:
        async def script(_: ScriptedNode, writer: asyncio.StreamWriter) -> None:
            for begin, end in zip(begins, [*begins[1:], len(wire_bytes)], strict=True):
                writer.write(wire_bytes[begin:end])
                await asyncio.sleep(0)

        return script

    async with ScriptedNode(*(in_pieces(list(cut)) for cut in cuts)) as node:
        balancer = await serve(node, **PATIENT)
        wire = await Wire.to(balancer)
        for number, _ in enumerate(cuts):
            answer = await wire.ask(post({**dialect.body, "number": number}, dialect.path))
            assert answer.body == b"".join(dialect.events)
        assert len(node.requests) == len(cuts)


# -- streams that break


def closes(writer: asyncio.StreamWriter) -> None:
    writer.close()


def resets(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def says_no_chunk(writer: asyncio.StreamWriter) -> None:
    writer.write(b"zz\r\n")


def says_half_an_event(writer: asyncio.StreamWriter) -> None:
    writer.write(b'1d\r\ndata: {"choices":[{"index":0,\r\n0\r\n\r\n')


def falls_silent(writer: asyncio.StreamWriter) -> None:
    pass


BREAKS = [
    (closes, "upstream_truncated"),
    (resets, "upstream_truncated"),
    (finish, "upstream_truncated"),
    (says_half_an_event, "upstream_truncated"),
    (says_no_chunk, "upstream_bad_answer"),
    (falls_silent, "upstream_truncated"),
]


@each_dialect
@pytest.mark.parametrize(("how", "code"), BREAKS, ids=[how.__name__ for how, _ in BREAKS])
async def test_a_stream_that_stops_anywhere_ends_with_one_error_event_and_without_its_good_end(
    serve: Serve, dialect: Dialect, how: Callable[[asyncio.StreamWriter], object], code: str
) -> None:
    whole = b"".join(dialect.events)
    stops = range(dialect.content + 1, len(dialect.events))
    steps = [Steps(stream_head() + chunked(*dialect.events[:stop])[:-5], then=how) for stop in stops]
    async with ScriptedNode(*steps) as node:
        balancer = await serve(node, **PATIENT, timeouts={"idle_s": 0.05})
        wire = await Wire.to(balancer)
        for stop, script in zip(stops, steps, strict=True):
            seen = b"".join(dialect.events[:stop])
            wire.send(post(dialect.body, dialect.path))
            script.go()
            body = b""
            assert (await wire.head()).status == 200
            while body != seen:
                body += await wire.chunk()
                assert whole.startswith(body)
            script.go()
            rest = b"".join([part async for part in wire.chunks()])
            assert rest.startswith(dialect.error_begins)
            (error,) = payloads(rest)
            assert dialect.error(error) == code
            assert "127.0.0.1" not in rest.decode()
            assert balancer.requests[-1]["code"] == code or await finished(balancer, code)
        assert len(node.requests) == len(steps)


async def finished(balancer: Balancer, code: str) -> bool:
    await balancer.wait_for(lambda: balancer.requests[-1]["code"] == code)
    return True


NODE_ERRORS = {
    "chat": data({"error": {"message": "engine died", "code": 500}}),
    "completions": data({"error": {"message": "engine died"}}),
    "messages": named("error", error={"type": "api_error", "message": "engine died"}),
    "responses": named("error", code="server_error", message="engine died"),
    "generate_stream": data({"error": "engine died", "error_type": "generation"}),
}


@pytest.mark.parametrize("name", DIALECTS)
async def test_a_nodes_own_error_event_becomes_the_one_error_event(serve: Serve, name: str) -> None:
    dialect = DIALECTS[name]
    seen = dialect.events[: dialect.content + 1]
    script = Steps(stream_head() + chunked(*seen)[:-5], chunked(NODE_ERRORS[name], dialect.events[-1]), then=finish)
    async with ScriptedNode(script) as node:
        wire = await Wire.to(await serve(node, **PATIENT))
        wire.send(post(dialect.body, dialect.path))
        script.go()
        await wire.head()
        body = b""
        while body != b"".join(seen):
            body += await wire.chunk()
        script.go()
        rest = b"".join([part async for part in wire.chunks()])
        assert rest.startswith(dialect.error_begins)
        (error,) = payloads(rest)
        assert dialect.error(error) == "upstream_bad_answer"
        assert "engine died" in rest.decode()


async def test_a_stream_that_stops_inside_an_event_too_large_to_hold_does_not_look_whole(serve: Serve) -> None:
    half = delta("y" * 600_000)[:400_000]
    script = Steps(stream_head() + chunked(delta("x"), half)[:-5], then=finish)
    async with ScriptedNode(script) as node:
        wire = await Wire.to(await serve(node, **PATIENT))
        wire.send(post(chat(stream=True)))
        script.go()
        await wire.head()
        got = b""
        while len(got) < 390_000:
            got += await wire.chunk()
        script.go()
        rest = b"".join([part async for part in wire.chunks()])
        assert rest.startswith((half + b"\n\n")[len(got) - len(delta("x")) :])  # what there is of it, and its end
        error = rest[rest.rindex(b"data: ") :]
        assert openai_code(payloads(error)[0]) == "upstream_truncated"
        assert b"[DONE]" not in rest


@each_dialect
async def test_a_stream_that_breaks_before_its_first_content_is_another_nodes_from_the_beginning(
    serve: Serve, dialect: Dialect
) -> None:
    held = dialect.events[: dialect.content]
    breaks: list[Any] = [ok(b"", kind="text/event-stream")]
    for how, _ in BREAKS[:-1]:
        script = Steps(stream_head() + chunked(*held)[:-5], then=how)
        script.go(2)
        breaks.append(script)
    async with ScriptedNode(*breaks, b"") as sick, ScriptedNode(streamed(*dialect.events)) as well:
        nodes = [{"url": sick.url, "weight": 1000.0}, {"url": well.url, "weight": 0.001}]
        balancer = await serve(*({"models": [MODEL], **node} for node in nodes), **PATIENT, routing={"panic_ratio": 0})
        for number in range(len(breaks)):
            answer = await ask(balancer, {**dialect.body, "number": number}, dialect.path)
            assert answer.body == b"".join(dialect.events)
        assert len(well.requests) == len(breaks)


@each_dialect
async def test_nothing_is_handed_on_before_the_first_content(serve: Serve, dialect: Dialect, node: FakeNode) -> None:
    script = Steps(stream_head() + chunked(*dialect.events[: dialect.content])[:-5], then=resets)
    async with ScriptedNode(script) as silent:
        balancer = await serve(silent, {"url": node.url, "models": ["other"]})
        wire = await Wire.to(balancer)
        wire.send(post(dialect.body, dialect.path))
        script.go()
        await silent.wait_for(lambda: len(silent.requests) == 1)
        for number in range(3):  # whatever was to come has come by then
            await ask(balancer, {**chat(str(number)), "model": "other"})
        assert wire.pending == b""
        script.go()
        assert (await wire.answer()).status == 502


async def test_after_commit_s_what_is_held_goes_to_the_client_and_the_node_is_kept(serve: Serve) -> None:
    script = Steps(stream_head() + chunked(delta(""))[:-5], chunked(delta("x", "stop"), DONE), then=finish)
    async with ScriptedNode(script) as node:
        wire = await Wire.to(await serve(node, timeouts={"commit_s": 0.05}))
        wire.send(post(chat(stream=True)))
        script.go()
        assert (await wire.head()).status == 200
        assert await wire.chunk() == delta("")
        script.go()
        rest = [part async for part in wire.chunks()]
        assert b"".join(rest) == delta("x", "stop") + DONE
        assert len(node.requests) == 1


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
