"""A stream's pace is kept in a few bytes and gives the same times back, within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.pace import MAX_PAUSE_S, MAX_WHOLE_S, RECORD_BYTES, record, schedule


def test_a_stream_is_replayed_as_it_came() -> None:
    pace = record([(100.0, 50), (100.02, 40), (100.02, 10), (100.5, 300)])
    steps = schedule(pace, 400)
    assert [end for _, end in steps] == [50, 100, 400]
    assert [at_s for at_s, _ in steps] == pytest.approx([0.0, 0.02, 0.5])
    assert len(pace) == 10


def test_rounding_does_not_add_up() -> None:
    reads = [(number * 0.0004, 1) for number in range(5001)]
    steps = schedule(record(reads), 5001)
    assert steps[-1][0] == pytest.approx(2.0, abs=0.01)


def test_long_pauses_and_long_streams_are_shortened() -> None:
    assert schedule(record([(0.0, 1), (30.0, 1)]), 2) == [(0.0, 1), (MAX_PAUSE_S, 2)]
    steps = schedule(record([(number * 0.9, 1) for number in range(201)]), 201)
    assert steps[-1] == (pytest.approx(MAX_WHOLE_S), 201)
    assert steps[100][0] == pytest.approx(MAX_WHOLE_S / 2, rel=0.01)


def test_a_record_that_grows_too_long_is_none() -> None:
    assert record([]) == b""
    assert record([(number * 0.5, 200) for number in range(RECORD_BYTES)]) == b""


@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10_000)), max_size=50).map(sorted),
    st.integers(1, 100_000),
)
def test_a_schedule_goes_forward_to_the_whole(reads: list[tuple[float, int]], size: int) -> None:
    is_schedule(schedule(record(reads), size), size)


@given(st.binary(max_size=100), st.integers(1, 100_000))
def test_a_soiled_record_is_a_schedule_too(pace: bytes, size: int) -> None:
    is_schedule(schedule(pace, size), size)


def is_schedule(steps: list[tuple[float, int]], size: int) -> None:
    times, ends = [step[0] for step in steps], [step[1] for step in steps]
    assert ends[-1] == size
    assert all(before < after for before, after in zip([0, *ends], ends, strict=False))
    assert times == sorted(times)
    assert 0.0 <= times[-1] <= MAX_WHOLE_S + 1e-6
