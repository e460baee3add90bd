"""Each way in which an attempt can fail: what it is called, that another node is asked, and what the client sees."""

from __future__ import annotations

from typing import Any

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import dead_url, full_url
from tests.client import Client, chat, client_of, fleet, paced_node
from tests.harness import QUIET, running

# Limits for what hangs. Healthy answers come at once, so that these only have to be out of a slow machine's reach.
SHORT = {"first_byte_s": 0.4, "unary_s": 0.4, "idle_s": 0.4}
NONE = {"enabled": False}

UNARY, STREAM = chat("a question"), chat("a question", stream=True)
# Fault, request, outcome, and what the client sees when there is no other node.
BEFORE_COMMIT = [
    (Fault("reset"), UNARY, "reset_before_head", (502, "upstream_unreachable")),
    (Fault("close"), UNARY, "reset_before_head", (502, "upstream_unreachable")),
    (Fault("close"), STREAM, "reset_before_head", (502, "upstream_unreachable")),
    (Fault("reset", after_events=0), UNARY, "reset_after_head", (502, "upstream_truncated")),
    (Fault("reset", after_events=1), UNARY, "reset_after_head", (502, "upstream_truncated")),
    (Fault("close", after_events=1), UNARY, "truncated", (502, "upstream_truncated")),
    (Fault("truncated"), UNARY, "truncated", (502, "upstream_truncated")),
    (Fault("close", after_events=0), STREAM, "truncated", (502, "upstream_truncated")),
    (Fault("reset", after_events=1), STREAM, "reset_after_head", (502, "upstream_truncated")),
    (Fault("cut", after_events=1), STREAM, "no_finish_reason", (502, "upstream_truncated")),
    (Fault("hang"), UNARY, "unary_timeout", (504, "first_token_timeout")),
    (Fault("hang", after_events=1), UNARY, "unary_timeout", (504, "first_token_timeout")),
    (Fault("hang"), STREAM, "first_byte_timeout", (504, "first_token_timeout")),
    (Fault("status", status=500), UNARY, "server_error", (502, "upstream_bad_answer")),
    (Fault("status", status=502, body="<html>"), STREAM, "server_error", (502, "upstream_bad_answer")),
    (Fault("garbage"), UNARY, "bad_framing", (502, "upstream_bad_answer")),
    (Fault("bad_chunk"), STREAM, "bad_framing", (502, "upstream_bad_answer")),
    (Fault("endless_head"), UNARY, "bad_framing", (502, "upstream_bad_answer")),
    (Fault("gzip"), UNARY, "bad_encoding", (502, "upstream_bad_answer")),
    (Fault("gzip"), STREAM, "bad_encoding", (502, "upstream_bad_answer")),
    (Fault("bad_json"), UNARY, "bad_body", (502, "upstream_bad_answer")),
    (Fault("bad_event", after_events=1), STREAM, "bad_body", (502, "upstream_bad_answer")),
    (Fault("error_body"), UNARY, "error_object", (502, "upstream_bad_answer")),
    (Fault("error_event"), STREAM, "error_object", (502, "upstream_bad_answer")),
    (Fault("empty_body"), UNARY, "empty_body", (502, "upstream_bad_answer")),
    (Fault("status", status=302), UNARY, "misconfigured", (502, "upstream_bad_answer")),
]
# The same for a stream of which the client has seen something.
AFTER_COMMIT = [
    (Fault("reset", after_events=3), "reset_after_head", "upstream_truncated"),
    (Fault("close", after_events=3), "truncated", "upstream_truncated"),
    (Fault("cut", after_events=3), "no_finish_reason", "upstream_truncated"),
    (Fault("no_finish"), "no_finish_reason", "upstream_truncated"),
    (Fault("no_done"), "no_good_end", "upstream_truncated"),
    (Fault("hang", after_events=3), "idle_timeout", "upstream_truncated"),
    (Fault("bad_chunk", after_events=3), "bad_framing", "upstream_bad_answer"),
    (Fault("error_event", after_events=3), "stream_error", "upstream_bad_answer"),
    (Fault("die", after_events=3), "reset_after_head", "upstream_truncated"),
]


def name(value: Any) -> str | None:
    if isinstance(value, Fault):
        point = "" if value.after_events is None else f"-{value.after_events}"
        return f"{value.kind}{value.status if value.kind == 'status' else ''}{point}"
    if isinstance(value, dict):
        return "stream" if value.get("stream") else "unary"
    return None if isinstance(value, str) else ""


def shows_no_address(told: bytes) -> bool:
    return b"127.0.0.1" not in told and b"http://" not in told


@pytest.mark.parametrize(("fault", "body", "outcome", "alone"), BEFORE_COMMIT, ids=name)
async def test_a_failure_before_the_commit_point_is_an_answer_from_another_node(
    fault: Fault, body: Any, outcome: str, alone: Any
) -> None:
    async with FakeNode(instant=True) as sick, FakeNode(instant=True) as well:
        sick.faults.add(fault)
        async with running(*fleet(sick, well), timeouts=SHORT, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(body)
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "b", 2)
        assert reply.text == well.expected_text(body)
        assert balancer.counts("attempts") == {("a", outcome): 1, ("b", "ok"): 1}
        assert balancer.counts("retries") == {(outcome,): 1}
        assert [len(sick.requests), len(well.requests)] == [1, 1]
        assert sick.requests[0].body == well.requests[0].body
        assert balancer.node("a").load.failure > 0.0
        assert balancer.requests[-1]["outcomes"] == [outcome, "ok"]


@pytest.mark.parametrize(("fault", "body", "outcome", "alone"), BEFORE_COMMIT, ids=name)
async def test_a_failure_of_the_only_node_is_an_error_answer_that_names_no_address(
    fault: Fault, body: Any, outcome: str, alone: tuple[int, str]
) -> None:
    async with FakeNode(instant=True) as sick:
        sick.faults.add(fault)
        async with running(*fleet(sick), timeouts=SHORT, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(body)
        assert (reply.status, reply.code, reply.attempts) == (*alone, 1)
        assert reply.headers["Content-Type"] == "application/json"
        assert shows_no_address(reply.body)
        assert balancer.counts("attempts") == {("a", outcome): 1}
        assert len(sick.requests) == 1
        ((labels, count),) = balancer.counts("requests").items()
        assert (labels[2:], count) == ((str(alone[0]), alone[1]), 1)


@pytest.mark.parametrize(("fault", "outcome", "code"), AFTER_COMMIT, ids=name)
async def test_a_stream_that_breaks_ends_with_one_error_event_and_is_sent_to_no_other_node(
    fault: Fault, outcome: str, code: str
) -> None:
    async with paced_node() as sick, FakeNode(instant=True) as well:
        sick.faults.add(fault)
        async with (
            running(*fleet(sick, well), timeouts=SHORT, resume=NONE, **QUIET) as balancer,
            client_of(balancer.url) as client,
        ):
            reply = await client.post(STREAM)
        assert (reply.status, reply.code, reply.node, reply.attempts) == (200, code, "a", 1)
        assert "[DONE]" not in reply.events
        assert "error" in reply.events[-1], "the error event is the last"
        assert shows_no_address(reply.body)
        said = sick.expected_text(STREAM)
        assert reply.text
        assert said.startswith(reply.text), "what came before the break is the answer's beginning, with nothing twice"
        assert [len(sick.requests), len(well.requests)] == [1, 0]
        assert balancer.counts("attempts") == {("a", outcome): 1}
        assert balancer.counts("retries") == {}
        assert balancer.node("a").load.failure > 0.0, "a stream broken in the middle is the node's failure"
        ((labels, _),) = balancer.counts("requests").items()
        assert labels[2:] == ("200", code)


async def test_a_refused_connection_is_an_answer_from_another_node() -> None:
    async with FakeNode(instant=True) as gone, FakeNode(instant=True) as well:
        async with running(*fleet(gone, well), **QUIET) as balancer, client_of(balancer.url) as client:
            await balancer.wait_for(lambda: balancer.node("a").check_up is True)
            gone.die()
            reply = await client.post(UNARY)
        assert (reply.is_whole, reply.node, reply.attempts) == (True, "b", 2)
        assert balancer.counts("attempts") == {("a", "refused"): 1, ("b", "ok"): 1}


@pytest.mark.parametrize("alone", [False, True])
async def test_a_connection_that_is_never_made_is_given_up_after_connect_s(alone: bool) -> None:
    settings: dict[str, Any] = {"timeouts": {"connect_s": 0.2}, "health": {"interval_s": 1000.0, "timeout_s": 1000.0}}
    with full_url() as full:
        async with FakeNode(instant=True) as well:
            nodes = fleet(full) if alone else fleet(full, well)
            async with running(*nodes, **settings) as balancer, client_of(balancer.url) as client:
                reply = await client.post(UNARY)
            if alone:
                assert (reply.status, reply.code, reply.retry_after_s) == (503, "no_eligible_node", 1)
                assert shows_no_address(reply.body)
            else:
                assert (reply.is_whole, reply.node, reply.attempts) == (True, "b", 2)
            assert balancer.counts("attempts")["a", "connect_timeout"] == 1


async def test_a_name_without_an_address_is_a_node_that_refuses() -> None:
    async with FakeNode(instant=True) as well:
        nodes = fleet("http://no-such-name.invalid:8000", well)
        async with running(*nodes, **QUIET) as balancer, client_of(balancer.url) as client:
            replies = await client.many(5)
        assert all(reply.is_whole and reply.node == "b" for reply in replies)


async def leaves_in_the_middle(client: Client, sick: FakeNode) -> None:
    stream = await client.open(STREAM)
    await stream.event()
    stream.leave()
    await sick.wait_for(lambda: sick.cancelled == 1)


async def test_a_client_that_leaves_is_nobodys_failure_and_frees_the_slot() -> None:
    async with paced_node() as node, FakeNode(instant=True) as other:
        node.faults.add(Fault("hang", after_events=3))
        async with running(*fleet(node, other), **QUIET) as balancer, client_of(balancer.url) as client:
            await leaves_in_the_middle(client, node)
            await balancer.wait_for(lambda: len(balancer.requests) == 1)
            assert balancer.counts("attempts") == {("a", "client_gone"): 1}
            assert (balancer.node("a").load.rif, balancer.node("a").load.failure) == (0, 0.0)
            assert (len(other.requests), balancer.requests[0]["code"]) == (0, "client_left")


async def test_a_dead_address_alone_is_refused_in_the_openai_form_with_a_retry_after() -> None:
    async with running(*fleet(dead_url())) as balancer, client_of(balancer.url) as client:
        reply = await client.post(UNARY)
    assert (reply.status, reply.code, reply.retry_after_s) == (503, "no_eligible_node", 1)
    assert reply.headers["Content-Type"] == "application/json"
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert shows_no_address(reply.body)
