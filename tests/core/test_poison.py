"""Whose account a death goes to, when a request is condemned, and what is remembered of it; on a clock of our own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.breaker import Permit
from balancer.core.outcome import Outcome
from balancer.core.poison import (
    DEATHS,
    LEAST_HOLD_S,
    MOST_HOLD_S,
    SAME_CAUSE_S,
    Account,
    Failure,
    Ledger,
    Quarantine,
    blame,
    fingerprint,
    is_death,
)
from balancer.core.request import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def failure(node: NodeId = A, **fields: object) -> Failure:
    facts = {"permit": Permit(0), "at_s": 100.0, "present": False, "charged": False, "requests": 0, "failed": 0}
    return Failure(node=node, **{**facts, **fields})  # type: ignore[arg-type]


def death(node: NodeId = A, *, charged: bool = True, **fields: object) -> Failure:
    return failure(node, present=True, charged=charged, **fields)


def suspect(*nodes: NodeId) -> Account:
    return Account(failures=[death(node) for node in nodes or (A,)])


def hang(node: NodeId = A, **fields: object) -> Failure:
    return failure(node, hung=True, **fields)


def moved(*nodes: NodeId) -> Account:
    return Account(failures=[hang(node) for node in nodes or (A,)])


# -- which ends are deaths


@pytest.mark.parametrize("outcome", list(Outcome))
def test_what_ends_with_the_node_gone_or_hung_after_the_request_was_sent_is_a_death(outcome: Outcome) -> None:
    gone = {
        Outcome.RESET_BEFORE_HEAD,
        Outcome.RESET_AFTER_HEAD,
        Outcome.TRUNCATED,
        Outcome.FIRST_BYTE_TIMEOUT,
        Outcome.UNARY_TIMEOUT,
        Outcome.IDLE_TIMEOUT,
    }
    refused = {Outcome.REFUSED, Outcome.CONNECT_TIMEOUT}
    assert is_death(outcome, stale_before=False) == (outcome in gone)
    assert is_death(outcome, stale_before=True) == (outcome in gone | refused)


# -- nodes that hang


def test_the_first_hang_charges_nobody_and_holds_nobody_up() -> None:
    account = Account()
    blame([account])
    account.failures.append(hang())
    assert not account.is_spent
    assert account.is_suspect
    assert not account.waits_its_turn


def test_a_second_hang_is_on_the_account_of_the_only_suspect_that_waited_there() -> None:
    known, fresh = moved(), Account()
    blame([fresh, known, Account()])
    assert known.is_spent
    assert not fresh.is_spent


def test_with_two_suspects_waiting_a_hang_is_nobodys_and_each_waits_its_turn() -> None:
    accounts = [moved(), moved()]
    blame(accounts)
    for account in accounts:
        account.failures.append(hang(B))
        assert not account.is_spent
        assert account.waits_its_turn


def test_a_request_that_was_on_two_nodes_that_hung_has_the_next_one_until_a_hang_would_be_found() -> None:
    quarantine, account = Quarantine(), moved(A, B)
    quarantine.waiting = 10
    quarantine.enter(C, account, reading_s=0.0, nodes=1, now=100.0, hang_s=3.5)
    assert quarantine.free_from_s(C, 100.0) == pytest.approx(103.5)
    assert quarantine.leave(C, account, alive=True), "its first byte"
    assert quarantine.free_from_s(C, 100.0) < 100.0
    quarantine.enter(C, moved(A), reading_s=0.0, nodes=1, now=100.0, hang_s=3.5)
    assert quarantine.free_from_s(C, 100.0) < 101.0


def test_two_hangs_condemn_on_nodes_that_seldom_fail_and_an_equal_request_starts_with_them() -> None:
    assert moved(A, B).condemns([100.0, 100.0]) is False, "not on its account"
    account = moved(A, B)
    account.blamed = True
    assert account.condemns([])
    ledger = Ledger()
    ledger.died("mark", frozenset(), 100.0, hung=frozenset({A}))
    ledger.died("mark", frozenset({C}), 101.0)
    again = Account(ledger.present("mark", 101.0), ledger.hung("mark", 101.0))
    assert (again.present, again.hung) == ({C}, {A})
    assert len(again.hung) < DEATHS


# -- the quarantine


def test_a_node_takes_one_suspect_at_a_time_until_it_is_read() -> None:
    quarantine, first = Quarantine(), suspect()
    assert quarantine.free_from_s(B, 100.0) < 100.0
    quarantine.enter(B, first, reading_s=0.1, nodes=3, now=100.0)
    assert quarantine.free_from_s(B, 100.0) == pytest.approx(100.2)
    assert quarantine.free_from_s(C, 100.0) < 100.0
    assert quarantine.free_from_s(B, 100.3) < 100.3, "its hold is over"
    assert quarantine.leave(B, first, alive=True)
    assert quarantine.free_from_s(B, 100.1) < 100.1
    assert not quarantine


@pytest.mark.parametrize(("reading_s", "hold_s"), [(0.0, LEAST_HOLD_S), (0.1, 0.2), (60.0, MOST_HOLD_S)])
def test_a_hold_is_as_long_as_reading_the_prompt_twice_within_bounds(reading_s: float, hold_s: float) -> None:
    quarantine = Quarantine()
    quarantine.enter(A, suspect(), reading_s=reading_s, nodes=1, now=100.0)
    assert quarantine.free_from_s(A, 100.0) == pytest.approx(100.0 + hold_s)


def test_many_suspects_wait_two_seconds_in_all() -> None:
    quarantine = Quarantine()
    quarantine.waiting = 300
    quarantine.enter(A, suspect(), reading_s=1.0, nodes=3, now=100.0)
    assert quarantine.free_from_s(A, 100.0) == pytest.approx(100.02)


def test_the_first_death_goes_to_everybody_who_was_there() -> None:
    quarantine = Quarantine()
    there = [Account() for _ in range(5)]
    assert all(quarantine.charge(A, account, sent_s=99.0, now=100.0) for account in there)


@pytest.mark.parametrize("first", ["suspect", "bystander"])
def test_with_one_suspect_on_a_node_its_death_is_the_suspects_alone(first: str) -> None:
    quarantine, guilty, bystander = Quarantine(), suspect(A), Account()
    quarantine.enter(B, guilty, reading_s=0.1, nodes=3, now=100.0)
    order = [guilty, bystander] if first == "suspect" else [bystander, guilty]
    charged = {}
    for account in order:  # the suspect leaves as it is settled, before the others are
        charged[account] = quarantine.charge(B, account, sent_s=100.0, now=100.05)
        quarantine.leave(B, account, alive=False)
    assert charged == {guilty: True, bystander: False}


def test_with_two_suspects_on_a_node_nobody_is_charged() -> None:
    quarantine, one, other = Quarantine(), suspect(A), suspect(A)
    for account in (one, other):
        quarantine.enter(B, account, reading_s=0.1, nodes=1, now=100.0)
    for account in (one, other, Account()):
        assert not quarantine.charge(B, account, sent_s=100.0, now=100.05)
        quarantine.leave(B, account, alive=False)


def test_another_death_of_the_node_has_its_own_cause() -> None:
    quarantine = Quarantine()
    assert quarantine.charge(A, Account(), sent_s=99.0, now=100.0)
    back = 100.0 + SAME_CAUSE_S
    assert quarantine.charge(A, Account(), sent_s=100.5, now=100.6), "sent after the node came back"
    assert quarantine.charge(A, Account(), sent_s=99.0, now=back + 1.0)


def test_a_suspect_that_outlives_its_hold_is_cleared_of_its_death() -> None:
    quarantine, account = Quarantine(), suspect(A)
    quarantine.enter(B, account, reading_s=0.1, nodes=3, now=100.0)
    quarantine.charge(B, Account(), sent_s=99.0, now=105.0)
    assert account.deaths == 0
    assert account.present == {A}
    assert not account.is_spent


def test_a_first_byte_clears_a_suspect_and_a_death_does_not() -> None:
    alive, dead = suspect(A), suspect(A)
    quarantine = Quarantine()
    for account in (alive, dead):
        quarantine.enter(B, account, reading_s=0.1, nodes=3, now=100.0)
    assert quarantine.leave(B, alive, alive=True)
    assert quarantine.leave(B, dead, alive=False)
    assert (alive.deaths, dead.deaths) == (0, 1)
    assert not quarantine.leave(B, alive, alive=True), "it is not there any more"


# -- when it is enough


def test_two_deaths_on_its_account_or_three_in_its_presence_are_enough() -> None:
    assert not Account().is_spent
    assert not suspect(A).is_spent
    assert suspect(A, B).is_spent
    unclear = [death(node, charged=False) for node in (A, B)]
    assert not Account(failures=unclear).is_spent
    assert Account(failures=[*unclear, death(C, charged=False)]).is_spent
    assert Account(inherited=frozenset({A, B}), failures=[death(C, charged=False)]).is_spent


def test_two_deaths_condemn_a_request_even_on_nodes_that_did_nothing_else() -> None:
    assert suspect(A, B).condemns([float("-inf")] * 2)


def test_deaths_on_nodes_that_break_often_condemn_nobody() -> None:
    account = Account(failures=[death(node, requests=100, failed=30) for node in (A, B)])
    assert not account.condemns([100.0, 100.0])


def test_other_failures_condemn_only_where_every_node_answered_others_around_that_time() -> None:
    account = Account(failures=[failure(node, requests=100) for node in (A, B, C)])
    assert account.condemns([100.0, 99.0, 101.0])
    assert not account.condemns([100.0, 99.0, 90.0])
    assert not account.condemns([100.0, 99.0, float("-inf")])


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_a_request_that_nodes_fail_by_chance_is_not_condemned(ratio: float) -> None:
    account = Account(failures=[failure(node, requests=100, failed=int(100 * ratio)) for node in (A, B, C)])
    assert not account.condemns([100.0] * 3)


def test_a_node_that_breaks_every_stream_condemns_nobody_however_often_it_is_asked() -> None:
    account = Account(inherited=frozenset({A}), failures=[death(A, charged=False) for _ in range(5)])
    assert not account.is_spent
    assert not account.condemns([100.0] * 5)


def test_one_node_is_not_enough_to_condemn() -> None:
    account = Account(failures=[failure(A, requests=1000), failure(A, requests=1000)])
    assert not account.condemns([100.0, 100.0])


# -- what is remembered


def test_a_verdict_stands_for_its_time() -> None:
    ledger = Ledger(keep_s=60.0)
    ledger.condemn("x", 100.0)
    assert ledger.verdict_for_s("x", 130.0) == pytest.approx(30.0)
    assert ledger.verdict_for_s("y", 130.0) == 0.0
    assert ledger.verdict_for_s("x", 160.0) == 0.0
    ledger.sweep(160.0)
    assert len(ledger) == 0


def test_deaths_of_equal_requests_at_the_same_time_do_not_add_up() -> None:
    ledger = Ledger()
    for _ in range(5):
        ledger.died("x", frozenset({A}), 100.0)
    ledger.died("x", frozenset({B}), 100.0)
    assert len(ledger.present("x", 101.0)) == 1
    ledger.died("x", frozenset({A, B}), 102.0)
    assert ledger.present("x", 103.0) == {A, B}
    assert ledger.verdict_for_s("x", 103.0) == 0.0


def test_an_equal_request_that_was_answered_clears_the_account() -> None:
    ledger = Ledger()
    ledger.died("x", frozenset({A}), 100.0)
    ledger.answered("x")
    assert not ledger.present("x", 100.0)
    assert not len(ledger)


def test_a_verdict_is_not_weakened_by_a_death_that_was_under_way() -> None:
    ledger = Ledger()
    ledger.condemn("x", 100.0)
    ledger.died("x", frozenset({A}), 101.0)
    assert ledger.verdict_for_s("x", 101.0) > 0.0


# -- fingerprints

_TEXT = st.text(max_size=8)


@given(one=st.tuples(_TEXT, _TEXT, _TEXT, st.binary(max_size=8)), two=st.tuples(_TEXT, _TEXT, _TEXT, st.binary()))
def test_only_equal_requests_share_a_fingerprint(
    one: tuple[str, str, str, bytes], two: tuple[str, str, str, bytes]
) -> None:
    assert (fingerprint(*one) == fingerprint(*two)) == (one == two)
