"""One policy, one trace: eight nodes in this process, a balancer in its own, and every answer timed."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import pstdev

import aiohttp
import orjson

from loadtest.children import Child, Ports
from loadtest.clock import Clock
from loadtest.compare.trace import Turn
from loadtest.fake_node import FakeNode
from loadtest.node_spec import NodeSpec
from loadtest.sim.profiles import EngineProfile, slower
from loadtest.sim.results import three

PATH = "/v1/chat/completions"
# Slow on purpose: two cores carry eight of these and the balancer at a few per cent, so that the nodes are what is
# waited for. Prompts of 2,000 tokens take 1 s, a token 20 ms, and the KV cache holds some 15 conversations.
NODE = NodeSpec(
    ttft_s_per_token=0.0005, itl_s=0.02, itl_growth=0.04, slots=8, kv_tokens=40_000, block_tokens=64, step_tokens=512
)
SPEEDS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5)
# Later than this a first token or an end is a failure; nothing that works takes nearly as long.
TIMEOUT_S = 120.0
START_WITHIN_S = 30.0
# Below the range that connections get their own ports from.
FIRST_PORT = 20_000

Three = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run. Seconds (P50, P95, P99) of what ended well; shares are 0..1 of one core, of requests, of tokens."""

    policy: str
    requests: int
    failures: int
    ttft_s: Three
    e2e_s: Three
    hit_ratio: float  # prompt tokens that a node's prefix cache held
    uneven: float  # standard deviation over mean of the nodes' busy time
    load_cpu: float  # of this process, which holds the nodes too
    balancer_cpu: float


@dataclass(slots=True)
class _Answer:
    ttft_s: float | None = None
    e2e_s: float | None = None


def profiles() -> list[EngineProfile]:
    """The same nodes for the simulator."""
    sequence_s = NODE.itl_s * NODE.itl_growth
    fast = EngineProfile(
        name="fake",
        decode_s=NODE.itl_s - sequence_s,
        decode_sequence_s=sequence_s,
        decode_context_s=0.0,
        prefill_base_s=NODE.itl_s - sequence_s,  # a step takes its prompt tokens' time and a decode step's
        prefill_s=NODE.ttft_s_per_token,
        attention_s=0.0,
        kv_tokens=NODE.kv_tokens,
        block_tokens=NODE.block_tokens,
        max_sequences=NODE.slots,
        step_tokens=NODE.step_tokens,
    )
    return [fast if speed == 1.0 else slower(fast, 1.0 / speed) for speed in SPEEDS]


async def measure(policy: str, turns: Sequence[Turn], clock: Clock) -> Measured:
    """Play the trace through a fresh balancer to fresh nodes. Raises CannotRun when the balancer does not start."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-balancer-compare-")))
        nodes = [
            await stack.enter_async_context(FakeNode(NODE, speed=speed, seed=at)) for at, speed in enumerate(SPEEDS)
        ]
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        balancer, url = _balancer(policy, nodes, folder)
        stack.push_async_callback(balancer.end)
        await balancer.start()
        await balancer.until(lambda: _is_ready(session, url), clock, START_WITHIN_S)
        cpu_s, began_s = _cpu_s(os.getpid()), clock.now()
        balancer_cpu_s = _cpu_s(balancer.pid)
        answers = await _play(turns, url, session, clock)
        wall_s = clock.now() - began_s
        balancer.check()
        good = [answer for answer in answers if answer.e2e_s is not None]
        busy_s = [node.model.busy_s for node in nodes]
        stats = [node.model.stats for node in nodes]
        return Measured(
            policy=policy,
            requests=len(answers),
            failures=len(answers) - len(good),
            ttft_s=three([answer.ttft_s or 0.0 for answer in good]),
            e2e_s=three([answer.e2e_s or 0.0 for answer in good]),
            hit_ratio=sum(one.prefix_hits for one in stats) / max(1, sum(one.prefix_queries for one in stats)),
            uneven=pstdev(busy_s) / (sum(busy_s) / len(busy_s)),
            load_cpu=(_cpu_s(os.getpid()) - cpu_s) / wall_s,
            balancer_cpu=(_cpu_s(balancer.pid) - balancer_cpu_s) / wall_s,
        )


def _balancer(policy: str, nodes: Sequence[FakeNode], folder: Path) -> tuple[Child, str]:
    ports = Ports()
    preferred = FIRST_PORT + 10 * (os.getpid() % 1000)  # several of us may run at once
    data, ops = (f"127.0.0.1:{ports.take(port)}" for port in (preferred, preferred + 1))
    words = [word for at, node in enumerate(nodes) for word in ("--node", f"{node.url},id=n{at}")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
    environment |= {
        "BALANCER_ROUTING__POLICY": policy,
        "BALANCER_CACHE__ENABLED": "false",
        "BALANCER_TIMEOUTS__FIRST_BYTE_S": str(TIMEOUT_S),
        "BALANCER_TIMEOUTS__IDLE_S": str(TIMEOUT_S),
        "BALANCER_LOG__LEVEL": "warning",
    }
    arguments = ["serve", "--listen", data, "--ops-listen", ops, *words]
    return Child("balancer", "balancer", arguments, log=folder / "log", environment=environment), f"http://{data}"


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether it knows what every node serves; no request is spent on asking."""
    try:
        async with session.get(f"{url}/v1/models") as response:
            return response.status == 200 and bool((await response.json())["data"])
    except aiohttp.ClientError:
        return False


async def _play(turns: Sequence[Turn], url: str, session: aiohttp.ClientSession, clock: Clock) -> list[_Answer]:
    """Ask each turn at its time, whatever comes back; what became of each."""
    began_s = clock.now()
    tasks = []
    for turn in turns:
        await clock.sleep(max(0.0, began_s + turn.at_s - clock.now()))
        tasks.append(asyncio.create_task(_ask(turn.body, url, session, clock)))
    return await asyncio.gather(*tasks)


async def _ask(body: Mapping[str, object], url: str, session: aiohttp.ClientSession, clock: Clock) -> _Answer:
    """One answer; without its times when it is not whole."""
    answer, sent_s = _Answer(), clock.now()
    try:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with session.post(url + PATH, json=body, timeout=timeout) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    answer.e2e_s = clock.now() - sent_s
                elif answer.ttft_s is None and line.startswith(b"data: ") and _has_text(line[6:]):
                    answer.ttft_s = clock.now() - sent_s
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return _Answer()
    return answer if answer.ttft_s is not None else _Answer()


def _has_text(data: bytes) -> bool:
    choices = orjson.loads(data).get("choices")
    return bool(choices and choices[0].get("delta", {}).get("content"))


def _cpu_s(pid: int) -> float:
    """CPU seconds that a process has used; not a number where the system does not tell."""
    try:
        # The name in brackets may hold spaces: fields are counted from behind it (proc(5): utime and stime).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
