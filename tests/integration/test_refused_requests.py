"""Requests that are refused before any node: bodies, headers, paths, methods, encodings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from tests.harness import Balancer
from tests.integration.asking import told
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, get, post

BAD_BODIES = {
    "empty": b"",
    "cut": b'{"model":"sim-model"',
    "no object": b"[]",
    "text": b'"x"',
    "number": b"1",
    "null": b"null",
    "two objects": b"{}{}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "invalid UTF-8": b'{"a":"\xff"}',
    "overlong UTF-8": b'{"a":"\xc0\xaf"}',
    "single quotes": b"{'a':1}",
    "trailing comma": b'{"a":1,}',
    "comment": b'{"a":1}//x',
    "leading zero": b'{"a":01}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b'{"a":[-Infinity]}',
    "float beyond all floats": b'{"a":1e400}',
    "raw newline in a string": b'{"a":"x\ny"}',
    "lone high surrogate": b'{"a":"\\ud800"}',
    "lone low surrogate": b'{"a":"\\udc00 x"}',
    "surrogates the wrong way round": b'{"a":"\\udc00\\ud800"}',
    "lone surrogate in a name": b'{"\\ud800":1}',
    "raw surrogate": b'{"a":"\xed\xa0\x80"}',
    "deep lists": b'{"a":' + b"[" * 200 + b"]" * 200 + b"}",
    "deep objects": b'{"a":' * 129 + b"1" + b"}" * 129,
    "deep and never closed": b'{"a":' + b"[" * 100_000,
    "a huge number": b'{"a":' + b"9" * 5000 + b"}",
    "a huge fraction": b'{"a":0.' + b"9" * 5000 + b"}",
    "a huge exponent": b'{"a":1e' + b"9" * 5000 + b"}",
    "a name twice": b'{"model":"sim-model","temperature":0,"temperature":1}',
    "a name twice, once escaped": b'{"model":"sim-model","mod\\u0065l":"other"}',
}


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
async def test_a_body_that_is_no_plain_json_object_is_400(
    balancer: Balancer, node: FakeNode, body: bytes, path: str
) -> None:
    wire = await Wire.to(balancer)
    assert told(await wire.ask(post(body, path))) == (400, "invalid_json")
    assert (await wire.ask(post(chat()))).status == 200  # the connection is none the worse
    assert len(node.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":"%b"' % (b"x" * 2_000_000),
        b"[%b1]" % (b"1," * 1_000_000),
        b'{"a":%b1}' % (b"[" * 1_500_000),
        b"1" * 2_000_000,
    ],
    ids=["cut", "list", "deep", "number"],
)
async def test_a_large_body_that_is_no_json_object_is_400(balancer: Balancer, node: FakeNode, body: bytes) -> None:
    wire = await Wire.to(balancer)
    wire.send(post(body) + get("/healthz") + post(chat()))
    assert told(await wire.answer()) == (400, "invalid_json")
    assert [(await wire.answer()).status for _ in range(2)] == [200, 200]
    assert len(node.requests) == 1


async def test_json_up_to_the_limits_is_taken(balancer: Balancer, node: FakeNode) -> None:
    for extra in ("[" * 127 + "]" * 127, "9" * 300, '"' + "[" * 500 + '"', '"' + "9" * 9000 + '"'):
        body = json.dumps(chat()).replace("}]", f'}}],"extra":{extra}', 1).encode()
        assert (await ask(balancer, body)).status == 200
        assert node.requests[-1].body == body


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"model": 7}, "model"), ({"model": [MODEL]}, "model"), ({"stream": "yes"}, "stream"), ({"stream": 1}, "stream")],
)
async def test_a_field_that_we_read_and_cannot_is_400(
    balancer: Balancer, node: FakeNode, fields: dict[str, Any], param: str
) -> None:
    answer = await ask(balancer, chat(**fields))
    assert told(answer) == (400, "invalid_request")
    assert answer.json["error"]["param"] == param
    assert node.requests == []


@pytest.mark.parametrize(
    "line",
    [
        *[f"X-Balancer-Timeout-S: {value}" for value in ("", "0", "-1", "nan", "inf", "1_0", "0x5", "5s", "1, 2")],
        *[f"X-Balancer-Cache-TTL-S: {value}" for value in ("", "0", "-5", "never")],
        *[f"X-Balancer-Priority: {value}" for value in ("", "urgent", "1", "high, low")],
        *[f"X-Balancer-Cache: {value}" for value in ("", "no-cache", "bypass, refresh", "default")],
        *[f"X-Balancer-Session: {value}" for value in ("", "a b", "s" * 129, "é")],
        *[f"X-Request-Id: {value}" for value in ("", "a b", "i" * 129, "é", "a\tb")],
    ],
)
async def test_an_invalid_header_is_400_and_named(balancer: Balancer, node: FakeNode, line: str) -> None:
    answer = await ask(balancer, chat(), CHAT, line)
    assert told(answer) == (400, "invalid_header")
    assert answer.json["error"]["param"] == line.partition(":")[0].lower()
    assert node.requests == []


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/v1", "/v1/chat", "/v1/chat/completions/", "/v1/chat//completions", "//v1/chat/completions"),
        *("/V1/chat/completions", "/v1/%63hat/completions", "/v1/./chat/completions", "/x/../v1/chat/completions"),
        *("/v1/chat/completions;x", "/v1/models/", "/v1/files", "/metrics", "/readyz", "/dashboard", "/admin/nodes"),
        *("/health", "/agent/v1/report", "/sim/faults", "/v1/chat/completions%3Fx", "/v1/embeddings%00"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_any_other_path_is_404(balancer: Balancer, node: FakeNode, path: str, method: str) -> None:
    assert told(await ask(balancer, chat(), path, method=method)) == (404, "not_found")
    assert node.requests == []


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        *[(method, CHAT, "POST") for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")],
        *[(method, "/v1/models", "GET, HEAD") for method in ("POST", "DELETE", "OPTIONS")],
        ("DELETE", "/v1/models/sim-model", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("GET", "/v1/embeddings", "POST"),
    ],
)
async def test_any_other_method_is_405_and_told_what_is_allowed(
    balancer: Balancer, node: FakeNode, method: str, path: str, allow: str
) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(get(path, method=method))
    assert (answer.status, answer.header("allow")) == (405, allow)
    assert await wire.ends() == b""
    assert method == "HEAD" or told(answer) == (405, "method_not_allowed")
    assert node.requests == []


async def test_head_is_answered_as_get_without_a_body(balancer: Balancer) -> None:
    wire = await Wire.to(balancer)
    for path, status in (("/healthz", 200), ("/v1/models", 200), ("/v1/models/none", 404), ("/v1/nothing", 404)):
        like_get = await (await Wire.to(balancer)).ask(get(path))
        if status == 404 and path == "/v1/nothing":
            wire = await Wire.to(balancer)
        answer = await wire.ask(get(path, method="HEAD"))
        assert (like_get.status, answer.status) == (status, status)
        assert answer.header("content-length") == str(len(like_get.body))
        assert answer.body == b""


async def test_only_allowed_origins_are_answered_in_cors(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cors={"allow_origins": ["https://good.example"]})
    asking = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization")
    wire = await Wire.to(balancer)
    answer = await wire.ask(get(CHAT, "Origin: https://good.example", *asking, method="OPTIONS"))
    assert (answer.status, answer.header("access-control-allow-origin")) == (204, "https://good.example")
    assert answer.header("access-control-allow-methods") == "POST"
    answer = await wire.ask(post(chat(), CHAT, "Origin: https://good.example"))
    assert (answer.status, answer.header("access-control-allow-origin")) == (200, "https://good.example")
    for origin in ("https://evil.example", "https://good.example.evil", "null"):
        refused = await (await Wire.to(balancer)).ask(get(CHAT, f"Origin: {origin}", *asking, method="OPTIONS"))
        assert (refused.status, refused.header("access-control-allow-origin")) == (405, None)


async def test_a_body_with_a_content_encoding_is_415(balancer: Balancer, node: FakeNode) -> None:
    for coding in ("gzip", "deflate", "br", "zstd", "x", "identity, gzip"):
        assert told(await ask(balancer, chat(), CHAT, f"Content-Encoding: {coding}")) == (415, "unsupported_encoding")
    assert node.requests == []
    assert (await ask(balancer, chat(), CHAT, "Content-Encoding: identity")).status == 200
