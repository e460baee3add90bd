"""A second attempt beside a slow first one, over real sockets."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from balancer.core.hedge import LEAST_SEEN
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Client, chat, client_of, fleet, instant_nodes
from tests.harness import QUIET, Balancer, running

HEDGED = {**QUIET, "hedge": {"enabled": True}}
SLOW = chat("a slow one", stream=True)


@asynccontextmanager
async def serving(settings: Mapping[str, Any], count: int) -> AsyncIterator[tuple[list[FakeNode], Balancer, Client]]:
    async with (
        instant_nodes(count) as nodes,
        running(*fleet(*nodes), **settings) as balancer,
        client_of(balancer.url) as client,
    ):
        yield nodes, balancer, client


async def taught(client: Client) -> None:
    """Enough first tokens for the delay to be known: some milliseconds on instant nodes."""
    replies = await client.many(LEAST_SEEN, lambda number: chat(f"number {number:3}", stream=True), at_once=4)
    assert all(reply.is_whole for reply in replies)


def outcomes(balancer: Balancer) -> Counter[str]:
    counts: Counter[str] = Counter()
    for (_, outcome), count in balancer.counts("attempts").items():
        counts[outcome] += count
    return counts


@pytest.mark.parametrize("settings", [HEDGED, {**QUIET, "models": [{"name": "sim-model", "hedge": True}]}])
async def test_a_late_first_token_is_had_from_another_node_and_the_loser_is_cancelled(settings: Any) -> None:
    async with serving(settings, 2) as ((a, b), balancer, client):
        await taught(client)
        a.faults.add(Fault("hang", body_has="slow"))
        reply = await client.post(SLOW)
        assert reply.is_whole
        assert (reply.node, reply.attempts) == ("b", 2)
        assert reply.text == b.expected_text(SLOW)
        await balancer.wait_for(lambda: a.cancelled == 1)
        assert balancer.counts("hedges") == {("yes",): 1}
        assert outcomes(balancer)["hedge_lost"] == 1
        assert [balancer.node(id_).load.rif for id_ in "ab"] == [0, 0]
        assert balancer.node("a").load.failure == 0.0, "to be slow once is no failure"


async def test_the_first_may_still_win() -> None:
    async with serving(HEDGED, 2) as ((a, b), balancer, client):
        await taught(client)
        a.faults.add(Fault("delay", delay_s=0.2, body_has="slow"))
        b.faults.add(Fault("hang", body_has="slow"))
        reply = await client.post(SLOW)
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "a", 2)
        assert balancer.counts("hedges") == {("no",): 1}
        await balancer.wait_for(lambda: b.cancelled == 1)


async def test_a_hedge_that_fails_leaves_the_first_alone() -> None:
    async with serving(HEDGED, 2) as ((a, b), _balancer, client):
        await taught(client)
        a.faults.add(Fault("delay", delay_s=0.2, body_has="slow"))
        b.faults.add(Fault("status", status=500, body_has="slow"))
        reply = await client.post(SLOW)
        assert (reply.is_whole, reply.node) == (True, "a")


async def test_two_that_fail_are_retried_as_one() -> None:
    async with serving(HEDGED, 3) as ((a, b, _c), balancer, client):
        await taught(client)
        for node in (a, b):
            node.faults.add(Fault("status", status=500, body_has="slow"))
            node.faults.add(Fault("delay", delay_s=0.2, body_has="slow"))
        reply = await client.post(SLOW)
        assert (reply.is_whole, reply.node) == (True, "c")
        assert [balancer.node(id_).load.rif for id_ in "abc"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "body"),
    [
        (QUIET, SLOW),
        (HEDGED, chat("a slow one")),
        ({**HEDGED, "models": [{"name": "sim-model", "hedge": False}]}, SLOW),
        ({**HEDGED, "retry": {"budget_ratio": 0.0, "min_retries_per_s": 0.0}}, SLOW),
    ],
    ids=["off", "unary", "off_for_the_model", "no_budget"],
)
async def test_no_hedge(settings: Any, body: dict[str, Any]) -> None:
    async with serving(settings, 2) as ((a, _b), balancer, client):
        await taught(client)
        a.faults.add(Fault("delay", delay_s=0.2, body_has="slow"))
        reply = await client.post(body)
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "a", 1)
        assert balancer.counts("hedges") == {}


async def test_a_client_that_leaves_takes_both_attempts_with_it() -> None:
    async with serving(HEDGED, 2) as ((a, b), balancer, client):
        await taught(client)
        for node in (a, b):
            node.faults.add(Fault("hang", body_has="slow"))
        asking = client.begin(SLOW)
        await balancer.wait_for(lambda: a.in_flight == 1 and b.in_flight == 1)
        asking.cancel()
        await balancer.wait_for(lambda: (a.cancelled, b.cancelled) == (1, 1))
        assert outcomes(balancer)["client_gone"] == 2
