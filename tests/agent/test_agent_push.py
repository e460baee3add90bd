"""Reports pushed to a balancer's operations port."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from agent_fakes import FakeBalancer, ManualClock, dead_url, fake_engine

from node_agent.derive import Identity
from node_agent.gpu_watch import NoGpus
from node_agent.push import PATH, Pusher, PushPolicy, pause_s
from node_agent.sampler import Sampler

POLICY = PushPolicy(timeout_s=20.0, max_pause_s=5.0)


@asynccontextmanager
async def pushing(
    url: str, clock: ManualClock, token: str | None = None, policy: PushPolicy = POLICY
) -> AsyncIterator[tuple[Sampler, Pusher]]:
    sampler = Sampler(Identity(host="h", boot_id="b", interval_s=1.0), [], NoGpus(), clock)
    async with aiohttp.ClientSession() as session:
        pusher = Pusher(url, sampler, session, clock, policy, random.Random(1), token)
        running = asyncio.create_task(pusher.run())
        try:
            yield sampler, pusher
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def balancer() -> AsyncIterator[FakeBalancer]:
    fake = FakeBalancer()
    fake.answer(PATH, b"", status=204)
    await fake.start()
    yield fake
    await fake.stop()


async def test_every_new_report_is_pushed(clock: ManualClock, balancer: FakeBalancer) -> None:
    async with pushing(balancer.url, clock) as (sampler, pusher):
        for seq in (1, 2):
            await sampler.look()
            report = await balancer.reports.get()
            assert (report["version"], report["host"], report["seq"]) == (1, "h", seq)
    assert pusher.pushes["failed"] == 0
    headers = dict(balancer.headers)[PATH]
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers


async def test_token_is_sent_as_a_bearer(clock: ManualClock, balancer: FakeBalancer) -> None:
    async with pushing(balancer.url, clock, token="s3cret") as (sampler, _):
        await sampler.look()
        await balancer.reports.get()
    assert dict(balancer.headers)[PATH]["Authorization"] == "Bearer s3cret"


async def test_balancer_that_refuses_is_left_alone_longer_each_time(clock: ManualClock, balancer: FakeBalancer) -> None:
    balancer.answer(PATH, b"", status=401)
    pauses = []
    async with pushing(balancer.url, clock) as (sampler, pusher):
        for _ in range(6):
            await sampler.look()
            await balancer.reports.get()
            pauses.append(await clock.somebody_sleeps())
            clock.advance(pauses[-1])
        assert pusher.pushes == {"ok": 0, "failed": 6}
    assert pauses[0] < 1.0
    assert pauses[-1] <= POLICY.max_pause_s * 1.25
    assert pauses[0] < pauses[2] < pauses[4]


async def test_reports_of_an_outage_are_dropped_and_the_latest_is_pushed(
    clock: ManualClock, balancer: FakeBalancer
) -> None:
    balancer.answer(PATH, b"", status=503)
    async with pushing(balancer.url, clock) as (sampler, pusher):
        await sampler.look()
        await balancer.reports.get()
        await clock.somebody_sleeps()
        for _ in range(10):
            await sampler.look()
        balancer.answer(PATH, b"", status=204)
        clock.advance(60.0)
        assert (await balancer.reports.get())["seq"] == 11
        assert balancer.reports.empty()
        await sampler.look()
        assert (await balancer.reports.get())["seq"] == 12
    assert pusher.pushes["failed"] == 1


async def test_dead_balancer_ends_nothing(clock: ManualClock) -> None:
    async with pushing(await dead_url(), clock) as (sampler, pusher):
        await sampler.look()
        await clock.somebody_sleeps()
        assert pusher.pushes == {"ok": 0, "failed": 1}


async def test_balancer_that_never_answers_is_given_up(clock: ManualClock) -> None:
    async with fake_engine() as silent:
        silent.held[PATH] = asyncio.Event()
        async with pushing(silent.url, clock, policy=PushPolicy(timeout_s=0.05)) as (sampler, pusher):
            await sampler.look()
            await clock.somebody_sleeps()
            assert pusher.pushes == {"ok": 0, "failed": 1}


def test_pause_grows_to_its_bound() -> None:
    rng = random.Random(1)
    assert pause_s(0, POLICY, rng) == 0.0
    assert 0.3 < pause_s(1, POLICY, rng) < 0.7
    assert all(pause_s(failures, POLICY, rng) <= 6.25 for failures in range(2000))
