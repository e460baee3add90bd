"""The breaker on a clock of our own: what opens it, what passes while it is not closed, what closes it again."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from balancer.core.breaker import (
    ALONE_OPEN_S,
    PROBE_INTERVAL_S,
    PROBE_LEASE_S,
    Breaker,
    BreakerPolicy,
    Change,
    Closed,
    HalfOpened,
    Opened,
    Permit,
)


def breaker(seed: int = 1, **policy: Any) -> Breaker:
    return Breaker(BreakerPolicy(**policy), Random(seed))


def permit_of(breaker: Breaker, now: float, *, alone: bool = False) -> Permit:
    permit, _ = breaker.try_acquire(now, alone=alone)
    assert permit is not None
    return permit


def attempt(breaker: Breaker, success: bool, now: float) -> Change | None:
    return breaker.record(permit_of(breaker, now), success, now)


def opened(now: float = 100.0, **policy: Any) -> Breaker:
    made = breaker(**policy)
    for _ in range(made._policy.consecutive_failures):
        attempt(made, False, now)
    assert made.state == "open"
    return made


def probing(now: float = 100.0, **policy: Any) -> tuple[Breaker, Permit, float]:
    """A half-open breaker, its probe, and when that began."""
    made = opened(now, **policy)
    at = made.admits_from_s()
    return made, permit_of(made, at), at


# Closed


def test_a_closed_breaker_admits_everybody() -> None:
    made = breaker()

    assert made.state == "closed"
    assert made.is_closed
    assert all(made.try_acquire(0.0) == (Permit(0), None) for _ in range(100))
    assert made.admits_from_s() == float("-inf")


def test_failures_in_a_row_open_it() -> None:
    made = breaker(consecutive_failures=3)

    assert [attempt(made, False, 1.0) for _ in range(2)] == [None, None]
    change = attempt(made, False, 1.0)

    assert isinstance(change, Opened)
    assert change.reason == "consecutive_failures"
    assert made.state == "open"


def test_a_success_between_begins_the_row_anew() -> None:
    made = breaker(consecutive_failures=3)
    for success in (False, False, True, False, False):
        assert attempt(made, success, 1.0) is None

    assert made.is_closed


def test_a_share_of_failures_opens_it_once_there_is_enough_to_judge() -> None:
    made = breaker(consecutive_failures=100, failure_ratio=0.5, min_requests=20)
    results = [attempt(made, success, 1.0) for success in [True, False] * 10]

    assert results[:-1] == [None] * 19
    assert isinstance(results[-1], Opened)
    assert results[-1].reason == "failure_ratio"


def test_a_smaller_share_never_opens_it() -> None:
    made = breaker(consecutive_failures=100, failure_ratio=0.5, min_requests=20)

    assert not any(attempt(made, success, at / 10) for at, success in enumerate([True, True, False] * 200))


def test_failures_older_than_the_window_are_forgotten() -> None:
    made = breaker(consecutive_failures=100, failure_ratio=0.5, min_requests=20, window_s=10.0)
    for _ in range(19):
        attempt(made, False, 5.0)

    assert attempt(made, False, 16.0) is None
    assert made.is_closed


def test_the_window_holds_all_of_its_seconds() -> None:
    made = breaker(consecutive_failures=100, failure_ratio=0.5, min_requests=20, window_s=10.0)
    for _ in range(19):
        attempt(made, False, 5.9)

    assert isinstance(attempt(made, False, 15.8), Opened)


# Open


def test_an_open_breaker_admits_nobody_until_its_time_is_over() -> None:
    made = opened(100.0)
    until_s = made.admits_from_s()

    assert until_s > 100.0
    assert not made.admits(until_s - 0.001)
    assert made.try_acquire(until_s - 0.001) == (None, None)
    assert made.state == "open"
    permit, change = made.try_acquire(until_s)
    assert permit is not None
    assert permit.probe
    assert change == HalfOpened()


@pytest.mark.parametrize("seed", range(20))
def test_the_open_time_is_jittered_and_doubles_with_each_failed_probe_up_to_its_cap(seed: int) -> None:
    made = breaker(seed, consecutive_failures=1, open_s=3.0, max_open_s=20.0)
    change = attempt(made, False, 0.0)
    for full_s in (3.0, 6.0, 12.0, 20.0, 20.0):
        assert isinstance(change, Opened)
        assert 0.9 * full_s <= change.for_s <= min(20.0, 1.1 * full_s)
        at = made.admits_from_s()
        change = made.record(permit_of(made, at), False, at + 0.5)
        assert isinstance(change, Opened)
        assert change.reason == "probe_failed"


def test_breakers_that_opened_together_do_not_probe_together() -> None:
    rng = Random(7)
    fleet = [Breaker(BreakerPolicy(consecutive_failures=1), rng) for _ in range(20)]
    for one in fleet:
        attempt(one, False, 0.0)

    assert len({one.admits_from_s() for one in fleet}) == 20


def test_the_only_node_of_a_model_is_asked_again_within_a_second() -> None:
    made = opened(100.0, open_s=30.0)

    assert not made.admits(100.0 + ALONE_OPEN_S - 0.001, alone=True)
    assert made.admits(100.0 + ALONE_OPEN_S, alone=True)
    assert not made.admits(100.0 + ALONE_OPEN_S)
    permit, change = made.try_acquire(100.0 + ALONE_OPEN_S, alone=True)
    assert permit is not None
    assert change == HalfOpened()


def test_being_alone_never_makes_it_wait_longer() -> None:
    made = opened(100.0, open_s=0.2)

    assert made.admits_from_s(alone=True) == made.admits_from_s() < 100.5


def test_other_evidence_ends_the_open_time() -> None:
    made = opened(100.0, open_s=30.0)

    assert made.nudge()
    assert made.admits(100.0)
    assert permit_of(made, 100.0).probe
    assert made.state == "half-open"


def test_other_evidence_changes_nothing_in_other_states() -> None:
    closed = breaker()
    half_open, _, at = probing()

    assert not closed.nudge()
    assert not half_open.nudge()
    assert not half_open.admits(at)


# Half open


def test_one_probe_at_a_time() -> None:
    made, _, at = probing()

    assert made.state == "half-open"
    assert made.try_acquire(at) == (None, None)
    assert made.try_acquire(at + PROBE_LEASE_S - 0.001, alone=True) == (None, None)


def test_a_probe_that_succeeds_closes_it() -> None:
    made, probe, at = probing()

    assert made.record(probe, True, at) == Closed()
    assert made.is_closed
    assert not permit_of(made, at).probe


def test_closing_forgets_failures_and_the_doubled_time() -> None:
    made, probe, at = probing(consecutive_failures=5, min_requests=5, open_s=3.0)
    made.record(probe, False, at)
    at = made.admits_from_s()
    made.record(permit_of(made, at), True, at)

    changes = [attempt(made, False, at) for _ in range(5)]

    assert changes[:4] == [None] * 4
    assert isinstance(changes[4], Opened)
    assert changes[4].for_s <= 3.3


def test_a_probe_that_nobody_reports_frees_its_place() -> None:
    made, _, at = probing()

    assert not made.admits(at + PROBE_LEASE_S - 0.001)
    assert permit_of(made, at + PROBE_LEASE_S).probe


def test_a_probe_given_back_frees_its_place_but_not_its_second() -> None:
    made, probe, at = probing()
    made.release(probe)

    assert not made.admits(at + PROBE_INTERVAL_S - 0.001)
    assert permit_of(made, at + PROBE_INTERVAL_S).probe
    assert made.state == "half-open"


def test_a_probe_that_outlived_its_lease_frees_nobody_elses_place() -> None:
    made, first, at = probing()
    second = permit_of(made, at + PROBE_LEASE_S)

    made.release(first)

    assert not made.admits(at + PROBE_LEASE_S + PROBE_INTERVAL_S)
    made.release(second)
    assert made.admits(at + PROBE_LEASE_S + PROBE_INTERVAL_S)


def test_a_slow_probe_still_counts_when_it_succeeds_at_last() -> None:
    made, first, at = probing()
    second = permit_of(made, at + PROBE_LEASE_S)

    assert made.record(first, True, at + 25.0) == Closed()
    assert made.record(second, False, at + 26.0) is None
    assert made.is_closed


def test_probes_given_back_at_once_are_at_most_one_a_second() -> None:
    made = opened(100.0)
    start = made.admits_from_s()
    granted = 0
    for tick in range(1000):
        permit, _ = made.try_acquire(start + tick / 100)
        if permit is not None:
            granted += 1
            made.release(permit)

    assert granted == 10


def test_giving_back_a_permit_twice_or_of_a_closed_breaker_is_harmless() -> None:
    made, probe, at = probing()
    made.release(probe)
    made.release(probe)
    made.record(probe, True, at)
    made.release(permit_of(made, at))

    assert made.is_closed


# Late results


def test_a_result_from_before_it_opened_changes_nothing() -> None:
    made = breaker(consecutive_failures=1)
    early = permit_of(made, 0.0)
    attempt(made, False, 0.0)

    assert made.record(early, True, 1.0) is None
    assert made.record(early, False, 1.0) is None
    assert made.state == "open"


def test_a_result_from_before_it_closed_again_changes_nothing() -> None:
    made = breaker(consecutive_failures=1)
    early = permit_of(made, 0.0)
    attempt(made, False, 0.0)
    at = made.admits_from_s()
    made.record(permit_of(made, at), True, at)

    assert made.record(early, False, at) is None
    assert made.is_closed


def test_a_probe_is_counted_once() -> None:
    made, probe, at = probing()
    made.record(probe, False, at)

    assert made.record(probe, True, at) is None
    assert made.state == "open"


def test_an_attempt_made_in_panic_counts_only_while_it_is_closed() -> None:
    made = breaker(consecutive_failures=1)
    unguarded = made.unguarded()
    assert isinstance(made.record(unguarded, False, 0.0), Opened)

    for success in (True, False):
        assert made.record(made.unguarded(), success, 1.0) is None
    at = made.admits_from_s()
    permit_of(made, at)
    assert made.record(made.unguarded(), True, at) is None
    assert made.state == "half-open"


def test_it_tells_its_state() -> None:
    made = breaker()
    attempt(made, False, 0.0)

    assert repr(made) == "<Breaker closed failures=1>"


# Whatever happens


class Interleavings(RuleBasedStateMachine):
    """Any order of asking, reporting, giving back and time leaves a legal breaker."""

    def __init__(self) -> None:
        super().__init__()
        self.made = breaker(consecutive_failures=2, min_requests=4, open_s=3.0, max_open_s=10.0)
        self.now = 1000.0
        self.out: list[Permit] = []
        self.probes: list[tuple[float, Permit]] = []  # when each was granted
        self.live: set[int] = set()  # ids of probes that hold the lease
        self.nudged_s = float("-inf")
        self.state = "closed"

    @rule(pause_s=st.sampled_from([0.0, 0.01, 0.4, 1.0, 3.5, 11.0]))
    def time_passes(self, pause_s: float) -> None:
        self.now += pause_s

    @rule(alone=st.booleans())
    def ask(self, alone: bool) -> None:
        before = self.made.state
        admitted = self.made.admits(self.now, alone=alone)
        permit, change = self.made.try_acquire(self.now, alone=alone)

        assert (permit is not None) == admitted
        assert (change == HalfOpened()) == (before == "open" and admitted)
        if permit is None:
            return
        assert permit.probe == (before != "closed")
        self.out.append(permit)
        if permit.probe:
            self.granted(permit)

    def granted(self, permit: Permit) -> None:
        same = [(at, old) for at, old in self.probes if old.generation == permit.generation]
        for at, old in same:
            assert self.now >= at + PROBE_INTERVAL_S
            assert id(old) not in self.live or self.now >= at + PROBE_LEASE_S
        self.live = {id(permit)}
        self.probes.append((self.now, permit))

    @rule()
    def ask_in_panic(self) -> None:
        self.out.append(self.made.unguarded())

    @precondition(lambda self: self.out)
    @rule(data=st.data(), success=st.booleans(), keep=st.booleans())
    def report(self, data: st.DataObject, success: bool, keep: bool) -> None:
        permit = data.draw(st.sampled_from(self.out))
        if not keep:
            self.out.remove(permit)
        before = self.made.state
        change = self.made.record(permit, success, self.now)

        if isinstance(change, Opened):
            assert not success
            assert 0.0 < change.for_s <= 10.0
            assert self.made.state == "open"
            assert not self.made.admits(self.now)
        elif isinstance(change, Closed):
            assert success
            assert permit.probe
            assert before == "half-open"
        else:
            assert change is None
            assert self.made.state == before

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        permit = data.draw(st.sampled_from(self.out))
        before = self.made.state
        self.made.release(permit)
        self.live.discard(id(permit))

        assert self.made.state == before

    @rule()
    def evidence_turns_good(self) -> None:
        was_open = self.made.state == "open"

        assert self.made.nudge() == was_open
        assert not was_open or self.made.admits(self.now)

    @invariant()
    def is_legal(self) -> None:
        assert self.made.state in ("closed", "open", "half-open")
        assert self.made.is_closed == (self.made.state == "closed")
        assert self.made.admits(self.now + 100.0)  # never shut for good
        assert self.made.admits(self.now) == (self.now >= self.made.admits_from_s())

    @invariant()
    def moves_only_along_the_arrows(self) -> None:
        arrows = {("closed", "open"), ("open", "half-open"), ("half-open", "open"), ("half-open", "closed")}
        now = self.made.state
        assert now == self.state or (self.state, now) in arrows
        self.state = now


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=150, stateful_step_count=40)


# Slow calls


def slowly(breaker: Breaker, now: float) -> Change | None:
    return breaker.record(permit_of(breaker, now), True, now, slow=True)


def test_slow_answers_open_it_by_their_share_once_there_were_enough() -> None:
    made = breaker(min_requests=10, slow_ratio=0.8, slow_factor=10.0)
    assert [attempt(made, True, 1.0) for _ in range(2)] == [None, None]
    assert [slowly(made, 1.0) for _ in range(7)] == [None] * 7

    change = slowly(made, 1.0)

    assert isinstance(change, Opened)
    assert change.reason == "slow_calls"


def test_slow_answers_are_successes_and_end_a_row_of_failures() -> None:
    made = breaker(consecutive_failures=3)
    for _ in range(5):
        attempt(made, False, 1.0)
        attempt(made, False, 1.0)
        slowly(made, 1.0)

    assert made.is_closed


def test_slow_answers_leave_the_window() -> None:
    made = breaker(min_requests=10, window_s=10.0, slow_factor=10.0)
    for second in range(100):
        assert slowly(made, float(second * 2)) is None


def test_a_probe_may_be_slow() -> None:
    made, permit, now = probing()

    assert isinstance(made.record(permit, True, now, slow=True), Closed)


@pytest.mark.parametrize(
    ("state", "event", "after"),
    [
        ("closed", "success", "closed"),
        ("closed", "failure", "open"),
        ("closed", "slow", "open"),
        ("closed", "released", "closed"),
        ("half-open", "success", "closed"),
        ("half-open", "slow", "closed"),
        ("half-open", "failure", "open"),
        ("half-open", "released", "half-open"),
        ("open", "success", "open"),
        ("open", "failure", "open"),
        ("open", "slow", "open"),
    ],
)
def test_every_transition(state: str, event: str, after: str) -> None:
    """With limits of one, so that each event decides; an open breaker hears late results only."""
    made = breaker(consecutive_failures=1, min_requests=1, slow_ratio=0.1)
    permit, now = permit_of(made, 100.0), 100.0
    if state != "closed":
        attempt(made, False, now)
    if state == "half-open":
        now = made.admits_from_s()
        permit = permit_of(made, now)
    assert made.state == state

    if event == "released":
        made.release(permit)
    else:
        made.record(permit, event != "failure", now, slow=event == "slow")

    assert made.state == after
