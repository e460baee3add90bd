"""The table of outcomes, row by row, and what a status line means (the contract's section on errors)."""

from __future__ import annotations

import pytest

from balancer.core.outcome import (
    BACK_PRESSURE_STATUS,
    MISCONFIGURED_STATUS,
    RULINGS,
    Again,
    Fault,
    Outcome,
    Ruling,
    of_status,
)

# outcome: whose fault, tried again, what the breaker counts, whether the failure costs, whether the weight is cut
TABLE = {
    "ok": (Fault.NOBODY, Again.NEVER, True, False, False),
    "refused": (Fault.NODE, Again.FREE, False, True, False),
    "connect_timeout": (Fault.NODE, Again.FREE, False, True, False),
    "stale_connection": (Fault.NOBODY, Again.FREE, None, False, False),
    "reset_before_head": (Fault.NODE, Again.BUDGET, False, True, False),
    "reset_after_head": (Fault.NODE, Again.BUDGET, False, True, False),
    "first_byte_timeout": (Fault.NODE, Again.BUDGET, False, True, False),
    "idle_timeout": (Fault.NODE, Again.BUDGET, False, True, False),
    "unary_timeout": (Fault.NODE, Again.BUDGET, False, True, False),
    "wedged": (Fault.NODE, Again.FREE, False, True, False),
    "deadline": (Fault.NOBODY, Again.NEVER, None, False, False),
    "request_error": (Fault.REQUEST, Again.NEVER, True, False, False),
    "misconfigured": (Fault.NODE, Again.ELSEWHERE, False, True, False),
    "unknown_model": (Fault.REQUEST, Again.ELSEWHERE, None, False, False),
    "back_pressure": (Fault.NOBODY, Again.ELSEWHERE, None, False, True),
    "server_error": (Fault.NODE, Again.BUDGET, False, True, False),
    "bad_framing": (Fault.NODE, Again.BUDGET, False, True, False),
    "bad_encoding": (Fault.NODE, Again.BUDGET, False, True, False),
    "bad_body": (Fault.NODE, Again.BUDGET, False, True, False),
    "error_object": (Fault.NODE, Again.BUDGET, False, True, False),
    "empty_body": (Fault.NODE, Again.BUDGET, False, True, False),
    "truncated": (Fault.NODE, Again.BUDGET, False, True, False),
    "no_finish_reason": (Fault.NODE, Again.BUDGET, False, True, False),
    "no_good_end": (Fault.NODE, Again.BUDGET, False, True, False),
    "stream_error": (Fault.NODE, Again.BUDGET, False, True, False),
    "client_gone": (Fault.CLIENT, Again.NEVER, None, False, False),
    "hedge_lost": (Fault.NOBODY, Again.NEVER, None, False, False),
}


@pytest.mark.parametrize("outcome", Outcome, ids=lambda outcome: outcome.label)
def test_every_outcome_has_the_ruling_of_its_row(outcome: Outcome) -> None:
    fault, again, breaker, price, cut = TABLE[outcome.label]

    expected = Ruling(fault=fault, again=again, breaker=breaker, failure_price=price, cut_weight=cut)
    assert outcome.ruling == RULINGS[outcome] == expected


def test_the_table_has_no_row_too_many() -> None:
    assert set(TABLE) == {outcome.label for outcome in Outcome}
    assert set(RULINGS) == set(Outcome)


def test_only_the_nodes_own_failures_count_against_it() -> None:
    for outcome in Outcome:
        is_nodes_fault = outcome.ruling.fault is Fault.NODE
        assert (outcome.ruling.breaker is False) == is_nodes_fault
        assert outcome.ruling.failure_price == is_nodes_fault


def test_a_good_answer_and_a_request_that_was_wrong_speak_for_the_node() -> None:
    assert {outcome for outcome in Outcome if outcome.ruling.breaker} == {Outcome.OK, Outcome.REQUEST_ERROR}


def test_what_no_node_has_worked_for_or_a_wedged_one_has_costs_no_retry() -> None:
    free = {outcome for outcome in Outcome if outcome.ruling.again is Again.FREE}

    assert free == {Outcome.REFUSED, Outcome.CONNECT_TIMEOUT, Outcome.STALE_CONNECTION, Outcome.WEDGED}


@pytest.mark.parametrize("status", [400, 402, 406, 409, 410, 411, 412, 413, 414, 415, 416, 418, 422, 424, 451, 499])
def test_a_nodes_4xx_is_the_requests(status: int) -> None:
    assert of_status(status) is Outcome.REQUEST_ERROR


@pytest.mark.parametrize("status", [401, 403, 404, 405, 407, 421, 426])
def test_a_4xx_about_the_node_is_its_configuration(status: int) -> None:
    assert of_status(status) is Outcome.MISCONFIGURED


@pytest.mark.parametrize("status", [408, 425, 429, 503])
def test_back_pressure_is_no_fault(status: int) -> None:
    assert of_status(status) is Outcome.BACK_PRESSURE


@pytest.mark.parametrize("status", [500, 501, 502, 504, 505, 507, 520, 599])
def test_other_5xx_are_the_nodes(status: int) -> None:
    assert of_status(status) is Outcome.SERVER_ERROR


@pytest.mark.parametrize("status", [301, 302, 303, 304, 307, 308])
def test_a_redirect_is_never_followed_and_is_the_nodes_configuration(status: int) -> None:
    assert of_status(status) is Outcome.MISCONFIGURED


def test_every_status_has_one_meaning() -> None:
    assert not MISCONFIGURED_STATUS & BACK_PRESSURE_STATUS
    for status in range(100, 1000):
        assert (of_status(status) is Outcome.OK) == (200 <= status < 300)
