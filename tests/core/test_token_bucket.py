"""A bucket never grants more than its burst and what was refilled since, and never less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.token_bucket import TokenBucket

RATES = st.floats(min_value=0.01, max_value=1e4)
BURSTS = st.integers(min_value=1, max_value=1000)
# Pauses, some none at all and some backwards: `now` comes from outside.
STEPS = st.lists(
    st.tuples(st.floats(min_value=-1.0, max_value=10.0), st.integers(min_value=1, max_value=20)), max_size=60
)


def test_fresh_bucket_grants_exactly_its_burst_at_one_instant() -> None:
    bucket = TokenBucket(rate_per_s=10.0, burst=50.0)
    assert [bucket.try_take(1.0, 7.0) == 0.0 for _ in range(60)] == [True] * 50 + [False] * 10


def test_refused_take_costs_nothing_and_says_how_long_to_wait() -> None:
    bucket = TokenBucket(rate_per_s=2.0, burst=4.0)
    assert bucket.try_take(3.0, 0.0) == 0.0
    assert bucket.try_take(3.0, 0.0) == 1.0
    assert bucket.remaining(0.0) == 1.0
    assert bucket.try_take(3.0, 1.0) == 0.0


def test_cost_above_the_burst_is_never_granted() -> None:
    bucket = TokenBucket(rate_per_s=1.0, burst=5.0)
    assert bucket.try_take(6.0, 0.0) > 0.0
    assert bucket.try_take(6.0, 1e6) == 1.0


def test_long_idleness_fills_no_further_than_the_burst() -> None:
    bucket = TokenBucket(rate_per_s=5.0, burst=10.0)
    bucket.try_take(10.0, 0.0)
    assert bucket.remaining(1e9) == 10.0
    assert bucket.reset_s(1e9) == 0.0


def test_charge_may_leave_a_debt_that_is_paid_off_before_anything_is_granted() -> None:
    bucket = TokenBucket(rate_per_s=1.0, burst=5.0)
    bucket.charge(8.0, 0.0)
    assert bucket.remaining(0.0) == -3.0
    assert bucket.reset_s(0.0) == 8.0
    assert bucket.try_take(1.0, 3.5) == pytest.approx(0.5)
    assert bucket.try_take(1.0, 4.0) == 0.0


def test_tokens_given_back_fill_no_further_than_the_burst() -> None:
    bucket = TokenBucket(rate_per_s=1.0, burst=5.0)
    bucket.try_take(2.0, 0.0)
    bucket.charge(-100.0, 0.0)
    assert bucket.remaining(0.0) == 5.0


def test_clock_that_steps_back_refills_nothing_twice() -> None:
    bucket = TokenBucket(rate_per_s=1.0, burst=10.0)
    bucket.try_take(10.0, 100.0)
    assert bucket.remaining(104.0) == 4.0
    assert bucket.remaining(50.0) == 4.0
    assert bucket.remaining(104.0) == 4.0
    assert bucket.remaining(105.0) == 5.0


@given(rate=RATES, burst=BURSTS, steps=STEPS)
def test_grants_stay_within_burst_and_refill_over_every_stretch_of_time(
    rate: float, burst: int, steps: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(rate_per_s=rate, burst=float(burst))
    now, latest = 100.0, 100.0
    grants: list[tuple[float, int]] = []
    for pause_s, cost in steps:
        now += pause_s
        latest = max(latest, now)
        if bucket.try_take(float(cost), now) == 0.0:
            grants.append((latest, cost))
    for first in range(len(grants)):
        granted = 0
        for at, cost in grants[first:]:
            granted += cost
            assert granted <= burst + rate * (at - grants[first][0]) + 1e-6


@given(rate=RATES, burst=BURSTS, steps=STEPS)
def test_wait_that_is_announced_is_enough_and_not_too_long(
    rate: float, burst: int, steps: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(rate_per_s=rate, burst=float(burst))
    now = 100.0
    for pause_s, cost in steps:
        now += abs(pause_s)
        cost = min(cost, burst)
        wait_s = bucket.try_take(float(cost), now)
        if wait_s > 1e-6:
            assert bucket.try_take(float(cost), now + wait_s * 0.999) > 0.0
            now += wait_s * (1 + 1e-9) + 1e-9
            assert bucket.try_take(float(cost), now) < 1e-6
