"""The sampler: looks on a timer, never waits for who is slow, keeps the latest report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from agent_fakes import FakeGpus, ManualClock, dead_url, fake_engine, gpu_reading, watching

from node_agent.derive import Identity
from node_agent.engine import EngineWatch
from node_agent.gpu_watch import GpuPolicy, GpuWatch, NoGpus
from node_agent.sampler import GpuSource, Sampler

IDENTITY = Identity(host="h", boot_id="b", interval_s=1.0)


@asynccontextmanager
async def sampling(
    clock: ManualClock, *engines: EngineWatch, gpus: GpuSource | None = None, patience_s: float = 20.0
) -> AsyncIterator[Sampler]:
    sampler = Sampler(IDENTITY, engines, gpus or NoGpus(), clock, patience_s=patience_s)
    try:
        yield sampler
    finally:
        await sampler.close()


async def test_no_report_before_the_first_look(clock: ManualClock) -> None:
    async with sampling(clock) as sampler:
        assert sampler.report() is None


async def test_look_brings_engines_and_gpus_together(clock: ManualClock) -> None:
    gpus = GpuWatch(clock, GpuPolicy(deadline_s=10.0), lambda: FakeGpus(gpu_reading(0)))
    async with (
        fake_engine("vllm") as engine,
        watching(engine, clock) as watch,
        sampling(clock, watch, gpus=gpus) as sampler,
    ):
        await sampler.look()
        report = sampler.report()
    assert report is not None
    assert (report.host, report.boot_id, report.seq, report.interval_s) == ("h", "b", 1, 1.0)
    assert (report.nodes[0].running, report.nodes[0].gpus) == (14, ("GPU-0",))
    assert report.nodes[0].gpu_memory_utilization == 0.5


async def test_age_is_counted_when_the_report_is_told(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch, sampling(clock, watch) as sampler:
        await sampler.look()
        clock.advance(0.7)
        report = sampler.report()
    assert report is not None
    assert (report.age_s, report.nodes[0].age_s) == (0.7, 0.7)


async def test_slow_engine_does_not_delay_the_report_of_the_others(clock: ManualClock) -> None:
    async with (
        fake_engine("vllm") as fast,
        fake_engine("vllm") as slow,
        watching(fast, clock) as fast_watch,
        watching(slow, clock) as slow_watch,
        sampling(clock, fast_watch, slow_watch, patience_s=0.01) as sampler,
    ):
        await asyncio.gather(fast_watch.begin_visit(), slow_watch.begin_visit())
        await sampler.look()
        slow.held["/metrics"] = asyncio.Event()
        clock.advance(1.0)
        await fast_watch.begin_visit()
        await sampler.look()
        report = sampler.report()
        assert report is not None
        assert report.seq == 2
        assert report.nodes[1].running == 14  # what was known of it before
        assert report.nodes[1].age_s == 1.0


async def test_dead_engine_is_reported_and_the_others_go_on(clock: ManualClock) -> None:
    url = await dead_url()
    async with (
        fake_engine("vllm") as engine,
        watching(engine, clock) as alive,
        watching(url, clock) as dead,
        sampling(clock, alive, dead) as sampler,
    ):
        await sampler.look()
        report = sampler.report()
    assert report is not None
    assert [node.problems for node in report.nodes] == [(), ("engine_unreachable",)]
    assert [node.healthy for node in report.nodes] == [True, False]


async def test_drain_is_reported_at_once_and_until_it_is_taken_back(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch, sampling(clock, watch) as sampler:
        await sampler.look()
        drained = asyncio.create_task(sampler.newer_than(1))
        await asyncio.sleep(0)
        await sampler.set_drain(True)
        report = await drained
        assert (report.drain, report.seq) == (True, 2)
        assert report.nodes[0].running == 14
        await sampler.look()
        assert (await sampler.newer_than(2)).drain
        await sampler.set_drain(False)
        assert not (await sampler.newer_than(3)).drain


async def test_looks_come_once_per_interval(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch, sampling(clock, watch) as sampler:
        running = asyncio.create_task(sampler.run())
        for seq in range(1, 4):
            assert (await sampler.newer_than(seq - 1)).seq == seq
            assert await clock.somebody_sleeps() == 1.0
            clock.advance(1.0)
        running.cancel()


async def test_look_that_took_too_long_is_followed_by_the_next_without_catching_up(clock: ManualClock) -> None:
    async with sampling(clock) as sampler:
        running = asyncio.create_task(sampler.run())
        await clock.somebody_sleeps()
        clock.advance(7.3)
        assert await clock.somebody_sleeps() == 1.0
        report = sampler.report()
        assert report is not None
        assert report.seq == 2
        running.cancel()


async def test_look_that_fails_oddly_does_not_end_the_timer(clock: ManualClock) -> None:
    class OddGpus(NoGpus):
        def view(self):  # type: ignore[no-untyped-def]
            if self.fails:
                raise RuntimeError("odd")
            return super().view()

        fails = True

    gpus = OddGpus()
    async with sampling(clock, gpus=gpus) as sampler, AsyncExitStack() as stack:
        running = asyncio.create_task(sampler.run())
        stack.callback(running.cancel)
        await clock.somebody_sleeps()
        assert sampler.report() is None
        gpus.fails = False
        clock.advance(1.0)
        assert (await sampler.newer_than(0)).seq == 1
