"""Reads the GPUs in a worker thread, so that a call which hangs in the driver delays nothing but its own GPU."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import structlog
from pydantic import ConfigDict, Field

from node_agent.clock import Clock
from node_agent.gpu import GpuReading, GpuSample, Xid
from node_agent.nvml import Nvml, NvmlUnavailable
from node_agent.xid_watch import XidSource, XidWatch

log = structlog.get_logger()

# A sample older than this says nothing about now: the figures become unknown, the identity stays.
GPU_STALE_S = 10.0
# A GPU slower than the deadline is read last, and again only after this many times its own duration.
SLOW_REST = 2.0
# No driver yet: it may be loaded later. Asking costs a failed dlopen.
RETRY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPolicy:
    """Whether GPUs are read at all, and how long a report waits for a round of readings."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    enabled: bool = True
    deadline_s: Annotated[float, Field(gt=0, le=10)] = 0.3  # a healthy GPU takes 5 to 30 ms


class GpuReader(Protocol):
    """What the worker thread needs of NVML."""

    def count(self) -> int: ...

    def read(self, index: int) -> GpuReading: ...

    def xid_events(self, indices: list[int]) -> XidSource | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuView:
    """What is known of all GPUs at one moment. `available` False: there is no NVML, so nothing can be known."""

    available: bool = False
    samples: tuple[GpuSample, ...] = ()
    xids: Mapping[int, tuple[Xid, ...]] = field(default_factory=dict)  # by index; absent: not heard


class NoGpus:
    """Stands in for GpuWatch where reading GPUs is switched off."""

    async def refresh(self) -> None: ...

    def view(self) -> GpuView:
        return GpuView()

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Kept:
    reading: GpuReading
    at: float
    took_s: float


def due(kept: Mapping[int, tuple[float, float]], count: int, deadline_s: float, now: float) -> list[int]:
    """Say which GPUs to read now, the slow ones last and seldom; `kept` is index -> (read at, took)."""

    def is_slow(index: int) -> bool:
        return index in kept and kept[index][1] > deadline_s

    def is_due(index: int) -> bool:
        return not is_slow(index) or now - kept[index][0] >= SLOW_REST * kept[index][1]

    return sorted(filter(is_due, range(count)), key=is_slow)


class GpuWatch:
    """Every NVML call happens in one daemon thread; only Xid errors are awaited in a second one."""

    def __init__(self, clock: Clock, policy: GpuPolicy, open_reader: Callable[[], GpuReader] = Nvml.open) -> None:
        self._clock, self._policy, self._open_reader = clock, policy, open_reader
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._wanted: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._reading: tuple[int, float] | None = None  # the GPU being read, and since when
        self._reader: GpuReader | None = None
        self._xids: XidWatch | None = None
        self._count = 0
        self._kept: dict[int, _Kept] = {}
        self._retry_at: float | None = None
        self._unavailable: str | None = None

    def __repr__(self) -> str:
        state = "busy" if self._busy else "idle"
        return f"<GpuWatch gpus={self._count} {state} reading={self._reading} unavailable={self._unavailable!r}>"

    async def refresh(self) -> None:
        """Ask for a round of readings and wait for it, at most the deadline; a worker that hangs is not waited for."""
        done = asyncio.Event()
        with self._wake:
            if self._busy or self._wanted is not None:
                return
            self._wanted = (asyncio.get_running_loop(), done)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="nvml", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._policy.deadline_s):
                await done.wait()

    def view(self) -> GpuView:
        """Return the latest of every GPU with its age; a stale sample keeps only the GPU's identity."""
        now = self._clock.now()
        with self._lock:
            if self._reader is None or self._xids is None:
                return GpuView()
            samples = tuple(self._sample(index, now) for index in range(self._count))
            return GpuView(available=True, samples=samples, xids=self._xids.heard())

    def stop(self) -> None:
        """Let the threads end; one that hangs in the driver is left behind and ends with the process."""
        self._stop.set()
        with self._wake:
            self._wake.notify_all()

    def _sample(self, index: int, now: float) -> GpuSample:
        stuck_for_s = now - self._reading[1] if self._reading and self._reading[0] == index else 0.0
        kept = self._kept.get(index)
        if kept is None:
            return GpuSample(reading=GpuReading(index=index), age_s=stuck_for_s, stuck_for_s=stuck_for_s)
        age_s, reading = now - kept.at, kept.reading
        if age_s > GPU_STALE_S:
            reading = GpuReading(index=index, uuid=reading.uuid, name=reading.name, lost=reading.lost)
        return GpuSample(reading=reading, age_s=age_s, stuck_for_s=stuck_for_s)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop.is_set() or self._wanted is not None)
                if self._stop.is_set() or self._wanted is None:
                    return
                (loop, done), self._wanted = self._wanted, None
                self._busy = True
            try:
                self._round()
            except Exception:  # the edge of a background loop
                log.exception("gpu.round_failed")
            finally:
                self._busy = False
                with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                    loop.call_soon_threadsafe(done.set)

    def _round(self) -> None:
        reader = self._reader or self._open()
        if reader is None:
            return
        kept = {index: (one.at, one.took_s) for index, one in self._kept.items()}
        for index in due(kept, self._count, self._policy.deadline_s, self._clock.now()):
            if self._stop.is_set():
                return
            self._read(reader, index)

    def _read(self, reader: GpuReader, index: int) -> None:
        begun = self._clock.now()
        with self._lock:
            self._reading = (index, begun)
        try:
            reading = reader.read(index)
        finally:
            with self._lock:
                self._reading = None
        now = self._clock.now()
        with self._lock:
            before = self._kept.get(index)
            self._kept[index] = _Kept(reading, now, now - begun)
        _log_loss(before, reading)

    def _open(self) -> GpuReader | None:
        """Open NVML, at most once in RETRY_S; without it everything about GPUs is unknown."""
        now = self._clock.now()
        if self._retry_at is not None and now < self._retry_at:
            return None
        self._retry_at = now + RETRY_S
        try:
            reader = self._open_reader()
            count = reader.count()
        except NvmlUnavailable as error:
            if str(error) != self._unavailable:
                log.info("nvml.not_found", reason=str(error), retry_s=RETRY_S)
            self._unavailable = str(error)
            return None
        log.info("nvml.opened", gpus=count)
        xids = XidWatch(lambda: reader.xid_events(list(range(count))), self._clock, self._stop)
        xids.start()
        with self._lock:
            self._reader, self._xids, self._count, self._unavailable = reader, xids, count, None
        return reader


def _log_loss(before: _Kept | None, reading: GpuReading) -> None:
    was_lost = before is not None and before.reading.lost
    if reading.lost and not was_lost:
        log.warning("gpu.lost", gpu=reading.index, uuid=reading.uuid)
    if was_lost and not reading.lost:
        log.info("gpu.recovered", gpu=reading.index, uuid=reading.uuid)
