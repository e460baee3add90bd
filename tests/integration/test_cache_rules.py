"""What is kept, for how long, and in which way it comes back: lifetimes, refusals, stale answers, tools, pace."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from balancer.core.cache_entry import Stored
from balancer.core.pace import record
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, caches, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, get, post
from tests.integration.scripted_node import ScriptedNode, ok, streamed

SAMPLED = chat(temperature=1)
WITHIN_S = 20.0


def stored(balancer: Balancer) -> list[Stored]:
    """What is kept in this process, oldest first."""
    return [kept.stored for kept in balancer.app.cache.local._kept.values()]


def reason(balancer: Balancer) -> str:
    """Why the last request was not answered from the cache, or its answer not kept."""
    calls = [slot for slot in balancer.app.ring._slots if slot is not None]
    return str(max(calls, key=lambda call: call.received_s).cache_reason)


# -- lifetimes


@pytest.mark.parametrize(
    ("settings", "lines", "ttl_s"),
    [
        ({}, [], 3600.0),
        ({"cache": {"ttl_by_endpoint": {"chat": 50}}}, [], 50.0),
        ({"cache": {"ttl_by_endpoint": {"embeddings": 50}}}, [], 3600.0),
        ({"cache": {"ttl_by_endpoint": {"chat": 50}}, "models": [{"name": MODEL, "ttl_s": 40}]}, [], 40.0),
        (
            {"cache": {"ttl_by_tenant": {"anonymous": 30}}, "models": [{"name": MODEL, "ttl_s": 40}]},
            [],
            30.0,
        ),
        ({"cache": {"ttl_by_tenant": {"anonymous": 30}}}, ["X-Balancer-Cache-TTL-S: 20"], 20.0),
    ],
)
async def test_the_lifetime_is_the_callers_the_tenants_the_models_the_endpoints_or_the_general_one(
    node: FakeNode, serve: Serve, settings: dict[str, Any], lines: list[str], ttl_s: float
) -> None:
    settings = {**settings, "cache": {"ttl_jitter": 0, **settings.get("cache", {})}}
    balancer = await serve(node, **settings)
    await ask(balancer, chat(), CHAT, *lines)
    assert [one.ttl_s for one in stored(balancer)] == [ttl_s]


async def test_lifetimes_are_spread_and_what_a_caller_asks_for_is_not(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache={"ttl_s": 100, "ttl_jitter": 0.2})
    for number in range(30):
        await ask(balancer, chat(str(number)))
    lifetimes = [one.ttl_s for one in stored(balancer)]
    assert all(80.0 < ttl_s <= 100.0 for ttl_s in lifetimes)
    assert len(set(lifetimes)) == 30
    await ask(balancer, chat("mine"), CHAT, "X-Balancer-Cache-TTL-S: 100")
    assert stored(balancer)[-1].ttl_s == 100.0


async def test_another_revision_of_a_model_is_another_answer(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, models=[{"name": MODEL, "revision": "a"}])
    assert await caches(balancer, (chat(),), (chat(),)) == ["miss", "hit"]
    balancer.app.cache.configure(
        balancer.app.cache._config, {MODEL: balancer.app.intake.rules[MODEL].__class__(name=MODEL, revision="b")}
    )
    assert await caches(balancer, (chat(),)) == ["miss"]


async def test_expired_answers_go_by_themselves(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node)
    await ask(balancer, chat(), CHAT, "X-Balancer-Cache-TTL-S: 0.01")
    async with asyncio.timeout(WITHIN_S):
        while len(balancer.app.cache.local):  # noqa: ASYNC110
            await asyncio.sleep(0.02)  # the balancer's own timer has to come


# -- what is not kept


CALLS = [{"id": "c", "type": "function", "function": {"name": "pay", "arguments": "{}"}}]


def completion(**message: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": None, **message}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return ok(
        {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}
    )


@pytest.mark.parametrize(
    ("body", "lines", "why"),
    [
        (chat(temperature=1), [], "sampling"),
        (chat(temperature=None), [], "sampling"),
        (chat(temperature=1, seed=-1), [], "sampling"),
        (chat(), ["X-Balancer-Cache: bypass"], "bypass"),
        (chat(store=True), [], "stateful"),
        (chat(), [], ""),
        (chat(temperature=1, seed=3), [], ""),
    ],
)
async def test_why_a_request_is_not_cached_is_told(
    balancer: Balancer, body: dict[str, Any], lines: list[str], why: str
) -> None:
    first, second = [await ask(balancer, body, CHAT, *lines) for _ in range(2)]
    assert (first.cache, second.cache) == (("bypass", "bypass") if why else ("miss", "hit"))
    assert reason(balancer) == why
    record_ = balancer.app.ring.get(second.header("x-request-id") or "")
    assert record_ is not None
    assert record_.as_dict({})["cache"]["reason"] == why


@pytest.mark.parametrize(("settings", "why"), [({"enabled": False}, "disabled"), ({}, "model")])
async def test_why_a_model_is_not_cached_is_told(
    node: FakeNode, serve: Serve, settings: dict[str, Any], why: str
) -> None:
    balancer = await serve(node, cache=settings, models=[{"name": MODEL, "cacheable": False}])
    assert await caches(balancer, (chat(),)) == ["bypass"]
    assert reason(balancer) == why


@pytest.mark.parametrize(("allowed", "second"), [(False, "miss"), (True, "hit")])
async def test_an_answer_that_calls_tools_is_kept_only_where_that_is_allowed(
    serve: Serve, allowed: bool, second: str
) -> None:
    async with ScriptedNode(completion(tool_calls=CALLS)) as scripted:
        balancer = await serve(scripted, cache={"tools": allowed})
        assert await caches(balancer, (chat(),)) == ["miss"]
        assert reason(balancer) == ("" if allowed else "tool_calls")
        assert await caches(balancer, (chat(),)) == [second]


async def test_an_answer_that_could_have_called_tools_and_did_not_is_kept(serve: Serve) -> None:
    async with ScriptedNode(completion(content="no", tool_calls=[])) as scripted:
        balancer = await serve(scripted)
        assert await caches(
            balancer, (chat(tools=[{"type": "function"}]),) * 1, (chat(tools=[{"type": "function"}]),)
        ) == [
            "miss",
            "hit",
        ]


async def test_a_stream_that_calls_tools_is_not_kept(serve: Serve) -> None:
    delta = {
        "index": 0,
        "delta": {"role": "assistant", "tool_calls": [{"index": 0, **CALLS[0]}]},
        "finish_reason": None,
    }
    end = {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
    events = [b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n" for choice in (delta, end)]
    async with ScriptedNode(streamed(*events, b"data: [DONE]\n\n")) as scripted:
        balancer = await serve(scripted)
        assert await caches(balancer, (chat(stream=True),), (chat(stream=True),)) == ["miss", "miss"]
        assert reason(balancer) == "tool_calls"


async def test_too_large_an_answer_is_told_of(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache={"max_entry_bytes": 1024})
    node.faults.add(Fault("huge", size_bytes=2000, path=CHAT))
    assert await caches(balancer, (chat(),)) == ["miss"]
    assert reason(balancer) == "size"


# -- refusals


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("body", [chat(), SAMPLED, {**SAMPLED, "stream": True}], ids=["exact", "sampled", "stream"])
async def test_a_nodes_refusal_is_told_again_without_asking(
    balancer: Balancer, node: FakeNode, body: dict[str, Any], status: int
) -> None:
    node.faults.add(Fault("status", status=status, body='{"error": {"message": "context too long"}}'))
    first, second = [await ask(balancer, body) for _ in range(2)]
    assert (first.status, second.status, second.cache) == (status, status, "hit")
    assert second.body == first.body
    assert second.header("content-type") == first.header("content-type")
    assert second.header("age") == "0"
    assert len(node.requests) == 1
    assert balancer.counts("cache_hits") == {("refusal",): 1}


async def test_only_the_very_same_request_of_the_same_tenant_is_refused_so(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("acme"), key("globex")), cache={"shared_between_tenants": True})
    node.faults.add(Fault("status", status=400, first=1))
    assert (await ask(balancer, chat(), CHAT, bearer("acme"))).status == 400
    others = [
        (chat(), CHAT, bearer("globex")),
        (chat(metadata={"a": "b"}), CHAT, bearer("acme")),
        (chat(stream=True), CHAT, bearer("acme")),
        (chat(), CHAT, bearer("acme"), "X-Balancer-Cache: bypass"),
        (chat(), CHAT, bearer("acme"), "X-Balancer-Cache: refresh"),
    ]
    assert [(await ask(balancer, *other)).status for other in others] == [200] * len(others)
    assert (await ask(balancer, chat(), CHAT, bearer("acme"))).status == 200, "a good answer is there by now"


@pytest.mark.parametrize("status", [401, 404, 409, 429, 500])
async def test_other_failures_are_asked_about_again(node: FakeNode, serve: Serve, status: int) -> None:
    balancer = await serve(node, breaker={"consecutive_failures": 100})
    node.faults.add(Fault("status", status=status, first=1, path=CHAT))
    await ask(balancer, SAMPLED)
    for known in balancer.app.registry.nodes.values():
        known.blocked_until_s = 0.0
    balancer.app.registry.touch()
    assert (await ask(balancer, SAMPLED)).status == 200
    assert len(balancer.app.cache._refusals) == 0


@pytest.mark.parametrize("settings", [{"negative_ttl_s": 0}, {"negative_ttl_s": 0.01}, {"enabled": False}])
async def test_refusals_are_forgotten_or_never_kept(node: FakeNode, serve: Serve, settings: dict[str, Any]) -> None:
    balancer = await serve(node, cache=settings)
    node.faults.add(Fault("status", status=400, first=1))
    assert (await ask(balancer, SAMPLED)).status == 400
    async with asyncio.timeout(WITHIN_S):
        while (await ask(balancer, SAMPLED)).status == 400:
            pass


async def test_a_flush_forgets_refusals(balancer: Balancer, node: FakeNode) -> None:
    node.faults.add(Fault("status", status=400, first=1))
    assert (await ask(balancer, SAMPLED)).status == 400
    balancer.app.cache.forget_local(None, MODEL, None)
    assert (await ask(balancer, SAMPLED)).status == 200


async def test_an_unknown_model_is_refused_without_asking_a_node(balancer: Balancer, node: FakeNode) -> None:
    answer = await ask(balancer, {**chat(), "model": "no-such-model"})
    assert (answer.status, answer.code, len(node.requests)) == (404, "unknown_model", 0)


# -- stale answers


async def expired(balancer: Balancer, body: dict[str, Any]) -> None:
    """Store an answer whose lifetime is over by now."""
    await ask(balancer, body)
    for one in stored(balancer):
        one.stored_wall_s -= 1000.0


STALE = {"ttl_s": 100, "stale_if_error_s": 1000}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_expired_answer_is_served_while_no_node_answers(node: FakeNode, serve: Serve, stream: bool) -> None:
    balancer = await serve(node, cache=STALE)
    body = chat(stream=stream)
    first = await ask(balancer, body)
    await expired(balancer, body)
    node.die()
    answer = await ask(balancer, body)
    assert (answer.status, answer.cache, answer.body) == (200, "stale", first.body)
    assert int(answer.header("age") or 0) >= 1000
    assert answer.header("x-balancer-node") is None
    assert balancer.counts("cache_hits") == {("memory",): 1, ("stale",): 1}
    assert (await ask(balancer, chat("other"))).status in (502, 503)


@pytest.mark.parametrize("kind", ["bad_json", "reset", "error_body"])
async def test_an_expired_answer_is_served_when_every_attempt_fails(node: FakeNode, serve: Serve, kind: Any) -> None:
    balancer = await serve(node, cache=STALE)
    await expired(balancer, chat())
    node.faults.add(Fault(kind, path=CHAT))
    assert await caches(balancer, (chat(),)) == ["stale"]


async def test_an_expired_answer_is_renewed_where_a_node_answers(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache=STALE)
    await expired(balancer, chat())
    assert await caches(balancer, (chat(),), (chat(),)) == ["miss", "hit"]
    assert len(node.requests) == 2


async def test_a_nodes_own_refusal_is_no_reason_for_an_expired_answer(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, cache=STALE)
    await expired(balancer, chat())
    node.faults.add(Fault("status", status=400))
    assert (await ask(balancer, chat())).status == 400


@pytest.mark.parametrize(("grace_s", "lines"), [(0, []), (500, []), (2000, ["X-Balancer-Cache: refresh"])])
async def test_without_grace_or_with_its_end_the_error_stands(
    node: FakeNode, serve: Serve, grace_s: float, lines: list[str]
) -> None:
    balancer = await serve(node, cache={**STALE, "stale_if_error_s": 2000})
    await expired(balancer, chat())
    config = balancer.app.cache._config
    balancer.app.cache.configure(config.__class__(stale_if_error_s=grace_s), balancer.app.intake.rules)
    node.die()
    assert (await ask(balancer, chat(), CHAT, *lines)).status in (502, 503)


# -- pace


async def test_a_stream_is_recorded_and_replayed_as_it_came(serve: Serve) -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.005) as node:  # event by event
        balancer = await serve(node, cache={"replay": "recorded"})
        body = chat(stream=True)
        first = await ask(balancer, body)
        (kept,) = stored(balancer)
        assert kept.pace
        second = await ask(balancer, body)
        assert (second.cache, second.body) == ("hit", first.body)
        assert second.chunks is not None
        assert len(second.chunks) > 3
        unary = await ask(balancer, chat())
        assert (unary.cache, unary.chunks) == ("hit", None)
        assert len(node.requests) == 1


async def test_at_once_is_one_write_whatever_was_recorded(serve: Serve) -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.005) as node:
        balancer = await serve(node)
        first, second = [await ask(balancer, chat(stream=True)) for _ in range(2)]
        assert (second.cache, second.body, second.chunks) == ("hit", first.body, None)
        assert stored(balancer)[0].pace == b""


def second_by_second(events: bytes) -> bytes:
    """A pace with a second between one event and the next."""
    return record([(float(number), len(event) + 2) for number, event in enumerate(events.split(b"\n\n")[:-1])])


async def test_a_client_that_leaves_ends_its_replay(serve: Serve, node: FakeNode) -> None:
    balancer = await serve(node, cache={"replay": "recorded"})
    body = chat(stream=True)
    await ask(balancer, body)
    (kept,) = stored(balancer)
    kept.pace = second_by_second(kept.body)
    wire = await Wire.to(balancer)
    wire.send(post(body))
    await wire.head()
    assert len(balancer.app.port.working()) == 1
    wire.leave()
    await balancer.wait_for(lambda: any(call["code"] == "client_left" for call in balancer.requests))
    assert balancer.app.port.working() == []
    wire = await Wire.to(balancer)
    assert (await wire.ask(get("/healthz"))).status == 200


async def test_a_replay_that_a_shutdown_cuts_ends_with_an_error(serve: Serve, node: FakeNode) -> None:
    balancer = await serve(node, cache={"replay": "recorded"})
    body = chat(stream=True)
    await ask(balancer, body)
    (kept,) = stored(balancer)
    kept.pace = second_by_second(kept.body)
    wire = await Wire.to(balancer)
    asking = asyncio.create_task(wire.ask(post(body)))
    async with asyncio.timeout(WITHIN_S):
        while not balancer.app.port.working():  # noqa: ASYNC110
            await asyncio.sleep(0)
    await asyncio.sleep(0)
    balancer.app.port.close_listener()
    await asyncio.gather(*balancer.app.port.cut_all(), return_exceptions=True)
    answer = await asking
    assert answer.status == 200
    assert answer.events[-1]["error"]["code"] == "draining"
    assert "[DONE]" not in answer.events


# -- what was saved


async def test_gpu_seconds_are_shared_between_what_ran_at_once(serve: Serve) -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.01) as node:
        balancer = await serve(node)
        await ask(balancer, chat("alone"))
        (alone,) = stored(balancer)
        long = [asyncio.create_task(ask(balancer, chat(str(number), max_tokens=200))) for number in range(3)]
        async with asyncio.timeout(WITHIN_S):
            while len(node.requests) < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        rif = next(iter(balancer.app.registry.nodes.values())).load
        assert rif.rif == 3
        await ask(balancer, chat("among others"))
        shared = stored(balancer)[-1]
        assert shared.node_seconds > 0.0
        call = balancer.requests[-1]
        assert shared.node_seconds <= call["seconds"] / 2
        assert alone.node_seconds > 0.0
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
