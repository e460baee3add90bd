"""Whether there is another try, and after how long."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.outcome import Again, Outcome
from balancer.core.retry import GiveUp, Retry, RetryPlan, RetryPolicy
from balancer.core.retry_budget import RetryBudget


def plan(*, deadline_s: float = 100.0, floor: float = 10.0, seed: int = 1, **policy: Any) -> RetryPlan:
    return RetryPlan(RetryPolicy(**policy), RetryBudget(0.2, floor), Random(seed), deadline_s)


final = [outcome for outcome in Outcome if outcome.ruling.again is Again.NEVER]
free = [outcome for outcome in Outcome if outcome.ruling.again is Again.FREE]
paid = [outcome for outcome in Outcome if outcome.ruling.again is Again.BUDGET]


@pytest.mark.parametrize("outcome", final, ids=lambda outcome: outcome.label)
def test_what_is_final_is_not_tried_again(outcome: Outcome) -> None:
    assert plan().next(outcome, 0.0) == GiveUp("final")


@pytest.mark.parametrize("outcome", free, ids=lambda outcome: outcome.label)
def test_what_no_node_has_seen_is_tried_again_at_once_and_for_nothing(outcome: Outcome) -> None:
    retrying = plan(floor=0.0)

    assert [retrying.next(outcome, 0.0) for _ in range(20)] == [Retry(0.0)] * 20
    assert retrying.counted == 0
    assert retrying.next(outcome, 100.0) == GiveUp("deadline")


@pytest.mark.parametrize("outcome", paid, ids=lambda outcome: outcome.label)
def test_a_failure_uses_up_one_of_the_attempts(outcome: Outcome) -> None:
    retrying = plan(max_attempts=3)

    decisions = [retrying.next(outcome, 0.0) for _ in range(3)]

    assert [type(decision) for decision in decisions] == [Retry, Retry, GiveUp]
    assert decisions[-1] == GiveUp("max_attempts")


@pytest.mark.parametrize("outcome", [Outcome.MISCONFIGURED, Outcome.BACK_PRESSURE], ids=lambda outcome: outcome.label)
def test_a_node_that_did_no_work_costs_the_budget_and_no_attempt(outcome: Outcome) -> None:
    retrying = plan(floor=0.5)

    decisions = [retrying.next(outcome, 0.0) for _ in range(6)]

    assert decisions == [Retry(0.0)] * 5 + [GiveUp("budget")]
    assert retrying.counted == 0


def test_refusals_on_the_way_leave_all_attempts() -> None:
    retrying = plan(max_attempts=2)
    retrying.next(Outcome.REFUSED, 0.0)

    assert isinstance(retrying.next(Outcome.SERVER_ERROR, 0.0), Retry)
    retrying.next(Outcome.REFUSED, 0.0)
    assert retrying.next(Outcome.SERVER_ERROR, 0.0) == GiveUp("max_attempts")


def test_one_attempt_means_no_retry() -> None:
    assert plan(max_attempts=1).next(Outcome.SERVER_ERROR, 0.0) == GiveUp("max_attempts")


@pytest.mark.parametrize("outcome", [*free, *paid], ids=lambda outcome: outcome.label)
def test_what_may_not_be_sent_twice_is_not(outcome: Outcome) -> None:
    assert plan().next(outcome, 0.0, replayable=False) == GiveUp("not_replayable")


def test_without_budget_the_last_outcome_stands() -> None:
    assert plan(floor=0.0).next(Outcome.SERVER_ERROR, 0.0) == GiveUp("budget")


def test_a_retry_that_could_not_begin_before_the_deadline_spends_nothing() -> None:
    retrying = plan(deadline_s=10.0, base_s=1.0)

    assert retrying.next(Outcome.SERVER_ERROR, 9.9) == GiveUp("deadline")
    assert retrying.budget.try_spend(9.9)


def test_requests_share_one_budget() -> None:
    budget = RetryBudget(0.0, 0.5)
    plans = [RetryPlan(RetryPolicy(), budget, Random(seed), 100.0) for seed in range(10)]

    decisions = [one.next(Outcome.SERVER_ERROR, 0.0) for one in plans]

    assert sum(isinstance(decision, Retry) for decision in decisions) == 5


def test_the_back_off_doubles_up_to_its_limit() -> None:
    retrying = plan(max_attempts=8, base_s=0.1, max_s=0.5)
    waits = [decision.after_s for _ in range(6) if isinstance(decision := retrying.next(Outcome.TRUNCATED, 0.0), Retry)]

    for wait_s, full_s in zip(waits, [0.1, 0.2, 0.4, 0.5, 0.5, 0.5], strict=True):
        assert full_s / 2 <= wait_s <= full_s


def test_the_victims_of_one_death_do_not_come_back_together() -> None:
    waits = {plan(seed=seed).next(Outcome.RESET_BEFORE_HEAD, 0.0) for seed in range(50)}

    assert len(waits) == 50


@given(st.lists(st.sampled_from([*free, *paid]), max_size=30), st.integers(1, 5), st.integers(0, 2**32))
def test_no_request_is_ever_tried_more_often_than_allowed(outcomes: list[Outcome], most: int, seed: int) -> None:
    retrying = plan(max_attempts=most, seed=seed)
    failures = 0
    for outcome in outcomes:
        decision = retrying.next(outcome, 0.0)
        failures += outcome in paid
        if isinstance(decision, GiveUp):
            break
        assert failures < most
        assert decision.after_s >= 0.0
