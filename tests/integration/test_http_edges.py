"""The data port as an HTTP/1.1 server: what it refuses byte by byte, and what it takes in whatever pieces it comes."""

from __future__ import annotations

import asyncio
import json

import pytest

from balancer.wire.inbound import URI_BYTES
from loadtest.fake_node import FakeNode
from tests.harness import Balancer
from tests.integration.raw_http import CHAT, Answer, Wire, ask, chat, chunked, get, post

BODY = json.dumps(chat()).encode()
SIZE = b"Content-Length: %d" % len(BODY)
HOST = b"Host: balancer"
SMUGGLED = get("/healthz")


def raw(*lines: bytes, start: bytes = b"POST /v1/chat/completions HTTP/1.1", body: bytes = BODY) -> bytes:
    return b"\r\n".join([start, *lines, b"", b""]) + body


async def refused(balancer: Balancer, data: bytes) -> Answer:
    """The one answer to `data` and a good request behind it, after which the connection is closed."""
    wire = await Wire.to(balancer)
    answer = await wire.ask(data + SMUGGLED)
    assert answer.header("connection") == "close"
    assert await wire.ends() == b""
    return answer


# -- framing


FRAMING = {
    "length and chunked": raw(HOST, SIZE, b"Transfer-Encoding: chunked", body=chunked(BODY)),
    "chunked and length": raw(HOST, b"Transfer-Encoding: chunked", SIZE, body=chunked(BODY)),
    "length twice": raw(HOST, SIZE, SIZE),
    "two lengths": raw(HOST, SIZE, b"Content-Length: 5"),
    "length list": raw(HOST, SIZE + b", %d" % len(BODY)),
    "length with a sign": raw(HOST, SIZE.replace(b": ", b": +")),
    "negative length": raw(HOST, b"Content-Length: -1"),
    "hexadecimal length": raw(HOST, b"Content-Length: 0x%x" % len(BODY)),
    "length with a fraction": raw(HOST, SIZE + b".0"),
    "length with a space inside": raw(HOST, b"Content-Length: 1 2"),
    "length with an underscore": raw(HOST, b"Content-Length: 1_2"),
    "empty length": raw(HOST, b"Content-Length: "),
    "length beyond 64 bits": raw(HOST, b"Content-Length: " + b"9" * 30),
    "length that wraps around": raw(HOST, b"Content-Length: %d" % (2**64 + len(BODY))),
    "folded header": raw(HOST, SIZE, b"X-Folded: a", b" b"),
    "folded length": raw(HOST, b"Content-Length:", b" %d" % len(BODY)),
    "folded first header": raw(b" Host: balancer", SIZE),
    "bare LF": raw(HOST, SIZE).replace(b"\r\n", b"\n"),
    "bare LF in the head": raw(HOST + b"\nX-Hidden: 1", SIZE),
    "bare LF at the head's end": raw(HOST, SIZE).replace(b"\r\n\r\n", b"\n\n"),
    "bare CR": raw(HOST + b"\rX-Hidden: 1", SIZE),
    "NUL in a value": raw(HOST, SIZE, b"X-Null: a\0b"),
    "NUL in a name": raw(HOST, SIZE, b"X-\0Null: a"),
    "NUL in the target": raw(HOST, SIZE, start=b"POST /v1/chat\0/completions HTTP/1.1"),
    "control character in a value": raw(HOST, SIZE, b"X-Bell: a\x07b"),
    "space before the colon": raw(HOST, SIZE.replace(b":", b" :")),
    "tab before the colon": raw(HOST, SIZE.replace(b":", b"\t:")),
    "no colon": raw(HOST, SIZE, b"X-Nothing"),
    "no name": raw(HOST, SIZE, b": nothing"),
    "space in a name": raw(HOST, SIZE, b"X Space: a"),
    "gzip, chunked": raw(HOST, b"Transfer-Encoding: gzip, chunked", body=chunked(BODY)),
    "chunked, gzip": raw(HOST, b"Transfer-Encoding: chunked, gzip", body=chunked(BODY)),
    "chunked twice": raw(HOST, b"Transfer-Encoding: chunked, chunked", body=chunked(BODY)),
    "chunked in two headers": raw(HOST, *[b"Transfer-Encoding: chunked"] * 2, body=chunked(BODY)),
    "chunked and identity": raw(HOST, *[b"Transfer-Encoding: " + k for k in (b"chunked", b"identity")], body=BODY),
    "identity": raw(HOST, b"Transfer-Encoding: identity"),
    "unknown coding": raw(HOST, b"Transfer-Encoding: xchunked", body=chunked(BODY)),
    "coding with a vertical tab": raw(HOST, b"Transfer-Encoding: \x0bchunked", body=chunked(BODY)),
    "empty coding": raw(HOST, b"Transfer-Encoding: ", SIZE),
    "HTTP/0.9": b"POST /v1/chat/completions\r\n\r\n",
    "HTTP/2.0": raw(HOST, SIZE, start=b"POST /v1/chat/completions HTTP/2.0"),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": raw(HOST, SIZE, start=b"POST /v1/chat/completions HTTP/1.2"),
    "HTTP/3": raw(HOST, SIZE, start=b"POST /v1/chat/completions HTTP/3"),
    "lower-case protocol": raw(HOST, SIZE, start=b"POST /v1/chat/completions http/1.1"),
    "no version and a space": raw(HOST, SIZE, start=b"POST /v1/chat/completions "),
    "space in the target": raw(HOST, SIZE, start=b"POST /v1/chat/completions x HTTP/1.1"),
    "HTTP/1.0 and chunked": raw(
        HOST, b"Transfer-Encoding: chunked", start=b"POST /v1/chat/completions HTTP/1.0", body=chunked(BODY)
    ),
    "no Host": raw(SIZE),
    "two Hosts": raw(HOST, HOST, SIZE),
    "two Hosts that differ": raw(HOST, SIZE, b"Host: elsewhere"),
    "two Hosts in one": raw(HOST + b", elsewhere", SIZE),
    "chunk size that is none": raw(HOST, b"Transfer-Encoding: chunked", body=b"5g\r\nhello\r\n0\r\n\r\n"),
    "negative chunk size": raw(HOST, b"Transfer-Encoding: chunked", body=b"-5\r\nhello\r\n0\r\n\r\n"),
    "prefixed chunk size": raw(HOST, b"Transfer-Encoding: chunked", body=b"0x5\r\nhello\r\n0\r\n\r\n"),
    "chunk size beyond 64 bits": raw(HOST, b"Transfer-Encoding: chunked", body=b"f" * 17 + b"\r\nhello"),
    "chunk longer than it says": raw(HOST, b"Transfer-Encoding: chunked", body=b"3\r\nhello\r\n0\r\n\r\n"),
    "chunk with bare LF": raw(HOST, b"Transfer-Encoding: chunked", body=b"5\nhello\n0\n\n"),
    "chunk extension with bare LF": raw(HOST, b"Transfer-Encoding: chunked", body=b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
    "empty chunk size": raw(HOST, b"Transfer-Encoding: chunked", body=b"\r\nhello\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("data", FRAMING.values(), ids=FRAMING.keys())
async def test_framing_that_can_be_read_two_ways_is_refused_and_closes(
    balancer: Balancer, node: FakeNode, data: bytes
) -> None:
    answer = await refused(balancer, data)
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert node.requests == []


@pytest.mark.parametrize(
    ("start", "status", "code"),
    [
        (b"CONNECT example.org:443 HTTP/1.1", 404, "not_found"),
        (b"POST http://elsewhere/v1/chat/completions HTTP/1.1", 404, "not_found"),
        (b"POST //elsewhere/v1/chat/completions HTTP/1.1", 404, "not_found"),
        (b"OPTIONS * HTTP/1.1", 404, "not_found"),
        (b"BREW /v1/chat/completions HTTP/1.1", 405, "method_not_allowed"),
        (b"post /v1/chat/completions HTTP/1.1", 405, "method_not_allowed"),
        (b"POST\t/v1/chat/completions HTTP/1.1", 405, "method_not_allowed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS handshake", 405, "method_not_allowed"),
    ],
)
async def test_a_target_or_method_of_another_kind_goes_nowhere(
    balancer: Balancer, node: FakeNode, start: bytes, status: int, code: str
) -> None:
    answer = await refused(balancer, raw(HOST, SIZE, start=start))
    assert (answer.status, answer.code) == (status, code)
    assert node.requests == []


# -- limits of the head


@pytest.mark.parametrize(
    "data",
    [
        raw(HOST, SIZE, b"X-Large: " + b"x" * 65536),
        raw(HOST, SIZE, *[b"X-%d: 1234567890" % n for n in range(4000)]),
        raw(HOST, SIZE, b"X-" + b"n" * 65536 + b": 1"),
        b"POST /v1/chat/completions HTTP/1.1\r\nX-Endless: " + b"x" * 70000,
        b"POST /v1/chat/completions HTTP/1.1\r\n" + b"X-Endless: x\r\n" * 6000,
    ],
    ids=["large value", "many headers", "large name", "endless value", "endless headers"],
)
async def test_a_head_over_the_limit_is_431(balancer: Balancer, node: FakeNode, data: bytes) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(data)
    assert (answer.status, answer.code) == (431, "headers_too_large")
    assert await wire.ends() == b""
    assert node.requests == []


async def test_a_head_within_the_limit_is_taken(balancer: Balancer, node: FakeNode) -> None:
    answer = await ask(balancer, chat(), CHAT, "x-large: " + "x" * 60000)
    assert answer.status == 200
    assert len(node.requests) == 1


async def test_a_long_target_is_414_and_one_within_the_limit_is_taken(balancer: Balancer, node: FakeNode) -> None:
    answer = await ask(balancer, chat(), CHAT + "?q=" + "x" * URI_BYTES)
    assert (answer.status, answer.code) == (414, "uri_too_long")
    assert node.requests == []
    target = CHAT + "?q=" + "x" * (URI_BYTES - 100)
    assert (await ask(balancer, chat(), target)).status == 200
    assert node.requests[0].target == target


async def test_a_target_that_never_ends_is_414(balancer: Balancer) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(b"POST /" + b"x" * 9000)
    assert (answer.status, answer.code) == (414, "uri_too_long")


# -- what is taken


async def test_a_request_may_come_byte_by_byte(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    for byte in post(chat()):
        wire.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await wire.answer()).status == 200
    assert [request.body for request in node.requests] == [BODY]


async def test_a_chunked_body_goes_on_with_its_length_and_without_extensions_or_trailers(
    balancer: Balancer, node: FakeNode
) -> None:
    parts = b"".join(b'1;name="value"\r\n%c\r\n' % byte for byte in BODY)
    trailers = b"0\r\nX-Trailer: 1\r\nAuthorization: Bearer x\r\nOpenAI-Beta: x\r\n\r\n"
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(parts + trailers, CHAT, "Transfer-Encoding: Chunked"))
    assert answer.status == 200
    (request,) = node.requests
    assert request.body == BODY
    assert request.header("content-length") == str(len(BODY))
    assert {name.lower() for name, _ in request.headers}.isdisjoint(
        {"transfer-encoding", "x-trailer", "authorization", "openai-beta"}
    )
    assert (await wire.ask(post(chat()))).status == 200  # nothing was left of it


async def test_empty_lines_before_a_request_are_passed_over(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    assert (await wire.ask(b"\r\n\r\n" + post(chat()))).status == 200
    assert len(node.requests) == 1


@pytest.mark.parametrize("lines", [["Upgrade: websocket"], ["Upgrade: h2c", "Connection: Upgrade"]])
async def test_upgrade_is_ignored_and_the_body_is_a_body(balancer: Balancer, node: FakeNode, lines: list[str]) -> None:
    wire = await Wire.to(balancer)
    wire.send(post(chat(), CHAT, *lines) + get("/healthz", *lines) + post(chat("again")))
    assert [(await wire.answer()).status for _ in range(3)] == [200, 200, 200]
    assert [request.body for request in node.requests] == [BODY, json.dumps(chat("again")).encode()]
    assert all(request.header("upgrade") is None for request in node.requests)


async def test_what_else_connection_says_holds_for_an_upgrade(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(chat(), CHAT, "Upgrade: h2c", "Connection: Upgrade, Baggage, close", "Baggage: a=b"))
    assert (answer.status, answer.header("connection")) == (200, "close")
    assert await wire.ends() == b""
    assert node.requests[0].header("baggage") is None


async def test_the_body_of_an_upgrade_is_never_read_as_a_request(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    hidden = post(chat("hidden"))
    for _ in range(2):
        answer = await wire.ask(post(hidden, CHAT, "Upgrade: h2c", "Connection: Upgrade"))
        assert (answer.status, answer.code) == (400, "invalid_json")
    assert (await wire.ask(get("/healthz"))).json == {"status": "ok"}
    assert node.requests == []
