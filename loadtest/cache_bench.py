"""What the cache saves, and what a miss pays for it: `python -m loadtest.cache_bench`.

Three balancers run side by side, without cache, with it in memory, and with Redis behind the memory, each before a node
of its own. First all get the same traffic: 80 requests a second, 76 % of them repeated, before a node that takes 1.8 s.
Then requests that are all new go to each in turn, before a node that takes no time: the difference is what a miss adds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import yaml

from loadtest.bench import redis_server
from loadtest.clock import SystemClock

RATE_PER_S = 80.0
REPEATED = 0.76
NODE_S = 1.8
MODEL = "bench-model"
# Most that a miss may add to the median, in milliseconds.
BOUNDS_MS = {"memory": 0.3, "redis": 1.0}
# Requests that are not counted, at the beginning of the second part.
WARM_UP = 100
START_WITHIN_S = 20.0

_ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 150}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 150, "total_tokens": 160},
    }
).encode()
_REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_ANSWER), _ANSWER)


class Node:
    """Answers every POST with the same completion after `delay_s`, and counts them."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.calls = 0
        self.port = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Node]:
        """Listen on a free port of this machine."""
        server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", 0)
        async with server:
            self.port = server.sockets[0].getsockname()[1]
            yield self


class _Connection(asyncio.Protocol):
    """One kept-alive connection; requests come whole or in pieces, one after the other."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._came = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._came += data
        head, end, body = self._came.partition(b"\r\n\r\n")
        if not end:
            return
        lines = [line.partition(b":") for line in head.lower().split(b"\r\n")[1:]]
        length = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
        if len(body) < length:
            return
        self._came = b""
        delay_s = 0.0
        if head.startswith(b"POST"):
            self._node.calls += 1
            delay_s = self._node.delay_s
        if delay_s:
            asyncio.get_running_loop().call_later(delay_s, self._answer)
        else:
            self._answer()

    def _answer(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_REPLY)


@dataclass(slots=True)
class Bench:
    """One balancer, its node, and what was measured."""

    name: str
    node: Node
    url: str = ""
    latencies_s: list[float] = field(default_factory=list)
    hits: int = 0
    misses_s: list[float] = field(default_factory=list)

    async def ask(self, session: aiohttp.ClientSession, prompt: str) -> tuple[float, str]:
        """Seconds to the whole answer, and what the cache said."""
        body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        begun_s = CLOCK.now()
        async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            await response.read()
            if response.status != 200:
                raise RuntimeError(f"{self.name}: status {response.status}")
            return CLOCK.now() - begun_s, response.headers["X-Balancer-Cache"]


CLOCK = SystemClock()


@contextlib.asynccontextmanager
async def balancer(bench: Bench, settings: dict[str, Any], folder: Path) -> AsyncIterator[Bench]:
    """A balancer process of this bench; raises RuntimeError when it does not come up."""
    file = folder / f"{bench.name}.yaml"
    common = {"listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", "log": {"level": "info", "format": "json"}}
    nodes = [{"url": f"http://127.0.0.1:{bench.node.port}", "models": [MODEL]}]
    file.write_text(yaml.safe_dump({**common, "nodes": nodes, **settings}), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balancer", "serve", "--config", str(file)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    reading: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(START_WITHIN_S):
            async for line in process.stderr:
                told = json.loads(line) if line.startswith(b"{") else {}
                if told.get("event") == "data.listening":
                    bench.url = f"http://{told['address']}"
                if told.get("event") == "ops.listening":
                    break
        if not bench.url:
            raise RuntimeError(f"the balancer {bench.name} did not start")
        reading = asyncio.create_task(_drain(process.stderr))
        yield bench
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        if reading is not None:
            await reading


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass


def prompts(count: int, rng: Random) -> list[str]:
    """A sequence in which the given share repeats an earlier prompt."""
    made: list[str] = []
    for number in range(count):
        made.append(rng.choice(made) if made and rng.random() < REPEATED else f"prompt {number} {rng.random()}")
    return made


async def repeat(benches: Sequence[Bench], seconds: float, rng: Random) -> float:
    """The first part; how large the share of repeated requests was."""
    sequence = prompts(int(seconds * RATE_PER_S), rng)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(bench: Bench, prompt: str) -> None:
            took_s, said = await bench.ask(session, prompt)
            bench.latencies_s.append(took_s)
            bench.hits += said in ("hit", "coalesced")

        begun_s = CLOCK.now()
        async with asyncio.TaskGroup() as group:
            for number, prompt in enumerate(sequence):
                await CLOCK.sleep(max(0.0, begun_s + number / RATE_PER_S - CLOCK.now()))
                for bench in benches:
                    group.create_task(one(bench, prompt))
    return 1.0 - len(set(sequence)) / len(sequence)


async def miss(benches: Sequence[Bench], count: int, rng: Random) -> None:
    """The second part: each balancer in turn, one request at a time."""
    async with aiohttp.ClientSession() as session:
        for number in range(count + WARM_UP):
            for bench in rng.sample(benches, len(benches)):
                took_s, said = await bench.ask(session, f"new {number} {rng.random()}")
                if said == "hit":
                    raise RuntimeError(f"{bench.name}: a new request was a hit")
                if number >= WARM_UP:
                    bench.misses_s.append(took_s)


def report(benches: Sequence[Bench], repeated: float, calls: Sequence[int]) -> bool:
    """Print the tables; whether every bound holds."""
    print(f"{len(benches[0].latencies_s)} requests at {RATE_PER_S:.0f}/s, {repeated:.0%} repeated, node {NODE_S} s\n")
    print("| cache | mean latency | p50 | upstream calls | served from the cache |")
    print("| --- | --- | --- | --- | --- |")
    for bench, called in zip(benches, calls, strict=True):
        mean_s, p50_s = statistics.fmean(bench.latencies_s), statistics.median(bench.latencies_s)
        share = bench.hits / len(bench.latencies_s)
        print(f"| {bench.name} | {mean_s:.3f} s | {p50_s * 1000:.1f} ms | {called} | {share:.0%} |")
    base_s = statistics.median(benches[0].misses_s)
    print(f"\n{len(benches[0].misses_s)} new requests, one at a time; without cache p50 {base_s * 1000:.3f} ms\n")
    print("| cache | added p50 of a miss | bound | |\n| --- | --- | --- | --- |")
    good = True
    for bench in benches[1:]:
        added_ms = (statistics.median(bench.misses_s) - base_s) * 1000
        holds = added_ms <= BOUNDS_MS[bench.name]
        good = good and holds
        print(f"| {bench.name} | {added_ms:.3f} ms | {BOUNDS_MS[bench.name]} ms | {'holds' if holds else 'missed'} |")
    return good


async def run(seconds: float, misses: int, seed: int) -> bool:
    """Both parts; whether every bound holds."""
    rng = Random(seed)
    with contextlib.ExitStack() as files:
        folder = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="cache-bench-")))
        setups: dict[str, dict[str, Any]] = {"off": {"cache": {"enabled": False}}, "memory": {}}
        if (why := redis_server.missing()) is None:
            server = files.enter_context(redis_server.started(str(folder)))
            setups["redis"] = {"redis": {"url": f"redis://127.0.0.1:{server.port}/0", "timeout_s": 0.03}}
        else:
            print(f"without Redis: {why}")
        async with contextlib.AsyncExitStack() as stack:
            benches = []
            for name, settings in setups.items():
                node = await stack.enter_async_context(Node().serving())
                benches.append(await stack.enter_async_context(balancer(Bench(name, node), settings, folder)))
            for bench in benches:
                bench.node.delay_s = NODE_S
            repeated = await repeat(benches, seconds, rng)
            calls = [bench.node.calls for bench in benches]
            for bench in benches:
                bench.node.delay_s = 0.0
            await miss(benches, misses, rng)
            return report(benches, repeated, calls)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; 0 when every bound holds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.cache_bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of repeated traffic (default %(default)s)")
    parser.add_argument("--misses", type=int, default=3000, help="new requests to each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic (default %(default)s)")
    options = parser.parse_args(arguments)
    return 0 if asyncio.run(run(options.seconds, options.misses, options.seed)) else 1


if __name__ == "__main__":
    sys.exit(main())
