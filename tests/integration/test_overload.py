"""More than the fleet can take: what is let in is served, the rest is refused with a Retry-After, and nothing stays."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from balancer.core.concurrency import LEAST_AHEAD
from balancer.core.health import HostReport, NodeReport
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Client, Reply, chat, client_of, fleet
from tests.harness import QUIET, Balancer, running

SLOTS = 4
AT_ONCE = SLOTS + int(LEAST_AHEAD)
WAITING = 20


def waiting(balancer: Balancer) -> int:
    return int(sum(value for _, value in balancer.app.metrics.queue_depth.read()))


def says(balancer: Balancer, id_: str, **figures: Any) -> None:
    """A node's agent reports."""
    node = balancer.node(id_)
    report = NodeReport(id=id_, url=node.config.url, **figures)
    host = HostReport(host="h", boot_id="b", seq=1, age_s=0.0, interval_s=1.0, drain=False, nodes=(report,))
    balancer.app.registry.observe(node, host, report, balancer.app.registry._now())


def refused_well(reply: Reply) -> bool:
    return reply.status in (429, 503) and 1 <= reply.retry_after_s <= 60 and reply.attempts == 0


async def flood(balancer: Balancer, client: Client, count: int, **fields: Any) -> list[asyncio.Task[Reply]]:
    """So many requests at once, all of them at a node, in the queue or refused."""
    before = len(balancer.requests)
    begun = [client.begin(chat(f"{number}", **fields)) for number in range(count)]
    let_in = 2 * AT_ONCE + WAITING
    await balancer.wait_for(lambda: len(balancer.requests) - before == count - let_in and waiting(balancer) == WAITING)
    return begun


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
async def test_at_twice_capacity_what_is_let_in_is_served_and_the_rest_is_told_when_to_come_back(stream: bool) -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        settings = {**QUIET, "queue": {"max_waiting": WAITING}, "agents": {"stale_s": 1000.0}}
        async with running(*fleet(a, b, weight=1.0), **settings) as balancer, client_of(balancer.url) as client:
            for id_ in "ab":
                says(balancer, id_, slots=float(SLOTS))
            let_in = 2 * AT_ONCE + WAITING
            for _ in range(3):
                hangs = [node.faults.add(Fault("hang")) for node in (a, b)]
                begun = await flood(balancer, client, 2 * let_in, stream=stream)
                for node, hang in zip((a, b), hangs, strict=True):
                    await node.wait_for(lambda hang=hang: hang.hits == AT_ONCE)
                assert [a.in_flight, b.in_flight] == [AT_ONCE, AT_ONCE], "no engine has more than it was to have"
                a.faults.release()
                await a.wait_for(lambda hang=hangs[0]: hang.hits == 2 * AT_ONCE)
                assert [a.in_flight, b.in_flight] == [AT_ONCE, AT_ONCE], "what waited went where there was room"
                for node in (a, b):
                    node.faults.clear()
                    node.faults.release()
                replies = [await reply for reply in begun]
                assert sum(reply.is_whole for reply in replies) == let_in, "all that was let in is served"
                assert all(refused_well(reply) for reply in replies if not reply.is_whole)
            assert all(reply.is_whole for reply in await client.many(10)), "and normal right after"
            assert balancer.counts("shed") == {("queue_full",): 3 * let_in}
            await balancer.wait_for(lambda: balancer.app.buffered.bytes == 0)
            assert not balancer.app.admission._waiters
            assert all(balancer.node(id_).load.rif == 0 for id_ in "ab")


async def test_a_flooding_tenant_leaves_room_for_another() -> None:
    def key(name: str) -> dict[str, Any]:
        return {"tenant": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}

    def bearer(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {name}"}

    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("hang"))
        settings = {**QUIET, "queue": {"max_waiting": 10}, "auth": {"keys": [key("many"), key("few")]}}
        async with running(*fleet(node, max_in_flight=1), **settings) as balancer, client_of(balancer.url) as client:
            begun = [client.begin(chat("first"), headers=bearer("many"))]
            await node.wait_for(lambda: node.in_flight == 1)
            begun += [client.begin(chat(f"many {number}"), headers=bearer("many")) for number in range(10)]
            await balancer.wait_for(lambda: waiting(balancer) == 10)
            few = [client.begin(chat(f"few {number}"), headers=bearer("few")) for number in range(2)]
            displaced = await first_done(begun, 2)
            assert [(reply.status, reply.code) for reply in displaced] == [(503, "queue_full")] * 2
            assert all(refused_well(reply) for reply in displaced)
            assert balancer.counts("shed") == {("displaced",): 2}
            while len(node.requests) < 5:
                seen = len(node.requests)
                node.faults.release()
                await node.wait_for(lambda seen=seen: len(node.requests) > seen)
            texts = [request.json()["messages"][0]["content"] for request in node.requests]
            assert {"few 0", "few 1"} < set(texts[:5]), "each second slot is the other tenant's"
            node.faults.clear()
            node.faults.release()
            assert all([(await reply).is_whole for reply in few])


async def first_done(begun: list[asyncio.Task[Reply]], count: int) -> list[Reply]:
    """The first so many answers."""
    done: set[asyncio.Task[Reply]] = set()
    pending = set(begun)
    while len(done) < count:
        ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        done |= ended
    return [task.result() for task in done]


async def test_a_deadline_that_the_queue_cannot_make_is_refused_at_once_and_says_when() -> None:
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("hang"))
        async with running(*fleet(node, max_in_flight=1), **QUIET) as balancer, client_of(balancer.url) as client:
            begun = [client.begin(chat("first"))]
            await node.wait_for(lambda: node.in_flight == 1)
            begun += [client.begin(chat(f"{number}")) for number in range(30)]
            await balancer.wait_for(lambda: waiting(balancer) == 30)
            for seen in range(1, 11):
                node.faults.release()
                await node.wait_for(lambda seen=seen: len(node.requests) > seen)
            rate = balancer.app.admission._queue.rate("sim-model")
            rate._seconds = rate._grants * 1.0  # as if each had taken a second
            reply = await client.post(chat("in a hurry"), headers={"X-Balancer-Timeout-S": "5"})
            assert (reply.status, reply.code, reply.attempts) == (503, "queue_timeout", 0)
            assert 15 <= reply.retry_after_s <= 30
            assert balancer.counts("shed") == {("too_late",): 1}
            node.faults.clear()
            node.faults.release()
            assert all([(await reply).is_whole for reply in begun])


async def test_an_operator_can_turn_limits_that_were_not_configured_off() -> None:
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("hang"))
        settings = {**QUIET, "queue": {"adaptive": False}}
        async with running(*fleet(node), **settings) as balancer, client_of(balancer.url) as client:
            says(balancer, "a", slots=1.0)
            begun = [client.begin(chat(f"{number}")) for number in range(20)]
            await node.wait_for(lambda: node.in_flight == 20)
            balancer.write_settings({**balancer.settings, "queue": {"adaptive": True}})
            await balancer.app.reload()
            begun.append(client.begin(chat("now one too many")))
            await balancer.wait_for(lambda: waiting(balancer) == 1)
            node.faults.clear()
            node.faults.release()
            assert all([(await reply).is_whole for reply in begun])


async def test_a_node_that_pushes_back_gets_no_more_than_it_took() -> None:
    async with FakeNode(instant=True) as node:
        hang = node.faults.add(Fault("hang", first=20))
        async with running(*fleet(node), **QUIET) as balancer, client_of(balancer.url) as client:
            begun = [client.begin(chat(f"{number}")) for number in range(20)]
            await node.wait_for(lambda: hang.hits == 20)
            node.faults.add(Fault("status", status=429, retry_after_s=0, first=1))
            assert (await client.post(chat("one too many"))).status in (429, 503)
            assert balancer.node("a").limit == 18.0
            begun.append(client.begin(chat("waits here, not there")))
            await balancer.wait_for(lambda: waiting(balancer) == 1)
            node.faults.clear()
            node.faults.release()
            assert all([(await reply).is_whole for reply in begun])


async def test_who_waits_for_a_silent_agents_node_goes_on() -> None:
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("hang"))
        async with running(*fleet(node), **QUIET) as balancer, client_of(balancer.url) as client:
            says(balancer, "a", slots=1.0)
            begun = [client.begin(chat(f"{number}")) for number in range(8)]
            await balancer.wait_for(lambda: waiting(balancer) == 8 - 1 - int(LEAST_AHEAD))
            registry = balancer.app.registry
            registry.lose_report(balancer.node("a"), registry._now() + 1000.0)
            await node.wait_for(lambda: node.in_flight == 8)
            node.faults.clear()
            node.faults.release()
            assert all([(await reply).is_whole for reply in begun])
