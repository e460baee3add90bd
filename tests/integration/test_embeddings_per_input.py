"""Vectors kept one by one: lists cost only what is not known, with the right order, usage and encoding."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import MODEL, Answer, ask
from tests.integration.scripted_node import ScriptedNode, ok
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

PER_INPUT: dict[str, Any] = {"cache": {"embeddings": {"per_input": True}}}
PATH = "/v1/embeddings"


@pytest.fixture
async def embedding(node: FakeNode, serve: Serve) -> Balancer:
    return await serve(node, **PER_INPUT)


@pytest.fixture
async def plain() -> AsyncIterator[FakeNode]:
    """A node of the same model that is asked directly, to compare with."""
    async with FakeNode(instant=True) as fake:
        yield fake


def asked(node: FakeNode) -> list[Any]:
    return [request.json()["input"] for request in node.requests]


async def embed(balancer: Balancer, inputs: Any, *lines: str, **fields: Any) -> Answer:
    answer = await ask(balancer, {"model": MODEL, "input": inputs, **fields}, PATH, *lines)
    assert answer.status == 200
    return answer


async def told_by_a_node(serve: Serve, plain: FakeNode, inputs: Any, **fields: Any) -> Any:
    balancer = await serve(plain, cache={"enabled": False})
    return (await embed(balancer, inputs, **fields)).json


@pytest.mark.parametrize("fields", [{}, {"encoding_format": "base64"}, {"dimensions": 8}])
async def test_a_list_costs_only_what_is_not_known(
    embedding: Balancer, node: FakeNode, serve: Serve, plain: FakeNode, fields: dict[str, Any]
) -> None:
    await embed(embedding, "one", **fields)
    await embed(embedding, ["three and more"], **fields)
    answer = await embed(embedding, ["two words", "one", "four", "three and more"], **fields)
    assert asked(node) == ["one", ["three and more"], ["two words", "four"]]
    assert (answer.cache, answer.header("x-balancer-attempts")) == ("miss", "1")
    whole = await told_by_a_node(serve, plain, ["two words", "one", "four", "three and more"], **fields)
    assert answer.json["data"] == whole["data"]
    assert answer.json["usage"] == whole["usage"]
    again = await embed(embedding, ["four", "two words", "one"], **fields)
    assert (again.cache, again.header("age"), len(node.requests)) == ("hit", "0", 3)
    assert again.json["usage"] == (await told_by_a_node(serve, plain, ["four", "two words", "one"], **fields))["usage"]
    part = await embed(embedding, ["four", "one"], **fields)
    assert part.cache == "miss"
    assert asked(node)[3:] == [["four"]], "of two that were counted together one is not known alone"


async def test_token_lists_are_inputs(embedding: Balancer, node: FakeNode) -> None:
    await embed(embedding, [5, 6, 7])
    answer = await embed(embedding, [[8, 9], [5, 6, 7]])
    assert asked(node) == [[5, 6, 7], [[8, 9]]]
    assert [item["index"] for item in answer.json["data"]] == [0, 1]


async def test_off_by_default(balancer: Balancer, node: FakeNode) -> None:
    await embed(balancer, "one")
    await embed(balancer, ["one", "two"])
    assert asked(node) == ["one", ["one", "two"]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"dimensions": 8}),
        ({}, {"encoding_format": "base64"}),
        ({"x": 1}, {"x": 2}),
    ],
)
async def test_what_differs_otherwise_is_not_shared(
    embedding: Balancer, node: FakeNode, one: dict[str, Any], other: dict[str, Any]
) -> None:
    await embed(embedding, "one", **one)
    await embed(embedding, ["one", "two"], **other)
    assert asked(node) == ["one", ["one", "two"]]


async def test_tenants_share_no_vector(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("acme"), key("globex")), **PER_INPUT)
    await embed(balancer, "one", bearer("acme"))
    await embed(balancer, ["one", "two"], bearer("globex"))
    assert asked(node) == ["one", ["one", "two"]]
    assert await balancer.app.cache.delete(tenant="globex", model=MODEL, key=None) == 3, "flushed with the rest"


async def test_bypass_and_refresh_read_nothing(embedding: Balancer, node: FakeNode) -> None:
    await embed(embedding, "one")
    for wish in ("bypass", "refresh"):
        assert (await embed(embedding, ["one", "two"], f"X-Balancer-Cache: {wish}")).cache == "bypass"
    assert asked(node) == ["one", ["one", "two"], ["one", "two"]]
    assert (await embed(embedding, ["two", "one"])).cache == "hit", "a refresh is written"


async def test_an_input_that_stands_twice_is_left_to_the_node(embedding: Balancer, node: FakeNode) -> None:
    await embed(embedding, "one")
    await embed(embedding, ["one", "one"])
    assert asked(node) == ["one", ["one", "one"]]


@pytest.mark.parametrize("status", [400, 500])
async def test_a_call_for_the_rest_that_fails_is_the_requests_failure(
    embedding: Balancer, node: FakeNode, status: int
) -> None:
    await embed(embedding, "one")
    node.faults.add(Fault("status", status=status))
    answer = await ask(embedding, {"model": MODEL, "input": ["one", "two"]}, PATH)
    assert answer.status == {400: 400, 500: 502}[status]
    assert "error" in answer.json


def vectors(count: int, **usage: int) -> bytes:
    data = [{"object": "embedding", "index": index, "embedding": [1.0]} for index in range(count)]
    return ok({"object": "list", "data": data, "usage": usage})


async def test_a_usage_that_cannot_be_added_up_is_not_made_up(serve: Serve) -> None:
    """The whole list is asked for instead."""
    whole = vectors(2, prompt_tokens=7)
    node = ScriptedNode(vectors(1, prompt_tokens=3, total_tokens=3), vectors(1, prompt_tokens=4), whole)
    async with node:
        balancer = await serve(node, **PER_INPUT)
        await embed(balancer, "one")
        answer = await embed(balancer, ["one", "two"])
        assert answer.json["usage"] == {"prompt_tokens": 7}
        assert [json.loads(request.body)["input"] for request in node.requests] == ["one", ["two"], ["one", "two"]]


async def test_tokens_that_a_node_did_not_count_cost_nothing(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **PER_INPUT)
    first = await embed(balancer, ["one two three"])
    second = await embed(balancer, ["one two three", "four"])
    used = balancer.app.admission.tenants()["anonymous"]["prompt_tokens"]
    assert used == second.json["usage"]["prompt_tokens"]
    assert first.json["usage"]["prompt_tokens"] < used


@pytest.mark.real("redis")
async def test_vectors_are_shared_through_redis(
    node: FakeNode, serve: Serve, redis_server: RedisServer, patient_redis: None
) -> None:
    settings = {"redis": {"url": redis_server.url, "timeout_s": 0.03}, **PER_INPUT}
    one, two = await serve(node, **settings), await serve(node, **settings)
    await embed(one, "one")
    with redis_server.client() as client:
        await one.wait_for(lambda: len(client.keys(b"*")) == 2)
        await embed(two, ["one", "two"])
        assert asked(node) == ["one", ["two"]]
        await two.wait_for(lambda: len(client.keys(b"*")) == 3)
        assert all(client.pttl(name) > 0 for name in client.scan_iter(b"*"))
