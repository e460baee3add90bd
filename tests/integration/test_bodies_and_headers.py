"""What of a request reaches a node, byte for byte and header by header."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.connection import Request
from loadtest.fake_node import FakeNode
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, get, post
from tests.integration.scripted_node import ScriptedNode, ok, streamed

GOOD = {"id": "x", "object": "chat.completion", "choices": []}
STREAM = [
    b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]


# -- bodies


@pytest.mark.parametrize(
    "body",
    [
        b'{ "model":"sim-model",\r\n\t"messages":[ {"content":"h\\u00e9 \\ud83d\\ude42 \\/","role":"user"} ] }\n ',
        '{"model":"sim-model","messages":[{"role":"user","content":"é 🙂 \x7f"}]}'.encode(),
        b'{"model":"sim-model","messages":[{"role":"user","content":"x"}],"seed":18446744073709551617,"a":1.0,"b":1E0,"c":-0}',
        b'{"model":"sim-model","messages":[{"role":"user","content":"x"}],"unknown":{"deep":[[[{}]]]},"null":null,"":""}',
    ],
    ids=["spacing and escapes", "raw UTF-8", "numbers", "unknown fields"],
)
async def test_a_body_reaches_the_node_byte_for_byte(balancer: Balancer, node: FakeNode, body: bytes) -> None:
    answer = await ask(balancer, body)
    assert answer.status == 200, answer.body
    assert [request.body for request in node.requests] == [body]


@pytest.mark.parametrize("size", [70_000, 300_000, 1_500_000, 8_000_000])
async def test_a_large_body_reaches_the_node_byte_for_byte_and_is_cached(serve: Serve, size: int) -> None:
    body = b'{"model":"sim-model", "temperature":0,\n "messages":[{"role":"user","content":"%b"}]}' % (
        b"ab" * (size // 2)
    )
    async with ScriptedNode(ok(GOOD)) as node:
        balancer = await serve(node)
        assert [(await ask(balancer, body)).cache for _ in range(2)] == ["miss", "hit"]
        assert [request.body == body for request in node.requests] == [True]
        wire = await Wire.to(balancer)
        answer = await wire.ask(post(body + b" ", CHAT, "X-Balancer-Cache: bypass"))
        assert (answer.cache, answer.json) == ("bypass", GOOD)
        assert [request.body == body + b" " for request in node.requests[1:]] == [True]


@pytest.mark.parametrize("query", ["?a=b#c", "?%00%ff", "?a?b&c=d;e", "?'\"<>{}|\\^`", "?é"])
async def test_a_query_reaches_the_node_as_it_is_or_is_refused(balancer: Balancer, node: FakeNode, query: str) -> None:
    answer = await ask(balancer, chat(), CHAT + query)
    assert answer.status in (200, 400)
    assert [request.target for request in node.requests] == [CHAT + query] * (answer.status == 200)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 4}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ("/rerank", {"query": "x", "documents": ["y"]}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}),
        ("/score", {"text_1": "x", "text_2": "y"}),
        ("/v1/audio/speech", {"input": "x"}),
        ("/v1/images/generations", {"prompt": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": []}),
        ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 4}}),
        ("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 4}}),
        ("/pooling", {"input": "x"}),
        ("/classify", {"input": "x"}),
    ],
)
async def test_every_path_goes_to_the_node_as_it_is_with_its_query(
    balancer: Balancer, node: FakeNode, path: str, body: dict[str, Any]
) -> None:
    body = {"model": MODEL, **body}
    answer = await ask(balancer, body, f"{path}?beta=true&x=%20y")
    assert answer.status == 200, answer.body
    assert answer.body
    (request,) = node.requests
    assert request.target == f"{path}?beta=true&x=%20y"
    assert request.json() == body


def form(*parts: tuple[str, bytes]) -> bytes:
    lines = [b'--B\r\nContent-Disposition: form-data; name="%b\r\n\r\n%b\r\n' % (n.encode(), v) for n, v in parts]
    return b"".join(lines) + b"--B--\r\n"


SOUND = ('file"; filename="a.wav"\r\nContent-Type: audio/wav', bytes(range(256)) * 8)


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
async def test_an_upload_reaches_the_node_byte_for_byte(balancer: Balancer, node: FakeNode, path: str) -> None:
    body = form(('model"', MODEL.encode()), SOUND, ('language"', b"en"))
    answer = await ask(balancer, body, path, "Content-Type: multipart/form-data; boundary=B")
    assert answer.status == 200, answer.body
    assert answer.json["text"]
    (request,) = node.requests
    assert (request.body, request.header("content-type")) == (body, "multipart/form-data; boundary=B")
    assert answer.cache == "bypass"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(('model"', b"no-such-model"), SOUND), "multipart/form-data; boundary=B"),
        (form(('model"', MODEL.encode())), "multipart/form-data"),
        (form(('model"', MODEL.encode())), "application/json"),
    ],
    ids=["unknown model", "no boundary", "no form"],
)
async def test_an_upload_that_cannot_be_placed_is_refused(
    balancer: Balancer, node: FakeNode, body: bytes, kind: str
) -> None:
    answer = await ask(balancer, body, "/v1/audio/transcriptions", f"Content-Type: {kind}")
    assert answer.status in (400, 404)
    assert answer.code in ("invalid_request", "unknown_model")
    assert node.requests == []


# -- asking for usage


ASKED = '{"include_usage":true}'


@pytest.mark.parametrize(
    ("sent", "old", "new"),
    [
        ('{"stream": true, "a":1 }', "", f',"stream_options":{ASKED}'),
        ('{"stream":true, "stream_options" : null}', "null", ASKED),
        ('{"stream_options": {"include_usage" :false}, "stream":true}', '{"include_usage" :false}', ASKED),
        ('{"stream":true,"stream_options":{"x": 1}}', '{"x": 1}', '{"x":1,"include_usage":true}'),
        ('{"stream":true,"stream_options":{"include_usage":true} }', "", ""),
        ('{"stream":true,"stream_options":"what"}', "", ""),
    ],
)
async def test_usage_is_spliced_into_the_body_of_a_stream_that_lacks_it_and_nothing_else_changes(
    serve: Serve, sent: str, old: str, new: str
) -> None:
    async with ScriptedNode(streamed(*STREAM)) as node:
        assert (await ask(await serve(node), sent.encode())).status == 200
        reached = node.requests[0].body.decode()
        assert new in reached
        assert (reached.replace(new, old, 1) if new else reached) == sent


@pytest.mark.parametrize("sent", [b'{"stream":false, "x": 1}', b'{"stream": null}', b"{ }"])
async def test_usage_is_not_asked_for_where_there_is_no_stream(serve: Serve, sent: bytes) -> None:
    async with ScriptedNode(ok(GOOD)) as node:
        assert (await ask(await serve(node), sent)).status == 200
        assert node.requests[0].body == sent


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/generate_stream"])
async def test_other_dialects_are_not_asked_for_usage(balancer: Balancer, node: FakeNode, path: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "stream": True}
    body |= {"input": "x", "inputs": "x"}
    assert (await ask(balancer, body, path)).status == 200
    assert node.requests[0].json() == body


async def test_usage_is_not_asked_for_where_it_is_off(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, upstream={"ask_usage": False})
    answer = await ask(balancer, chat(stream=True))
    assert answer.events[-1] == "[DONE]"
    assert node.requests[0].json() == chat(stream=True)


async def test_a_node_that_refuses_stream_options_gets_the_clients_own_bodies_from_then_on(serve: Serve) -> None:
    refusal = ok({"error": {"message": "stream_options: unexpected field"}}, status="400 Bad Request")
    async with ScriptedNode(refusal, streamed(*STREAM)) as node:
        balancer = await serve(node)
        for text in ("one", "two"):
            answer = await ask(balancer, chat(text, stream=True))
            assert (answer.status, answer.body) == (200, b"".join(STREAM))
        asked = ["stream_options" in json.loads(request.body) for request in node.requests]
        assert asked == [True, False, False]
        assert json.loads(node.requests[1].body) == chat("one", stream=True)


# -- headers to nodes


def names(request: Request) -> list[str]:
    return sorted(name.lower() for name, _ in request.headers)


ALWAYS = ["accept-encoding", "content-length", "content-type", "host", "x-request-id"]


async def test_only_allowed_headers_reach_the_node(balancer: Balancer, node: FakeNode) -> None:
    allowed = {
        "Accept": "application/json, text/event-stream",
        "User-Agent": "client/1.0",
        "X-Request-Id": "id-1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "TraceState": "a=b",
        "baggage": "c=d",
        "anthropic-version": "2023-06-01",
        "Anthropic-Beta": "x",
        "OpenAI-Organization": "org",
        "openai-project": "proj",
    }
    others = (
        *("Authorization: Bearer secret", "X-Api-Key: secret", "Api-Key: secret", "Proxy-Authorization: Basic secret"),
        *("Cookie: secret=1", "X-Forwarded-For: 10.0.0.1", "Forwarded: for=10.0.0.1", "X-Real-IP: 10.0.0.1"),
        *("Via: 1.1 proxy", "Origin: http://x", "Referer: http://x", "Range: bytes=0-1", "If-None-Match: x"),
        *("TE: trailers", "Trailer: X", "Keep-Alive: timeout=5", "X-Custom: 1", "Accept-Language: de", "Host-X: 1"),
        *("X-Balancer-Priority: high", "X-Balancer-Session: s", "X-Balancer-Cache-TTL-S: 5", "X-Stainless-Lang: py"),
        *("Accept-Encoding: gzip, br", "Expect: 100-continue", "Content-Encoding: identity", "Content-Language: de"),
    )
    answer = await ask(balancer, chat(), CHAT, *(f"{name}: {value}" for name, value in allowed.items()), *others)
    assert answer.status == 200
    (request,) = node.requests
    assert sorted(name.lower() for name, _ in request.headers) == sorted(
        [*ALWAYS, *map(str.lower, {*allowed} - {"X-Request-Id"})]
    )
    assert {name: request.header(name) for name in allowed} == allowed
    assert request.header("accept-encoding") == "identity"
    assert request.header("host") == node.url.removeprefix("http://")
    assert not any("secret" in value for _, value in request.headers)


async def test_nothing_named_in_connection_reaches_the_node(balancer: Balancer, node: FakeNode) -> None:
    lines = ("Connection: keep-alive, Baggage , openai-project", "Connection: traceparent")
    lines = (*lines, "Baggage: a", "OpenAI-Project: b", "Traceparent: c", "Tracestate: d")
    assert (await ask(balancer, chat(), CHAT, *lines)).status == 200
    assert names(node.requests[0]) == sorted([*ALWAYS, "tracestate"])


async def test_operators_may_let_more_headers_through(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, upstream={"forward_headers": ["X-Custom", "accept-language"]})
    await ask(balancer, chat(), CHAT, "x-custom: 1", "Accept-Language: de", "X-Other: 2")
    assert names(node.requests[0]) == sorted([*ALWAYS, "accept-language", "x-custom"])


async def test_a_header_that_comes_twice_reaches_the_node_once_with_both_values(
    balancer: Balancer, node: FakeNode
) -> None:
    await ask(balancer, chat(), CHAT, "Baggage: a=1", "Baggage: b=2")
    assert node.requests[0].header("baggage") == "a=1, b=2"


async def test_a_node_gets_its_own_key_and_never_the_clients(node: FakeNode, serve: Serve) -> None:
    balancer = await serve({"url": node.url, "models": [MODEL], "api_key": "node-key"})
    await ask(balancer, chat(), CHAT, "Authorization: Bearer client-key")
    values = [value for name, value in node.requests[0].headers if name.lower() == "authorization"]
    assert values == ["Bearer node-key"]


async def test_a_nodes_path_prefix_stands_before_the_target(serve: Serve) -> None:
    async with ScriptedNode(ok(GOOD)) as node:
        balancer = await serve({"url": node.url + "/engines/7/", "models": [MODEL]})
        await ask(balancer, chat(), CHAT + "?a=b")
        assert node.requests[0].target == "/engines/7" + CHAT + "?a=b"


# -- request ids


async def test_a_request_id_is_echoed_sent_on_and_made_when_absent(balancer: Balancer, node: FakeNode) -> None:
    given = await ask(balancer, chat(), CHAT, "X-Request-Id: my~id-1")
    assert given.header("x-request-id") == "my~id-1"
    made = [(await ask(balancer, chat(str(n)))).header("x-request-id") for n in range(3)]
    assert len(set(made)) == 3
    assert all(made)
    assert [request.header("x-request-id") for request in node.requests] == ["my~id-1", *made]
    assert [facts["request_id"] for facts in balancer.requests] == ["my~id-1", *made]


@pytest.mark.parametrize("data", [post({}, "/v1/nothing"), post(b"{"), get("/v1/models"), post(chat(), "/healthz")])
async def test_every_answer_has_a_request_id(balancer: Balancer, data: bytes) -> None:
    wire = await Wire.to(balancer)
    data = data.replace(b"\r\n", b"\r\nX-Request-Id: mine\r\n", 1)
    assert (await wire.ask(data)).header("x-request-id") == "mine"
