"""The worker thread: a GPU that hangs delays nothing but its own figures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from agent_fakes import FakeGpus, ManualClock, gpu_reading, no_gpus

from node_agent.gpu import GpuReading, Xid
from node_agent.gpu_watch import GPU_STALE_S, RETRY_S, GpuPolicy, GpuReader, GpuWatch, NoGpus, due
from node_agent.nvml import NvmlUnavailable
from node_agent.xid_watch import XidWatch

# Long enough that a round on a fake always ends within it.
PATIENT = GpuPolicy(deadline_s=10.0)


@asynccontextmanager
async def watching(
    clock: ManualClock, open_reader: Callable[[], GpuReader], policy: GpuPolicy = PATIENT
) -> AsyncIterator[GpuWatch]:
    watch = GpuWatch(clock, policy, open_reader)
    try:
        yield watch
    finally:
        watch.stop()


async def test_samples_carry_their_age(clock: ManualClock) -> None:
    gpus = FakeGpus(gpu_reading(0), gpu_reading(1))
    async with watching(clock, lambda: gpus) as watch:
        await watch.refresh()
        clock.advance(0.5)
        view = watch.view()
    assert view.available
    assert [sample.reading.uuid for sample in view.samples] == ["GPU-0", "GPU-1"]
    assert [sample.age_s for sample in view.samples] == [0.5, 0.5]
    assert view.xids == {}  # this driver reports none


async def test_without_nvml_nothing_is_known_and_it_is_tried_again_later(clock: ManualClock) -> None:
    tries: list[float] = []

    def open_reader() -> FakeGpus:
        tries.append(clock.now())
        return no_gpus() if len(tries) < 3 else FakeGpus(gpu_reading(0))

    async with watching(clock, open_reader) as watch:
        for _ in range(5):
            await watch.refresh()
            assert not watch.view().available
            clock.advance(RETRY_S / 4)
        assert len(tries) == 2
        clock.advance(RETRY_S)
        await watch.refresh()
        assert watch.view().available


@asynccontextmanager
async def hanging(watch: GpuWatch, gpus: FakeGpus, index: int) -> AsyncIterator[None]:
    """While inside, the worker hangs in a call on that GPU."""
    gpus.hung.add(index)
    waiting = asyncio.create_task(watch.refresh())
    assert await asyncio.to_thread(gpus.entered.wait, 10)
    try:
        yield
    finally:
        gpus.release()
        await waiting


async def test_gpu_that_hangs_does_not_delay_the_report_and_is_told_apart(clock: ManualClock) -> None:
    gpus = FakeGpus(gpu_reading(0), gpu_reading(1))
    async with watching(clock, lambda: gpus) as watch:
        await watch.refresh()
        async with hanging(watch, gpus, 1):
            clock.advance(3.0)
            await watch.refresh()  # returns at once: a worker that hangs is not waited for
            fine, stuck = watch.view().samples
            assert (fine.stuck_for_s, stuck.stuck_for_s) == (0.0, 3.0)
            assert stuck.reading == gpu_reading(1)  # still the last known
            clock.advance(GPU_STALE_S)
            fine, stuck = watch.view().samples
            assert stuck.reading == GpuReading(index=1, uuid="GPU-1", name="NVIDIA H200")
            assert stuck.stuck_for_s == 3.0 + GPU_STALE_S
        assert watch.view().samples[1].stuck_for_s == 0.0


async def test_gpu_that_hangs_from_the_start_is_listed_without_figures(clock: ManualClock) -> None:
    gpus = FakeGpus(gpu_reading(0))
    async with watching(clock, lambda: gpus) as watch, hanging(watch, gpus, 0):
        clock.advance(12.0)
        (sample,) = watch.view().samples
        assert (sample.reading.index, sample.reading.uuid, sample.stuck_for_s) == (0, None, 12.0)


async def test_round_that_takes_too_long_is_not_waited_for(clock: ManualClock) -> None:
    gpus = FakeGpus(gpu_reading(0))
    gpus.hung.add(0)
    async with watching(clock, lambda: gpus, GpuPolicy(deadline_s=0.01)) as watch:
        await watch.refresh()
        assert watch.view().samples == () or watch.view().samples[0].reading.uuid is None
        gpus.release()


def test_slow_gpu_is_read_last_and_seldom() -> None:
    kept = {0: (100.0, 2.0), 1: (100.0, 0.01)}
    assert due({}, 2, 0.3, 100.0) == [0, 1]
    assert due(kept, 2, 0.3, 101.0) == [1]
    assert due(kept, 2, 0.3, 104.0) == [1, 0]


async def test_reader_that_fails_oddly_ends_nothing(clock: ManualClock) -> None:
    class Odd(FakeGpus):
        fails = True

        def read(self, index: int) -> GpuReading:
            if self.fails:
                raise RuntimeError("odd")
            return super().read(index)

    odd = Odd(gpu_reading(0))
    async with watching(clock, lambda: odd) as watch:
        await watch.refresh()
        assert watch.view().samples[0].reading.uuid is None
        odd.fails = False
        await watch.refresh()
        assert watch.view().samples[0].reading.uuid == "GPU-0"


async def test_switched_off_it_knows_nothing() -> None:
    gpus = NoGpus()
    await gpus.refresh()
    assert not gpus.view().available
    gpus.stop()


class FakeXids:
    """An XidSource that plays a script; when it has ended, `stop` is set."""

    def __init__(self, script: Sequence[tuple[int | None, int] | Exception | None], stop: threading.Event) -> None:
        self._script, self._stop = list(script), stop
        self.indices = frozenset({0, 1})

    def next(self, timeout_ms: int) -> tuple[int | None, int] | None:
        if not self._script:
            self._stop.set()
            return None
        event = self._script.pop(0)
        if isinstance(event, Exception):
            raise event
        return event


def heard(clock: ManualClock, script: Sequence[tuple[int | None, int] | Exception | None]) -> dict[int, list[Xid]]:
    stop = threading.Event()
    watch = XidWatch(lambda: FakeXids(script, stop), clock, stop, pause_s=0.0)
    watch.start()
    assert stop.wait(10)
    return {index: list(xids) for index, xids in watch.heard().items()}


def test_xids_are_kept_by_gpu(clock: ManualClock) -> None:
    assert heard(clock, [None, (1, 79), (None, 13), (1, 13)]) == {0: [], 1: [Xid(79, 1000.0), Xid(13, 1000.0)]}


def test_xids_are_bounded(clock: ManualClock) -> None:
    assert len(heard(clock, [(0, 13)] * 100)[0]) == 32


def test_wait_that_fails_does_not_end_the_watch(clock: ManualClock) -> None:
    assert heard(clock, [NvmlUnavailable("GPU is lost"), (0, 79)])[0] == [Xid(79, 1000.0)]
