"""Which failures are tried elsewhere, at what price, and which answers go to the client as they came."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from balancer.clock import SystemClock
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import Reply, chat, client_of, fleet, instant_nodes
from tests.harness import QUIET, running

REFUSAL = '{"error": {"message": "too long", "type": "BadRequestError", "param": "messages", "code": 400}}'


class RushedClock(SystemClock):
    """The real clock, but waits of a minute and more are over at once; `waits` are their lengths."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    async def sleep(self, delay_s: float) -> None:
        if 60.0 <= delay_s < 10_000.0:
            self.waits.append(delay_s)
            delay_s = 0.0
        await asyncio.sleep(delay_s)


def ask_for_status(*nodes: FakeNode, status: int, **fault: Any) -> None:
    for node in nodes:
        node.faults.add(Fault("status", status=status, **fault))


# -- what goes to the client as it came


@pytest.mark.parametrize("status", [400, 402, 409, 410, 413, 415, 418, 422, 451])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_4xx_about_the_request_is_passed_on_as_it_came_and_tried_nowhere_else(
    status: int, stream: bool
) -> None:
    async with FakeNode(instant=True) as node, FakeNode(instant=True) as other:
        ask_for_status(node, status=status, body=REFUSAL)
        async with running(*fleet(node, other), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(stream=stream))
        assert (reply.status, reply.body.decode(), reply.attempts, reply.node) == (status, REFUSAL, 1, "a")
        assert reply.headers["Content-Type"] == "application/json"
        assert len(other.requests) == 0
        assert balancer.counts("attempts") == {("a", "request_error"): 1}
        assert balancer.node("a").load.failure == 0.0


@pytest.mark.parametrize("status", [401, 403, 404, 405, 407, 421, 426])
async def test_a_misconfigured_node_is_passed_over_and_counted(status: int) -> None:
    async with FakeNode(instant=True) as odd, FakeNode(instant=True) as well:
        ask_for_status(odd, status=status)
        async with running(*fleet(odd, well), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "b", 2)
        assert balancer.counts("attempts") == {("a", "misconfigured"): 1, ("b", "ok"): 1}
        assert balancer.node("a").load.failure > 0.0


@pytest.mark.parametrize("status", [404, 405, 421, 426])
async def test_what_every_node_says_of_itself_is_passed_on(status: int) -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        ask_for_status(a, b, status=status, body=REFUSAL)
        async with running(*fleet(a, b), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.body.decode(), reply.attempts) == (status, REFUSAL, 2)
        assert [len(a.requests), len(b.requests)] == [1, 1]


@pytest.mark.parametrize("status", [401, 403, 407])
async def test_credentials_that_no_node_takes_are_ours_and_not_the_clients_to_mend(status: int) -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        ask_for_status(a, b, status=status)
        async with running(*fleet(a, b), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.code) == (502, "upstream_bad_answer")
        assert "WWW-Authenticate" not in reply.headers


@pytest.mark.parametrize("order", [(500, 404), (404, 500)])
async def test_a_404_that_not_every_node_says_is_not_passed_on(order: tuple[int, int]) -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        ask_for_status(a, status=order[0])
        ask_for_status(b, status=order[1])
        async with running(*fleet(a, b), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.code) == (502, "upstream_bad_answer")


async def test_nodes_that_say_404_do_not_hide_one_that_would_answer() -> None:
    async with instant_nodes(4) as (a, b, c, well):
        ask_for_status(a, b, c, status=404)
        nodes = fleet(a, b, c, well)
        async with running(*nodes, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert reply.status != 404, "passed on only when every eligible node says so"


# -- what another attempt may and may not do


async def test_no_node_is_asked_twice_for_one_request() -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        ask_for_status(a, b, status=500)
        retry = {"max_attempts": 10}
        async with running(*fleet(a, b), retry=retry, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.code, reply.attempts) == (502, "upstream_bad_answer", 2)
        assert [len(a.requests), len(b.requests)] == [1, 1]


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
async def test_no_more_nodes_are_asked_than_max_attempts(max_attempts: int) -> None:
    async with instant_nodes(4) as (a, b, c, well):
        ask_for_status(a, b, c, status=500)
        settings = {"retry": {"max_attempts": max_attempts}, **QUIET}
        async with running(*fleet(a, b, c, well), **settings) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.status, reply.code, reply.attempts) == (502, "upstream_bad_answer", max_attempts)
        assert len(a.requests) + len(b.requests) + len(c.requests) == max_attempts
        assert len(well.requests) == 0


async def test_back_off_doubles_and_is_waited_for_on_the_clock() -> None:
    clock = RushedClock()
    async with instant_nodes(4) as nodes:
        ask_for_status(*nodes[:3], status=500)
        settings = {"retry": {"max_attempts": 4, "base_s": 200.0, "max_s": 500.0}, **QUIET}
        async with running(*fleet(*nodes), clock=clock, **settings) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.is_whole, reply.attempts) == (True, 4)
        assert len(clock.waits) == 3
        for waited_s, full_s in zip(clock.waits, (200.0, 400.0, 500.0), strict=True):
            assert full_s / 2 <= waited_s <= full_s


async def test_a_retry_for_which_no_node_is_left_is_neither_waited_for_nor_paid() -> None:
    clock = RushedClock()
    async with FakeNode(instant=True) as node:
        ask_for_status(node, status=500)
        settings = {"retry": {"base_s": 200.0, "max_s": 200.0}, **QUIET}
        async with running(*fleet(node), clock=clock, **settings) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat())
        assert (reply.code, reply.attempts, len(node.requests)) == ("upstream_bad_answer", 1, 1)
        assert clock.waits == []
        assert balancer.counts("retries") == {}


async def test_a_request_with_effects_on_its_node_is_not_sent_again_once_sent_but_is_when_refused() -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b, FakeNode(instant=True) as gone:
        ask_for_status(a, status=500)
        kept = {"model": "sim-model", "input": "remember this", "store": True}
        async with running(*fleet(gone, a, b), **QUIET) as balancer, client_of(balancer.url) as client:
            await balancer.wait_for(lambda: balancer.node("a").check_up is True)
            gone.die()
            stored = await client.post(kept, "/v1/responses")
            assert (stored.status, stored.json["error"]["code"]) == (502, "upstream_bad_answer")
            assert [len(a.requests), len(b.requests)] == [1, 0]
            loose = await client.post({**kept, "store": False}, "/v1/responses")
            assert (loose.status, len(b.requests)) == (200, 1)


# -- connections and bodies between us and the node


@pytest.mark.parametrize("stream", [False, True])
async def test_a_kept_connection_that_the_node_closed_as_we_wrote_is_made_anew(stream: bool) -> None:
    async with FakeNode(instant=True) as node:
        retry = {"max_attempts": 1, "min_retries_per_s": 0.0, "budget_ratio": 0.0}
        async with running(*fleet(node), retry=retry, **QUIET) as balancer, client_of(balancer.url) as client:
            assert (await client.post(chat())).is_whole
            kept = node.requests[0].connection
            node.faults.add(Fault("close", first=1))
            reply = await client.post(chat(stream=stream))
        assert reply.is_whole
        assert [request.connection == kept for request in node.requests] == [True, True, False]
        assert balancer.counts("attempts") == {("a", "ok"): 2, ("a", "stale_connection"): 1}
        assert balancer.counts("retries") == {}, "it costs neither budget nor an attempt"
        assert balancer.node("a").load.failure == 0.0


async def test_a_node_that_refuses_stream_options_gets_the_clients_own_body_from_then_on() -> None:
    async with FakeNode(instant=True) as old:
        refusal = '{"error": {"message": "stream_options: Extra inputs are not permitted", "code": 400}}'
        ask_for_status(old, status=400, body=refusal, body_has="stream_options")
        body = b'{"model": "sim-model",  "messages": [{"role":"user","content":"hi"}], "stream": true}'
        async with running(*fleet(old), **QUIET) as balancer, client_of(balancer.url) as client:
            replies = [await client.post(body) for _ in range(3)]
        assert all(reply.is_whole for reply in replies)
        assert [b"include_usage" in request.body for request in old.requests] == [True, False, False, False]
        assert [request.body == body for request in old.requests] == [False, True, True, True]
        assert balancer.node("a").load.failure == 0.0


async def test_a_client_that_sends_bad_stream_options_itself_gets_the_nodes_answer() -> None:
    async with FakeNode(instant=True) as node, FakeNode(instant=True) as other:
        ask_for_status(node, status=400, body=REFUSAL, body_has="stream_options")
        async with running(*fleet(node, other), **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(stream=True, stream_options={"include_usage": True}))
        assert (reply.status, reply.body.decode(), reply.attempts) == (400, REFUSAL, 1)


# -- the budget


async def upstream_requests(count: int, **settings: Any) -> tuple[int, list[Reply], dict[tuple[str, ...], int]]:
    """How many requests four nodes got when they failed `count` requests of clients."""
    async with instant_nodes(4) as nodes:
        ask_for_status(*nodes, status=500)
        async with running(*fleet(*nodes), **settings, **QUIET) as balancer, client_of(balancer.url) as client:
            replies = await client.many(count)
        assert {reply.code for reply in replies} == {"upstream_bad_answer"}
        return sum(len(node.requests) for node in nodes), replies, balancer.counts("retry_budget_exhausted")


async def test_a_fleet_that_fails_everything_gets_at_most_1_3_requests_for_each_of_the_clients() -> None:
    sent, replies, exhausted = await upstream_requests(400)  # ten seconds' worth at 40 a second
    assert sent <= 1.3 * len(replies)
    assert sent == sum(reply.attempts for reply in replies)
    assert exhausted[()] > 0


async def test_without_a_floor_nothing_is_retried_while_everything_fails() -> None:
    sent, replies, exhausted = await upstream_requests(30, retry={"min_retries_per_s": 0.0})
    assert sent == len(replies) == exhausted[()] == 30


async def test_successes_earn_retries() -> None:
    async with FakeNode(instant=True) as a, FakeNode(instant=True) as b:
        retry = {"max_attempts": 2, "min_retries_per_s": 0.0, "budget_ratio": 0.2}
        async with running(*fleet(a, b), retry=retry, **QUIET) as balancer, client_of(balancer.url) as client:
            assert all(reply.is_whole for reply in await client.many(10, at_once=1))
            ask_for_status(a, b, status=500, body_has="fails")
            replies = [await client.post(chat(f"fails {number}")) for number in range(4)]
        assert [reply.attempts for reply in replies] == [2, 2, 1, 1]
