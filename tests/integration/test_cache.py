"""The response cache as clients see it: what is shared, what never is, and in which form it comes back."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, post, text_of

COMPLETION = {"model": MODEL, "prompt": "x", "temperature": 0, "max_tokens": 6}
USAGE = {"stream_options": {"include_usage": True}}


def keys(*names: str) -> dict[str, Any]:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    return {"auth": {"keys": [{"tenant": name, "sha256": digest} for name, digest in digests.items()]}}


def said(answer: Answer) -> str:
    """The first choice's text, of a stream or a unary answer."""
    if (answer.header("content-type") or "").startswith("text/event-stream"):
        assert answer.events[-1] == "[DONE]"
        return text_of(answer.events[:-1])
    return str(answer.json["choices"][0]["message"]["content"])


async def caches(balancer: Balancer, *requests: tuple[Any, ...]) -> list[str | None]:
    """The cache's verdict on each request, one after the other."""
    answers = [await ask(balancer, *request) for request in requests]
    assert [answer.status for answer in answers] == [200] * len(answers)
    return [answer.cache for answer in answers]


# -- hits


async def test_an_equal_request_is_answered_from_the_cache(balancer: Balancer, node: FakeNode) -> None:
    first, second = [await ask(balancer, chat()) for _ in range(2)]
    assert (first.cache, second.cache) == ("miss", "hit")
    assert second.body == first.body
    assert (first.header("age"), second.header("age")) == (None, "0")
    assert (first.header("x-balancer-attempts"), second.header("x-balancer-attempts")) == ("1", "0")
    assert second.header("x-balancer-node") is None
    assert second.header("content-type") == first.header("content-type")
    assert second.header("x-request-id") != first.header("x-request-id")
    assert len(node.requests) == 1


@pytest.fixture
def written(balancer: Balancer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes, float]]:
    """What is put into the store, in order: name, value, lifetime."""
    puts: list[tuple[str, bytes, float]] = []
    put = balancer.app.store.put

    def note(name: str, value: bytes, ttl_s: float) -> None:
        puts.append((name, value, ttl_s))
        put(name, value, ttl_s)

    monkeypatch.setattr(balancer.app.store, "put", note)
    return puts


async def test_age_is_the_seconds_since_the_answer_was_stored(
    balancer: Balancer, written: list[tuple[str, bytes, float]]
) -> None:
    first = await ask(balancer, chat())
    ((name, value, ttl_s),) = written
    about = json.loads(value.partition(b"\n")[0])
    about[3] -= 90.0
    balancer.app.store.put(name, json.dumps(about).encode() + b"\n" + first.body, ttl_s)
    answer = await ask(balancer, chat())
    assert (answer.cache, answer.body) == ("hit", first.body)
    assert answer.header("age") in ("90", "91")


async def test_an_entry_that_was_soiled_is_a_miss(
    balancer: Balancer, node: FakeNode, written: list[tuple[str, bytes, float]]
) -> None:
    await ask(balancer, chat())
    name, value, ttl_s = written[0]
    for soiled in (b"x", b"\n", value[:-1], value + b" ", value.replace(b"[1,", b"[2,", 1), b"null\n", b"[]\n{}"):
        balancer.app.store.put(name, soiled, ttl_s)
        assert await caches(balancer, (chat(),), (chat(),)) == ["miss", "hit"]
    assert len(node.requests) == 8


async def test_hits_need_no_node_and_outlive_it(balancer: Balancer, node: FakeNode) -> None:
    first = await ask(balancer, chat())
    node.die()
    assert (await ask(balancer, chat())).body == first.body
    assert (await ask(balancer, chat("other"))).status in (502, 503)


@pytest.mark.parametrize("name", ["chat", "completions"])
@pytest.mark.parametrize("stored", [{}, {"stream": True}, {"stream": True, **USAGE}], ids=["unary", "stream", "usage"])
@pytest.mark.parametrize("wanted", [{}, {"stream": True}, {"stream": True, **USAGE}], ids=["unary", "stream", "usage"])
async def test_an_answer_comes_back_in_the_form_that_is_asked_for(
    balancer: Balancer, node: FakeNode, name: str, stored: dict[str, Any], wanted: dict[str, Any]
) -> None:
    body, path = (chat(), CHAT) if name == "chat" else (COMPLETION, "/v1/completions")
    first = await ask(balancer, {**body, **stored}, path)
    second = await ask(balancer, {**body, **wanted}, path)
    assert (first.cache, second.cache, second.status) == ("miss", "hit", 200)
    assert len(node.requests) == 1
    node.forget()
    await balancer.app.cache.delete(tenant=None, model=None, key=None)
    fresh = await ask(balancer, {**body, **wanted}, path)
    assert same_answer(second) == same_answer(fresh)
    id_ = first.json["id"] if not stored else first.events[0]["id"]
    assert (second.json["id"] if not wanted else second.events[0]["id"]) == id_
    kind = "text/event-stream" if wanted else "application/json"
    assert (second.header("content-type") or "").partition(";")[0] == kind


def same_answer(answer: Answer) -> tuple[Any, ...]:
    """What an answer says, apart from how it is cut into events: text, finish reasons, usage, the good end."""
    if answer.header("content-type") == "application/json":
        choice, usage = answer.json["choices"][0], answer.json["usage"]
        return choice.get("message", choice).get("content", choice.get("text")), choice["finish_reason"], usage
    *events, done = answer.events
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice.get("delta", choice).get("content", choice.get("text")) or "" for choice in choices)
    usages = [event["usage"] for event in events if event.get("usage")]
    return text, [choice["finish_reason"] for choice in choices if choice["finish_reason"]], usages, done


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {**chat(), "stream": True}),
        ("/v1/messages", chat()),
        ("/v1/responses", {"model": MODEL, "input": "x", "temperature": 0}),
        ("/v1/responses", {"model": MODEL, "input": "x", "temperature": 0, "stream": True}),
        ("/generate", {"model": MODEL, "inputs": "x", "parameters": {"seed": 1}}),
        ("/generate_stream", {"model": MODEL, "inputs": "x", "parameters": {"temperature": 0}}),
        ("/v1/embeddings", {"model": MODEL, "input": "x"}),
        ("/v1/rerank", {"model": MODEL, "query": "x", "documents": ["y"]}),
        ("/score", {"model": MODEL, "text_1": "x", "text_2": "y"}),
        ("/tokenize", {"model": MODEL, "prompt": "x"}),
        ("/classify", {"model": MODEL, "input": "x"}),
        ("/v1/images/generations", {"model": MODEL, "prompt": "x", "seed": 1}),
    ],
)
async def test_other_dialects_are_replayed_byte_for_byte(
    balancer: Balancer, node: FakeNode, path: str, body: dict[str, Any]
) -> None:
    first, second = [await ask(balancer, body, path) for _ in range(2)]
    assert (first.status, first.cache, second.cache) == (200, "miss", "hit")
    assert second.body == first.body
    assert len(node.requests) == 1


async def test_what_cannot_be_converted_is_a_miss(balancer: Balancer, node: FakeNode) -> None:
    body = {**chat(), "max_tokens": 4}
    stream = {**body, "stream": True}
    assert await caches(balancer, (body, "/v1/messages"), (stream, "/v1/messages")) == ["miss", "miss"]
    assert len(node.requests) == 2


async def test_several_choices_are_stored_and_replayed(balancer: Balancer, node: FakeNode) -> None:
    first, second = [await ask(balancer, chat(n=3, seed=5)) for _ in range(2)]
    assert (second.cache, second.body) == ("hit", first.body)
    stream = await ask(balancer, chat(n=3, seed=5, stream=True))
    assert stream.cache == "hit"
    for index, choice in enumerate(first.json["choices"]):
        deltas = [part for event in stream.events[:-1] for part in event["choices"] if part["index"] == index]
        assert "".join(part["delta"].get("content") or "" for part in deltas) == choice["message"]["content"]
    assert len(node.requests) == 1


# -- the key


SAME = [
    b'{"model":"sim-model","messages":[{"role":"user","content":"hi"}],"temperature":0,"max_tokens":6}',
    b'{ "max_tokens": 6,\r\n"temperature" :0,"messages":[{"content":"hi", "role":"user"}],"model":"sim-model" }\n',
    b'{"model":"sim-model","messages":[{"role":"user","content":"h\\u0069"}],"temperature":0,"max_tokens":6,"user":"u"}',
    b'{"metadata":{"a":1},"stream":false,"model":"sim-model","messages":[{"role":"user","content":"hi"}],'
    b'"temperature":0,"max_tokens":6,"stream_options":null}',
]
LINES = [(), ("User-Agent: a",), ("Traceparent: x", "Tracestate: y", "Baggage: z"), ("X-Request-Id: i", "X-Custom: 1")]


async def test_order_spacing_and_who_asks_do_not_change_the_key(balancer: Balancer, node: FakeNode) -> None:
    verdicts = await caches(balancer, *((body, CHAT, *lines) for body, lines in zip(SAME, LINES, strict=True)))
    assert verdicts == ["miss", "hit", "hit", "hit"]
    assert len(node.requests) == 1


DIFFERENT: list[tuple[Any, ...]] = [
    (chat(),),
    (chat(unknown=None),),
    (chat(unknown=1),),
    (chat(unknown=1.0),),
    (chat(unknown=True),),
    (chat(unknown="1"),),
    (chat(unknown=[1]),),
    (chat(unknown={"a": 1}),),
    (chat(unknown=18446744073709551617),),
    (chat(unknown=18446744073709551618),),
    (chat(unknown=18446744073709551617.0),),
    (chat(unknown=-0.0),),
    (chat("hello "),),
    (chat("Hello"),),
    (chat("hellö"),),
    (chat("hello", max_tokens=7),),
    (chat(seed=1),),
    (chat(tools=[]),),
    (chat(messages=[{"role": "user", "content": "hello", "name": "x"}]),),
    (json.dumps(chat()).replace('"role"', '"role": "x", "role"').encode(),),
    (json.dumps(chat()).replace('"role"', '"role": "y", "role"').encode(),),
    (chat(), CHAT + "?a=1"),
    (chat(), CHAT + "?a=2"),
    (chat(), CHAT + "?"),
    (chat(), CHAT, "OpenAI-Organization: a"),
    (chat(), CHAT, "OpenAI-Organization: b"),
    (chat(), CHAT, "anthropic-beta: a"),
    (chat(), CHAT, "Accept: text/plain"),
    (chat(), CHAT, "Content-Type: application/json; charset=utf-8"),
    (chat(), "/v1/messages"),
]


async def test_whatever_can_change_the_answer_changes_the_key(balancer: Balancer, node: FakeNode) -> None:
    # `?` without a query is the same query as none: only that one may be shared.
    first = await caches(balancer, *DIFFERENT)
    assert [request for request, cache in zip(DIFFERENT, first, strict=True) if cache != "miss"] in (
        [],
        [(chat(), CHAT + "?")],
    )
    assert set(await caches(balancer, *DIFFERENT)) == {"hit"}
    assert len(node.requests) == first.count("miss")


async def test_a_models_alias_shares_and_its_revision_parts(node: FakeNode, serve: Serve) -> None:
    rule = {"name": MODEL, "aliases": ["nice", "nicer"]}
    balancer = await serve(node, models=[rule])
    requests = [(chat(model=name),) for name in ("nice", "nicer", MODEL)]
    assert await caches(balancer, *requests) == ["miss", "hit", "hit"]
    balancer.write_settings({**balancer.settings, "models": [{**rule, "revision": "2"}]})
    await balancer.app.reload()
    assert await caches(balancer, *requests) == ["miss", "hit", "hit"]
    assert len(node.requests) == 2


async def test_tenants_share_nothing_unless_the_operator_says_so(node: FakeNode, serve: Serve) -> None:
    requests = [(chat(), CHAT, f"Authorization: Bearer {name}") for name in ("acme", "globex", "acme")]
    balancer = await serve(node, **keys("acme", "globex"))
    assert await caches(balancer, *requests) == ["miss", "miss", "hit"]
    shared = await serve(node, **keys("acme", "globex"), cache={"shared_between_tenants": True})
    assert await caches(shared, *requests) == ["miss", "hit", "hit"]


# -- what is cacheable


NOT_CACHEABLE: list[tuple[Any, ...]] = [
    (chat(temperature=0.5),),
    ({key: value for key, value in chat().items() if key != "temperature"},),
    (chat(temperature=None),),
    (chat(temperature=1, seed=-1),),
    (chat(temperature=1, seed="1"),),
    ({"model": MODEL, "input": "x", "store": True, "temperature": 0}, "/v1/responses"),
    ({"model": MODEL, "input": "x", "voice": "x"}, "/v1/audio/speech"),
    ({"inputs": "x", "temperature": 0}, "/generate"),
]


@pytest.mark.parametrize("request_", NOT_CACHEABLE, ids=[str(number) for number in range(len(NOT_CACHEABLE))])
async def test_what_may_come_out_differently_is_not_cached(
    balancer: Balancer, node: FakeNode, request_: tuple[Any, ...]
) -> None:
    assert await caches(balancer, request_, request_) == ["bypass", "bypass"]
    assert len(node.requests) == 2


async def test_the_operator_may_cache_everything_nothing_or_by_model(node: FakeNode, serve: Serve) -> None:
    sampled = (chat(temperature=1),)
    assert await caches(await serve(node, cache={"cacheable": "all"}), sampled, sampled) == ["miss", "hit"]
    rule = {"name": MODEL, "cacheable": True}
    assert await caches(await serve(node, models=[rule]), sampled, sampled) == ["miss", "hit"]
    rule = {"name": MODEL, "cacheable": False}
    assert await caches(await serve(node, models=[rule]), (chat(),), (chat(),)) == ["bypass", "bypass"]
    assert await caches(await serve(node, cache={"enabled": False}), (chat(),), (chat(),)) == ["bypass", "bypass"]


# -- what clients may ask of the cache


async def test_bypass_neither_reads_nor_writes(balancer: Balancer, node: FakeNode) -> None:
    bypass = (chat(), CHAT, "X-Balancer-Cache: bypass")
    assert await caches(balancer, bypass, (chat(),), bypass, (chat(),)) == ["bypass", "miss", "bypass", "hit"]
    assert len(node.requests) == 3


async def test_refresh_writes_and_does_not_read(balancer: Balancer, node: FakeNode) -> None:
    first = await ask(balancer, chat())
    node.speed = 2.0
    refreshed = await ask(balancer, chat(), CHAT, "X-Balancer-Cache: Refresh")
    assert (refreshed.cache, refreshed.json["id"] != first.json["id"]) == ("bypass", True)
    assert (await ask(balancer, chat())).body == refreshed.body
    assert len(node.requests) == 2


async def test_only_and_exact_read_what_is_there(balancer: Balancer, node: FakeNode) -> None:
    await ask(balancer, chat(), CHAT, "X-Balancer-Cache: exact")
    for wish in ("only", "exact"):
        assert (await ask(balancer, chat(), CHAT, f"X-Balancer-Cache: {wish}")).cache == "hit"
    answer = await ask(balancer, chat("other"), CHAT, "X-Balancer-Cache: only")
    assert (answer.status, answer.code) == (504, "cache_miss")
    assert len(node.requests) == 1


async def test_a_lifetime_makes_a_sampled_request_cacheable(
    balancer: Balancer, node: FakeNode, written: list[tuple[str, bytes, float]]
) -> None:
    sampled = chat(temperature=1)
    assert await caches(balancer, (sampled, CHAT, "X-Balancer-Cache-TTL-S: 60"), (sampled,)) == ["miss", "bypass"]
    assert await caches(balancer, (sampled, CHAT, "X-Balancer-Cache-TTL-S: 5")) == ["hit"]
    assert [ttl_s for _, _, ttl_s in written] == [60.0]
    assert len(node.requests) == 2


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        ({}, ["X-Balancer-Cache-TTL-S: 0.05"]),
        ({"cache": {"ttl_s": 0.05}}, []),
        ({"models": [{"name": MODEL, "ttl_s": 0.05}]}, []),
    ],
)
async def test_an_answer_is_gone_after_its_lifetime(
    node: FakeNode, serve: Serve, settings: dict[str, Any], lines: list[str]
) -> None:
    balancer = await serve(node, **settings)
    assert await caches(balancer, (chat(), CHAT, *lines)) == ["miss"]
    async with asyncio.timeout(10):
        while (await ask(balancer, chat(), CHAT, "X-Balancer-Cache: only")).status == 200:
            pass
    assert len(node.requests) == 1


# -- what is never stored


ALL_FAULTS = [
    (Fault("status", status=500), {}),
    (Fault("status", status=400), {}),
    (Fault("status", status=404), {}),
    (Fault("status", status=429), {}),
    (Fault("bad_json"), {}),
    (Fault("error_body"), {}),
    (Fault("empty_body"), {}),
    (Fault("truncated"), {}),
    (Fault("reset", after_events=1), {}),
    (Fault("cut", after_events=4), {"stream": True}),
    (Fault("close", after_events=4), {"stream": True}),
    (Fault("error_event", after_events=4), {"stream": True}),
    (Fault("bad_event", after_events=4), {"stream": True}),
    (Fault("no_done"), {"stream": True}),
    (Fault("no_finish"), {"stream": True}),
]


@pytest.mark.parametrize(("fault", "fields"), ALL_FAULTS, ids=[f"{f.kind}{f.status}" for f, _ in ALL_FAULTS])
async def test_a_bad_answer_is_never_stored(serve: Serve, fault: Fault, fields: dict[str, Any]) -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.001) as node:  # event by event
        balancer = await serve(node)
        node.faults.add(fault)
        bad = await ask(balancer, chat(**fields))
        assert bad.cache == "miss"
        assert (await balancer.app.cache.stats())["stored"] == 0
        node.faults.clear()
        for known in balancer.app.registry.nodes.values():
            known.blocked_until_s = 0.0  # it may have asked to be left alone
        balancer.app.registry.touch()
        good = await ask(balancer, chat(**fields))
        assert (good.status, good.cache, said(good)) == (200, "miss", node.expected_text(chat()))


async def test_a_stream_whose_client_left_is_not_stored(balancer: Balancer, node: FakeNode) -> None:
    node.faults.add(Fault("hang", after_events=3, first=1))
    wire = await Wire.to(balancer)
    wire.send(post(chat(stream=True)))
    await wire.head()
    wire.leave()
    await node.wait_for(lambda: node.cancelled == 1)
    assert await caches(balancer, (chat(stream=True),)) == ["miss"]


async def test_a_large_answer_is_passed_on_and_not_kept(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache={"max_entry_bytes": 1024})
    node.faults.add(Fault("huge", size_bytes=2000, path=CHAT))
    for body in (chat(), chat(stream=True)):
        assert await caches(balancer, (body,), (body,)) == ["miss", "miss"]


async def test_memory_is_bounded_and_the_oldest_goes_first(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache={"memory_bytes": 20_000})
    requests = [(chat(str(number)),) for number in range(30)]
    await caches(balancer, *requests)
    assert 0 < balancer.app.memory.size_bytes <= 20_000
    assert await caches(balancer, requests[-1], requests[0]) == ["hit", "miss"]


# -- flushing, and the bound on hits


async def test_answers_are_removed_by_tenant_model_and_key(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **keys("acme", "globex"))
    acme, globex = [(chat(), CHAT, f"Authorization: Bearer {name}") for name in ("acme", "globex")]
    await caches(balancer, acme, globex)
    cache = balancer.app.cache
    assert await cache.delete(tenant="nobody", model=None, key=None) == 0
    assert await cache.delete(tenant=None, model="other", key=None) == 0
    assert await cache.delete(tenant="acme", model=MODEL, key=None) == 1
    assert await caches(balancer, acme, globex) == ["miss", "hit"]
    assert await cache.delete(tenant=None, model=None, key=None) == 2
    assert await caches(balancer, acme, globex) == ["miss", "miss"]


async def test_hits_per_second_bounds_a_tenants_hits_and_nobody_elses(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **keys("acme", "globex"), cache={"hits_per_second": 0.01})
    acme, globex = [(chat(), CHAT, f"Authorization: Bearer {name}") for name in ("acme", "globex")]
    assert await caches(balancer, acme, globex, acme) == ["miss", "miss", "hit"]
    answer = await ask(balancer, *acme)
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert int(answer.header("retry-after") or 0) >= 1
    assert await caches(balancer, globex) == ["hit"]
    assert len(node.requests) == 2
