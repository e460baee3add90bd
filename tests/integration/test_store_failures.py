"""A Redis that is absent, killed, frozen, full or soiled: requests are served, and it is used again when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from loadtest.fake_node import FakeNode
from tests.client import Client, Reply, chat, client_of, fleet
from tests.harness import Balancer, running
from tests.redis_server import RedisServer, free_port, new_server, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

pytestmark = pytest.mark.real("redis")

# The longest that settings allow: a busy machine must not make a store look slow that is there.
PATIENT_S = 0.03
WITHIN_S = 20.0


@asynccontextmanager
async def with_store(url: str, **settings: Any) -> AsyncIterator[tuple[FakeNode, Balancer, Client]]:
    """One healthy node behind a balancer whose store is at `url`, with nothing in its own memory."""
    settings["cache"] = {"memory_bytes": 0, **settings.get("cache", {})}
    redis = {"url": url, "timeout_s": PATIENT_S}
    async with (
        FakeNode(instant=True) as node,
        running(*fleet(node), redis=redis, **settings) as balancer,
        client_of(balancer.url) as client,
    ):
        yield node, balancer, client


def cached_as(reply: Reply) -> str:
    assert reply.is_whole
    return reply.headers["X-Balancer-Cache"]


async def is_used(balancer: Balancer, client: Client, text: str) -> None:
    """Until an answer comes out of the store: it is reached, written to, and read from."""
    await balancer.wait_for(lambda: balancer.app.store.state() == "ready", WITHIN_S)
    async with asyncio.timeout(WITHIN_S):
        while cached_as(await client.post(chat(text))) != "hit":  # noqa: ASYNC110
            await asyncio.sleep(0)  # there is nothing else to wait for between two tries


async def is_given_up(balancer: Balancer, client: Client) -> None:
    """Until the store's breaker is open; every request on the way is served."""
    async with asyncio.timeout(WITHIN_S):
        number = 0
        while balancer.app.store.state() == "ready":
            assert cached_as(await client.post(chat(f"on the way {number}"))) == "miss"
            number += 1


# -- the cache


async def test_a_store_that_is_absent_at_the_start_is_a_warning_and_no_more() -> None:
    with capture_logs() as logs:
        async with with_store(f"redis://127.0.0.1:{free_port()}/0") as (node, balancer, client):
            replies = await client.many(40)
            assert {cached_as(reply) for reply in replies} == {"miss"}
            assert len(node.requests) == 40
            assert (await client.get(f"{balancer.ops_url}/readyz")).status == 200
    (warning,) = [line for line in logs if line["event"] == "store.unreachable"]
    assert warning["log_level"] == "warning"


async def test_a_store_that_comes_up_later_is_used() -> None:
    server = new_server()
    server.port = free_port()
    try:
        async with with_store(server.url) as (_, balancer, client):
            assert cached_as(await client.post(chat())) == "miss"
            server.start()
            await is_used(balancer, client, "now kept")
    finally:
        server.kill()


async def test_a_store_killed_under_load_fails_nothing_and_is_used_again_when_it_is_back(
    redis_server: RedisServer,
) -> None:
    with capture_logs() as logs:
        async with with_store(redis_server.url) as (node, balancer, client):
            await is_used(balancer, client, "kept")
            load = asyncio.create_task(client.many(300))
            await balancer.wait_for(lambda: len(balancer.requests) > 100)
            redis_server.kill()
            assert {cached_as(reply) for reply in await load} == {"miss"}
            await is_given_up(balancer, client)
            before = len(node.requests)
            assert cached_as(await client.post(chat("kept"))) == "miss"
            assert len(node.requests) == before + 1
            assert balancer.counts("store_errors")
            redis_server.start()
            await is_used(balancer, client, "kept again")
    told = [line["event"] for line in logs if line["event"].startswith("store.")]
    assert told == ["store.unreachable", "store.recovered"], "once on each edge"


async def test_a_frozen_store_fails_nothing_and_is_soon_not_asked_any_more(redis_server: RedisServer) -> None:
    async with with_store(redis_server.url) as (_, balancer, client):
        await is_used(balancer, client, "kept")
        redis_server.freeze()
        await is_given_up(balancer, client)
        errors = balancer.counts("store_errors")
        assert errors["get",] <= 3, "its breaker opens after three"
        assert {cached_as(reply) for reply in await client.many(100)} == {"miss"}
        assert balancer.counts("store_errors")["get",] == errors["get",]
        redis_server.thaw()
        await is_used(balancer, client, "kept again")


async def test_a_full_store_fails_nothing() -> None:
    with new_server("--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        async with with_store(server.url) as (_, balancer, client):
            replies = await client.many(40)
            assert {cached_as(reply) for reply in replies} == {"miss"}
            await balancer.wait_for(lambda: balancer.counts("store_errors").get(("put",), 0) > 0)


@pytest.mark.parametrize("dirt", [b"", b"no line", b'{"v":1}\n', b'{"v":99,"stream":false}\nx', b"\xff" * 1000])
async def test_a_soiled_entry_is_a_miss_and_is_written_anew(redis_server: RedisServer, dirt: bytes) -> None:
    async with with_store(redis_server.url) as (_, balancer, client):
        await is_used(balancer, client, "kept")
        inside = redis_server.client()
        (key,) = inside.keys("balancer:v1:cache:*")
        inside.set(key, dirt)
        assert cached_as(await client.post(chat("kept"))) == "miss"
        await is_used(balancer, client, "kept")
        inside.delete(key)
        inside.rpush(key, "a list")
        assert cached_as(await client.post(chat("kept"))) == "miss"
        inside.close()


# -- limits


LIMITED = {"requests_per_minute": 0.001, "burst": 3}


def outcomes(replies: list[Reply]) -> list[tuple[int, str | None]]:
    return [(reply.status, reply.code) for reply in replies]


async def one_by_one(client: Client, count: int, text: str = "asked") -> list[Reply]:
    return [await client.post(chat(f"{text} {number}")) for number in range(count)]


async def test_limits_that_fail_open_are_applied_in_this_process_while_the_store_is_away(
    redis_server: RedisServer,
) -> None:
    async with with_store(redis_server.url, limits=LIMITED) as (_, balancer, client):
        assert outcomes(await one_by_one(client, 1)) == [(200, None)]
        assert balancer.counts("limits_unchecked") == {}
        redis_server.kill()
        replies = await one_by_one(client, 5, "away")
        assert outcomes(replies) == [(200, None)] * 3 + [(429, "rate_limited")] * 2
        assert all(reply.retry_after_s >= 1 for reply in replies[3:])
        assert balancer.counts("limits_unchecked") == {(): 5}


async def test_limits_that_fail_closed_refuse_while_the_store_is_away(redis_server: RedisServer) -> None:
    async with with_store(redis_server.url, limits={**LIMITED, "fail_open": False}) as (node, balancer, client):
        assert outcomes(await one_by_one(client, 1)) == [(200, None)]
        redis_server.kill()
        replies = await one_by_one(client, 3, "away")
        assert [reply.status for reply in replies] == [503] * 3
        assert all(reply.retry_after_s >= 1 for reply in replies)
        assert all(b"127.0.0.1" not in reply.body for reply in replies)
        assert len(node.requests) == 1
        assert balancer.counts("shed") == {("limits_unavailable",): 3}
        redis_server.start()
        await balancer.wait_for(lambda: balancer.app.store.state() == "ready", WITHIN_S)
        assert outcomes(await one_by_one(client, 1, "back")) == [(200, None)]


@pytest.mark.parametrize("fail_open", [True, False])
async def test_a_frozen_store_keeps_limits_as_set(redis_server: RedisServer, fail_open: bool) -> None:
    settings = {"limits": {**LIMITED, "fail_open": fail_open}, "cache": {"enabled": False}}
    async with with_store(redis_server.url, **settings) as (_, _, client):
        redis_server.freeze()
        replies = await one_by_one(client, 4)
        redis_server.thaw()
    statuses = [reply.status for reply in replies]
    assert statuses == ([200, 200, 200, 429] if fail_open else [503] * 4)


async def test_limits_kept_in_memory_need_no_store() -> None:
    limits = {**LIMITED, "fail_open": False, "store": "memory"}
    async with with_store(f"redis://127.0.0.1:{free_port()}/0", limits=limits) as (_, balancer, client):
        assert [reply.status for reply in await one_by_one(client, 4)] == [200, 200, 200, 429]
        assert balancer.counts("limits_unchecked") == {}


@asynccontextmanager
async def two_balancers(url: str, **settings: Any) -> AsyncIterator[tuple[FakeNode, Balancer, Balancer]]:
    """A node behind two balancers with one store."""
    settings["redis"] = {"url": url, "timeout_s": PATIENT_S}
    async with (
        FakeNode(instant=True) as node,
        running(*fleet(node), **settings) as one,
        running(*fleet(node), **settings) as two,
    ):
        yield node, one, two


async def test_two_balancers_share_their_answers(redis_server: RedisServer) -> None:
    async with two_balancers(redis_server.url) as (node, one, two):
        async with client_of(one.url) as a, client_of(two.url) as b:
            await is_used(one, a, "kept")
            before = len(node.requests)
            await is_used(two, b, "kept")
        late = two.counts("store_errors")  # on a machine that is too busy
        assert len(node.requests) == before or late


async def test_two_balancers_share_a_limit(redis_server: RedisServer) -> None:
    limits = {**LIMITED, "burst": 7, "fail_open": False}
    async with two_balancers(redis_server.url, limits=limits) as (node, one, two):
        async with client_of(one.url) as a, client_of(two.url) as b:
            replies = [await client.post(chat(f"{client is a} {n}")) for n in range(6) for client in (a, b)]
        late = one.counts("store_errors") or two.counts("store_errors")
        assert len(node.requests) == 7 or (late and len(node.requests) < 7)
        assert sum(reply.is_whole for reply in replies) == len(node.requests)
