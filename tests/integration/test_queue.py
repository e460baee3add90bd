"""Requests that wait for a slot: in which order they go on, who is refused, and that no slot is lost or given twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from balancer.core.request import Priority
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Client, Reply, chat, client_of, fleet
from tests.harness import QUIET, Balancer, running


def waiting(balancer: Balancer) -> int:
    """Requests in the queue, as the metric says."""
    return int(sum(value for _, value in balancer.app.metrics.queue_depth.read()))


@asynccontextmanager
async def one_slot(**settings: Any) -> AsyncIterator[tuple[FakeNode, Balancer, Client]]:
    """A node with one slot, whose answers wait until they are released."""
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("hang"))
        nodes = fleet(node, max_in_flight=1)
        async with running(*nodes, **{**QUIET, **settings}) as balancer, client_of(balancer.url) as client:
            yield node, balancer, client


async def line_up(
    balancer: Balancer, client: Client, *texts: str, headers: Mapping[str, str] | None = None, **fields: Any
) -> list[asyncio.Task[Reply]]:
    """Requests that enter the queue in this order."""
    begun = []
    for text in texts:
        before = waiting(balancer)
        begun.append(client.begin(chat(text, **fields), headers=headers))
        await balancer.wait_for(lambda: waiting(balancer) == before + 1)
    return begun


async def take_the_slot(node: FakeNode, client: Client) -> asyncio.Task[Reply]:
    begun = client.begin(chat("first"))
    await node.wait_for(lambda: node.in_flight == 1)
    return begun


async def let_go(node: FakeNode, count: int) -> None:
    """Release the node's answers one after the other, until it has begun `count` requests; then let it run."""
    while len(node.requests) < count:
        seen = len(node.requests)
        node.faults.release()
        await node.wait_for(lambda: len(node.requests) > seen)
        assert node.in_flight == 1
    node.faults.clear()
    node.faults.release()


def asked(node: FakeNode) -> list[str]:
    """The texts of the requests in the order in which the node got them."""
    return [request.json()["messages"][0]["content"] for request in node.requests]


# -- order


async def test_who_came_first_is_served_first() -> None:
    async with one_slot() as (node, balancer, client):
        begun = [await take_the_slot(node, client), *await line_up(balancer, client, *"abcde")]
        await let_go(node, 6)
        assert all([(await reply).is_whole for reply in begun])
        assert asked(node) == ["first", *"abcde"]
        assert waiting(balancer) == 0
        assert all(facts["queue_s"] > 0.0 for facts in balancer.requests[1:])
        assert balancer.requests[0]["queue_s"] == 0.0


async def test_high_priority_goes_first_and_low_last() -> None:
    async with one_slot() as (node, balancer, client):
        begun = [await take_the_slot(node, client)]
        for priority in ("low", "normal", "high"):
            texts = (f"{priority} 1", f"{priority} 2")
            begun += await line_up(balancer, client, *texts, headers={"X-Balancer-Priority": priority})
        depths = dict(balancer.app.metrics.queue_depth.read())
        assert depths == {(priority.name.lower(),): 2.0 for priority in Priority}
        await let_go(node, 7)
        assert all([(await reply).is_whole for reply in begun])
        assert asked(node) == ["first", "high 1", "high 2", "normal 1", "normal 2", "low 1", "low 2"]


async def test_no_node_gets_more_than_max_in_flight_and_nobody_is_forgotten() -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        for node in (a, b):
            node.faults.add(Fault("hang"))
        nodes = fleet(a, b, weight=1.0, max_in_flight=3)
        async with running(*nodes, **QUIET) as balancer, client_of(balancer.url) as client:
            begun = [client.begin(chat(f"{number}")) for number in range(50)]
            await balancer.wait_for(lambda: waiting(balancer) == 44)
            for _ in range(4):
                assert [a.in_flight, b.in_flight] == [3, 3]
                seen = len(a.requests) + len(b.requests)
                a.faults.release()
                b.faults.release()
                await balancer.wait_for(lambda: len(a.requests) + len(b.requests) == seen + 6)
            assert waiting(balancer) == 44 - 24
            for node in (a, b):
                node.faults.clear()
                node.faults.release()
            assert all([(await reply).is_whole for reply in begun])
            assert len(a.requests) + len(b.requests) == 50


# -- refusals


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async with one_slot(queue={"max_waiting": 2}) as (node, balancer, client):
        begun = [await take_the_slot(node, client), *await line_up(balancer, client, "a", "b")]
        refused = await client.post(chat("c"))
        assert (refused.status, refused.code, refused.attempts) == (503, "queue_full", 0)
        assert refused.retry_after_s >= 1
        assert balancer.counts("shed") == {("queue_full",): 1}
        await let_go(node, 3)
        assert all([(await reply).is_whole for reply in begun])
        assert asked(node) == ["first", "a", "b"]


async def test_who_waited_too_long_is_refused_and_its_place_is_free() -> None:
    async with one_slot(queue={"max_waiting": 1, "max_wait_s": 0.1}) as (node, balancer, client):
        first = await take_the_slot(node, client)
        for _ in range(2):
            refused = await client.post(chat("in vain"))
            assert (refused.status, refused.code, refused.attempts) == (503, "queue_timeout", 0)
            assert refused.retry_after_s >= 1
        assert balancer.counts("shed") == {("queue_timeout",): 2}
        await let_go(node, 1)
        assert (await first).is_whole
        assert (await client.post(chat("later"))).is_whole
        assert asked(node) == ["first", "later"]


async def test_a_deadline_that_passes_in_the_queue_is_the_deadlines_error() -> None:
    async with one_slot() as (node, _, client):
        first = await take_the_slot(node, client)
        reply = await client.post(chat("in a hurry"), headers={"X-Balancer-Timeout-S": "0.1"})
        assert (reply.status, reply.code, reply.attempts) == (504, "deadline_exceeded", 0)
        await let_go(node, 1)
        assert (await first).is_whole


async def test_a_client_that_leaves_the_queue_is_passed_over() -> None:
    async with one_slot() as (node, balancer, client):
        first = await take_the_slot(node, client)
        leaver, stayer = await line_up(balancer, client, "leaves", "stays")
        leaver.cancel()
        await balancer.wait_for(lambda: waiting(balancer) == 1)
        await let_go(node, 2)
        assert (await first).is_whole
        assert (await stayer).is_whole
        assert asked(node) == ["first", "stays"]
        assert balancer.node("a").load.rif == 0
        assert balancer.app.admission.tenants()["anonymous"]["in_flight"] == 0


# -- slots that come and go otherwise


async def test_who_waits_for_a_node_that_dies_is_not_left_waiting() -> None:
    async with one_slot(health={"interval_s": 0.05, "timeout_s": 10.0, "fall": 1}) as (node, balancer, client):
        begun = [await take_the_slot(node, client), *await line_up(balancer, client, "a", "b")]
        node.die()
        replies = [await reply for reply in begun]
        assert {reply.code for reply in replies[1:]} == {"no_eligible_node"}


async def test_a_node_that_joins_serves_those_who_wait() -> None:
    async with one_slot() as (node, balancer, client), FakeNode(instant=True) as new:
        first = await take_the_slot(node, client)
        begun = await line_up(balancer, client, *"abc")
        balancer.write_settings({**balancer.settings, "nodes": fleet(node, new, max_in_flight=1)})
        await balancer.app.reload()
        assert [(await reply).node for reply in begun] == ["b", "b", "b"]
        await let_go(node, 1)
        assert (await first).is_whole


async def test_a_retry_waits_for_a_slot_of_another_node_instead_of_failing() -> None:
    async with FakeNode(instant=True) as sick, FakeNode(instant=True) as busy:
        sick.faults.add(Fault("hang", first=1))
        sick.faults.add(Fault("reset"))
        busy.faults.add(Fault("hang"))
        nodes = fleet(sick, busy, max_in_flight=1)
        async with running(*nodes, **QUIET) as balancer, client_of(balancer.url) as client:
            begun = [client.begin(chat("at the sick node"))]
            await sick.wait_for(lambda: sick.in_flight == 1)
            begun.append(client.begin(chat("at the busy node")))
            await busy.wait_for(lambda: busy.in_flight == 1)
            sick.die()
            await balancer.wait_for(lambda: waiting(balancer) == 1 or begun[0].done())
            busy.faults.clear()
            busy.faults.release()
            assert [(await reply).is_whole for reply in begun] == [True, True], "one node killed: nothing failed"


async def test_two_models_are_not_given_the_same_slot() -> None:
    async with FakeNode(instant=True, models=("one", "two")) as node:
        node.faults.add(Fault("hang"))
        nodes = fleet(node, models=["one", "two"], max_in_flight=1)
        async with running(*nodes, **QUIET) as balancer, client_of(balancer.url) as client:
            begun = [client.begin(chat("first", model="one"))]
            await node.wait_for(lambda: node.in_flight == 1)
            for model in ("one", "two", "one", "two"):
                begun += await line_up(balancer, client, f"for {model}", model=model)
            node.faults.clear()
            node.faults.release()
            assert [(await reply).code for reply in begun] == [None] * 5
            assert asked(node) == ["first", "for one", "for two", "for one", "for two"]


async def test_a_model_that_is_full_holds_up_only_its_own_requests() -> None:
    async with FakeNode(instant=True, models=("small", "large")) as node:
        node.faults.add(Fault("hang", body_has="small"))
        nodes = fleet(node, models=["small", "large"])
        models = [{"name": "small", "max_in_flight": 1}]
        async with running(*nodes, models=models, **QUIET) as balancer, client_of(balancer.url) as client:
            begun = [client.begin(chat("first", model="small"))]
            await node.wait_for(lambda: node.in_flight == 1)
            begun += await line_up(balancer, client, "second", model="small")
            assert (await client.post(chat(model="large"))).is_whole
            node.faults.clear()
            node.faults.release()
            assert all([(await reply).is_whole for reply in begun])


async def test_a_tenants_own_limit_refuses_instead_of_queueing() -> None:
    key = {"tenant": "acme", "sha256": "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"}
    async with one_slot(auth={"keys": [{**key, "max_in_flight": 1}]}) as (node, _, client):
        headers = {"Authorization": "Bearer key"}
        first = client.begin(chat("first"), headers=headers)
        await node.wait_for(lambda: node.in_flight == 1)
        refused = await client.post(chat("second"), headers=headers)
        assert (refused.status, refused.code, refused.retry_after_s) == (429, "rate_limited", 1)
        await let_go(node, 1)
        assert (await first).is_whole


@pytest.mark.parametrize("then", ["gone", "back"])
async def test_a_models_limit_that_comes_and_goes_with_a_reload_loses_neither_requests_nor_slots(then: str) -> None:
    limited = {"models": [{"name": "sim-model", "max_in_flight": 1}]}
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("hang"))
        before = limited if then == "gone" else {}
        async with running(*fleet(node), **QUIET, **before) as balancer, client_of(balancer.url) as client:
            begun = client.begin(chat("across the reload"))
            await node.wait_for(lambda: node.in_flight == 1)
            balancer.write_settings({**balancer.settings, "models": [] if then == "gone" else limited["models"]})
            await balancer.app.reload()
            node.faults.clear()
            node.faults.release()
            assert (await begun).is_whole
            await balancer.wait_for(lambda: len(balancer.requests) == 1)
            balancer.write_settings({**balancer.settings, **limited})
            await balancer.app.reload()
            assert all(reply.is_whole for reply in await client.many(5))
            assert {(facts["status"], facts["code"]) for facts in balancer.requests} == {(200, "")}
