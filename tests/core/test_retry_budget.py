"""Retries are a share of what succeeded plus a floor, in every stretch of ten seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.retry_budget import WINDOW_S, RetryBudget


def spend(budget: RetryBudget, times: int, now: float) -> int:
    return sum(budget.try_spend(now) for _ in range(times))


def test_a_quiet_service_has_the_floor_of_ten_seconds() -> None:
    assert spend(RetryBudget(0.2, 10.0), 500, 5.0) == 100


def test_successes_earn_their_share() -> None:
    budget = RetryBudget(0.2, 1.0)
    for _ in range(200):
        budget.succeeded(5.0)

    assert budget.allowed() == pytest.approx(50.0)
    assert spend(budget, 500, 5.5) == 50


def test_nothing_is_earned_while_everything_fails() -> None:
    budget = RetryBudget(0.2, 0.0)

    assert spend(budget, 100, 1.0) == 0


def test_a_refused_retry_costs_nothing() -> None:
    budget = RetryBudget(1.0, 0.0)
    spend(budget, 100, 1.0)
    budget.succeeded(1.0)

    assert spend(budget, 5, 1.0) == 1


def test_what_was_earned_and_spent_is_forgotten_after_the_window() -> None:
    budget = RetryBudget(1.0, 0.0)
    for _ in range(10):
        budget.succeeded(100.0)
    assert spend(budget, 20, 100.0) == 10

    assert spend(budget, 5, 109.9) == 0
    assert spend(budget, 5, 150.0) == 0
    assert budget.allowed() == 0.0


def test_what_was_spent_at_the_end_of_a_second_still_counts_ten_seconds_later() -> None:
    budget = RetryBudget(0.0, 10.0)
    assert spend(budget, 200, 0.95) == 100

    assert spend(budget, 200, 10.5) == 0
    assert spend(budget, 200, 11.0) == 100


def test_when_everything_fails_a_fleet_of_forty_a_second_is_asked_at_most_a_third_more() -> None:
    budget = RetryBudget(0.2, 10.0)
    retries = [sum(budget.try_spend(tick / 40) for _ in range(2)) for tick in range(40 * 60)]

    for start in range(0, 40 * 50, 40):
        assert sum(retries[start : start + 400]) <= 0.3 * 400


@given(
    st.lists(
        st.tuples(st.floats(0.0, 3.0), st.integers(0, 30), st.integers(0, 60)), max_size=40
    ),  # pause, successes, tries
    st.sampled_from([0.0, 0.1, 0.2, 1.0]),
    st.sampled_from([0.0, 0.5, 10.0]),
)
def test_no_stretch_of_ten_seconds_sees_more_retries_than_its_budget(
    steps: list[tuple[float, int, int]], ratio: float, floor: float
) -> None:
    budget = RetryBudget(ratio, floor)
    now = 0.0
    log: list[tuple[float, int, int]] = []
    for pause_s, successes, tries in steps:
        now += pause_s
        for _ in range(successes):
            budget.succeeded(now)
        log.append((now, successes, spend(budget, tries, now)))

    for at, _, _ in log:
        spent = sum(taken for when, _, taken in log if at - WINDOW_S < when <= at)
        # earned seconds are whole ones: an eleventh may lend its successes
        earned = sum(good for when, good, _ in log if at - 2 * WINDOW_S - 1.0 < when <= at)
        assert spent <= floor * WINDOW_S + ratio * earned
