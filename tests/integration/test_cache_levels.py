"""Two levels: this process's memory in front of a real Redis, and what entries look like there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from balancer.cache import THREAD_BYTES
from balancer.core.cache_entry import decode, encode
from loadtest.fake_node import FakeNode
from tests.harness import Balancer, running
from tests.integration.asking import caches
from tests.integration.conftest import PATIENT, node_settings
from tests.integration.raw_http import CHAT, ask, chat
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

pytestmark = pytest.mark.real("redis")

WITHIN_S = 20.0
SIGN_KEY = "0123456789abcdef"


@asynccontextmanager
async def balancer_on(server: RedisServer, node: FakeNode, **cache: Any) -> AsyncIterator[Balancer]:
    redis = {"url": server.url, "timeout_s": 0.03}
    async with running(node_settings(node), health=PATIENT, redis=redis, cache=cache) as balancer:
        await balancer.wait_for(lambda: balancer.app.store.state() == "ready", WITHIN_S)
        yield balancer


async def written(balancer: Balancer) -> None:
    """Return when Redis has what was stored."""
    store: Any = balancer.app.store
    await store.written()


def hits(balancer: Balancer) -> dict[tuple[str, ...], int]:
    return balancer.counts("cache_hits")


async def until_hit(balancer: Balancer, body: dict[str, Any], level: str) -> None:
    """Ask until that level answers: on a busy machine Redis may be too late once."""
    before = hits(balancer).get((level,), 0)
    async with asyncio.timeout(WITHIN_S):
        while hits(balancer).get((level,), 0) == before:
            await ask(balancer, body)
            await written(balancer)


# -- memory in front of Redis


async def test_what_one_balancer_stored_another_finds_and_then_has_itself(
    redis_server: RedisServer, node: FakeNode
) -> None:
    async with balancer_on(redis_server, node) as one, balancer_on(redis_server, node) as two:
        first = await ask(one, chat())
        await written(one)
        await until_hit(two, chat(), "redis")
        redis_server.freeze()
        answer = await ask(two, chat())
        redis_server.thaw()
        assert (answer.cache, answer.body) == ("hit", first.body)
        assert hits(two)["memory",] >= 1
        assert len(node.requests) == 1


async def test_own_answers_are_served_from_memory(redis_server: RedisServer, node: FakeNode) -> None:
    async with balancer_on(redis_server, node) as balancer:
        assert await caches(balancer, (chat(),), (chat(),), (chat(stream=True),)) == ["miss", "hit", "hit"]
        assert hits(balancer) == {("memory",): 2}
        stats = await balancer.app.cache.stats()
        assert (stats["hits_by_level"]["memory"], stats["memory"]["entries"], stats["store"]) == (2, 1, "ready")


async def test_a_copy_lives_only_a_while_and_no_longer_than_the_answer(
    redis_server: RedisServer, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with balancer_on(redis_server, node, memory_ttl_s=30.0, ttl_jitter=0.0) as balancer:
        until: list[float] = []
        put = balancer.app.cache.local.put
        monkeypatch.setattr(
            balancer.app.cache.local,
            "put",
            lambda name, stored, until_s: (until.append(until_s), put(name, stored, until_s)),
        )
        now: Callable[[], float] = balancer.app._clock.now
        await ask(balancer, chat())
        await ask(balancer, chat("short"), CHAT, "X-Balancer-Cache-TTL-S: 5")
        assert until[0] - now() == pytest.approx(30.0, abs=5.0)
        assert until[1] - now() == pytest.approx(5.0, abs=4.9)
        await written(balancer)
        (name,) = [name for name in keys(redis_server) if pttl(redis_server, name) > 10_000]
        assert 3_500_000 < pttl(redis_server, name) <= 3_600_000, "in Redis for its whole lifetime"


def keys(server: RedisServer) -> list[str]:
    with server.client() as client:
        return [key.decode() for key in client.keys("balancer:v1:cache:*")]


def pttl(server: RedisServer, name: str) -> int:
    with server.client() as client:
        return int(client.pttl(name))


async def test_without_memory_every_hit_comes_from_redis(redis_server: RedisServer, node: FakeNode) -> None:
    async with balancer_on(redis_server, node, memory_bytes=0) as balancer:
        await ask(balancer, chat())
        await written(balancer)
        await until_hit(balancer, chat(), "redis")
        assert ("memory",) not in hits(balancer)


# -- entries in Redis


def only_entry(server: RedisServer) -> tuple[str, bytes]:
    (name,) = keys(server)
    with server.client() as client:
        return name, client.get(name)


@pytest.mark.parametrize("words", [100, 1000], ids=["at once", "in a thread"])
async def test_large_answers_are_compressed_there_and_come_back_whole(redis_server: RedisServer, words: int) -> None:
    body = chat(stream=True, max_tokens=words)
    async with (
        FakeNode(instant=True, shortest_answer=words, longest_answer=words) as node,
        balancer_on(redis_server, node, memory_bytes=0) as balancer,
    ):
        first = await ask(balancer, body)
        async with asyncio.timeout(WITHIN_S):
            while not keys(redis_server):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # written from a thread
        name, entry = only_entry(redis_server)
        assert (len(first.body) > THREAD_BYTES) == (words == 1000)
        assert len(entry) < len(first.body) / 4
        assert decode(entry, name, max_bytes=1 << 20).stream
        async with asyncio.timeout(WITHIN_S):
            while (answer := await ask(balancer, body)).cache != "hit":
                pass
        assert answer.body == first.body


async def test_signed_entries_are_read_and_others_are_misses_and_counted(
    redis_server: RedisServer, node: FakeNode
) -> None:
    async with balancer_on(redis_server, node, memory_bytes=0, sign_key=SIGN_KEY) as balancer:
        await ask(balancer, chat())
        await written(balancer)
        await until_hit(balancer, chat(), "redis")
        name, entry = only_entry(redis_server)
        stored = decode(entry, name, max_bytes=1 << 20, key=SIGN_KEY.encode())
        forged = encode(stored, name, key=b"not the same key")
        elsewhere = encode(stored, name + "x", key=SIGN_KEY.encode())
        before = len(node.requests)
        for soiled in (encode(stored, name), forged, elsewhere):
            with redis_server.client() as client:
                client.set(name, soiled)
            assert await caches(balancer, (chat(),)) == ["miss"]
            await written(balancer)
        assert len(node.requests) == before + 3
        refused = balancer.counts("cache_entries_refused")
        assert refused == {("unsigned",): 1, ("signature",): 2}


# -- flushing


async def test_flushing_removes_answers_from_both_levels(redis_server: RedisServer, node: FakeNode) -> None:
    async with balancer_on(redis_server, node) as balancer:
        await caches(balancer, (chat(),), (chat("other"),))
        await written(balancer)
        assert await balancer.app.cache.delete(tenant=None, model="sim-model", key=None) == 2
        assert (keys(redis_server), len(balancer.app.cache.local)) == ([], 0)
        assert await caches(balancer, (chat(),)) == ["miss"]


async def test_what_is_forgotten_here_is_still_in_redis(redis_server: RedisServer, node: FakeNode) -> None:
    async with balancer_on(redis_server, node) as balancer:
        await ask(balancer, chat())
        await written(balancer)
        digest = keys(redis_server)[0].split(":")[-1].strip("{}")
        assert balancer.app.cache.forget_local("anonymous", None, "0" * 64) == 0
        assert balancer.app.cache.forget_local("anonymous", None, digest) == 1
        await until_hit(balancer, chat(), "redis")


async def test_answers_are_removed_by_age_through_the_admin_port(redis_server: RedisServer, node: FakeNode) -> None:
    async with balancer_on(redis_server, node, memory_bytes=0, sign_key=SIGN_KEY) as balancer:
        await caches(balancer, (chat("one"),), (chat("other"),))
        await written(balancer)
        with redis_server.client() as client:
            for name in keys(redis_server):
                stored = decode(client.get(name), name, max_bytes=1 << 20, key=SIGN_KEY.encode())
                stored.stored_wall_s -= 100.0
                client.set(name, encode(stored, name, key=SIGN_KEY.encode()), px=60_000)
                break
        assert (await flush(balancer, "older_than_s=50"))["deleted"] == 1
        assert len(keys(redis_server)) == 1
        assert (await flush(balancer, "older_than_s=50&tenant=anonymous"))["deleted"] == 0
        assert (await flush(balancer, "older_than_s=0&tenant=nobody"))["deleted"] == 0
        assert (await flush(balancer, "older_than_s=0"))["deleted"] == 1
        for wrong in ("older_than_s=x", "older_than_s=-1", "older_than_s=inf", "older_than=1"):
            assert (await flush(balancer, wrong))["error"]["code"] == "invalid_request"


async def flush(balancer: Balancer, query: str) -> Any:
    async with aiohttp.ClientSession() as session, session.delete(f"{balancer.ops_url}/admin/cache?{query}") as answer:
        return await answer.json()
