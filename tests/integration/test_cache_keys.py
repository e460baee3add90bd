"""Which requests share an answer, which never do, and which answers are never stored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, caches, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, post, text_of


def said(answer: Answer) -> str:
    """The first choice's text, of a stream or a unary answer."""
    if (answer.header("content-type") or "").startswith("text/event-stream"):
        assert answer.events[-1] == "[DONE]"
        return text_of(answer.events[:-1])
    return str(answer.json["choices"][0]["message"]["content"])


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
    requests = [(chat(), CHAT, bearer(name)) for name in ("acme", "globex", "acme")]
    balancer = await serve(node, **auth(key("acme"), key("globex")))
    assert await caches(balancer, *requests) == ["miss", "miss", "hit"]
    shared = await serve(node, **auth(key("acme"), key("globex")), cache={"shared_between_tenants": True})
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
        balancer = await serve(node, cache={"negative_ttl_s": 0})
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
    assert 0 < balancer.app.cache.local.size_bytes <= 20_000
    assert await caches(balancer, requests[-1], requests[0]) == ["hit", "miss"]
