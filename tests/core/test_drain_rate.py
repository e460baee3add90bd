"""The pace of a queue: what counts as a gap, when it is too old or too little to go by."""

from __future__ import annotations

import pytest

from balancer.core.drain_rate import ENOUGH_GRANTS, STALE_S, DrainRate


def paced(gap_s: float, count: int = 20, begin_s: float = 0.0) -> DrainRate:
    rate = DrainRate()
    rate.resumed(begin_s)
    for number in range(count):
        rate.granted(begin_s + gap_s * (number + 1))
    return rate


def test_a_steady_pace_is_known_after_some_grants() -> None:
    assert paced(0.5, count=int(ENOUGH_GRANTS) - 1).gap_s(2.0) is None
    assert paced(0.5).gap_s(10.0) == pytest.approx(0.5)


def test_slots_that_come_in_batches_count_as_what_they_are_on_average() -> None:
    rate = DrainRate()
    rate.resumed(0.0)
    for second in range(1, 21):
        for _ in range(8):
            rate.granted(float(second))
    assert rate.gap_s(20.0) == pytest.approx(1 / 8, rel=0.3)


def test_time_in_which_nobody_waits_is_no_gap() -> None:
    rate = paced(0.5)
    rate.resumed(40.0)
    rate.granted(40.5)
    assert rate.gap_s(40.5) == pytest.approx(0.5)


def test_a_pause_counts_while_it_lasts() -> None:
    rate = paced(0.1)
    assert rate.gap_s(2.0) == pytest.approx(0.1)
    during = rate.gap_s(22.0)
    assert during is not None
    assert during > 1.0


def test_what_was_measured_long_ago_says_nothing() -> None:
    rate = paced(0.1)
    assert rate.gap_s(2.0 + STALE_S + 1.0) is None
    rate.resumed(1000.0)
    rate.granted(1003.0)
    assert rate.gap_s(1003.0) is None, "one grant is too little to go by"


def test_service_stays_near_the_shorter_ones() -> None:
    rate = DrainRate()
    for number in range(200):
        rate.served(1.0 if number % 5 == 0 else 30.0)
    assert 1.0 <= rate.service_s < 12.0
    assert rate.wait_s(3, 0.0) is None
