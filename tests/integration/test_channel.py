"""Messages between balancers over a real Redis, which may be absent, killed, frozen or soiled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import Random

import pytest

from balancer.clock import SystemClock
from balancer.store.channel import MAX_BYTES, MAX_WAITING, PREFIX, Channel, client_of
from tests.redis_server import RedisServer, free_port, new_server, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

pytestmark = pytest.mark.real("redis")

WITHIN_S = 20.0


class Ear:
    """A channel and what came over it; payloads that begin with `bad` are none of this topic's."""

    def __init__(self, url: str, *topics: str) -> None:
        self.heard: list[tuple[str, str, bytes]] = []
        self.events: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self.channel = Channel(partial(client_of, url), clock=SystemClock(), rng=Random(7), on_event=self._event)
        for topic in topics:
            self.channel.subscribe(topic, partial(self._hear, topic))

    def _event(self, topic: str, what: str) -> None:
        self.events[what] += 1

    def _hear(self, topic: str, sender: str, payload: bytes) -> bool:
        if payload.startswith(b"raise"):
            raise RuntimeError("a handler's own fault")
        if payload.startswith(b"bad"):
            return False
        self.heard.append((topic, sender, payload))
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def up(self) -> None:
        await self.until(lambda: self.channel.connected)


@asynccontextmanager
async def ears(url: str, *topics: str, count: int = 2) -> AsyncIterator[list[Ear]]:
    made = [Ear(url, *topics) for _ in range(count)]
    for ear in made:
        ear.channel.start()
    try:
        yield made
    finally:
        for ear in made:
            await ear.channel.close()


async def test_what_one_says_all_others_hear_and_it_does_not(redis_server: RedisServer) -> None:
    async with ears(redis_server.url, "a", "b", count=3) as (one, two, three):
        for ear in (one, two, three):
            await ear.up()
        assert one.channel.publish("a", b"first")
        assert one.channel.publish("b", b"\x00second")
        me = one.channel.balancer_id
        for ear in (two, three):
            await ear.until(lambda ear=ear: len(ear.heard) == 2)  # type: ignore[misc]
            assert ear.heard == [("a", me, b"first"), ("b", me, b"\x00second")]
        assert three.channel.publish("a", b"third")
        await one.until(lambda: bool(one.heard))
        assert one.heard == [("a", three.channel.balancer_id, b"third")]
        assert one.events == {"sent": 2, "received": 1}


async def test_junk_is_ignored_and_counted(redis_server: RedisServer) -> None:
    junk = [b"", b"1", b"2 0123456789abcdef x", b"1 0123456789ABCDEF x", b"\xff" * 100, b"1 0123456789abcdef bad"]
    junk += [b"1 0123456789abcdef raise", b"1 0123456789abcdef " + b"x" * (MAX_BYTES + 1)]
    async with ears(redis_server.url, "a", count=1) as (one,):
        await one.up()
        inside = redis_server.client()
        for data in junk:
            inside.publish(PREFIX + "a", data)
        inside.publish(PREFIX + "a", b"1 0123456789abcdef good")
        inside.close()
        await one.until(lambda: bool(one.heard))
        assert one.heard == [("a", "0123456789abcdef", b"good")]
        assert one.events == {"ignored": len(junk), "received": 1}


async def test_a_message_too_large_is_not_sent(redis_server: RedisServer) -> None:
    async with ears(redis_server.url, "a", count=1) as (one,):
        await one.up()
        assert not one.channel.publish("a", b"x" * (MAX_BYTES + 1))
        assert one.events == {"dropped": 1}


async def test_what_is_said_while_nobody_can_hear_is_dropped_at_once() -> None:
    async with ears(f"redis://127.0.0.1:{free_port()}/0", "a", count=1) as (one,):
        assert [one.channel.publish("a", b"x") for _ in range(3)] == [False] * 3
        assert one.events == {"dropped": 3}


async def test_of_too_many_waiting_messages_the_oldest_go(redis_server: RedisServer) -> None:
    async with ears(redis_server.url, "a") as (one, two):
        await one.up()
        await two.up()
        for number in range(MAX_WAITING + 6):
            assert one.channel.publish("a", str(number).encode())
        await two.until(lambda: len(two.heard) == MAX_WAITING)
        assert [payload for *_, payload in two.heard] == [str(n).encode() for n in range(6, MAX_WAITING + 6)]
        assert one.events == {"dropped": 6, "sent": MAX_WAITING}


async def test_what_waits_is_sent_before_it_closes(redis_server: RedisServer) -> None:
    async with ears(redis_server.url, "a") as (one, two):
        await one.up()
        await two.up()
        one.channel.publish("a", b"farewell")
        await one.channel.close()
        await two.until(lambda: bool(two.heard))


async def test_a_server_that_comes_up_later_is_used() -> None:
    server = new_server()
    server.port = free_port()
    try:
        async with ears(server.url, "a") as (one, two):
            server.start()
            await one.up()
            await two.up()
            one.channel.publish("a", b"now")
            await two.until(lambda: bool(two.heard))
    finally:
        server.kill()


@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_after_an_outage_it_goes_on(redis_server: RedisServer, fault: str) -> None:
    async with ears(redis_server.url, "a") as (one, two):
        await one.up()
        await two.up()
        if fault == "killed":
            redis_server.kill()
        else:
            redis_server.freeze()
        for ear in (one, two):
            await ear.until(lambda ear=ear: not ear.channel.connected)  # type: ignore[misc]
        assert not one.channel.publish("a", b"lost")
        if fault == "killed":
            redis_server.start()
        else:
            redis_server.thaw()
        await one.up()
        await two.up()
        one.channel.publish("a", b"back")
        await two.until(lambda: bool(two.heard))
        assert [payload for *_, payload in two.heard] == [b"back"]


async def test_it_closes_while_the_server_is_frozen(redis_server: RedisServer) -> None:
    async with ears(redis_server.url, "a", count=1) as (one,):
        await one.up()
        redis_server.freeze()
        one.channel.publish("a", b"never")
        async with asyncio.timeout(WITHIN_S):
            await one.channel.close()
        redis_server.thaw()
