"""What a node may say, and what of it reaches the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, chunked, post
from tests.integration.scripted_node import ScriptedNode, ok, stream_head, streamed

GOOD: dict[str, Any] = {"id": "x", "object": "chat.completion", "choices": []}
BODY = json.dumps(GOOD).encode()
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)
CLOSES = b"connection: close\r\n"


def says(data: bytes) -> Any:
    """A script that says this and hangs up."""

    async def script(_: ScriptedNode, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        writer.close()

    return script


@pytest.mark.parametrize(
    "data",
    [
        HEAD + LENGTH + b"\r\n" + BODY,
        HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(BODY[:5], BODY[5:]),
        HEAD
        + b"transfer-encoding: Chunked\r\n\r\n"
        + b"%x;ext=1\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (len(BODY), BODY),
        HEAD + CLOSES + b"\r\n" + BODY,
        b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
        b"HTTP/1.0 200\r\ncontent-type: application/json\r\n" + LENGTH + b"\r\n" + BODY,
        HEAD.replace(b"application/json", b"text/html") + LENGTH + b"\r\n" + BODY,
        HEAD.replace(b"200 OK", b"201 Created") + LENGTH + b"\r\n" + BODY,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nx: y\r\n\r\n" + HEAD + LENGTH + b"\r\n" + BODY,
        HEAD + b"content-encoding: identity\r\n" + LENGTH + b"\r\n" + BODY,
        HEAD + LENGTH + b"x-large: " + b"y" * 60_000 + b"\r\n\r\n" + BODY,
    ],
    ids=[
        *("length", "chunked", "extensions and trailers", "up to the end", "HTTP/1.0", "no reason"),
        *("another type", "another 2xx", "1xx first", "identity", "a head within the limit"),
    ],
)
async def test_a_good_answer_is_good_however_it_is_framed(serve: Serve, data: bytes) -> None:
    async with ScriptedNode(says(data)) as node:
        answer = await ask(await serve(node), chat())
        assert (answer.status, answer.json, answer.interim) == (201 if b"201" in data else 200, GOOD, [])
        assert answer.header("x-trailer") is None
        assert len(node.requests) == 1


BAD = {
    "length and chunked": HEAD + LENGTH + b"transfer-encoding: chunked\r\n\r\n" + chunked(BODY),
    "two lengths": HEAD + LENGTH + b"content-length: 5\r\n\r\n" + BODY,
    "a negative length": HEAD + b"content-length: -5\r\n\r\n" + BODY,
    "gzip, chunked": HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n" + chunked(BODY),
    "a folded header": HEAD + b"x-folded: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY,
    "NUL in a header": HEAD + b"x-nul: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "a bare CR": HEAD + b"x-cr: a\rset-cookie: b\r\n" + LENGTH + b"\r\n" + BODY,
    "no HTTP": b"220 mail.example ESMTP\r\n",
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n" + BODY,
    "a head over the limit": HEAD + LENGTH + b"x-large: " + b"y" * 70_000 + b"\r\n\r\n" + BODY,
    "many heads before it": b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" * 4000 + HEAD + LENGTH + b"\r\n" + BODY,
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "elsewhere": b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/secret\r\ncontent-length: 0\r\n\r\n",
    "empty": ok(b""),
    "white space": ok(b" \n"),
    "text": ok(b"hello"),
    "a number": ok(b"5"),
    "null": ok(b"null"),
    "a list": ok(b"[{}]"),
    "two objects": ok(b"{}{}"),
    "half an object": ok(BODY[:-1]),
    "an error": ok({"error": {"message": "no"}}),
    "an error in words": ok({"error": "no"}),
    "html": ok(b"<html>", kind="text/html"),
    "invalid UTF-8": ok(b'{"a":"\xff"}'),
    "a large half": ok(b'{"a":"' + b"x" * 300_000),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
async def test_a_bad_answer_is_replaced_by_another_nodes_and_else_by_an_error(serve: Serve, data: bytes) -> None:
    async with ScriptedNode(says(data)) as sick, ScriptedNode(ok(GOOD)) as well:
        sick_node = {"url": sick.url, "models": [MODEL], "weight": 1000.0}
        answer = await ask(await serve(sick_node), chat())
        assert (answer.status, answer.code) == (502, "upstream_bad_answer")
        assert not {"location", "set-cookie", "upgrade"} & {name for name, _ in answer.headers}
        assert "127.0.0.1" not in answer.body.decode()
        answer = await ask(await serve(sick_node, {"url": well.url, "models": [MODEL], "weight": 0.1}), chat())
        assert (answer.status, answer.json, answer.header("x-balancer-attempts")) == (200, GOOD, "2")
        assert len(sick.requests) == 2


@pytest.mark.parametrize("path", ["/rerank", "/pooling", "/classify", "/generate"])
async def test_a_list_is_a_good_answer_where_servers_give_one(serve: Serve, path: str) -> None:
    async with ScriptedNode(ok([{"index": 0}])) as node:
        answer = await ask(await serve(node), {"model": MODEL, "inputs": "x"}, path)
        assert (answer.status, answer.json) == (200, [{"index": 0}])


@pytest.mark.parametrize("status", [400, 402, 409, 410, 413, 415, 418, 422, 451])
async def test_a_nodes_word_about_the_request_is_passed_on_as_it_came(serve: Serve, status: int) -> None:
    kind = "application/problem+json"
    told = ok(b'{ "detail" :\t"no" }', "Retry-After: 5", "X-Why: y", status=f"{status} No", kind=kind)
    async with ScriptedNode(told) as one, ScriptedNode(told) as two:
        answer = await ask(await serve(one, two), chat())
        assert (answer.status, answer.body) == (status, b'{ "detail" :\t"no" }')
        assert (answer.header("content-type"), answer.header("x-why")) == (kind, "y")
        assert answer.header("x-balancer-attempts") == "1"
        assert len(one.requests) + len(two.requests) == 1


STREAM = [
    b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]


# -- headers to clients


SECRET = (
    *("Set-Cookie: secret=1", "Server: secret", "Via: secret", "ETag: secret", "Alt-Svc: secret"),
    *("Keep-Alive: secret", "Proxy-Authenticate: secret", "WWW-Authenticate: secret", "Location: http://secret/"),
    *("Access-Control-Allow-Origin: secret", "Strict-Transport-Security: secret", "Last-Modified: secret"),
    *(
        "X-Request-Id: secret",
        "X-Balancer-Node: secret",
        "X-Balancer-Cache: secret",
        "X-RateLimit-Limit-Requests: secret",
    ),
    *("Connection: X-Named, keep-alive", "X-Named: secret", "Age: secret", "Retry-After: 77", "Date: secret"),
)
RETURNED = ("Cache-Control: no-store", "OpenAI-Processing-Ms: 5", "X-Engine: one", "Content-Disposition: attachment")
OURS = {"date", "content-length", "x-request-id", "x-balancer-node", "x-balancer-attempts", "x-balancer-cache"}


@pytest.mark.parametrize("case", ["whole", "stream", "request error", "sound"])
async def test_only_allowed_headers_reach_the_client(serve: Serve, case: str) -> None:
    answers = {
        "whole": ok(GOOD, *SECRET, *RETURNED),
        "stream": streamed(*STREAM).replace(b"\r\n", "\r\n".join(["", *SECRET, *RETURNED, ""]).encode(), 1),
        "request error": ok({"error": "no"}, *SECRET, *RETURNED, status="422 Unprocessable Entity"),
        "sound": ok(b"\0\1", *SECRET, *RETURNED, kind="audio/mpeg"),
    }
    async with ScriptedNode(answers[case]) as node:
        balancer = await serve({"url": node.url, "models": [MODEL], "id": "a"})
        path = "/v1/audio/speech" if case == "sound" else CHAT
        for number in range(2):  # a head that was seen before is remembered
            answer = await ask(balancer, chat(str(number), stream=case == "stream"), path)
            names = [name.replace("transfer-encoding", "content-length") for name, _ in answer.headers]
            wanted = OURS | {"content-type", *(line.partition(":")[0].lower() for line in RETURNED)}
            assert sorted(names) == sorted(wanted)
            assert "secret" not in str(answer.headers)
            assert answer.header("x-engine") == "one"
            assert answer.header("x-balancer-node") == "a"


async def test_operators_may_return_more_headers(serve: Serve) -> None:
    async with ScriptedNode(ok(GOOD, "ETag: e", "Server: s")) as node:
        balancer = await serve(node, upstream={"return_headers": ["etag"]})
        answer = await ask(balancer, chat())
        assert (answer.header("etag"), answer.header("server")) == ("e", None)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_node_says_before_its_answer_is_dropped(balancer: Balancer, node: FakeNode, stream: bool) -> None:
    node.faults.add(Fault("informational"))
    answer = await ask(balancer, chat(stream=stream))
    assert (answer.status, answer.interim, answer.header("link")) == (200, [], None)
    assert len(node.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_compressed_answer_is_a_bad_one(balancer: Balancer, node: FakeNode, stream: bool) -> None:
    node.faults.add(Fault("gzip"))
    answer = await ask(balancer, chat(stream=stream))
    assert (answer.status, answer.code, answer.header("content-encoding")) == (502, "upstream_bad_answer", None)


async def test_a_stream_head_out_of_allowed_kinds_is_not_relayed_as_events(serve: Serve) -> None:
    async with ScriptedNode(stream_head(kind="text/html") + b"5\r\n<html\r\n0\r\n\r\n") as node:
        answer = await ask(await serve(node), chat(stream=True))
        assert (answer.status, answer.code) == (502, "upstream_bad_answer")


# -- connections to nodes


@pytest.mark.parametrize("fault", [Fault("extra_bytes"), Fault("extra_bytes", body="x"), Fault("hang_up")])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_node_says_unasked_is_nobodys_answer(
    balancer: Balancer, node: FakeNode, fault: Fault, stream: bool
) -> None:
    node.faults.add(fault)
    wire = await Wire.to(balancer)
    for number in range(6):
        body = chat(f"number {number}", stream=stream)
        answer = await ask(balancer, body)
        text = answer.json["choices"][0]["message"]["content"] if not stream else None
        assert stream or text == node.expected_text(body)
        assert not stream or answer.events[-1] == "[DONE]"
    assert len(node.requests) == 6
    wire.leave()


@asynccontextmanager
async def serving(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[str]:
    """A node that does with each connection what it likes."""
    tasks: set[asyncio.Task[None]] = set()

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(run, "127.0.0.1", 0, limit=65536)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_connection_that_answered_before_it_was_asked_in_full_is_not_used_again(serve: Serve) -> None:
    heads: list[bytes] = []

    async def impatient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            heads.append(head)
            writer.write(ok({"error": "too long"}, status="413 Content Too Large"))
            await asyncio.Event().wait()  # and reads nothing more
        writer.write(ok({}, "connection: close"))
        await writer.drain()

    async with serving(impatient) as url:
        balancer = await serve({"url": url, "models": [MODEL]}, timeouts={"unary_s": 2.0})
        answers = [await ask(balancer, chat("x" * 8_000_000 if number == 0 else "y")) for number in range(2)]
        assert [answer.status for answer in answers] == [413, 413]
        assert answers[0].json == {"error": "too long"}
        assert len(heads) == 2  # the second came on a connection of its own


async def test_a_connection_that_failed_is_not_used_again(balancer: Balancer, node: FakeNode) -> None:
    for fault in (Fault("bad_json"), Fault("gzip"), Fault("truncated"), Fault("status", status=500)):
        node.faults.add(fault)
        assert (await ask(balancer, chat(fault.kind), CHAT, "X-Balancer-Cache: bypass")).status == 502
        node.faults.clear()
        answer = await ask(balancer, chat(fault.kind), CHAT, "X-Balancer-Cache: bypass")
        assert answer.json["choices"][0]["message"]["content"] == node.expected_text(chat(fault.kind))


async def test_a_1xx_on_its_own_is_never_taken_for_an_answer(serve: Serve, node: FakeNode) -> None:
    may_answer = asyncio.Semaphore(0)
    numbers = count()

    async def hinting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            if head.startswith(b"POST"):
                await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r")[0]))
                number = next(numbers)
                writer.write(b"HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\n\r\n")
                await may_answer.acquire()
                writer.write(ok({"number": number}))
            else:
                writer.write(ok({}))

    async with serving(hinting) as url:
        balancer = await serve({"url": url, "models": [MODEL]}, {"url": node.url, "models": ["other"]})
        for number in range(4):
            wire = await Wire.to(balancer)
            wire.send(post(chat(str(number))))
            for other in range(3):  # what was to come has come by then
                await ask(balancer, {**chat(f"{number} {other}"), "model": "other"})
            may_answer.release()
            assert (await wire.answer()).json == {"number": number}
