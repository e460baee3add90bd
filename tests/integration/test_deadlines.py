"""The caller's deadline over connecting, every attempt and the stream; and the limits that bound a silent node."""

from __future__ import annotations

import aiohttp
import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import full_url
from tests.client import chat, client_of, fleet, paced_node
from tests.harness import QUIET, running

# So long that a test which waits for one of them has failed.
LONG = {"connect_s": 300.0, "first_byte_s": 300.0, "unary_s": 300.0, "idle_s": 300.0}
HURRY = {"X-Balancer-Timeout-S": "0.3"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_ends_a_request_that_hangs_and_its_node_is_not_blamed(stream: bool) -> None:
    async with FakeNode(instant=True) as slow, FakeNode(instant=True) as other:
        slow.faults.add(Fault("hang"))
        async with running(*fleet(slow, other), timeouts=LONG, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(stream=stream), headers=HURRY)
            await slow.wait_for(lambda: slow.cancelled == 1)
        assert (reply.status, reply.code, reply.attempts) == (504, "deadline_exceeded", 1)
        assert len(other.requests) == 0
        assert balancer.counts("attempts") == {("a", "deadline"): 1}
        assert balancer.node("a").load.failure == 0.0


async def test_one_deadline_covers_all_attempts() -> None:
    async with FakeNode(instant=True) as broken, FakeNode(instant=True) as slow:
        broken.faults.add(Fault("reset"))
        slow.faults.add(Fault("hang"))
        async with running(*fleet(broken, slow), timeouts=LONG, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(), headers=HURRY)
            await slow.wait_for(lambda: slow.cancelled == 1)
        assert (reply.status, reply.code, reply.attempts) == (504, "deadline_exceeded", 2)
        assert balancer.counts("attempts") == {("a", "reset_before_head"): 1, ("b", "deadline"): 1}


async def test_a_back_off_that_would_pass_the_deadline_is_not_begun() -> None:
    async with FakeNode(instant=True) as broken, FakeNode(instant=True) as other:
        broken.faults.add(Fault("reset"))
        settings = {"retry": {"base_s": 300.0, "max_s": 300.0}, **QUIET}
        async with running(*fleet(broken, other), **settings) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(), headers={"X-Balancer-Timeout-S": "100"})
        assert (reply.status, reply.code, reply.attempts) == (502, "upstream_unreachable", 1)
        assert len(other.requests) == 0


async def test_a_deadline_within_a_stream_ends_it_with_the_error_event() -> None:
    async with paced_node() as slow:
        slow.faults.add(Fault("hang", after_events=3))
        async with running(*fleet(slow), timeouts=LONG, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(stream=True), headers=HURRY)
            await slow.wait_for(lambda: slow.cancelled == 1)
        assert (reply.status, reply.code, reply.text != "") == (200, "deadline_exceeded", True)
        assert "[DONE]" not in reply.events
        assert balancer.counts("attempts") == {("a", "deadline"): 1}


async def test_a_deadline_covers_the_making_of_the_connection() -> None:
    with full_url() as full:
        settings = {"timeouts": LONG, "health": {"interval_s": 1000.0, "timeout_s": 1000.0}}
        async with running(*fleet(full), **settings) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(), headers=HURRY)
    assert (reply.status, reply.code) == (504, "deadline_exceeded")


async def test_a_deadline_may_only_shorten_the_operators() -> None:
    async with FakeNode(instant=True) as slow:
        slow.faults.add(Fault("hang"))
        timeouts = LONG | {"total_s": 0.3}
        async with running(*fleet(slow), timeouts=timeouts, **QUIET) as balancer, client_of(balancer.url) as client:
            replies = [await client.post(chat(), headers=headers) for headers in ({}, {"X-Balancer-Timeout-S": "3000"})]
        assert [reply.code for reply in replies] == ["deadline_exceeded"] * 2


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", ""])
async def test_a_deadline_that_is_none_is_refused_before_any_node_hears_of_it(value: str) -> None:
    async with FakeNode(instant=True) as node:
        async with running(*fleet(node)) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(), headers={"X-Balancer-Timeout-S": value})
        assert (reply.status, reply.code, len(node.requests)) == (400, "invalid_header", 0)


async def test_a_stream_that_falls_silent_is_ended_after_idle_s_and_not_later_because_of_other_limits() -> None:
    async with paced_node() as slow:
        slow.faults.add(Fault("hang", after_events=3))
        timeouts = {"first_byte_s": 300.0, "commit_s": 300.0, "unary_s": 300.0, "idle_s": 0.3}
        async with running(*fleet(slow), timeouts=timeouts, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(chat(stream=True))
        assert (reply.status, reply.code) == (200, "upstream_truncated")
        assert balancer.counts("attempts") == {("a", "idle_timeout"): 1}


async def test_an_audio_answer_that_falls_silent_is_cut_after_idle_s_and_not_only_after_total_s() -> None:
    async with FakeNode(instant=True) as slow:
        slow.faults.add(Fault("hang", after_events=1, path="/v1/audio/speech"))
        timeouts = {"unary_s": None, "total_s": 3600.0, "idle_s": 0.3}
        async with running(*fleet(slow), timeouts=timeouts, **QUIET) as balancer, client_of(balancer.url) as client:
            stream = await client.open({"model": "sim-model", "input": "say this", "voice": "x"}, "/v1/audio/speech")
            assert stream.status == 200
            with pytest.raises(aiohttp.ClientPayloadError):
                await stream.rest()
        assert balancer.counts("attempts") == {("a", "idle_timeout"): 1}
