"""The demo's client: what it takes for a loss, and what not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer

from loadtest.clock import SystemClock
from loadtest.demo_traffic import End, Sent, Traffic
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault

WITHIN_S = 20.0


@pytest.fixture
async def served() -> AsyncIterator[tuple[FakeNode, Traffic]]:
    """A node that stands in for a balancer, and traffic to it as fast as it comes."""
    async with FakeNode(instant=True) as node, aiohttp.ClientSession() as session:
        node.answer_headers += [("X-Balancer-Node", "n"), ("X-Balancer-Attempts", "1"), ("X-Balancer-Cache", "miss")]
        traffic = Traffic(node.url, session, rate_per_s=200.0, clock=SystemClock(), rng=Random(3))
        yield node, traffic
        await traffic.give_up()


async def run(node: FakeNode, traffic: Traffic, requests: int) -> None:
    traffic.start()
    await node.wait_for(lambda: len(node.requests) >= requests)
    await traffic.finish()


async def test_whole_answers_are_no_loss_and_are_booked_for_their_node(served: tuple[FakeNode, Traffic]) -> None:
    node, traffic = served
    await run(node, traffic, 30)
    assert traffic.totals.whole == traffic.totals.requests == len(node.requests)
    assert traffic.lost == []
    assert traffic.shares() == {"n": 1.0}
    assert 0 < (traffic.ttft_s("n") or 0) < WITHIN_S
    assert traffic.ttft_s("other") is None
    assert traffic.answered_by("n", since_s=0.0)
    assert not traffic.answered_by("n", since_s=SystemClock().now())


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (Fault("status", status=503), "failed"),
        (Fault("reset"), "failed"),
        (Fault("error_event", after_events=3, body_has='"stream": true'), "cut"),
        (Fault("cut", after_events=3), "broken"),
        (Fault("reset", after_events=3), "broken"),
    ],
)
async def test_every_loss_is_noticed(served: tuple[FakeNode, Traffic], fault: Fault, end: str) -> None:
    node, traffic = served
    rule = node.faults.add(fault)
    await run(node, traffic, 30)
    totals = traffic.totals
    assert getattr(totals, end) == rule.hits == len(traffic.lost) >= 15
    assert totals.whole == totals.requests - rule.hits
    assert all(sent.reason for sent in traffic.lost)


async def test_stream_that_is_cut_as_its_node_is_killed_is_no_loss() -> None:
    enough, killed = asyncio.Event(), asyncio.Event()
    asked: list[web.BaseRequest] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(request)
        if len(asked) == 5:
            enough.set()
        if not (await request.json()).get("stream"):
            await killed.wait()
            return web.json_response({"choices": [{"message": {"content": "whole"}}]})
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"delta": {"content": "one"}}]}\n\n')
        await killed.wait()
        await response.write(b'data: {"error": {"code": "upstream_truncated"}}\n\n')
        return response

    async with RawTestServer(answer) as server, aiohttp.ClientSession() as session:
        traffic = Traffic(
            f"http://127.0.0.1:{server.port}", session, rate_per_s=50.0, clock=SystemClock(), rng=Random(3)
        )
        traffic.start()
        await enough.wait()
        under_way = traffic.node_is_killed()
        killed.set()
        await traffic.finish()
    assert {sent.end for sent in under_way if sent.streams} == {End.CUT}
    assert traffic.totals.cut >= 1
    assert traffic.lost == []


async def test_traffic_that_is_given_up_is_not_counted(served: tuple[FakeNode, Traffic]) -> None:
    node, traffic = served
    node.faults.add(Fault("hang"))
    traffic.start()
    await node.wait_for(lambda: node.in_flight >= 5)
    await traffic.give_up()
    assert (traffic.totals.requests, traffic.lost, traffic.under_way) == (0, [], set())


def test_answers_from_the_cache_are_no_node_s_share() -> None:
    hit, coalesced, miss = (Sent(0.0, cache=cache) for cache in ("hit", "coalesced", "miss"))
    assert (hit.from_cache, coalesced.from_cache, miss.from_cache) == (True, True, False)
