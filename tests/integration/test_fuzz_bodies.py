"""Any body on any path is understood or refused as the client's fault, and nothing that reads it later raises."""

from __future__ import annotations

import json
from functools import cache
from random import Random
from typing import Any
from unittest.mock import Mock

from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.auth import Auth
from balancer.core import cache_key, prompt_blocks
from balancer.core.poison import fingerprint
from balancer.core.request import InferenceRequest
from balancer.errors import BalancerError
from balancer.intake import Intake
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.server import ENDPOINTS
from balancer.settings import Settings
from balancer.wire.inbound_request import InboundRequest

SETTINGS = Settings(
    nodes=({"url": "http://127.0.0.1:9", "models": ["m"]},),  # type: ignore[arg-type]
    models=({"name": "m", "aliases": ["alias"]},),  # type: ignore[arg-type]
)
NAMES = ["model", "messages", "prompt", "input", "stream", "stream_options", "n", "max_tokens", "role", "content"]
MORE_NAMES = ["temperature", "seed", "tools", "stop", "parameters", "include_usage", "text", "type", "x", "é"]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.sampled_from(["m", "alias", "", "user", "assistant", "text", "\u0000", "é" * 40]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES + MORE_NAMES), inner, max_size=6),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES + MORE_NAMES), JSON, max_size=8).map(
    lambda value: {"model": "m"} | value
)
# JSON, JSON with a few bytes put in or taken out, and anything.
CUTS = [
    b'"',
    b"{",
    b"[",
    b"]" * 40,
    b"[" * 400,
    b"9" * 5000,
    b"\\",
    b"\\ud800",
    b"NaN",
    b"\xff",
    b"\0",
    b',"model":"x"',
    b"",
]


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    body = json.dumps(draw(OBJECTS), ensure_ascii=draw(st.booleans())).encode()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.sampled_from(CUTS)) + body[at + draw(st.integers(0, 3)) :]
    return body


@cache
def intake() -> Intake:
    registry = Registry(
        routing=SETTINGS.routing,
        breaker=SETTINGS.breaker,
        health=SETTINGS.health,
        stale_s=5.0,
        metrics=Metrics(),
        now=lambda: 0.0,
        rng=Random(1),
    )
    for node in SETTINGS.nodes:
        registry.put(node)
    return Intake(SETTINGS, registry, Auth(SETTINGS.auth))


def understood(path: bytes, body: bytes) -> InferenceRequest:
    inbound = InboundRequest(Mock(), 0.0)
    inbound.method, inbound.target, inbound.body = b"POST", path, body
    inbound.headers = {b"content-type": b"multipart/form-data; boundary=x" if b"audio" in path else b"application/json"}
    inbound.context = intake().head(ENDPOINTS[path], inbound, None)
    return intake().understand(inbound, "id")


@settings(max_examples=250, deadline=None)
@given(path=st.sampled_from(sorted(ENDPOINTS)), body=bodies() | st.binary(max_size=60))
def test_any_body_is_understood_or_the_clients_fault(path: bytes, body: bytes) -> None:
    try:
        request = understood(path, body)
    except BalancerError as error:
        status = error.status
    else:
        status = 200
        read(path, request)
    assert status < 500


def read(path: bytes, request: InferenceRequest) -> None:
    assert request.choices >= 1
    assert request.max_tokens() >= 1
    assert request.prompt_tokens() >= 1.0
    assert len(fingerprint(request.tenant.id, path.decode(), request.model, request.body)) == 64
    prompt_blocks.read(request.parsed, len(request.body), request.model)
    if cache_key.not_cacheable(request, everything=True, rule=None) is None:
        assert len(key_of(request)) == 64


def key_of(request: InferenceRequest) -> str:
    return cache_key.derive(
        tenant="t",
        endpoint=request.endpoint.path,
        query=request.query,
        model=request.model,
        revision=None,
        headers=request.forward,
        body=request.body,
        parsed=request.parsed,
        exact=request.is_exact,
    )


@settings(max_examples=200, deadline=None)
@given(body=OBJECTS, usage=st.booleans())
def test_a_node_gets_what_the_client_said_and_no_more(body: dict[str, Any], usage: bool) -> None:
    body |= {"stream": True, "model": "m"} | ({"stream_options": {"include_usage": True}} if usage else {})
    try:
        request = understood(b"/v1/chat/completions", json.dumps(body).encode())
    except BalancerError:
        return
    assert json.loads(request.body) == json.loads(json.dumps(body))
    if request.usage_body is not None:
        sent = json.loads(request.usage_body)
        assert sent.pop("stream_options")["include_usage"] is True
        assert sent == {name: value for name, value in json.loads(request.body).items() if name != "stream_options"}
