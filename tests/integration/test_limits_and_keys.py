"""Who may ask, and how often."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import dead_url
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, different, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, get, post


async def statuses(balancer: Balancer, count: int, *lines: str) -> Counter[int]:
    """How many of `count` requests at once got which status."""
    answers = await asyncio.gather(*(ask(balancer, different(n), CHAT, *lines) for n in range(count)))
    return Counter(answer.status for answer in answers)


# -- keys


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Authorization: Bearer wrong"],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        ["Authorization: secret"],
        ["Authorization: Basic secret"],
        ["Authorization: Bearer secret", "Authorization: Bearer secret"],
        ["Authorization: Bearer secret, Bearer secret"],
        ["Authorization: Bearer SECRET"],
        ["Authorization: Bearer wrong", "X-Api-Key: secret"],
        ["X-Api-Key: wrong"],
        ["X-Api-Key: secret, secret"],
        ["Cookie: Authorization=Bearer secret"],
    ],
)
async def test_without_a_known_key_it_is_401_and_no_node_hears_of_it(
    node: FakeNode, serve: Serve, lines: list[str]
) -> None:
    balancer = await serve(node, **auth(key("secret")))
    wire = await Wire.to(balancer)
    for data in (post(chat(), CHAT, *lines), get("/v1/models", *lines)):
        wire = await Wire.to(balancer)
        answer = await wire.ask(data)
        assert (answer.status, answer.code) == (401, "unauthenticated")
        assert answer.json["error"]["type"] == "authentication_error"
        assert (answer.header("www-authenticate") or "").startswith("Bearer")
        assert "secret" not in answer.body.decode()
    assert node.requests == []


async def test_the_body_of_a_request_without_a_key_is_not_waited_for(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("secret")))
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(b"", CHAT, "Content-Length: 1000000", "Expect: 100-continue"))
    assert (answer.status, answer.interim) == (401, [])
    assert await wire.ends() == b""


@pytest.mark.parametrize(
    "line", ["Authorization: Bearer secret", "authorization: bEaReR   secret", "x-api-key: secret"]
)
async def test_a_known_key_is_let_in_and_kept_from_the_node(node: FakeNode, serve: Serve, line: str) -> None:
    balancer = await serve(node, **auth(key("secret", "acme")))
    assert (await ask(balancer, chat(), CHAT, line)).status == 200
    assert not any("secret" in value for _, value in node.requests[0].headers)
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    assert balancer.requests[0]["tenant"] == "acme"
    assert "secret" not in json.dumps(balancer.requests)


async def test_one_connection_may_carry_several_keys(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("one"), key("two")))
    wire = await Wire.to(balancer)
    for number, name in enumerate(("one", "two", "two", "one")):
        assert (await wire.ask(post(different(number), CHAT, bearer(name)))).status == 200
    assert (await wire.ask(post(chat(), CHAT, bearer("three")))).status == 401
    assert [facts["tenant"] for facts in balancer.requests][:4] == ["one", "two", "two", "one"]


async def test_a_key_that_was_taken_back_is_refused_on_connections_that_are_open(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("old"), key("new")))
    wire = await Wire.to(balancer)
    for number in range(3):  # as often as it takes to be remembered
        assert (await wire.ask(post(different(number), CHAT, bearer("old")))).status == 200
    balancer.write_settings({**balancer.settings, **auth(key("new"))})
    await balancer.app.reload()
    assert (await wire.ask(post(different(4), CHAT, bearer("old")))).status == 401
    assert (await ask(balancer, chat(), CHAT, bearer("new"))).status == 200
    assert len(node.requests) == 4


async def test_health_needs_no_key(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("secret")))
    assert (await (await Wire.to(balancer)).ask(get("/healthz"))).status == 200


async def test_a_key_may_use_its_models_only(node: FakeNode, serve: Serve) -> None:
    rules = [{"name": MODEL, "aliases": ["nice"]}]
    keys = auth(key("some", models=[MODEL]), key("none", models=[]), key("all"))
    balancer = await serve({"url": node.url, "models": [MODEL, "other"]}, models=rules, **keys)
    for name, model, status in [
        ("some", MODEL, 200),
        ("some", "nice", 200),
        ("some", "other", 403),
        ("some", "unknown", 403),
        ("none", MODEL, 403),
        ("all", "unknown", 404),
    ]:
        answer = await ask(balancer, chat(model=model), CHAT, bearer(name))
        assert answer.status == status, (name, model)
        if status == 403:
            assert (answer.code, answer.json["error"]["type"]) == ("forbidden", "permission_error")
    assert len(node.requests) == 1  # the second was the first one's answer


# -- rates


def limits_of(answer: Answer, kind: str = "requests") -> tuple[int, int, float]:
    """Limit, remaining and seconds to reset, as the headers say."""
    limit, remaining, reset = [answer.header(f"x-ratelimit-{what}-{kind}") for what in ("limit", "remaining", "reset")]
    assert limit is not None
    assert remaining is not None
    assert reset is not None
    assert reset.endswith("s")
    return int(limit), int(remaining), float(reset[:-1])


async def test_a_burst_is_exact_and_the_rest_is_429(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("k", requests_per_minute=1, burst=7)))
    assert await statuses(balancer, 20, bearer("k")) == {200: 7, 429: 13}
    assert len(node.requests) == 7
    answer = await ask(balancer, different(99), CHAT, bearer("k"))
    assert (answer.status, answer.code) == (429, "rate_limited")
    assert answer.json["error"]["type"] == "rate_limit_error"
    assert 1 <= int(answer.header("retry-after") or 0) <= 60


async def test_a_rate_is_not_evaded_by_headers_connections_or_another_key_of_the_tenant(
    node: FakeNode, serve: Serve
) -> None:
    one, two = key("one", "acme", requests_per_minute=1, burst=3), key("two", "acme", requests_per_minute=1, burst=3)
    balancer = await serve(node, **auth(one, two))
    answers = [
        await ask(balancer, different(number), CHAT, bearer(name), f"X-Forwarded-For: 10.0.0.{number}", *more)
        for number, (name, *more) in enumerate(
            [
                ("one", "Forwarded: for=x"),
                ("two", "X-Real-IP: 1"),
                ("one", "User-Agent: x"),
                ("two", "X-Request-Id: y"),
                ("one", "X-Balancer-Priority: high"),
                ("two", "OpenAI-Organization: z"),
            ]
        )
    ]
    assert [answer.status for answer in answers] == [200] * 3 + [429] * 3


async def test_tenants_do_not_use_up_each_others_rates(node: FakeNode, serve: Serve) -> None:
    limits = {"requests_per_minute": 1, "burst": 2}
    balancer = await serve(node, **auth(key("one", **limits), key("two", **limits), key("free")))
    assert await statuses(balancer, 9, bearer("one")) == {200: 2, 429: 7}
    assert await statuses(balancer, 9, bearer("two")) == {200: 2, 429: 7}
    assert await statuses(balancer, 9, bearer("free")) == {200: 9}


async def test_the_default_rate_is_each_tenants_own(node: FakeNode, serve: Serve) -> None:
    keys = auth(key("one"), key("two"), key("more", requests_per_minute=1, burst=4))
    balancer = await serve(node, **keys, limits={"requests_per_minute": 1, "burst": 2})
    for name, granted in (("one", 2), ("two", 2), ("more", 4)):
        assert await statuses(balancer, 8, bearer(name)) == {200: granted, 429: 8 - granted}


async def test_without_keys_everybody_shares_the_default_rate(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, limits={"requests_per_minute": 1, "burst": 3})
    assert await statuses(balancer, 8) == {200: 3, 429: 5}


async def test_the_headers_count_down_and_are_there_when_it_is_refused(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("k", requests_per_minute=6, burst=3)))
    answers = [await ask(balancer, different(number), CHAT, bearer("k")) for number in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429]
    assert [limits_of(answer)[:2] for answer in answers] == [(3, 2), (3, 1), (3, 0), (3, 0)]
    resets = [limits_of(answer)[2] for answer in answers]
    assert resets == sorted(resets)
    assert 25.0 < resets[2] <= 30.0


@pytest.mark.parametrize(
    ("fault", "fields"),
    [(None, {"stream": True}), (Fault("status", status=400), {}), (Fault("status", status=500), {})],
)
async def test_every_answer_of_a_limited_tenant_says_its_limits(
    node: FakeNode, serve: Serve, fault: Fault | None, fields: dict[str, Any]
) -> None:
    balancer = await serve(node, **auth(key("k", requests_per_minute=6, burst=3)))
    if fault is not None:
        node.faults.add(fault)
    assert limits_of(await ask(balancer, chat(**fields), CHAT, bearer("k")))[:2] == (3, 2)


async def test_a_tenant_without_limits_hears_of_none(balancer: Balancer) -> None:
    answer = await ask(balancer, chat())
    assert not any(name.startswith("x-ratelimit") for name, _ in answer.headers)


async def test_hits_cost_no_request(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("k", requests_per_minute=1, burst=2)))
    answers = [await ask(balancer, chat(), CHAT, bearer("k")) for _ in range(10)]
    assert Counter((answer.status, answer.cache) for answer in answers) == {(200, "miss"): 1, (200, "hit"): 9}
    assert (await ask(balancer, different(), CHAT, bearer("k"))).status == 200
    assert (await ask(balancer, different(1), CHAT, bearer("k"))).status == 429


# -- tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_charged_as_the_node_counted_them(node: FakeNode, serve: Serve, stream: bool) -> None:
    balancer = await serve(node, **auth(key("k", tokens_per_minute=1200)))
    large = different(1, stream=stream, max_tokens=1000)
    limit, remaining, _ = limits_of(await ask(balancer, large, CHAT, bearer("k")), "tokens")
    assert (limit, remaining < 200) == (1200, True)  # the estimate is taken on the way in
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    used = balancer.requests[0]["prompt_tokens"] + balancer.requests[0]["completion_tokens"]
    assert used < 150
    # What was too much has been given back.
    assert (await ask(balancer, different(2, max_tokens=1000), CHAT, bearer("k"))).status == 200


async def test_beyond_the_tokens_of_a_minute_it_is_429(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("k", tokens_per_minute=60), key("free")))
    answers = [await ask(balancer, different(number, max_tokens=30), CHAT, bearer("k")) for number in range(3)]
    assert answers[0].status == 200
    assert (answers[-1].status, answers[-1].code) == (429, "rate_limited")
    assert int(answers[-1].header("retry-after") or 0) >= 1
    assert limits_of(answers[-1], "tokens")[0] == 60
    assert (await ask(balancer, different(max_tokens=30), CHAT, bearer("free"))).status == 200


async def test_a_request_that_no_node_worked_for_costs_no_tokens(node: FakeNode, serve: Serve) -> None:
    dead = {"url": dead_url(), "models": [MODEL]}
    balancer = await serve(dead, **auth(key("k", tokens_per_minute=600)))
    for number in range(5):
        answer = await ask(balancer, different(number, max_tokens=400), CHAT, bearer("k"))
        assert (answer.status, answer.code) == (503, "no_eligible_node")


# -- when Redis is away


async def test_without_redis_the_whole_limit_holds_in_this_process(node: FakeNode, serve: Serve) -> None:
    keys = auth(key("k", requests_per_minute=1, burst=4))
    redis = {"url": dead_url().replace("http", "redis")}
    balancer = await serve(node, **keys, redis=redis)
    assert await statuses(balancer, 10, bearer("k")) == {200: 4, 429: 6}
    assert balancer.app.metrics.limits_unchecked.of().value >= 1  # type: ignore[attr-defined]


async def test_without_redis_limits_may_be_set_to_refuse(node: FakeNode, serve: Serve) -> None:
    keys = auth(key("k", requests_per_minute=600, burst=4), key("free"))
    redis = {"url": dead_url().replace("http", "redis")}
    balancer = await serve(node, **keys, redis=redis, limits={"fail_open": False})
    answer = await ask(balancer, chat(), CHAT, bearer("k"))
    assert answer.status == 503
    assert answer.code is not None
    assert int(answer.header("retry-after") or 0) >= 1
    assert node.requests == []
    assert (await ask(balancer, chat(), CHAT, bearer("free"))).status == 200
