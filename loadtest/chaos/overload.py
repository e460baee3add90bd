"""Promises 17, 18 and 21: readers that stop, more work than there is room for, prompts of megabytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from statistics import median
from urllib.parse import urlsplit

import orjson

from loadtest.chaos.figure import Figure, promise
from loadtest.chaos.load import Load, Reply, ask, chat
from loadtest.chaos.stage import WITHIN_S, Stage, Theatre
from loadtest.chaos.wire import post, wire
from loadtest.clock import SystemClock

READERS = 8
# A node makes the whole stream at once, and answers nobody meanwhile: one after the other.
STREAM_S = 2.0
PROMPT_BYTES = 10_000_000


@promise(17, "8 readers that stop in a stream of 7 MB, beside ordinary traffic")
async def readers_that_stop(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(2, options=[("--instant",)] * 2) as stage:
        await ask(stage, chat("warm", stream=True))
        before = stage.resident_bytes()
        async with AsyncExitStack() as stack:
            for number in range(READERS):
                connection = await stack.enter_async_context(wire(stage, limit=1024))
                body = chat(f"stopped reader {number}", stream=True, max_tokens=30_000, min_tokens=30_000)
                await connection.send(post(orjson.dumps(body)))
                await SystemClock().sleep(STREAM_S)
            load = Load(stage)
            async with load:
                await load.run(4.0)
                grown = stage.resident_bytes() - before
                await load.end()
        return (
            Figure(name="memory for each", value=grown / READERS / 1e6, bound=2, unit=" MB"),
            Figure(name="others that failed", value=load.failed(), bound=0),
        )


@promise(18, "twice what the nodes have slots for, each at most 4 at once")
async def twice_capacity(theatre: Theatre) -> Sequence[Figure]:
    # Each node takes 4 at once for some 0.2 s: two of them some 40 a second.
    settings = {"queue": {"max_waiting": 20, "max_wait_s": 1.0}}
    options = [("--slots", "4")] * 2
    async with theatre.stage(2, settings=settings, options=options) as stage:
        told = await stage.get("/admin/nodes")
        for node in told["nodes"]:
            body = orjson.dumps({"url": node["url"], "models": node["models"], "max_in_flight": 4})
            async with stage.session.put(f"{stage.ops_url}/admin/nodes/{node['id']}", data=body) as response:
                assert response.status in (200, 201)
        begun = stage.resident_bytes()
        load = Load(stage, rate_per_s=100.0, body=lambda number: chat(f"question {number}", max_tokens=32))
        async with load:
            await load.run(8.0)
            peak = stage.resident_bytes()
            await load.end()
        refused = [reply for reply in load.replies if reply.status in (429, 503)]
        admitted = [reply for reply in load.replies if reply.status not in (429, 503)]
        clock = SystemClock()
        after_s = clock.now()
        calm = await ask(stage, chat("calm again", max_tokens=1))
        return (
            Figure(
                name="good of what was admitted",
                value=sum(r.whole for r in admitted) / max(1, len(admitted)),
                bound=0.95,
                least=True,
            ),
            Figure(
                name="refused without Retry-After", value=sum("Retry-After" not in r.headers for r in refused), bound=0
            ),
            Figure(name="some were refused", value=min(1, len(refused)), bound=1, least=True),
            Figure(
                name="normal again after", value=clock.now() - after_s if calm.whole else 99.0, bound=1.0, unit=" s"
            ),
            Figure(name="memory grown", value=(peak - begun) / 1e6, bound=64, unit=" MB"),
        )


def _send_large(stage: Stage, body: bytes) -> int:
    """Send a prompt over a socket of its own; the status of the answer."""
    address = urlsplit(stage.data_url)
    with socket.create_connection((address.hostname, address.port), timeout=WITHIN_S) as connection:
        connection.sendall(post(body))
        return int(connection.recv(4096).split(b" ", 2)[1])


@promise(21, "prompts of 10 MB, one after the other, beside small requests; 100 MB")
async def large_prompts(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(2, options=[("--instant",)] * 2) as stage:
        small = [await ask(stage, chat(f"small {number}", max_tokens=1)) for number in range(50)]
        bodies = [orjson.dumps(chat(f"{number}" + "word " * (PROMPT_BYTES // 5), max_tokens=1)) for number in range(4)]
        beside: list[Reply] = []
        for body in bodies:
            # In a thread: what sending costs this process is not to be taken for what receiving costs the other.
            large = asyncio.create_task(asyncio.to_thread(_send_large, stage, body))
            while not large.done():
                beside.append(await ask(stage, chat(f"beside {len(beside)}", max_tokens=1)))
        held_s = max((reply.seconds for reply in beside), default=0.0) - median(reply.seconds for reply in small)
        async with wire(stage) as connection:
            await connection.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n{"
            )
            refused = await connection.status()
        return (
            Figure(name="small requests held up by at most", value=1000.0 * held_s, bound=50, unit=" ms"),
            Figure(name="100 MB is told 413 before it is read", value=refused == 413, bound=1, least=True),
        )
