"""Every error of the data port: its status, code, type, Retry-After and form, and that no node heard of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import dead_url
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, chunked, get, post

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "overloaded_error",
}


def told(answer: Answer) -> tuple[int, str | None]:
    """Status and code; the rest of an error's form is checked."""
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-request-id")
    retry_after = answer.header("retry-after")
    if answer.status in (429, 503):
        assert retry_after is not None
        assert int(retry_after) >= 1
    else:
        assert retry_after is None
    code = answer.code
    assert answer.json["error"]["type"] == TYPES.get(answer.status, answer.json["error"]["type"])
    assert "127.0.0.1" not in answer.body.decode()
    return answer.status, code


def key_of(tenant: str, key: str, **limits: Any) -> dict[str, Any]:
    return {"tenant": tenant, "sha256": hashlib.sha256(key.encode()).hexdigest(), **limits}


# -- refused before any node


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


# -- sizes


async def test_a_body_over_the_limit_is_413_before_it_is_read(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, limits={"body_bytes": 1000})
    body = json.dumps(chat("x" * 2000)).encode()
    for data in (
        post(b"", CHAT, "Content-Length: 1001"),
        post(b"", CHAT, "Content-Length: 100000000000"),
        post(chunked(body), CHAT, "Transfer-Encoding: chunked"),
        post(b"3e9\r\n" + body[:1001], CHAT, "Transfer-Encoding: chunked"),
    ):
        wire = await Wire.to(balancer)
        assert told(await wire.ask(data)) == (413, "body_too_large")
        assert await wire.ends() == b""
    assert node.requests == []
    exact = json.dumps(chat()).encode().ljust(1000)
    assert (await ask(balancer, exact)).status == 200
    assert (await ask(balancer, chunked(exact), CHAT, "Transfer-Encoding: chunked")).status == 200
    assert balancer.app.port.buffered.bytes == 0


async def test_beyond_buffered_bytes_large_bodies_are_503_and_small_ones_are_served(
    node: FakeNode, serve: Serve
) -> None:
    balancer = await serve(node, limits={"buffered_bytes": 1048576})
    buffered = balancer.app.port.buffered
    filler = await Wire.to(balancer)
    filler.send(post(b"x" * 1_048_000, CHAT, "Content-Length: 2000000"))
    await balancer.wait_for(lambda: buffered.bytes == 1_048_000)
    answer = await ask(balancer, chat("x" * 200_000))
    assert answer.status == 503
    assert told(answer)[1] == "queue_full"
    assert (await ask(balancer, chat())).status == 200
    assert len(node.requests) == 1
    filler.leave()
    await balancer.wait_for(lambda: buffered.bytes == 0)
    assert (await ask(balancer, chat("x" * 200_000))).status in (200, 400)
    assert len(node.requests) == 2


# -- in each dialect's form


DIALECTS: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, chat(), "openai"),
    ("/v1/completions", {"model": MODEL, "prompt": "x"}, "openai"),
    ("/v1/embeddings", {"model": MODEL, "input": "x"}, "openai"),
    ("/v1/rerank", {"model": MODEL, "query": "x", "documents": ["y"]}, "openai"),
    ("/v1/responses", {"model": MODEL, "input": "x"}, "openai"),
    ("/v1/messages", chat(), "anthropic"),
    ("/generate", {"inputs": "x"}, "tgi"),
    ("/generate_stream", {"inputs": "x"}, "tgi"),
]
ANTHROPIC_TYPES = {400: "invalid_request_error", 401: "authentication_error", 415: "invalid_request_error"}
ANTHROPIC_TYPES |= {413: "request_too_large", 502: "api_error", 503: "overloaded_error", 404: "not_found_error"}


def in_form(answer: Answer, form: str) -> tuple[int, str]:
    """Status and code of an error, whose form has to be the dialect's."""
    data = answer.json
    if form == "anthropic":
        assert set(data) >= {"type", "error"}, data
        assert (data["type"], data["error"]["type"]) == ("error", ANTHROPIC_TYPES[answer.status])
        assert data["error"]["message"]
        return answer.status, data["error"]["code"]
    if form == "tgi":
        assert set(data) == {"error", "error_type"}, data
        assert isinstance(data["error"], str)
        return answer.status, data["error_type"]
    code = answer.code
    assert code is not None
    return answer.status, code


@pytest.mark.parametrize(("path", "body", "form"), DIALECTS, ids=[path for path, _, _ in DIALECTS])
async def test_errors_have_the_dialects_form(
    node: FakeNode, serve: Serve, path: str, body: dict[str, Any], form: str
) -> None:
    keys = {"keys": [key_of("acme", "k", requests_per_minute=1, burst=8)]}
    balancer = await serve(node, auth=keys, limits={"body_bytes": 1000})
    key = "Authorization: Bearer k"
    assert in_form(await ask(balancer, body, path), form) == (401, "unauthenticated")
    assert in_form(await ask(balancer, body, path, key, "Content-Encoding: br"), form) == (415, "unsupported_encoding")
    assert in_form(await ask(balancer, b"", path, key, "Content-Length: 1001"), form) == (413, "body_too_large")
    assert in_form(await ask(balancer, body, path, key, "X-Balancer-Cache: x"), form) == (400, "invalid_header")
    assert in_form(await ask(balancer, b"{", path, key), form) == (400, "invalid_json")
    assert in_form(await ask(balancer, {**body, "model": "x"}, path, key), form) == (404, "unknown_model")
    assert node.requests == []
    node.faults.add(Fault("status", status=500))
    assert in_form(await ask(balancer, body, path, key), form) == (502, "upstream_bad_answer")
    node.faults.clear()
    node.faults.add(Fault("status", status=503))
    assert in_form(await ask(balancer, body, path, key), form) == (503, "no_eligible_node")


# -- the balancer and its nodes


async def test_no_node_that_accepts_is_503_no_eligible_node(serve: Serve) -> None:
    balancer = await serve(*({"url": dead_url(), "models": [MODEL]} for _ in range(3)))
    for number in range(5):
        assert told(await ask(balancer, chat(str(number)))) == (503, "no_eligible_node")


async def test_no_nodes_at_all_is_503_no_eligible_node(serve: Serve) -> None:
    assert told(await ask(await serve(), chat())) == (503, "no_eligible_node")


@pytest.mark.parametrize(
    ("fault", "fields", "status", "code"),
    [
        (Fault("reset"), {}, 502, "upstream_unreachable"),
        (Fault("garbage"), {}, 502, "upstream_bad_answer"),
        (Fault("truncated"), {}, 502, "upstream_truncated"),
        (Fault("cut", after_events=1), {"stream": True}, 502, "upstream_truncated"),
        (Fault("status", status=401), {}, 502, "upstream_bad_answer"),
        (Fault("status", status=429), {}, 429, "rate_limited"),
        (Fault("hang"), {"stream": True}, 504, "first_token_timeout"),
        (Fault("hang"), {}, 504, "first_token_timeout"),
    ],
)
async def test_what_a_node_does_wrong_has_a_code(
    node: FakeNode, serve: Serve, fault: Fault, fields: dict[str, Any], status: int, code: str
) -> None:
    node.faults.add(fault)
    balancer = await serve(node, timeouts={"first_byte_s": 0.1, "unary_s": 0.1})
    answer = await ask(balancer, chat(**fields))
    assert told(answer) == (status, code)
    assert (answer.header("x-balancer-attempts"), answer.header("x-balancer-node")) == ("1", None)
    assert len(node.requests) == 1


async def test_a_deadline_that_passes_is_504(balancer: Balancer, node: FakeNode) -> None:
    node.faults.add(Fault("hang"))
    answer = await ask(balancer, chat(), CHAT, "X-Balancer-Timeout-S: 0.1")
    assert told(answer) == (504, "deadline_exceeded")
    await node.wait_for(lambda: node.cancelled == 1)


async def test_asking_for_a_stored_answer_only_is_504_where_there_is_none(balancer: Balancer, node: FakeNode) -> None:
    for body in (chat(), chat(temperature=1)):
        answer = await ask(balancer, body, CHAT, "X-Balancer-Cache: only")
        assert told(answer) == (504, "cache_miss")
    assert node.requests == []


@pytest.mark.parametrize("part", ["cache.plan", "admission.admit"])
async def test_a_bug_of_ours_is_500_without_its_details(
    balancer: Balancer, node: FakeNode, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("the secret of 127.0.0.1")

    owner, name = part.split(".")
    wire = await Wire.to(balancer)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(balancer.app, owner), name, broken)
        answer = await wire.ask(post(chat()))
        assert told(answer) == (500, "internal")
        assert "secret" not in answer.body.decode()
        assert node.requests == []
    assert (await wire.ask(post(chat()))).status == 200


# -- shutting down; the rest of it is in test_drain.py


async def test_a_kept_connection_is_told_503_draining_after_the_listener_closed(
    balancer: Balancer, node: FakeNode
) -> None:
    wire = await Wire.to(balancer)
    assert (await wire.ask(post(chat()))).status == 200
    balancer.app.port.begin_drain()
    balancer.app.port.close_listener()
    answer = await wire.ask(post(chat("late")))
    assert told(answer) == (503, "draining")
    assert answer.header("connection") == "close"
    assert await wire.ends() == b""
    assert len(node.requests) == 1


async def test_while_draining_requests_are_served_and_health_says_so(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    assert (await wire.ask(get("/healthz"))).json == {"status": "ok"}
    balancer.app.port.begin_drain()
    answer = await wire.ask(post(chat()))
    assert (answer.status, answer.header("connection")) == (200, "close")
    assert await wire.ends() == b""
    answer = await (await Wire.to(balancer)).ask(get("/healthz"))
    assert (answer.status, answer.json) == (503, {"status": "draining"})


async def test_what_is_cut_by_a_shutdown_is_told_so(balancer: Balancer, node: FakeNode) -> None:
    node.faults.add(Fault("hang"))
    wire = await Wire.to(balancer)
    wire.send(post(chat()))
    await node.wait_for(lambda: node.in_flight == 1)
    balancer.app.port.begin_drain()
    balancer.app.port.close_listener()
    balancer.app.port.cut_all()
    answer = await wire.answer()
    assert told(answer) == (503, "draining")
    assert await wire.ends() == b""
    await node.wait_for(lambda: node.cancelled == 1)
