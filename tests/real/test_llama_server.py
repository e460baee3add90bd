"""llama-server behind the balancer with an agent beside it: a real engine's answers, figures and death."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from tests.client import CHAT, Client, Reply, client_of
from tests.harness import Balancer, running
from tests.process import Process
from tests.real.engine import MODEL, Engine, Unavailable, engine
from tests.redis_server import free_port

pytestmark = pytest.mark.real("llama")

SLOTS = 2
# An answer of so many tokens takes a good part of a second.
TOKENS = 600
# Tokens kept from the model: those of more than one letter, the letters that they are made of, and white space. The
# tokenizer reads what is left letter by letter, as the model wrote it, so that every place in a text is a good seam.
READ_AS_WRITTEN = {str(token): -100 for token in (*b"haner \n", *range(260, 269))}
# The agent's looks: often, so that a test sees soon what it waits for.
AGENT = {"NODE_AGENT_GPU__ENABLED": "false", "NODE_AGENT_INTERVAL_S": "0.1"}
QUICK_AGENTS = {"interval_s": 0.1}
# A machine that is busy with other tests makes a real engine slow, which is not what is tested.
PATIENT = {"timeouts": {"first_byte_s": 30.0, "unary_s": 30.0, "idle_s": 30.0}, "health": {"timeout_s": 10.0}}


@pytest.fixture
async def engines() -> AsyncIterator[tuple[Engine, Engine]]:
    """Two engines, or a skip that says why there can be none."""
    async with AsyncExitStack() as stack:
        try:
            first = await stack.enter_async_context(engine(slots=SLOTS))
            second = await stack.enter_async_context(engine(slots=SLOTS))
        except Unavailable as why:
            pytest.skip(str(why))
        yield first, second


def ask(text: str, *, tokens: int = 24, **fields: Any) -> dict[str, Any]:
    """A chat that has one answer, of exactly so many tokens: the engine would end where its gibberish happens to."""
    message = {"role": "user", "content": text}
    body = {"model": MODEL, "messages": [message], "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return body | fields


@asynccontextmanager
async def agent_of(served: Engine, id_: str) -> AsyncIterator[str]:
    """A node agent in a process of its own; its URL."""
    arguments = ("serve", "--engine", f"{served.url},id={id_}", "--listen", f"127.0.0.1:{free_port()}")
    async with await Process.start("node_agent", *arguments, environment=AGENT) as process:
        await process.until(lambda: any('"agent.started"' in line for line in process.err))
        yield next(json.loads(line)["url"] for line in process.err if '"agent.started"' in line)


@asynccontextmanager
async def balancing(engines: tuple[Engine, Engine], **settings: Any) -> AsyncIterator[tuple[Balancer, Client]]:
    """A balancer in front of both engines, `a` and `b`, once it knows what they serve and how they are."""
    async with AsyncExitStack() as stack:
        nodes = []
        for id_, served in zip("ab", engines, strict=True):
            agent_url = await stack.enter_async_context(agent_of(served, id_))
            nodes.append({"id": id_, "url": served.url, "agent": agent_url})
        balancer = await stack.enter_async_context(running(*nodes, agents=QUICK_AGENTS, **PATIENT, **settings))
        await balancer.wait_for(lambda: all(is_known(balancer, id_) for id_ in "ab"))
        yield balancer, await stack.enter_async_context(client_of(balancer.url))


def is_known(balancer: Balancer, id_: str) -> bool:
    node = balancer.node(id_)
    return node.listed_models == {MODEL} and node.report is not None and bool(node.check_up)


def figures(balancer: Balancer, id_: str) -> Mapping[str, Any]:
    """What the agent of a node said last."""
    report = balancer.node(id_).report
    return dict(report.raw) if report is not None else {}


async def test_chats_stream_through_and_cost_what_the_engine_says(engines: tuple[Engine, Engine]) -> None:
    async with balancing(engines) as (balancer, client):
        whole = await client.post(ask("hello"))
        stream = await client.post(ask("hello", stream=True), headers={"X-Balancer-Cache": "bypass"})
        asking = {"stream": True, "stream_options": {"include_usage": True}}
        told = await client.post(ask("hello", **asking), headers={"X-Balancer-Cache": "bypass"})
        assert whole.is_whole
        assert whole.json["usage"]["completion_tokens"] == 24
        assert whole.text
        for reply in (stream, told):
            assert reply.is_whole
            assert reply.text == whole.text
        assert len(stream.events) > 10
        assert all("usage" not in event for event in stream.events[:-1])
        assert told.events[-2]["usage"]["completion_tokens"] == 24
        assert balancer.counts("tokens")[MODEL, "completion"] == 3 * 24
        models = await client.get("/v1/models")
        assert [card["id"] for card in models.json["data"]] == [MODEL]


@pytest.mark.parametrize("stream", [False, True])
async def test_second_equal_request_is_answered_from_the_cache(engines: tuple[Engine, Engine], stream: bool) -> None:
    async with balancing(engines) as (balancer, client):
        first, second, other = [await client.post(ask(text, stream=stream)) for text in ("one", "one", "two")]
        assert [reply.headers["X-Balancer-Cache"] for reply in (first, second, other)] == ["miss", "hit", "miss"]
        assert first.is_whole
        assert second.is_whole
        assert second.text == first.text != other.text
        assert sum(balancer.counts("attempts").values()) == 2


async def test_agents_tell_what_the_real_engine_has_to_do(engines: tuple[Engine, Engine]) -> None:
    async with balancing(engines, cache={"enabled": False}) as (balancer, client):
        idle = figures(balancer, "a")
        assert (idle["engine"], idle["slots"], idle["running"], idle["queue_depth"]) == ("llamacpp", SLOTS, 0, 0)
        assert idle["models"][0]["id"] == MODEL
        # More than both can work on at once, long enough to be seen at it.
        async with asyncio.TaskGroup() as group:
            for number in range(6 * SLOTS):
                group.create_task(client.post(ask(f"tell {number}", tokens=TOKENS)))

            def is_busy(id_: str) -> bool:
                return figures(balancer, id_)["running"] == SLOTS and figures(balancer, id_)["queue_depth"] >= 1

            await balancer.wait_for(lambda: is_busy("a") or is_busy("b"))
        await balancer.wait_for(lambda: all(figures(balancer, id_)["running"] == 0 for id_ in "ab"))
        made = [figures(balancer, id_)["generation_tokens_total"] for id_ in "ab"]
        assert sum(made) >= 6 * SLOTS * TOKENS


async def test_engine_killed_in_mid_load_costs_only_streams_that_had_begun(engines: tuple[Engine, Engine]) -> None:
    async with balancing(engines, cache={"enabled": False}) as (balancer, client):
        load = asyncio.create_task(client.many(60, mixed, at_once=8))
        begun = await client.open(ask("begun", tokens=1500, stream=True))
        victim = begun.headers["X-Balancer-Node"]
        survivor = "b" if victim == "a" else "a"
        engines["ab".index(victim)].kill()
        assert not load.done()
        cut = await begun.rest()
        assert is_cut(cut, victim)
        replies = await load
        assert len(replies) == 60
        for reply in replies:
            assert reply.is_whole or is_cut(reply, victim), reply
        assert {reply.node for reply in replies if reply.is_whole} >= {survivor}
        after = await client.many(10, mixed)
        assert {(reply.is_whole, reply.node) for reply in after} == {(True, survivor)}
        await balancer.wait_for(lambda: "engine_unreachable" in figures(balancer, victim)["problems"])


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("asks", [False, True])
async def test_stream_of_a_killed_engine_is_continued_by_the_other_with_the_same_text(
    engines: tuple[Engine, Engine], path: str, asks: bool
) -> None:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 1500, "stream": True, "logit_bias": READ_AS_WRITTEN}
    body |= {"messages": [{"role": "user", "content": "hello"}]} if path == CHAT else {"prompt": "hello"}
    told = body | ({"stream_options": {"include_usage": True}} if asks else {})
    async with balancing(engines, cache={"enabled": False}) as (balancer, client):
        unbroken = await client.post(body | {"stream_options": {"include_usage": True}}, f"{engines[1].url}{path}")
        begun = await client.open(told, path)
        for _ in range(20):
            await begun.event()
        engines["ab".index(begun.headers["X-Balancer-Node"])].kill()
        resumed = await begun.rest()
        assert resumed.is_whole
        assert said(resumed) == said(unbroken)
        assert b": resumed\n\n" in resumed.body
        assert balancer.counts("resumes") == {("ok",): 1}
        assert len({event["id"] for event in resumed.events[:-1]}) == 1
        usage = next(event["usage"] for event in reversed(unbroken.events[:-1]) if event.get("usage"))
        counted = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        shown = [event["usage"] for event in resumed.events[:-1] if event.get("usage")]
        assert shown == [counted] * (asks or path != CHAT)  # a completion's last text has it, asked for or not
        line = balancer.requests[-1]
        assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], 1500)


def said(reply: Reply) -> str:
    """The text of a stream of either endpoint."""
    choices = [choice for event in reply.events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def mixed(number: int) -> dict[str, Any]:
    """Half of them streams."""
    return ask(f"load {number}", tokens=200, stream=number % 2 == 0)


def is_cut(reply: Reply, victim: str) -> bool:
    """A stream that had begun at the killed engine, and says so at its end."""
    return reply.is_stream and reply.node == victim and reply.code == "upstream_truncated" and reply.text != ""
