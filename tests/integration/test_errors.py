"""Every error of the data port: its status, code, type, Retry-After and form."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
import structlog

from balancer.log import set_up
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import dead_url
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, key, told
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, chunked, get, post

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
    keys = auth(key("k", "acme", requests_per_minute=1, burst=8))
    balancer = await serve(node, **keys, limits={"body_bytes": 1000})
    assert in_form(await ask(balancer, body, path), form) == (401, "unauthenticated")
    assert in_form(await ask(balancer, body, path, bearer("k"), "Content-Encoding: br"), form) == (
        415,
        "unsupported_encoding",
    )
    assert in_form(await ask(balancer, b"", path, bearer("k"), "Content-Length: 1001"), form) == (413, "body_too_large")
    assert in_form(await ask(balancer, body, path, bearer("k"), "X-Balancer-Cache: x"), form) == (400, "invalid_header")
    assert in_form(await ask(balancer, b"{", path, bearer("k")), form) == (400, "invalid_json")
    assert in_form(await ask(balancer, {**body, "model": "x"}, path, bearer("k")), form) == (404, "unknown_model")
    assert node.requests == []
    node.faults.add(Fault("status", status=500))
    assert in_form(await ask(balancer, body, path, bearer("k")), form) == (502, "upstream_bad_answer")
    node.faults.clear()
    node.faults.add(Fault("status", status=503))
    assert in_form(await ask(balancer, body, path, bearer("k")), form) == (503, "no_eligible_node")


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
    balancer = await serve(node, timeouts={"first_byte_s": 0.1, "unary_s": 0.1} if fault.kind == "hang" else {})
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


def test_a_traceback_on_a_console_shows_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    before = structlog.get_config()
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    try:
        set_up("info", "console")
        prompt = " ".join(("somebody's", "prompt"))
        try:
            raise RuntimeError(f"{len(prompt)}")
        except RuntimeError:
            structlog.get_logger().exception("request.crashed")
    finally:
        structlog.configure(**before)
    assert "RuntimeError" in shown.getvalue()
    assert prompt not in shown.getvalue()


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
