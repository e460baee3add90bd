"""Where balancers meet over a call: one holds it, the others read it, and nothing there is kept or read loosely."""

from __future__ import annotations

from collections.abc import AsyncIterator
from random import Random

import pytest

from balancer.clock import SystemClock
from balancer.core.cache_key import flight_name
from balancer.store.address import Address, parse
from balancer.store.entries import BAD, BEGIN, DATA, END, GOOD, Entry
from balancer.store.flights import STREAM_BYTES, Board, Lease, stream_name
from balancer.store.redis import RedisStore
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

pytestmark = pytest.mark.real("redis")

PATIENT_S = 5.0
NAME = flight_name("d" * 64, "u10")


class Held:
    """A flight as a lease knows it."""

    def __init__(self, begin: bytes = b"[]", data: bytes = b"") -> None:
        self.begin = begin
        self.data = data
        self.told: list[bool] = []

    def so_far(self) -> tuple[bytes, bytes]:
        return self.begin, self.data

    def wanted_until(self, deadline_s: float | None) -> None:
        self.told.append(deadline_s is not None)


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[RedisStore]:
    errors: list[str] = []
    store = RedisStore(redis_server.url, timeout_s=PATIENT_S, clock=SystemClock(), on_error=errors.append)
    await store.start()
    yield store
    await store.close()


@pytest.fixture
async def board(store: RedisStore, redis_server: RedisServer) -> AsyncIterator[Board]:
    board = Board(store, address(redis_server.url), SystemClock())
    yield board
    await board.close()


def address(url: str) -> Address:
    where = parse(url)
    assert isinstance(where, Address)
    return where


async def claim(board: Board, token: str, wanted_s: float = 60.0) -> str | None:
    return await board.claim(NAME, token, wanted_s=wanted_s, within_s=PATIENT_S)


async def test_one_holds_a_flight_and_the_others_are_told_who(board: Board, redis_server: RedisServer) -> None:
    assert [await claim(board, token) for token in ("a", "b", "c", "a")] == ["", "a", "a", ""]
    with redis_server.client() as client:
        assert 0 < client.pttl(NAME) <= 2000


async def test_what_is_given_up_is_free(board: Board, store: RedisStore, redis_server: RedisServer) -> None:
    assert await claim(board, "a") == ""
    board.end(NAME, "b", 1, GOOD)
    await store.written()
    assert await claim(board, "c") == "a", "by its holder only"
    board.end(NAME, "a", 1, BAD)
    await store.written()
    assert await board.read(NAME, "a", 0) == [Entry(1, END, BAD)], "who waits is told"
    assert await claim(board, "c") == ""
    board.end(NAME, "c", 1, GOOD)
    await store.written()
    with redis_server.client() as client:
        assert client.keys(b"*") == [stream_name(NAME, "a").encode()], "nobody waited for this one"
        assert all(client.pttl(name) > 0 for name in client.keys(b"*"))


async def test_the_longest_wish_is_what_a_holder_hears(board: Board, store: RedisStore) -> None:
    heard: list[object] = []
    await claim(board, "a")
    for wanted_s in (5.0, 60.0, 7.0):
        await claim(board, "b", wanted_s)
    for token in ("a", "a", "b"):
        board.renew(NAME, token, heard.append)
        await store.written()
    assert heard == [60_000, 0, -1]


async def test_a_lease_publishes_from_when_it_is_wanted(board: Board, store: RedisStore) -> None:
    held = Held(b"[1]", b"so far")
    await claim(board, "a")
    lease = board.lease(NAME, "a", held)
    lease.write(b"nobody reads this")
    assert await board.read(NAME, "a", 0, wait=False) == []
    await claim(board, "b")
    while not held.told:
        assert await board.read(NAME, "b", 0) == []  # waits a little
    lease.write(b" and ")
    lease.write(b"more")
    lease.end(GOOD)
    await store.written()
    entries = [Entry(1, BEGIN, b"[1]"), Entry(2, DATA, b"so far"), Entry(3, DATA, b" and more"), Entry(4, END, GOOD)]
    assert await board.read(NAME, "a", 0) == entries
    assert await board.read(NAME, "a", 2) == entries[2:]
    assert held.told == [True]


async def test_a_stream_holds_its_last_part_only_and_who_comes_too_late_is_told(
    board: Board, store: RedisStore, redis_server: RedisServer
) -> None:
    await claim(board, "a")
    lease = board.lease(NAME, "a", Held(b"[1]", b"x"))
    publish(lease, [b"x" * 100_000] * 30)
    await store.written()
    with redis_server.client() as client:
        kept = client.xrange(stream_name(NAME, "a"))
    assert sum(len(data) for _, fields in kept for data in fields.values()) <= STREAM_BYTES
    assert await board.read(NAME, "a", 0) is None
    entries = await board.read(NAME, "a", 31)
    assert entries is not None
    assert [entry.number for entry in entries] == [32]
    lease.end(GOOD)


def publish(lease: Lease, parts: list[bytes]) -> None:
    lease._publish_so_far()
    for part in parts:
        lease.write(part)
        lease._flush()


@pytest.mark.parametrize("seed", range(5))
async def test_what_is_not_a_stream_of_ours_is_not_read(board: Board, redis_server: RedisServer, seed: int) -> None:
    rng = Random(seed)
    stream = stream_name(NAME, "a")
    with redis_server.client() as client:
        client.set(stream, b"x", px=60_000)
        assert await board.read(NAME, "a", 0) is None
        for fields in ({b"data": b"x", b"more": b"x"}, {rng.randbytes(4): b"x"}):
            client.delete(stream)
            client.xadd(stream, fields, id="1-1")
            assert await board.read(NAME, "a", 0) is None
        client.delete(stream)
        client.xadd(stream, {b"data": b"x"}, id=f"{rng.randrange(2, 9)}-1")
        assert await board.read(NAME, "a", 0) is None
        client.delete(stream)
        client.xadd(stream, {b"data": b"x"}, id="1-0")
        assert await board.read(NAME, "a", 0) in (None, [])


async def test_a_redis_that_is_gone_says_nothing_at_once(board: Board, redis_server: RedisServer) -> None:
    redis_server.kill()
    assert await board.read(NAME, "a", 0) is None
    assert await claim(board, "a") is None
