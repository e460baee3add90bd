"""The response cache as clients see it: hits, in which form they come back, what may be asked of it, and flushing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from balancer.core.cache_entry import Stored
from loadtest.fake_node import FakeNode
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, caches, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, ask, chat

COMPLETION = {"model": MODEL, "prompt": "x", "temperature": 0, "max_tokens": 6}
USAGE = {"stream_options": {"include_usage": True}}


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


Kept = list[tuple[str, Stored, float]]


@pytest.fixture
def kept(balancer: Balancer, monkeypatch: pytest.MonkeyPatch) -> Kept:
    """What is kept in this process, in order: name, answer, until when."""
    puts: Kept = []
    put = balancer.app.cache.local.put

    def note(name: str, stored: Stored, until_s: float) -> None:
        puts.append((name, stored, until_s))
        put(name, stored, until_s)

    monkeypatch.setattr(balancer.app.cache.local, "put", note)
    return puts


async def test_age_is_the_seconds_since_the_answer_was_stored(balancer: Balancer, kept: Kept) -> None:
    first = await ask(balancer, chat())
    ((_, stored, _),) = kept
    stored.stored_wall_s -= 90.0
    answer = await ask(balancer, chat())
    assert (answer.cache, answer.body) == ("hit", first.body)
    assert answer.header("age") in ("90", "91")


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


async def test_a_lifetime_makes_a_sampled_request_cacheable(balancer: Balancer, node: FakeNode, kept: Kept) -> None:
    sampled = chat(temperature=1)
    assert await caches(balancer, (sampled, CHAT, "X-Balancer-Cache-TTL-S: 60"), (sampled,)) == ["miss", "bypass"]
    assert await caches(balancer, (sampled, CHAT, "X-Balancer-Cache-TTL-S: 5")) == ["hit"]
    assert [stored.ttl_s for _, stored, _ in kept] == [60.0]
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


# -- flushing, and the bound on hits


async def test_answers_are_removed_by_tenant_model_and_key(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("acme"), key("globex")))
    acme, globex = [(chat(), CHAT, bearer(name)) for name in ("acme", "globex")]
    await caches(balancer, acme, globex)
    cache = balancer.app.cache
    assert await cache.delete(tenant="nobody", model=None, key=None) == 0
    assert await cache.delete(tenant=None, model="other", key=None) == 0
    assert await cache.delete(tenant="acme", model=MODEL, key=None) == 1
    assert await caches(balancer, acme, globex) == ["miss", "hit"]
    assert await cache.delete(tenant=None, model=None, key=None) == 2
    assert await caches(balancer, acme, globex) == ["miss", "miss"]


async def test_hits_per_second_bounds_a_tenants_hits_and_nobody_elses(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("acme"), key("globex")), cache={"hits_per_second": 0.01})
    acme, globex = [(chat(), CHAT, bearer(name)) for name in ("acme", "globex")]
    assert await caches(balancer, acme, globex, acme) == ["miss", "miss", "hit"]
    answer = await ask(balancer, *acme)
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert int(answer.header("retry-after") or 0) >= 1
    assert await caches(balancer, globex) == ["hit"]
    assert len(node.requests) == 2
