"""What the agent's tests stand on: a clock that is set by hand, and fakes of engines, GPUs and balancers."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import re
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from aiohttp import web

from node_agent.engine import EngineWatch
from node_agent.engine_http import EngineHttp
from node_agent.engine_spec import parse
from node_agent.engine_visit import ScrapePolicy
from node_agent.gpu import GpuReading
from node_agent.nvml import NvmlUnavailable
from node_agent.processes import EngineProcesses
from node_agent.push import PATH

GOLDEN = Path(__file__).parent / "golden"
# Nothing on loopback takes so long: a time-out in a test that expects none would be an accident.
PATIENT = ScrapePolicy(timeout_s=20.0)


def golden(kind: str) -> str:
    """Return a metrics page as an engine of that kind writes it."""
    return (GOLDEN / f"{kind}.txt").read_text()


def moved(page: str, name: str, by: float) -> str:
    """Return the page with the first series of `name` (which may carry its labels) moved by so much."""
    pattern = re.compile(rf"^({re.escape(name)}(?:\{{.*\}})?) (\S+)$", re.MULTILINE)
    assert pattern.search(page), f"no series {name}"
    return pattern.sub(lambda match: f"{match[1]} {float(match[2]) + by}", page, count=1)


def observed(page: str, name: str, value: float, times: int = 1) -> str:
    """Return the page after the first histogram of `name` saw a value so many times."""
    name_re = re.escape(name)
    block = re.search(rf"^{name_re}_bucket.*?(?=^{name_re}_(?:count|sum))", page, re.MULTILINE | re.DOTALL)
    assert block is not None, f"no histogram {name}"

    def line(match: re.Match[str]) -> str:
        inside = value <= float(match[2])
        return f"{match[1]} {float(match[3]) + times}" if inside else match[0]

    counted = re.sub(r'^(\S+_bucket\{.*?le="([^"]+)".*\}) (\S+)$', line, block[0], flags=re.MULTILINE)
    page = page[: block.start()] + counted + page[block.end() :]
    return moved(moved(page, f"{name}_count", times), f"{name}_sum", value * times)


class ManualClock:
    """Time passes only by `advance`; sleepers wake in order."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._asleep = asyncio.Condition()

    def now(self) -> float:
        return self._now

    async def sleep(self, for_s: float) -> None:
        if for_s <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + for_s, next(self._order), future))
        async with self._asleep:
            self._asleep.notify_all()
        await future

    def advance(self, by_s: float) -> None:
        self._now += by_s
        while self._sleepers and self._sleepers[0][0] <= self._now:
            future = heapq.heappop(self._sleepers)[2]
            if not future.done():
                future.set_result(None)

    async def somebody_sleeps(self) -> float:
        """Wait until a sleeper is there; return for how long the next one sleeps."""

        def waiting() -> bool:
            return any(not future.done() for _, _, future in self._sleepers)

        async with self._asleep:
            await self._asleep.wait_for(waiting)
        return min(at for at, _, future in self._sleepers if not future.done()) - self._now


class FakeEngine:
    """An HTTP server that answers as told: `pages` is path -> (status, body, headers)."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, bytes, Mapping[str, str]]] = {"/health": (200, b"", {})}
        self.held: dict[str, asyncio.Event] = {}  # a path whose answers wait
        self.asked: list[str] = []
        self.headers: list[tuple[str, Mapping[str, str]]] = []
        self.arrived = asyncio.Event()
        self.url = ""
        self._runner: web.AppRunner | None = None

    def answer(self, path: str, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else orjson.dumps(body)
        self.pages[path] = (status, data, {name.replace("_", "-"): value for name, value in headers.items()})

    async def _handle(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        self.headers.append((request.path, dict(request.headers)))
        self.arrived.set()
        if request.path in self.held:
            await self.held[request.path].wait()
        status, body, headers = self.pages.get(request.path, (404, b"", {}))
        return web.Response(status=status, body=body, headers=headers)

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        for event in self.held.values():
            event.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


class FakeBalancer(FakeEngine):
    """Takes reports, and lets a test wait for each."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def _handle(self, request: web.Request) -> web.Response:
        if request.method == "POST" and request.path == PATH:
            self.reports.put_nowait(orjson.loads(await request.read()))
        return await super()._handle(request)


@asynccontextmanager
async def fake_engine(kind: str | None = None) -> AsyncIterator[FakeEngine]:
    """A running FakeEngine, with the golden metrics page of that kind if one is named."""
    engine = FakeEngine()
    if kind is not None:
        engine.answer("/metrics", golden(kind))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def watching(
    engine: FakeEngine | str,
    clock: ManualClock,
    options: str = "",
    policy: ScrapePolicy = PATIENT,
    find_processes: Callable[[str], EngineProcesses | None] = lambda url: None,
    api_key: str | None = None,
) -> AsyncIterator[EngineWatch]:
    """An EngineWatch on an engine, with a session of its own."""
    url = engine if isinstance(engine, str) else engine.url
    spec = parse(f"{url},id=a{options}")
    async with aiohttp.ClientSession() as session:
        http = EngineHttp(session, spec.url, timeout_s=policy.timeout_s, api_key=api_key)
        watch = EngineWatch(spec, http, clock, policy, find_processes)
        try:
            yield watch
        finally:
            await watch.close()


async def dead_url() -> str:
    """A URL of this machine where nothing listens: a port bound and closed."""
    engine = FakeEngine()
    await engine.start()
    await engine.stop()
    return engine.url


class FakeGpus:
    """A GpuReader: `readings` by index; an index in `hung` blocks until `release` is called."""

    def __init__(self, *readings: GpuReading) -> None:
        self.readings = {reading.index: reading for reading in readings}
        self.hung: set[int] = set()
        self.rounds: list[int] = []
        self.entered = threading.Event()
        self._free = threading.Event()

    def release(self) -> None:
        self.hung.clear()
        self._free.set()

    def count(self) -> int:
        return len(self.readings)

    def read(self, index: int) -> GpuReading:
        self.rounds.append(index)
        if index in self.hung:
            self.entered.set()
            self._free.wait()
        return self.readings[index]

    def xid_events(self, indices: list[int]) -> None:
        return None


def no_gpus() -> FakeGpus:
    """What opening NVML does where there is none."""
    raise NvmlUnavailable("NVML Shared Library Not Found")


def gpu_reading(index: int = 0, **figures: object) -> GpuReading:
    """A healthy GPU that is half full, with the figures changed as given."""
    healthy: dict[str, object] = {
        "uuid": f"GPU-{index}",
        "name": "NVIDIA H200",
        "memory_used_bytes": 40 << 30,
        "memory_total_bytes": 80 << 30,
        "process_memory_bytes": {},
        "utilization_ratio": 0.9,
        "temperature_celsius": 61,
        "power_watts": 540.0,
        "clock_sm_mhz": 1980,
        "clock_sm_max_mhz": 1980,
        "event_reasons": 0,
        "ecc_uncorrected_total": 0,
        "remapped_rows_pending": False,
        "remapped_rows_failed": False,
        "pcie_width": 16,
        "pcie_width_max": 16,
    }
    return GpuReading(index=index, **{**healthy, **figures})  # type: ignore[arg-type]
