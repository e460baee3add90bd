"""Promises 1 to 4: no lie, a clean end of what breaks, nothing twice, nodes that talk without end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadtest.chaos.figure import Figure, promise
from loadtest.chaos.load import Load, ask, chat
from loadtest.chaos.stage import Theatre

# Everything that a node can say wrongly. What happens after content has been handed on cannot be retried.
BEFORE_CONTENT: Sequence[dict[str, Any]] = (
    {"kind": "reset"},
    {"kind": "close"},
    {"kind": "cut"},
    {"kind": "garbage"},
    {"kind": "bad_json"},
    {"kind": "error_body"},
    {"kind": "empty_body"},
    {"kind": "truncated", "size_bytes": 10},
    {"kind": "gzip"},
    {"kind": "status", "status": 500},
    {"kind": "status", "status": 502},
)
AFTER_CONTENT: Sequence[dict[str, Any]] = (
    {"kind": "reset", "after_events": 4},
    {"kind": "close", "after_events": 4},
    {"kind": "cut", "after_events": 4},
    {"kind": "bad_chunk", "after_events": 4},
    {"kind": "error_event", "after_events": 4},
    {"kind": "no_done"},
    {"kind": "no_finish"},
)


@promise(1, "nodes that lie in every way, one request in three", quick=True)
async def lies(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(settings={"breaker": {"consecutive_failures": 1000, "failure_ratio": 1.0}}) as stage:
        told = 0
        for fault in (*BEFORE_CONTENT, *AFTER_CONTENT):
            for node in stage.nodes:
                await node.mend()
                await node.fault(**fault, probability=0.3)
            load = Load(stage, rate_per_s=80.0)
            async with load:
                await load.run(0.5)
                await load.end()
            told += load.lies()
        return (Figure(name="lies", value=told, bound=0),)


@promise(2, "streams that break in the middle in every way", quick=True)
async def broken_streams(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(2, settings={"resume": {"enabled": False}}) as stage:
        unclean = done = 0
        for fault in AFTER_CONTENT:
            for node in stage.nodes:
                await node.mend()
                await node.fault(**fault)
            reply = await ask(stage, chat(f"question {fault}", stream=True))
            unclean += reply.status == 0 or not reply.code
            done += reply.whole
        return (
            Figure(name="ends without error event or clean framing", value=unclean, bound=0),
            Figure(name="ends as if good", value=done, bound=0),
        )


@promise(3, "one of four nodes killed (SIGKILL) under nothing but streams", quick=True)
async def continued(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        load = Load(stage, rate_per_s=100.0, body=lambda number: chat(f"question {number}", stream=True, max_tokens=60))
        async with load:
            await load.run(2.0)
            before = await stage.metric("balancer_resumes_total", outcome="ok")
            await stage.nodes[0].kill()
            await load.run(2.0)
            await load.end()
        resumed = await stage.metric("balancer_resumes_total", outcome="ok") - before
        return (
            Figure(name="texts with something lost or repeated", value=load.lies(), bound=0),
            Figure(name="streams that ended in an error", value=load.failed(), bound=0),
            Figure(name="streams continued elsewhere", value=resumed, bound=1, least=True),
        )


@promise(4, "nodes that talk without end: heads, garbage")
async def endless(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(2) as stage:
        await ask(stage, chat("warm"))
        before = stage.resident_bytes()
        for node in stage.nodes:
            await node.fault("endless_head")
        replies = [await ask(stage, chat(f"question {number}")) for number in range(8)]
        grown = stage.resident_bytes() - before
        return (
            Figure(name="memory grown", value=grown / 1e6, bound=32, unit=" MB"),
            Figure(name="answers that are an error", value=sum(bool(r.code) for r in replies), bound=8, least=True),
        )
