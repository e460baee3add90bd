"""The index in Redis vector sets beside the one in memory: the same results, and nothing that stays for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from balancer.clock import SystemClock
from balancer.core.cache_key import semantic_name
from balancer.core.semantic.guards import read
from balancer.semantic import Entry, Index, Unavailable, Vector
from balancer.semantic.index_memory import MemoryIndex
from balancer.semantic.index_redis import RedisIndex
from balancer.semantic.index_shared import SharedIndex
from balancer.store.address import Address
from balancer.store.address import parse as parse_url
from tests.fakes import ManualClock
from tests.real import engine
from tests.real.vector_server import VectorServer
from tests.redis_server import RedisServer, redis_server  # noqa: F401


def single(url: str) -> Address:
    """A server's address."""
    where = parse_url(url)
    assert isinstance(where, Address)
    return where


KEY = semantic_name("acme", "m", "p" * 64)
DIMENSIONS = 384
FEATURES = read("What is the capital of Peru?").hashed(b"key")
PATIENT_S = 10.0


@pytest.fixture(scope="module")
def vectors() -> Iterator[VectorServer]:
    try:
        server = VectorServer()
    except engine.Unavailable as error:
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture
async def redis_index(vectors: VectorServer) -> AsyncIterator[RedisIndex]:
    vectors.client().flushall()
    index = RedisIndex(single(vectors.url), timeout_s=PATIENT_S, max_entries=300, clock=SystemClock())
    yield index
    await index.close()


def entry(number: int, expires_wall_s: float) -> Entry:
    return Entry(f"{number:064x}", FEATURES, expires_wall_s)


def directions(count: int) -> list[Vector]:
    rows = np.random.default_rng(1).normal(size=(count, DIMENSIONS)).astype(np.float32)
    return list(rows / np.linalg.norm(rows, axis=1, keepdims=True))


async def found(index: Index, vector: Vector) -> list[tuple[str, float]]:
    return [(entry.id, round(cosine, 4)) for cosine, entry in await index.nearest(KEY, vector, 8)]


@pytest.mark.real("vectors")
async def test_both_indexes_find_the_same(redis_index: RedisIndex) -> None:
    clock = SystemClock()
    memory = MemoryIndex(1000, clock)
    rows = directions(260)
    for number, row in enumerate(rows[:250]):
        for index in (memory, redis_index):
            await index.add(KEY, row, entry(number, clock.wall() + 600))
    for row in rows[200:]:
        near = row + 0.3 * rows[0]
        near /= np.linalg.norm(near)
        assert await found(redis_index, near) == await found(memory, near)


@pytest.mark.real("vectors")
async def test_a_set_expires_with_its_longest_lived_answer(redis_index: RedisIndex, vectors: VectorServer) -> None:
    now = SystemClock().wall()
    one, other, *_ = directions(2)
    client = vectors.client()
    for vector, number, ttl_s in ((one, 1, 100), (other, 2, 900), (one, 3, 50)):
        await redis_index.add(KEY, vector, entry(number, now + ttl_s))
    assert 800 < client.ttl(KEY) <= 901
    assert [key.decode() for key in client.scan_iter()] == [KEY]


@pytest.mark.real("vectors")
async def test_what_is_over_or_soiled_is_not_found_and_goes(redis_index: RedisIndex, vectors: VectorServer) -> None:
    now = SystemClock().wall()
    one, other, third, *_ = directions(3)
    await redis_index.add(KEY, one, entry(1, now - 1))
    await redis_index.add(KEY, other, entry(2, now + 600))
    client = vectors.client()
    client.execute_command("VADD", KEY, "FP32", third.tobytes(), "soiled", "NOQUANT", "SETATTR", '{"expires": 1}')
    assert [id_ for id_, _ in await found(redis_index, one)] == [entry(2, now).id]
    assert client.execute_command("VCARD", KEY) == 1


@pytest.mark.real("vectors")
async def test_entries_are_found_by_id_and_removed(redis_index: RedisIndex) -> None:
    (vector,) = directions(1)
    kept = entry(7, SystemClock().wall() + 600)
    await redis_index.add(KEY, vector, kept)
    ((key, there),) = await redis_index.find(kept.id)
    assert key == KEY
    assert float(there @ vector) == pytest.approx(1.0, abs=1e-4)
    assert await redis_index.remove(KEY, kept.id)
    assert not await redis_index.remove(KEY, kept.id)
    assert await redis_index.find(kept.id) == []


@pytest.mark.real("vectors")
async def test_a_partition_does_not_grow_without_end(redis_index: RedisIndex, vectors: VectorServer) -> None:
    now = SystemClock().wall()
    for number, row in enumerate(directions(320)):
        await redis_index.add(KEY, row, entry(number, now + 600))
    assert vectors.client().execute_command("VCARD", KEY) == 300


@pytest.mark.real("vectors")
async def test_the_index_is_shared_where_the_server_has_vector_sets(vectors: VectorServer) -> None:
    vectors.client().flushall()
    clock = SystemClock()
    (vector,) = directions(1)
    pair = [
        SharedIndex(
            RedisIndex(single(vectors.url), timeout_s=PATIENT_S, max_entries=10, clock=clock),
            MemoryIndex(10, clock),
            clock,
        )
        for _ in range(2)
    ]
    for index in pair:
        await index.start()
    await pair[0].add(KEY, vector, entry(1, clock.wall() + 600))
    assert await found(pair[1], vector) == [(entry(1, 0).id, 1.0)]
    await asyncio.gather(*(index.close() for index in pair))


@pytest.mark.real("redis")
async def test_without_vector_sets_each_process_has_its_own(redis_server: RedisServer) -> None:  # noqa: F811
    clock = SystemClock()
    redis = RedisIndex(single(redis_server.url), timeout_s=PATIENT_S, max_entries=10, clock=clock)
    if await redis.usable():
        pytest.skip("this Redis has vector sets")
    index = SharedIndex(redis, MemoryIndex(10, clock), clock)
    await index.start()
    (vector,) = directions(1)
    await index.add(KEY, vector, entry(1, clock.wall() + 600))
    assert await found(index, vector) == [(entry(1, 0).id, 1.0)]
    assert redis_server.client().dbsize() == 0
    await index.close()


@pytest.mark.real("redis")
async def test_a_redis_that_is_away_is_unavailable_and_not_asked_for_a_while(
    redis_server: RedisServer,  # noqa: F811
) -> None:
    clock = ManualClock()
    index = RedisIndex(single(redis_server.url), timeout_s=PATIENT_S, max_entries=10, clock=clock)
    shared = SharedIndex(index, MemoryIndex(10, clock), clock)
    redis_server.kill()
    (vector,) = directions(1)
    await shared.start()
    with pytest.raises(Unavailable, match="undecided"):
        await shared.nearest(KEY, vector, 8)
    with pytest.raises(Unavailable, match="unreachable"):
        await index.nearest(KEY, vector, 8)
    with pytest.raises(Unavailable, match="paused"):
        await index.nearest(KEY, vector, 8)
    redis_server.start()
    clock.advance(10.0)
    assert await shared.nearest(KEY, vector, 8) == []
    await shared.close()
