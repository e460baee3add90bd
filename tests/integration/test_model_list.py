"""Which node serves which model, asked on real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from balancer.clock import SystemClock
from balancer.core.node import ANY_MODEL
from balancer.model_list import MAX_BYTES, ModelLister, engine_of, model_ids
from tests.answering import Answering, Fleet, dead_url

MODELS = "/v1/models"


def listing(*ids: str) -> tuple[int, Any]:
    return 200, {"object": "list", "data": [{"id": id_, "object": "model"} for id_ in ids]}


def owned(*owners: Any) -> tuple[int, Any]:
    return 200, {"object": "list", "data": [{"id": f"{at}", "owned_by": owner} for at, owner in enumerate(owners)]}


@asynccontextmanager
async def listing_models(fleet: Fleet, refresh_s: float = 0.02) -> AsyncIterator[None]:
    lister = ModelLister(fleet.registry, SystemClock(), Random(1), refresh_s=refresh_s)
    await lister.start()
    try:
        yield
    finally:
        await lister.close()


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"data": [{"id": "a"}, {"id": "b"}]}', {"a", "b"}),
        (b'{"data": []}', set()),
        (b'{"data": [{"id": 5}, "x", {"name": "y"}, {"id": "a"}]}', {"a"}),
        (b"[]", None),
        (b"{}", None),
        (b'{"data": {"id": "a"}}', None),
        (b"<html>", None),
        (b"", None),
    ],
)
def test_model_ids_are_read_from_a_list_and_from_nothing_else(body: bytes, ids: set[str] | None) -> None:
    assert model_ids(body) == ids


async def test_a_list_is_asked_for_at_once_with_the_nodes_key() -> None:
    fleet = Fleet()
    async with Answering({MODELS: listing("a", "b")}) as server:
        node = fleet.put(server.url, api_key="secret")
        async with listing_models(fleet, refresh_s=60.0):
            await fleet.until(lambda: node.listed_models == {"a", "b"})
        assert server.asked[0].headers["Authorization"] == "Bearer secret"
        assert fleet.registry.models() == {"a": [node], "b": [node]}


async def test_a_node_that_joins_is_asked_at_once() -> None:
    fleet = Fleet()
    async with Answering({MODELS: listing("a")}) as server, listing_models(fleet, refresh_s=60.0):
        node = fleet.put(server.url)
        await fleet.until(lambda: node.serves("a") is True)


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_node_without_such_a_path_takes_any_model(status: int) -> None:
    fleet = Fleet()
    async with Answering({MODELS: status}) as server:
        node = fleet.put(server.url)
        async with listing_models(fleet):
            await fleet.until(lambda: node.listed_models is ANY_MODEL)
        assert node.serves("whatever") is True


async def test_a_changed_list_is_noticed() -> None:
    fleet = Fleet()
    async with Answering({MODELS: listing("a")}) as server:
        node = fleet.put(server.url)
        async with listing_models(fleet):
            await fleet.until(lambda: node.listed_models == {"a"})
            server.answers[MODELS] = listing("a", "adapter")
            await fleet.until(lambda: node.listed_models == {"a", "adapter"})


@pytest.mark.parametrize(
    "answer",
    [500, 401, 302, (200, b"not JSON"), (200, {}), (200, b'{"data": []}' + b" " * MAX_BYTES), (200, {"data": None})],
)
async def test_an_answer_that_is_no_list_keeps_the_last_one(answer: Any) -> None:
    fleet = Fleet()
    async with Answering({MODELS: listing("a")}) as server:
        node = fleet.put(server.url)
        async with listing_models(fleet):
            await fleet.until(lambda: node.listed_models == {"a"})
            server.answers[MODELS] = answer
            await server.asked_for(MODELS, 3)
            assert node.listed_models == {"a"}


async def test_nothing_is_known_of_a_node_that_never_answered() -> None:
    fleet = Fleet()
    async with Answering({MODELS: listing("a")}) as server:
        node, other = fleet.put(dead_url()), fleet.put(server.url)
        async with listing_models(fleet):
            await server.asked_for(MODELS, 4)
        assert node.serves("a") is None
        assert other.serves("a") is True


async def test_a_node_with_configured_models_is_asked_for_its_engine_alone() -> None:
    fleet = Fleet()
    async with Answering({MODELS: owned("llamacpp")}) as server:
        node = fleet.put(server.url, models=("b",))
        async with listing_models(fleet):
            await fleet.until(lambda: node.engine == "llamacpp")
        assert node.known_models == {"b"}


async def test_a_node_of_which_all_is_configured_is_not_asked() -> None:
    fleet = Fleet()
    async with Answering() as configured, Answering({MODELS: listing("a")}) as asked:
        node, _ = fleet.put(configured.url, models=("b",), engine="vllm"), fleet.put(asked.url)
        async with listing_models(fleet):
            await asked.asked_for(MODELS, 4)
        assert configured.asked == []
        assert node.serves("b") is True
        assert node.engine == "vllm"


@pytest.mark.parametrize(
    ("owners", "engine"),
    [
        (["vllm"], "vllm"),
        (["vllm", "vllm"], "vllm"),
        (["sglang"], "sglang"),
        (["llamacpp"], "llamacpp"),
        (["tensorrt_llm"], "trtllm"),
        (["library"], "ollama"),
        (["vllm", "sglang"], None),
        (["organization-owner"], None),
        ([None], None),
        ([7], None),
        ([], None),
    ],
)
def test_an_engine_is_known_by_the_owner_of_all_its_models(owners: list[Any], engine: str | None) -> None:
    assert engine_of(json.dumps(owned(*owners)[1]).encode()) == engine


async def test_an_engine_that_is_another_one_now_is_noticed() -> None:
    fleet = Fleet()
    async with Answering({MODELS: owned("llamacpp")}) as server:
        node = fleet.put(server.url)
        async with listing_models(fleet):
            await fleet.until(lambda: node.engine == "llamacpp")
            server.answers[MODELS] = owned("vllm")
            await fleet.until(lambda: node.engine == "vllm")
            server.answers[MODELS] = 404
            await fleet.until(lambda: node.engine is None)


async def test_a_node_is_asked_again_when_it_recovers_and_not_while_it_is_down() -> None:
    fleet = Fleet()
    async with Answering({MODELS: 503}) as server, Answering({MODELS: 503}) as other:
        node = fleet.put(server.url)
        fleet.put(other.url)
        async with listing_models(fleet, refresh_s=60.0):
            await server.asked_for(MODELS)
            fleet.registry.checked(node, False, "refused", SystemClock.now())
            server.answers[MODELS] = listing("a")
            await other.asked_for(MODELS, 2)
            assert server.count(MODELS) == 1
            fleet.registry.checked(node, True, "", SystemClock.now())
            await fleet.until(lambda: node.listed_models == {"a"})
            fleet.registry.checked(node, False, "refused", SystemClock.now())
            server.answers[MODELS] = listing("b")
            fleet.registry.checked(node, True, "", SystemClock.now())
            await fleet.until(lambda: node.listed_models == {"b"})


async def test_a_node_without_an_answer_is_asked_again_before_the_others_are_refreshed() -> None:
    fleet = Fleet()
    async with Answering({MODELS: listing("a")}) as good, Answering({MODELS: 503}) as loading:
        node, late = fleet.put(good.url), fleet.put(loading.url)
        async with listing_models(fleet, refresh_s=60.0):
            await fleet.until(lambda: node.listed_models == {"a"})
            await loading.asked_for(MODELS)
            loading.answers[MODELS] = listing("b")
            await fleet.until(lambda: late.listed_models == {"b"})
        assert good.count(MODELS) == 1
