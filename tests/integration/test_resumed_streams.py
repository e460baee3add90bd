"""Streams that a node breaks are continued on another one: the client has one stream, whose text is the whole one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from balancer.core.node import NodeConfig
from balancer.core.request import NodeId
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.client import CHAT, Client, Reply, Stream, chat, client_of, fleet, paced_node
from tests.harness import QUIET, Balancer, running
from tests.integration.raw_http import Wire, chunked, payloads, post, text_of
from tests.integration.scripted_node import Flood, ScriptedNode, Steps, stream_head
from tests.integration.stream_dialects import DONE, closes, data, delta, finish

COMPLETIONS = "/v1/completions"
BOTH = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
SHORT = {"first_byte_s": 2.0, "idle_s": 2.0, "unary_s": 2.0, "commit_s": 0.5}
TOKENS = 20
AFTER = 7  # events that a node says before it breaks: in a chat a role, then words


def asked(path: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = chat("tell me", stream=True, max_tokens=TOKENS)
    if path == COMPLETIONS:
        del body["messages"]
        body["prompt"] = "tell me"
    return body | changes


def said(reply: Reply) -> str:
    """The text of a stream of either endpoint."""
    choices = [choice for event in reply.events if event != "[DONE]" for choice in event.get("choices", ())]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@dataclass
class Standing:
    """A node that breaks, one that is well, and the balancer in front of both."""

    sick: FakeNode
    well: FakeNode
    balancer: Balancer
    client: Client

    def breaks(self, kind: Any = "reset", after_events: int = AFTER, **fields: Any) -> None:
        self.sick.faults.add(Fault(kind, after_events=after_events, **fields))

    async def whole(self, body: Any, path: str = CHAT) -> Reply:
        """What a stream is that nobody broke."""
        reply = await self.client.post(body, f"{self.well.url}{path}")
        self.well.requests.clear()
        return reply

    @property
    def resumes(self) -> dict[str, int]:
        return {outcome: count for (outcome,), count in self.balancer.counts("resumes").items()}

    @property
    def attempts(self) -> dict[tuple[str, ...], int]:
        return self.balancer.counts("attempts")

    @property
    def story(self) -> dict[str, Any]:
        """What the last request's line says."""
        return self.balancer.requests[-1]


@asynccontextmanager
async def standing(
    engine: str = "vllm", other: str | None = None, *, is_told: bool = True, **settings: Any
) -> AsyncIterator[Standing]:
    """Nodes of two engines, the second like the first unless it is named; `a` is asked first."""
    async with AsyncExitStack() as stack:
        engines = (engine, other or engine)
        sick, well = [
            await stack.enter_async_context(paced_node(seed=seed, owned_by=name)) for seed, name in enumerate(engines)
        ]
        nodes = [
            node | ({"engine": name} if is_told else {}) for node, name in zip(fleet(sick, well), engines, strict=True)
        ]
        balancer = await stack.enter_async_context(running(*nodes, **{**QUIET, "timeouts": SHORT, **settings}))
        client = await stack.enter_async_context(client_of(balancer.url))
        yield Standing(sick, well, balancer, client)


def joins(stand: Standing, node: FakeNode) -> None:
    """One more node of the same kind, picked last."""
    config = NodeConfig(url=node.url, id=NodeId("c"), models=("sim-model",), engine="vllm", weight=0.1)
    stand.balancer.app.put_node(config)


# -- continued


@BOTH
@pytest.mark.parametrize("kind", ["reset", "close", "cut", "bad_chunk", "error_event", "die", "hang"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
async def test_a_stream_that_breaks_is_continued_elsewhere_with_the_same_text(
    path: str, kind: str, engine: str
) -> None:
    async with standing(engine) as stand:
        whole = await stand.whole(asked(path), path)
        stand.breaks(kind)
        reply = await stand.client.post(asked(path), path)
        assert (reply.status, reply.errors, reply.events[-1]) == (200, [], "[DONE]")
        assert said(reply) == said(whole) != ""
        assert reply.node == "a"
        assert stand.resumes == {"ok": 1}
        assert len(stand.well.requests) == 1
        assert (stand.story["resume"], stand.story["outcomes"][1:]) == ("ok", ["ok"])
        assert stand.story["attempts"] == 2


@BOTH
@pytest.mark.parametrize("asks", [False, True])
async def test_both_parts_are_one_stream(path: str, asks: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asks else {}
    async with standing() as stand:
        whole = await stand.whole(asked(path, **options), path)
        stand.breaks()
        reply = await stand.client.post(asked(path, **options), path)
        events = reply.events[:-1]
        assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
        roles = [choice for event in events for choice in event["choices"] if "role" in choice.get("delta", ())]
        assert len(roles) == (path == CHAT)
        assert [choice["finish_reason"] for event in events for choice in event["choices"]] == [
            choice["finish_reason"] for event in whole.events[:-1] for choice in event["choices"]
        ]
        assert [event["usage"]["completion_tokens"] for event in events if event.get("usage")] == [TOKENS] * asks
        assert stand.story["completion_tokens"] == TOKENS
        assert reply.body.count(b"\n\n: resumed\n\n") == 1


@BOTH
async def test_the_next_node_is_asked_for_the_rest_and_no_more(path: str) -> None:
    async with standing() as stand:
        stand.breaks()
        body = asked(path, user="u", top_p=0.5)
        await stand.client.post(body, path, {"X-Request-Id": "given"})
        first, rest = stand.sick.requests[0], stand.well.requests[0]
        asked_first, asked_rest = first.json(), rest.json()
        words = AFTER - (path == CHAT)
        assert asked_rest.pop("max_tokens") == TOKENS - words
        asked_first.pop("max_tokens")
        if path == CHAT:
            assert asked_rest.pop("continue_final_message") is True
            assert asked_rest.pop("add_generation_prompt") is False
            *before, last = asked_rest.pop("messages")
            assert before == asked_first.pop("messages")
            assert last["role"] == "assistant"
            assert stand.well.expected_text(body).startswith(last["content"])
        else:
            assert asked_rest.pop("prompt").startswith(asked_first.pop("prompt"))
        assert asked_rest == asked_first
        assert rest.header("x-request-id") == "given"


async def test_where_nothing_was_said_yet_the_request_is_sent_again() -> None:
    script = Steps(stream_head() + chunked(delta(""))[:-5], then=closes)
    script.go(1)
    async with ScriptedNode(script) as sick, FakeNode(instant=True) as well:
        nodes = fleet(sick.url, well, engine="vllm")
        timeouts = {**SHORT, "commit_s": 0.05}
        async with running(*nodes, timeouts=timeouts, **QUIET) as balancer, client_of(balancer.url) as client:
            stream = await client.open(asked())
            script.go(1)
            assert said(await stream.rest()) == well.expected_text(asked())
            assert well.requests[0].body == sick.requests[0].body


async def test_a_stream_without_a_limit_of_length_is_continued_to_its_end() -> None:
    async with standing() as stand:
        body = asked(max_tokens=None)
        whole = await stand.whole(body)
        stand.breaks()
        reply = await stand.client.post(body)
        assert (reply.is_whole, reply.text) == (True, whole.text)


@pytest.mark.parametrize("owner", ["vllm", "sglang", "llamacpp"])
async def test_the_engine_is_known_by_the_model_list(owner: str) -> None:
    async with standing(owner, is_told=False) as stand:
        await stand.balancer.wait_for(lambda: [stand.balancer.node(id_).engine for id_ in "ab"] == [owner, owner])
        stand.breaks()
        reply = await stand.client.post(asked())
        assert (reply.is_whole, reply.text) == (True, stand.well.expected_text(asked()))


async def test_several_streams_of_one_dying_node_are_all_continued() -> None:
    async with standing() as stand:
        stand.sick.faults.add(Fault("hang", after_events=AFTER))
        bodies = [asked(messages=[{"role": "user", "content": f"number {number}"}]) for number in range(8)]
        streams = [stand.client.begin(body) for body in bodies]
        await stand.sick.wait_for(lambda: sum(one.events_sent == AFTER for one in stand.sick.requests) >= 4)
        begun = len(stand.sick.requests)
        stand.sick.die()
        replies = await asyncio.gather(*streams)
        assert [reply.text for reply in replies] == [stand.well.expected_text(body) for body in bodies]
        assert all(reply.is_whole for reply in replies)
        assert 4 <= stand.resumes["ok"] <= begun


# -- once, and counted


async def test_a_stream_that_breaks_twice_is_continued_once() -> None:
    async with paced_node(seed=2) as third, standing() as stand:
        joins(stand, third)
        stand.breaks("die")
        stand.well.faults.add(Fault("die", after_events=3))
        reply = await stand.client.post(asked())
        assert reply.code == "upstream_truncated"
        assert "[DONE]" not in reply.events
        assert stand.well.expected_text(asked()).startswith(reply.text)
        assert third.requests == []
        assert stand.resumes == {"broken": 1}
        assert stand.attempts == {("a", "reset_after_head"): 1, ("b", "reset_after_head"): 1}
        assert stand.story["resume"] == "broken"


async def test_a_node_that_refuses_the_connection_is_passed_over_for_another() -> None:
    async with paced_node(seed=2) as third, standing() as stand:
        joins(stand, third)
        await stand.balancer.wait_for(lambda: stand.balancer.node("b").check_up is True)
        stand.breaks("die")
        stand.well.refuse()
        reply = await stand.client.post(asked())
        assert (reply.is_whole, reply.text) == (True, third.expected_text(asked()))
        assert stand.attempts[("b", "refused")] == 1


@pytest.mark.parametrize(
    ("retry", "outcome"),
    [({"max_attempts": 1}, "no_node"), ({"budget_ratio": 0.0, "min_retries_per_s": 0.0}, "no_node")],
)
async def test_a_resume_is_a_retry_and_counted_as_one(retry: dict[str, Any], outcome: str) -> None:
    async with standing(retry=retry) as stand:
        stand.breaks()
        reply = await stand.client.post(asked())
        assert (reply.code, stand.resumes) == ("upstream_truncated", {outcome: 1})
        assert stand.well.requests == []


async def test_attempts_before_the_break_count_too() -> None:
    async with paced_node(seed=2) as third, standing(retry={"max_attempts": 2}) as stand:
        joins(stand, third)
        stand.sick.faults.add(Fault("status", status=500))
        stand.well.faults.add(Fault("reset", after_events=AFTER))
        reply = await stand.client.post(asked())
        assert (reply.code, reply.attempts, stand.resumes) == ("upstream_truncated", 2, {"no_node": 1})
        assert third.requests == []


async def test_a_prompt_on_whose_account_two_nodes_died_is_not_sent_to_a_third() -> None:
    async with paced_node(seed=2) as third, standing() as stand:
        joins(stand, third)
        stand.sick.faults.add(Fault("die"))
        stand.well.faults.add(Fault("die", after_events=AFTER))
        reply = await stand.client.post(asked())
        assert (reply.code, stand.resumes) == ("upstream_truncated", {"no_node": 1})
        assert third.requests == []


async def test_the_deadline_holds_over_both_parts() -> None:
    async with standing() as stand:
        stand.breaks()
        stand.well.faults.add(Fault("hang", after_events=4))
        reply = await stand.client.post(asked(), headers={"X-Balancer-Timeout-S": "1"})
        assert (reply.code, stand.resumes) == ("deadline_exceeded", {"broken": 1})


async def test_a_client_that_leaves_in_the_second_part_is_felt_there() -> None:
    async with standing() as stand:
        stand.breaks()
        stand.well.faults.add(Fault("hang", after_events=4))
        stream: Stream = await stand.client.open(asked())
        await stand.well.wait_for(lambda: any(one.events_sent == 4 for one in stand.well.requests))
        stream.leave()
        await stand.well.wait_for(lambda: stand.well.cancelled == 1)
        await stand.balancer.wait_for(lambda: len(stand.balancer.requests) == 1)
        assert stand.attempts == {("a", "reset_after_head"): 1, ("b", "client_gone"): 1}
        assert all(stand.balancer.node(id_).load.rif == 0 for id_ in "ab")


# -- not continued


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"seed": 1, "temperature": 1}, "seed"),
        ({"stop": ["never said"]}, "stop"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "x"}, "unknown_field"),
        ({"user": "u" * 300_000}, "body_size"),
    ],
)
async def test_what_may_not_be_exact_ends_with_an_error_event(changes: dict[str, Any], reason: str) -> None:
    async with standing() as stand:
        stand.breaks("close")
        reply = await stand.client.post(asked(**changes))
        assert (reply.status, reply.code) == (200, "upstream_truncated")
        assert "[DONE]" not in reply.events
        assert stand.well.requests == []
        assert (stand.resumes, stand.story["resume"]) == ({"not_eligible": 1}, reason)


@pytest.mark.parametrize(
    ("engine", "other", "resumes"),
    [
        ("vllm", "llamacpp", {"no_node": 1}),
        ("tgi", "tgi", {"not_eligible": 1}),
        ("other", "other", {"not_eligible": 1}),
    ],
)
async def test_only_a_node_of_the_same_tested_engine_goes_on(engine: str, other: str, resumes: dict[str, int]) -> None:
    async with standing(engine, other) as stand:
        stand.breaks()
        reply = await stand.client.post(asked())
        assert (reply.code, stand.resumes) == ("upstream_truncated", resumes)
        assert stand.well.requests == []


SAID = {
    "a word too much": ([delta("one"), delta(" two three")], "tokens_unknown"),
    "white space": ([delta("one"), delta(" ")], "white_space"),
    "half a character": ([delta("one"), delta("\ufffd")], "incomplete_character"),
    "reasoning": ([data({"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})], "reasoning"),
    "a tool": ([data({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}}]})], "not_text"),
    "the end": ([delta("one"), delta(None, "stop")], "finished"),
    "all that it may": ([delta("one")] * TOKENS, "nothing_left"),
    "no JSON": ([delta("one"), b'data: {"choices": [{"delta": "finish_reason":null}]}\n\n'], "unreadable"),
    "too much": ([delta("one"), *[delta("y" * 200_000)] * 6], "answer_size"),
}  # fmt: skip


@pytest.mark.parametrize(("events", "reason"), SAID.values(), ids=SAID.keys())
async def test_what_was_said_decides_too(events: list[bytes], reason: str) -> None:
    parts = [stream_head() + chunked(events[0])[:-5], *(chunked(event)[:-5] for event in events[1:])]
    async with ScriptedNode(Steps(*parts, then=closes)) as sick, FakeNode(instant=True) as well:
        sick.answers[0].go(len(parts) + 1)  # type: ignore[union-attr]
        nodes = fleet(sick.url, well, engine="vllm")
        async with running(*nodes, timeouts=SHORT, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(asked())
            assert b"upstream_truncated" in reply.body
            assert (well.requests, balancer.requests[-1]["resume"]) == ([], reason)
            assert reply.body.startswith(b"".join(events[:1]))


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    ],
    ids=["refused", "no stream"],
)
async def test_a_node_that_will_not_go_on_leaves_the_first_error(answer: bytes) -> None:
    async with paced_node() as sick, ScriptedNode(answer) as well:
        sick.faults.add(Fault("close", after_events=AFTER))
        nodes = fleet(sick, well.url, engine="vllm")
        async with running(*nodes, timeouts=SHORT, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(asked())
            assert (reply.code, balancer.requests[-1]["resume"]) == ("upstream_truncated", "no_node")
            assert len(well.requests) == 1


async def test_a_node_that_goes_on_with_something_else_is_not_listened_to() -> None:
    thinks = data({"id": "d", "choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]})
    script = Steps(stream_head() + chunked(delta(" and"))[:-5], chunked(thinks)[:-5], then=finish)
    async with paced_node() as sick, ScriptedNode(script) as well:
        sick.faults.add(Fault("close", after_events=AFTER))
        script.go(2)
        nodes = fleet(sick, well.url, engine="vllm")
        async with running(*nodes, timeouts=SHORT, **QUIET) as balancer, client_of(balancer.url) as client:
            reply = await client.post(asked())
            assert reply.code == "upstream_bad_answer"
            assert b"reasoning" not in reply.body
            assert balancer.counts("resumes") == {("broken",): 1}


async def test_switched_off_nothing_is_continued_and_nothing_counted() -> None:
    async with standing(resume={"enabled": False}) as stand:
        stand.breaks()
        reply = await stand.client.post(asked())
        assert (reply.code, stand.resumes, stand.story["resume"]) == ("upstream_truncated", {}, "")


async def test_a_reload_switches_it() -> None:
    async with standing() as stand:
        stand.balancer.write_settings({**stand.balancer.settings, "resume": {"enabled": False}})
        await stand.balancer.app.reload()
        stand.breaks()
        assert (await stand.client.post(asked())).code == "upstream_truncated"


@pytest.mark.parametrize("kind", ["reset", "close"])
async def test_a_unary_answer_that_breaks_is_a_retry_as_ever(kind: Any) -> None:
    async with standing() as stand:
        stand.breaks(kind, after_events=1)
        reply = await stand.client.post(asked(stream=False))
        assert (reply.is_whole, reply.node, stand.resumes) == (True, "b", {})


# -- the cache


@pytest.mark.parametrize(("temperature", "result"), [(0, "hit"), (1, "miss")])
async def test_a_resumed_answer_is_stored_only_at_temperature_0(temperature: float, result: str) -> None:
    async with standing(cache={"enabled": True, "cacheable": "all"}) as stand:
        stand.breaks(first=1)
        body = asked(temperature=temperature)
        resumed = await stand.client.post(body)
        again = await stand.client.post(body)
        assert stand.resumes == {"ok": 1}
        assert (resumed.is_whole, again.headers["X-Balancer-Cache"]) == (True, result)
        if result == "hit":
            assert (again.is_whole, again.text) == (True, resumed.text)
            assert b"resumed" not in again.body
            unary = await stand.client.post(body | {"stream": False})
            assert (unary.headers["X-Balancer-Cache"], unary.text) == ("hit", resumed.text)
            assert unary.json["usage"]["completion_tokens"] == TOKENS
            assert len(stand.well.requests) == 1


# -- back-pressure


async def test_a_client_that_does_not_read_holds_the_second_node_up_as_well() -> None:
    parts = [delta("y" * 60_000)] * 1000
    flood = Flood(stream_head(), [*parts, delta(None, "stop"), DONE])
    first = Steps(stream_head() + chunked(delta("x"))[:-5], then=closes)
    async with ScriptedNode(first) as sick, ScriptedNode(flood) as well, FakeNode(models=("other",)) as bystander:
        first.go(2)
        nodes = [*fleet(sick.url, well.url, engine="vllm"), {"url": bystander.url, "id": "c", "models": ["other"]}]
        async with running(*nodes, timeouts=SHORT, **QUIET) as balancer, client_of(balancer.url) as client:
            reader = await Wire.to(balancer, limit=65536)
            reader.send(post(asked(max_tokens=None)))
            await reader.head()
            await well.wait_for(lambda: len(well.requests) == 1)
            before, count = -1, 0
            while before != flood.sent:
                before = flood.sent
                for _ in range(5):
                    count += 1
                    assert (await client.post(chat(f"{count}", model="other"))).is_whole
            assert 0 < flood.sent < len(flood.body) // 2  # what the kernel's buffers on both sides take
            read = b"".join([part async for part in reader.chunks()])
            assert len(text_of(payloads(read))) == 1 + 60_000 * len(parts)
            await Wire.cut_all()
