"""Two balancers with one Redis: what one flushes or condemns, the other knows."""

from __future__ import annotations

from loadtest.faults import Fault
from tests.client import chat, client_of, fleet, instant_nodes
from tests.harness import QUIET, Balancer, running
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

POISON = chat("this is poison")


def settings(redis_server: RedisServer) -> dict[str, object]:
    return {**QUIET, "cache": {"enabled": True}, "redis": {"url": redis_server.url}}


def heard(balancer: Balancer, topic: str) -> int:
    return balancer.counts("channel_messages").get((topic, "received"), 0)


async def connected(*balancers: Balancer) -> None:
    for balancer in balancers:
        await balancer.wait_for(lambda balancer=balancer: balancer.app.neighbours[0]._channel.connected)  # type: ignore[misc]


async def test_a_flush_at_one_balancer_reaches_the_memory_of_the_other(redis_server: RedisServer) -> None:
    async with (
        instant_nodes(1) as nodes,
        running(*fleet(*nodes), **settings(redis_server)) as one,
        running(*fleet(*nodes), **settings(redis_server)) as other,
        client_of(one.url) as client,
        client_of(other.url) as second,
    ):
        await connected(one, other)
        for asked in (client, second):
            assert (await asked.post(chat("hello"))).is_whole
        await other.wait_for(lambda: len(other.app.cache.local) == 1)
        await one.app.cache.delete(tenant=None, model="sim-model", key=None)
        await other.wait_for(lambda: heard(other, "flush") == 1)
        assert len(other.app.cache.local) == 0
        assert (await second.post(chat("hello"))).headers["X-Balancer-Cache"] == "miss"


async def test_a_verdict_of_one_balancer_holds_at_the_other(redis_server: RedisServer) -> None:
    async with (
        instant_nodes(4) as nodes,
        running(*fleet(*nodes, weight=1.0), **settings(redis_server)) as one,
        running(*fleet(*nodes, weight=1.0), **settings(redis_server)) as other,
        client_of(one.url) as client,
        client_of(other.url) as second,
    ):
        for node in nodes:
            node.faults.add(Fault("reset", body_has="poison"))
        await connected(one, other)
        assert (await client.post(POISON)).status == 502
        await other.wait_for(lambda: heard(other, "verdict") == 1)
        reply = await second.post(POISON)
        assert (reply.code, reply.attempts) == ("upstream_bad_answer", 0)


async def test_who_was_not_there_finds_the_verdict_in_redis_after_one_node(redis_server: RedisServer) -> None:
    async with instant_nodes(4) as nodes:
        for node in nodes:
            node.faults.add(Fault("reset", body_has="poison"))
        async with (
            running(*fleet(*nodes, weight=1.0), **settings(redis_server)) as one,
            client_of(one.url) as client,
        ):
            assert (await client.post(POISON)).status == 502
            await one.wait_for(lambda: bool(redis_server.client().keys("balancer:v1:verdict:*")))
        async with (
            running(*fleet(*nodes, weight=1.0), **settings(redis_server)) as late,
            client_of(late.url) as client,
        ):
            reply = await client.post(POISON)
            assert (reply.code, reply.attempts) == ("upstream_bad_answer", 1)
            assert (await client.post(POISON)).attempts == 0


async def test_what_is_no_message_of_ours_changes_nothing(redis_server: RedisServer) -> None:
    async with (
        instant_nodes(1) as nodes,
        running(*fleet(*nodes), **settings(redis_server)) as balancer,
        client_of(balancer.url) as client,
    ):
        await connected(balancer)
        await client.post(chat("hello"))
        ignored = (b"", b"x", b"[]", b"[1,2,3,4]", b'["m","x"]', b'["' + b"a" * 64 + b'",-1.0]', b"null")
        for topic in ("flush", "verdict"):
            for payload in ignored:
                redis_server.client().publish(f"balancer:v1:{topic}", b"1 0123456789abcdef " + payload)
            counted = (topic, "ignored")
            await balancer.wait_for(lambda c=counted: balancer.counts("channel_messages").get(c, 0) == len(ignored))  # type: ignore[misc]
        assert len(balancer.app.cache.local) == 1
        assert not balancer.app.verdicts
