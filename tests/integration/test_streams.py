"""Streams of every dialect: handed on event by event, and ended with one error event wherever they break."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import MODEL, Wire, ask, chat, chunked, payloads, post
from tests.integration.scripted_node import ScriptedNode, Steps, ok, stream_head, streamed
from tests.integration.stream_dialects import (
    DIALECTS,
    DONE,
    PATIENT,
    Dialect,
    closes,
    data,
    delta,
    each_dialect,
    finish,
    named,
    openai_code,
)


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
        balancer = await serve(node, **PATIENT, timeouts={"idle_s": 0.05} if how is falls_silent else {})
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
