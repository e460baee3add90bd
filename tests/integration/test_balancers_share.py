"""Two balancers and a real Redis: what one sends where is seen in the other's picks."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from balancer.core.request import NodeId
from balancer.core.routing import PredictedRouting
from balancer.core.sharing import node_key
from balancer.store.channel import PREFIX
from loadtest.fake_node import FakeNode
from tests.client import MODEL, Client, chat, client_of
from tests.harness import Balancer, running
from tests.process import serving
from tests.redis_server import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

pytestmark = pytest.mark.real("redis")

WITHIN_S = 20.0
# 20 KB: twenty blocks, and 1 s of prefill by the prior.
LONG = "word " * 4000


def settings_of(server: RedisServer, **more: Any) -> dict[str, Any]:
    return {
        "redis": {"url": server.url, "timeout_s": 0.03},
        "routing": {"policy": "predicted_cost", "share_interval_s": 0.05},
        "cache": {"enabled": False},
        **more,
    }


def named(**nodes: FakeNode) -> list[Mapping[str, Any]]:
    return [{"id": id_, "url": node.url, "models": [MODEL]} for id_, node in nodes.items()]


@asynccontextmanager
async def pair(
    server: RedisServer, one: list[Mapping[str, Any]], two: list[Mapping[str, Any]], **more: Any
) -> AsyncIterator[tuple[Balancer, Client, Balancer, Client]]:
    """Two balancers that know of each other."""
    async with AsyncExitStack() as stack:
        balancers = [
            await stack.enter_async_context(running(*nodes, **settings_of(server, **more))) for nodes in (one, two)
        ]
        clients = [await stack.enter_async_context(client_of(balancer.url)) for balancer in balancers]
        for balancer in balancers:
            await balancer.wait_for(lambda balancer=balancer: peers(balancer) == 1, WITHIN_S)  # type: ignore[misc]
        yield balancers[0], clients[0], balancers[1], clients[1]


def peers(balancer: Balancer) -> float:
    ((_, count),) = balancer.app.metrics.peers.read()
    return count


def others_tokens(balancer: Balancer, id_: str) -> float:
    others = balancer.node(id_).books.others
    return 0.0 if others is None else others.tokens


@asynccontextmanager
async def busy(client: Client, node: FakeNode, count: int = 3) -> AsyncIterator[None]:
    """Long prompts that hang at a wedged node."""
    node.freeze()
    asked = [asyncio.create_task(client.post(chat(f"{n} {LONG}", stream=True))) for n in range(count)]
    try:
        await node.wait_for(lambda: node.in_flight == count)
        yield
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        node.thaw()


async def test_load_put_through_one_is_seen_in_the_others_picks(redis_server: RedisServer) -> None:
    async with (
        FakeNode() as a,
        FakeNode(instant=True) as b,
        pair(redis_server, named(a=a), named(a=a, b=b)) as (_, one, two_balancer, two),
    ):
        async with busy(one, a):
            await two_balancer.wait_for(lambda: others_tokens(two_balancer, "a") > 10_000, WITHIN_S)
            replies = [await two.post(chat(f"{n}", stream=True)) for n in range(8)]
            assert {reply.node for reply in replies} == {"b"}
        await two_balancer.wait_for(lambda: others_tokens(two_balancer, "a") == 0, WITHIN_S)


async def test_the_next_turn_goes_where_the_other_balancer_sent_the_last_one(redis_server: RedisServer) -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        nodes = named(a=a, b=b)
        async with pair(redis_server, nodes, nodes) as (_, one, two_balancer, two):
            routing = two_balancer.app.attempts.routing
            assert isinstance(routing, PredictedRouting)
            sent = Counter[NodeId]()
            for number in range(8):
                opening = f"conversation {number} {LONG}"
                first = await one.post(chat(opening, stream=True))
                assert first.node is not None
                held = NodeId(first.node)
                sent[held] += 1
                await two_balancer.wait_for(lambda: routing.blocks_at(held) >= 18 * sent[held], WITHIN_S)
                again = chat(opening, stream=True)
                again["messages"] += [
                    {"role": "assistant", "content": first.text},
                    {"role": "user", "content": "go on"},
                ]
                assert (await two.post(again)).node == first.node


async def test_a_balancer_that_ends_says_farewell(redis_server: RedisServer) -> None:
    async with FakeNode() as a, running(*named(a=a), **settings_of(redis_server)) as two:
        async with running(*named(a=a), **settings_of(redis_server)):
            await two.wait_for(lambda: peers(two) == 1, WITHIN_S)
        assert two.counts("channel_messages")["routing", "received"] > 0
        await two.wait_for(lambda: peers(two) == 0, WITHIN_S)


async def test_a_balancer_that_is_killed_is_forgotten(redis_server: RedisServer) -> None:
    async with (
        FakeNode() as a,
        running(*named(a=a), **settings_of(redis_server)) as two,
        serving({"nodes": named(a=a), **settings_of(redis_server)}) as process,
        client_of(process.url) as one,
        busy(one, a),
    ):
        await two.wait_for(lambda: others_tokens(two, "a") > 10_000, WITHIN_S)
        process.process.kill()
        await two.wait_for(lambda: peers(two) == 0, WITHIN_S)
        assert two.node("a").books.others is None
        assert list(two.app.metrics.peer_age.read()) == []


@pytest.mark.parametrize("fault", ["killed", "frozen"])
async def test_an_outage_of_redis_costs_no_request_and_sharing_goes_on_after_it(
    redis_server: RedisServer, fault: str
) -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        nodes = named(a=a, b=b)
        async with pair(redis_server, nodes, nodes) as (one_balancer, one, two_balancer, two):
            load = [asyncio.create_task(client.many(150)) for client in (one, two)]
            await one_balancer.wait_for(lambda: len(one_balancer.requests) > 50)
            if fault == "killed":
                redis_server.kill()
            else:
                redis_server.freeze()
            assert all(reply.is_whole for replies in await asyncio.gather(*load) for reply in replies)
            await two_balancer.wait_for(lambda: peers(two_balancer) == 0, WITHIN_S)
            assert all(reply.is_whole for reply in [*await one.many(30), *await two.many(30)])
            if fault == "killed":
                redis_server.start()
            else:
                redis_server.thaw()
            await two_balancer.wait_for(lambda: peers(two_balancer) == 1, WITHIN_S)
            a.freeze()
            b.freeze()
            asked = one.begin(chat(LONG, stream=True))
            await two_balancer.wait_for(lambda: any(others_tokens(two_balancer, id_) > 1000 for id_ in "ab"), WITHIN_S)
            asked.cancel()


async def test_junk_and_nodes_that_are_not_ours_are_passed_over(redis_server: RedisServer) -> None:
    async with FakeNode(instant=True) as a, running(*named(a=a), **settings_of(redis_server)) as balancer:
        await balancer.wait_for(lambda: balancer.counts("channel_messages").get(("routing", "sent"), 0) > 0)
        inside = redis_server.client()
        other = node_key(NodeId("a"), "http://elsewhere:1")
        head = b"1 0123456789abcdef "
        inside.publish(PREFIX + "routing", b"\xff\xff")
        inside.publish(PREFIX + "routing", head + b'{"v":1}')
        inside.publish(
            PREFIX + "routing",
            head + b'{"v":1,"nodes":[["%s",5000,5,5,0]],"placed":[],"leaving":false}' % other.encode(),
        )
        inside.close()
        await balancer.wait_for(lambda: peers(balancer) == 1, WITHIN_S)
        assert balancer.counts("channel_messages")["routing", "ignored"] == 2
        assert balancer.node("a").books.others is None


@pytest.mark.parametrize("off", [{"policy": "least_outstanding"}, {"policy": "predicted_cost", "share_interval_s": 0}])
async def test_where_there_is_nothing_to_share_nothing_is_said(redis_server: RedisServer, off: dict[str, Any]) -> None:
    async with (
        FakeNode(instant=True) as a,
        running(*named(a=a), **settings_of(redis_server, routing=off)) as balancer,
        client_of(balancer.url) as client,
    ):
        await client.many(20)
        assert balancer.counts("channel_messages") == {}
