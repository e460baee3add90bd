"""Active checks on real sockets; the decision and the schedule alone, without any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from balancer.ask import Answer
from balancer.clock import SystemClock
from balancer.core.health import HealthPolicy
from balancer.core.node import Node
from balancer.core.outcome import Outcome
from balancer.health_check import CheckState, HealthChecker, judge, needs_check
from balancer.schedule import Periodic
from tests.answering import SILENT, Answering, Fleet, dead_url
from tests.fakes import ManualClock

POLICY = HealthPolicy(path="/health", interval_s=0.02, timeout_s=1.0, fall=3, rise=1)


@asynccontextmanager
async def checking(fleet: Fleet, policy: HealthPolicy = POLICY) -> AsyncIterator[HealthChecker]:
    checker = HealthChecker(fleet.registry, policy, SystemClock(), Random(1))
    await checker.start()
    try:
        yield checker
    finally:
        await checker.close()


def open_breaker(fleet: Fleet, node: Node) -> None:
    while node.breaker.is_closed:
        permit = fleet.registry.acquire(node, panic=False, now=SystemClock.now())
        assert permit is not None
        fleet.registry.settle(node, permit, Outcome.SERVER_ERROR, SystemClock.now())


# -- the decision


def verdicts(checks: str, policy: HealthPolicy) -> list[bool | None]:
    state, seen = CheckState(), []
    for check in checks:
        state = state.next(check == "+", policy)
        seen.append(state.up)
    return seen


def test_the_first_check_decides() -> None:
    assert verdicts("+", HealthPolicy(fall=3, rise=2)) == [True]
    assert verdicts("-", HealthPolicy(fall=3, rise=2)) == [False]


def test_a_first_check_without_an_answer_in_time_does_not_decide_alone() -> None:
    state, seen = CheckState(), []
    for _ in range(4):
        state = state.next(False, HealthPolicy(fall=3), decisive=False)
        seen.append(state.up)
    assert seen == [None, None, False, False]
    assert CheckState().next(False, HealthPolicy(), decisive=False).next(True, HealthPolicy()).up is True


def test_a_verdict_falls_only_after_fall_bad_checks_in_a_row() -> None:
    assert verdicts("+--+---", HealthPolicy(fall=3)) == [True] * 6 + [False]


def test_a_verdict_rises_only_after_rise_good_checks_in_a_row() -> None:
    assert verdicts("-+-++", HealthPolicy(rise=2)) == [False] * 4 + [True]


def test_only_a_good_check_after_a_bad_one_turns_good() -> None:
    policy = HealthPolicy(rise=2)
    state, turned = CheckState(), []
    for check in "++-+-----+++":
        before, state = state, state.next(check == "+", policy)
        turned.append(state.turned_good(before))
    # While the node is down the first good check of two changes nothing; the verdict's own change is the registry's.
    assert turned == [False, False, False, True] + [False] * 8


@pytest.mark.parametrize("status", [200, 204, 404, 405, 501])
def test_a_node_that_answers_or_has_no_such_path_is_there(status: int) -> None:
    assert judge(Answer(status, b"")) == (True, "")


@pytest.mark.parametrize("status", [302, 401, 429, 500, 503])
def test_any_other_status_is_a_bad_check(status: int) -> None:
    assert judge(Answer(status, b"")) == (False, f"status_{status}")


async def test_a_node_that_answers_requests_needs_no_check_until_something_speaks_against_it() -> None:
    fleet = Fleet()
    node = fleet.put("http://node:1")
    policy = HealthPolicy(interval_s=1.0)
    assert needs_check(node, policy, 100.0)
    node.answered_s = 99.5
    assert not needs_check(node, policy, 100.0)
    assert needs_check(node, policy, 101.0)
    node.check_up = False
    assert needs_check(node, policy, 100.0)
    node.check_up = True
    open_breaker(fleet, node)
    node.answered_s = 99.5
    assert needs_check(node, policy, 100.0)


# -- the schedule


class Scheduled:
    """A Periodic over `keys` on a manual clock, whose work is noted and lasts until `release`."""

    def __init__(self, *keys: str, lasting: bool = False, **options: Any) -> None:
        self.clock = ManualClock()
        self.keys = list(keys)
        self.begun: list[tuple[float, str]] = []
        self.release = asyncio.Event()
        if not lasting:
            self.release.set()
        self.periodic = Periodic(
            "test", lambda: self.keys, self._work, clock=self.clock, rng=Random(5), **{"interval_s": 1.0, **options}
        )

    def _work(self, key: str) -> Coroutine[Any, Any, None] | None:
        if key == "idle":
            return None
        self.begun.append((self.clock.now(), key))
        if key == "broken":
            raise ValueError("on purpose")
        return self._wait()

    async def _wait(self) -> None:
        await self.release.wait()

    async def ticks(self, count: int) -> None:
        for _ in range(count):
            self.clock.advance(0.05)
            await settle()

    async def __aenter__(self) -> Scheduled:
        self.periodic.start()
        await settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.periodic.close()


async def settle() -> None:
    """Let everything that is ready run; nothing here waits for a socket or a timer."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_every_key_is_worked_on_at_once_and_then_within_each_interval() -> None:
    async with Scheduled("a", "b") as scheduled:
        assert scheduled.begun == [(1000.0, "a"), (1000.0, "b")]
        await scheduled.ticks(20 * 20)
        for key in "ab":
            times = [at_s for at_s, begun in scheduled.begun if begun == key]
            gaps = [after - before for before, after in pairwise(times)]
            assert len(times) >= 20
            assert all(0.7 - 1e-6 <= gap <= 1.0 + 1e-6 for gap in gaps)
            assert len({round(gap, 3) for gap in gaps}) > 1, "spread, so that a fleet is not asked in step"


async def test_a_newcomer_is_worked_on_with_the_next_tick_and_a_leaver_no_more() -> None:
    async with Scheduled("a") as scheduled:
        scheduled.keys = ["b"]
        await scheduled.ticks(1)
        assert [key for _, key in scheduled.begun] == ["a", "b"]
        await scheduled.ticks(40)
        assert [key for _, key in scheduled.begun].count("a") == 1
        scheduled.keys = ["a", "b"]
        await scheduled.ticks(1)
        assert scheduled.begun[-1][1] == "a"


async def test_a_key_is_never_worked_on_twice_at_once() -> None:
    async with Scheduled("a", lasting=True) as scheduled:
        await scheduled.ticks(40)
        assert len(scheduled.begun) == 1
        scheduled.release.set()
        await settle()
        await scheduled.ticks(1)
        assert len(scheduled.begun) == 2


async def test_no_more_keys_are_worked_on_at_once_than_there_is_room_for() -> None:
    async with Scheduled("a", "b", "c", lasting=True, at_once=2) as scheduled:
        await scheduled.ticks(40)
        assert [key for _, key in scheduled.begun] == ["a", "b"]
        scheduled.release.set()
        await settle()
        await scheduled.ticks(1)
        assert scheduled.begun[2][1] == "c", "the longest overdue goes first"
        await scheduled.ticks(1)
        assert {key for _, key in scheduled.begun[3:]} == {"a", "b"}


async def test_work_that_raises_does_not_end_the_others() -> None:
    async with Scheduled("broken", "a") as scheduled:
        await scheduled.ticks(60)
        assert [key for _, key in scheduled.begun].count("a") >= 3


async def test_closing_cancels_what_is_under_way() -> None:
    scheduled = Scheduled("a", "idle", lasting=True)
    async with scheduled:
        assert repr(scheduled.periodic) == "<Periodic test keys=2 running=1>"
    await settle()
    assert repr(scheduled.periodic) == "<Periodic test keys=2 running=0>"


# -- real nodes


async def test_first_verdicts_come_at_once() -> None:
    fleet = Fleet()
    async with Answering({"/health": 200}) as good, Answering({"/health": 503}) as bad, Answering() as without:
        nodes = [fleet.put(url) for url in (good.url, bad.url, without.url, dead_url())]
        slow = HealthPolicy(interval_s=60.0, timeout_s=5.0)
        async with checking(fleet, slow):
            await fleet.until(lambda: all(node.check_up is not None for node in nodes))
        assert [node.check_up for node in nodes] == [True, False, True, False]
        assert [node.check_reason for node in nodes] == ["", "status_503", "", "refused"]


async def test_a_node_falls_after_its_third_bad_check_and_rises_with_its_first_good_one() -> None:
    fleet = Fleet()
    async with Answering({"/health": 200}) as server:
        node = fleet.put(server.url)
        async with checking(fleet):
            await fleet.until(lambda: node.check_up is True)
            server.answers["/health"] = 500
            before = server.count("/health")
            await fleet.until(lambda: node.check_up is False)
            assert 2 <= server.count("/health") - before <= 4, "one was under way, and may have been good or bad"
            server.answers["/health"] = 200
            await fleet.until(lambda: node.check_up is True)


async def test_a_silent_node_fails_its_checks() -> None:
    fleet = Fleet()
    async with Answering({"/health": SILENT}) as server:
        node = fleet.put(server.url)
        async with checking(fleet, HealthPolicy(interval_s=0.02, timeout_s=0.05)):
            await fleet.until(lambda: node.check_up is False)
        assert node.check_reason == "timeout"


async def test_a_redirect_is_not_followed() -> None:
    fleet = Fleet()
    async with Answering({"/health": 302, "/elsewhere": 200}) as server:
        node = fleet.put(server.url)
        async with checking(fleet):
            await fleet.until(lambda: node.check_up is False)
        assert server.count("/elsewhere") == 0


async def test_a_check_carries_the_nodes_own_key_and_the_configured_path() -> None:
    fleet = Fleet()
    async with Answering({"/prefix/ping": 200}) as server:
        node = fleet.put(f"{server.url}/prefix/", api_key="secret")
        async with checking(fleet, HealthPolicy(path="/ping")):
            await fleet.until(lambda: node.check_up is True)
        assert server.asked[0].path == "/prefix/ping"
        assert server.asked[0].headers["Authorization"] == "Bearer secret"


async def test_a_dead_node_comes_back_when_it_listens_again() -> None:
    fleet = Fleet()
    server = Answering({"/health": 200})
    await server.start()
    await server.stop()
    node = fleet.put(server.url)
    async with checking(fleet):
        await fleet.until(lambda: node.check_up is False)
        await server.start()
        await fleet.until(lambda: node.check_up is True)
        await server.stop()


async def test_a_busy_node_is_checked_no_more_until_it_is_silent() -> None:
    fleet = Fleet()
    async with Answering({"/health": 200}) as busy, Answering({"/health": 200}) as idle:
        node, _ = fleet.put(busy.url), fleet.put(idle.url)
        async with checking(fleet):
            await asyncio.gather(busy.asked_for("/health"), idle.asked_for("/health"))
            await fleet.until(lambda: node.check_up is True)
            node.answered_s = SystemClock.now() + 1000.0
            await idle.asked_for("/health", 2)
            before = busy.count("/health")
            await idle.asked_for("/health", 5)
            assert busy.count("/health") == before
            node.answered_s = float("-inf")
            await busy.asked_for("/health", 2)


async def test_a_check_that_turns_good_grants_a_probe_early_and_one_that_stays_good_does_not() -> None:
    fleet = Fleet()
    async with Answering({"/health": 200}) as server, Answering({"/health": 200}) as other:
        node = fleet.put(server.url)
        fleet.put(other.url)
        async with checking(fleet):
            await fleet.until(lambda: node.check_up is True)
            open_breaker(fleet, node)
            await server.asked_for("/health", 4)
            assert not node.breaker.admits(SystemClock.now()), "green checks say nothing about 500s"
            server.answers["/health"] = 500
            await server.asked_for("/health", 2)  # at least one was bad; the verdict has not fallen yet, or just so
            server.answers["/health"] = 200
            await fleet.until(lambda: node.breaker.admits(SystemClock.now()) and node.check_up is True)
            assert node.breaker.state == "open", "asking for a permit makes it half-open, with one probe"


async def test_nodes_that_join_are_checked_and_those_that_left_are_not_judged() -> None:
    fleet = Fleet()
    async with Answering({"/health": SILENT}) as leaver, Answering({"/health": 200}) as joiner:
        gone = fleet.put(leaver.url)
        async with checking(fleet, HealthPolicy(interval_s=0.02, timeout_s=0.05)):
            await leaver.asked_for("/health")
            fleet.registry.remove(gone.id)
            new = fleet.put(joiner.url)
            await fleet.until(lambda: new.check_up is True)
            before = leaver.count("/health")
            await joiner.asked_for("/health", 6)  # longer than the leaver's last time-out
            assert (gone.check_up, leaver.count("/health")) == (None, before)


async def test_five_hundred_nodes_have_their_first_verdict_soon() -> None:
    fleet = Fleet()
    async with Answering({"/health": 200}) as server:
        nodes = [fleet.put(f"{server.url}/{number}", id=f"n{number}") for number in range(500)]
        async with checking(fleet, HealthPolicy(interval_s=1.0, timeout_s=5.0)):
            await fleet.until(lambda: all(node.check_up for node in nodes))
        assert len({asked.path for asked in server.asked}) == 500
