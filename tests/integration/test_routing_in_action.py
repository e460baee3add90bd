"""What routing does on real requests: sessions, labels, the prefix rule, slow start, panic, large fleets, reload."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from balancer.core.request import NodeId
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import MODEL, Client, chat, client_of, fleet, instant_nodes
from tests.harness import QUIET, Balancer, running

DEFAULT = {name: section for name, section in QUIET.items() if name != "routing"}
LONG = "once upon a time " * 500  # eight blocks


def equal(*nodes: FakeNode | str, **fields: Any) -> list[dict[str, Any]]:
    """Nodes of one weight."""
    return [{**node, "weight": 1.0} for node in fleet(*nodes, **fields)]


@asynccontextmanager
async def ready(*nodes: dict[str, Any], **settings: Any) -> AsyncIterator[tuple[Balancer, Client]]:
    async with running(*nodes, **{**DEFAULT, **settings}) as balancer, client_of(balancer.url) as client:
        await balancer.wait_for(lambda: all(node.check_up for node in balancer.app.registry.nodes.values()))
        yield balancer, client


async def test_predicted_cost_is_what_chooses_by_default() -> None:
    async with instant_nodes(2) as nodes, ready(*equal(*nodes)) as (balancer, client):
        reply = await client.post(chat(), headers={"X-Request-Id": "r"})
        assert reply.is_whole
        told = (await client.get(f"{balancer.ops_url}/admin/requests/r")).json
        assert [choice["policy"] for choice in told["choices"]] == ["predicted_cost"]


async def test_a_session_stays_at_its_node_and_leaves_it_when_it_is_down() -> None:
    async with instant_nodes(4) as nodes, ready(*equal(*nodes)) as (balancer, client):
        session = {"X-Balancer-Session": "s-1"}
        replies = [await client.post(chat(f"turn {at}"), headers=session) for at in range(12)]
        (home,) = {reply.node for reply in replies}
        assert home is not None
        others = {(await client.post(chat(f"number {at}"))).node for at in range(40)}
        assert len(others) == 4, "without the header requests spread"
        await client.get(f"{balancer.ops_url}/admin/nodes")
        balancer.app.registry.drain(NodeId(home), drained=True)
        (next_home,) = {(await client.post(chat(f"later {at}"), headers=session)).node for at in range(12)}
        assert next_home != home


async def test_a_tenant_gets_the_nodes_whose_labels_it_prefers_while_there_are_any() -> None:
    keys = [
        {"tenant": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **prefer}
        for name, prefer in (("near", {"prefer": {"zone": "b"}}), ("any", {}))
    ]
    async with instant_nodes(3) as nodes:
        labelled = [{**node, "labels": {"zone": node["id"]}} for node in equal(*nodes)]
        async with ready(*labelled, auth={"keys": keys}) as (balancer, client):

            async def where(tenant: str) -> set[str | None]:
                headers = {"Authorization": f"Bearer {tenant}"}
                return {(await client.post(chat(f"{tenant} {at}"), headers=headers)).node for at in range(30)}

            assert await where("near") == {"b"}
            assert await where("any") == {"a", "b", "c"}
            balancer.app.registry.drain(NodeId("b"), drained=True)
            assert await where("near") == {"a", "c"}


async def test_the_prefix_policy_keeps_a_prompts_head_at_one_node() -> None:
    async with instant_nodes(4) as nodes, ready(*equal(*nodes), routing={"policy": "prefix"}) as (_, client):
        where = {(await client.post(chat(f"{LONG} {at}"))).node for at in range(12)}
        assert len(where) == 1
        spread = {(await client.post(chat(f"{at} {LONG}"))).node for at in range(40)}
        assert len(spread) == 4


async def test_what_an_engine_had_cached_is_heard_from_its_usage() -> None:
    async with FakeNode() as a, FakeNode() as b, ready(*equal(a, b)) as (balancer, client):
        first = await client.post(chat(LONG, stream=True))
        again = await client.post(chat(f"{LONG} more", stream=True))
        assert first.node == again.node
        sent = [node for node in (a, b) if node.requests]
        assert len(sent) == 1
        index = balancer.app.attempts.routing._index  # type: ignore[attr-defined]
        lane = index._lanes[NodeId(str(first.node))]
        assert lane.limit == lane.capacity, "it held what was believed of it"


@pytest.mark.parametrize("policy", ["predicted_cost", "least_outstanding"])
async def test_a_node_that_recovered_is_not_flooded(policy: str) -> None:
    async with instant_nodes(4) as nodes:
        for node in nodes:
            node.faults.add(Fault("hang", path="/v1/chat/completions"))
        async with ready(*equal(*nodes), routing={"policy": policy}) as (balancer, client):
            newcomer = balancer.node("a")
            newcomer.ramp_from_s = balancer.app._clock.now() + 3600.0  # at the very beginning of its slow start
            balancer.app.registry.touch()
            tasks = [client.begin(chat(f"{at}", stream=True)) for at in range(40)]
            await balancer.wait_for(lambda: sum(node.in_flight for node in nodes) == 40)
            counts = [node.in_flight for node in nodes]
            assert 1 <= counts[0] <= 4
            assert min(counts[1:]) >= 9
            for node in nodes:
                node.faults.release()
            for task in tasks:
                assert (await task).is_whole


async def test_in_panic_open_breakers_are_ignored_and_the_record_says_so() -> None:
    async with instant_nodes(3) as nodes:
        settings = {"breaker": {"open_s": 1000.0, "max_open_s": 10_000.0}, "retry": {"max_attempts": 3}}
        async with ready(*equal(*nodes), **settings) as (balancer, client):
            for id_ in "ab":
                breaker = balancer.node(id_).breaker
                for _ in range(5):
                    breaker.record(breaker.unguarded(), False, balancer.app._clock.now())
            balancer.app.registry.touch()
            replies = [await client.post(chat(f"{at}"), headers={"X-Request-Id": f"r{at}"}) for at in range(30)]
            assert all(reply.is_whole for reply in replies)
            assert len({reply.node for reply in replies}) > 1
            told = (await client.get(f"{balancer.ops_url}/admin/requests/r0")).json
            assert told["panic"] is True
            assert told["choices"][0]["panic"] is True
            assert told["choices"][0]["dropped"] == {}


async def test_of_many_nodes_some_are_looked_at_and_every_one_gets_its_share() -> None:
    async with FakeNode(instant=True) as node:
        many = [{"url": f"{node.url}/", "id": f"n{at:02d}", "models": [MODEL]} for at in range(40)]
        async with ready(*many) as (balancer, client):
            replies = await client.many(400)
            assert all(reply.is_whole for reply in replies)
            counts = Counter(reply.node for reply in replies)
            assert len(counts) == 40
            await client.post(chat("one more"), headers={"X-Request-Id": "r"})
            (choice,) = (await client.get(f"{balancer.ops_url}/admin/requests/r")).json["choices"]
            assert 12 <= len(choice["candidates"]) <= 18
            assert len(choice["candidates"]) + len(choice["dropped"]) == 40
            assert set(choice["dropped"].values()) == {"not_sampled"}


async def test_new_weights_are_in_force_after_a_reload_and_what_was_learned_stays() -> None:
    async with instant_nodes(2) as nodes, ready(*equal(*nodes)) as (balancer, client):
        await client.many(30)
        routing = balancer.app.attempts.routing
        paces = {id_: balancer.node(id_).books.s_per_token for id_ in "ab"}
        changed = {**balancer.settings, "routing": {"policy": "predicted_cost", "cost": {"session": 7.5}}}
        balancer.write_settings(changed)
        await balancer.app.reload()
        assert balancer.app.attempts.routing is routing
        assert {id_: balancer.node(id_).books.s_per_token for id_ in "ab"} == paces
        session = {"X-Balancer-Session": "s"}
        home = (await client.post(chat("first"), headers=session)).node
        await client.post(chat("second"), headers={**session, "X-Request-Id": "r"})
        (choice,) = (await client.get(f"{balancer.ops_url}/admin/requests/r")).json["choices"]
        assert {node["node"]: node["terms_s"]["session"] for node in choice["candidates"]} == {
            id_: 0.0 if id_ == home else 7.5 for id_ in "ab"
        }
        balancer.write_settings({**balancer.settings, "routing": {"cost": {"waste": -1}}})
        with pytest.raises(Exception, match=r"routing\.cost\.waste"):
            await balancer.app.reload()
