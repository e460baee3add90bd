"""A node's own accounting: requests in flight, latency, recent failures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.load import FAILURE_DECAY_S, LEAK_S, PACE_SAMPLES, TTFT_DECAY_S, Leak, Load


def test_requests_are_counted_in_and_out() -> None:
    load = Load()
    load.begin()
    load.begin()
    load.end()

    assert (load.rif, load.picks_since_report) == (1, 2)


def test_a_slow_first_token_counts_at_once() -> None:
    load = Load()
    load.first_token(0.1, 10.0)
    load.first_token(2.0, 10.1)

    assert load.ttft_s == 2.0


def test_a_fast_first_token_is_believed_slowly() -> None:
    load = Load()
    load.first_token(2.0, 10.0)
    load.first_token(0.1, 10.0)

    assert load.ttft_s == pytest.approx(2.0 - 0.1 * 1.9)


def test_the_memory_of_a_slow_token_fades() -> None:
    load = Load()
    load.first_token(2.0, 0.0)
    load.first_token(0.1, TTFT_DECAY_S)

    assert 0.1 < load.ttft_s < 2.0 / math.e


def test_the_first_gaps_set_the_pace_and_later_ones_move_it() -> None:
    load = Load()
    load.tokens(10, 1.0)
    assert load.itl_s == pytest.approx(0.1)

    load.tokens(1, 0.6)
    assert load.itl_s == pytest.approx(0.11)

    load.tokens(10_000, 200.0)
    assert load.itl_s == pytest.approx(0.02)


@pytest.mark.parametrize("count", [0, -1])
def test_no_further_token_says_nothing_of_the_pace(count: int) -> None:
    load = Load()
    load.tokens(count, 5.0)

    assert load.itl_s == 0.0


def test_failures_add_up_and_fade() -> None:
    load = Load()
    assert load.failure_now(5.0) == 0.0

    load.failed(10.0)
    assert load.failure_now(10.0) == pytest.approx(0.3)
    load.failed(10.0)
    assert load.failure_now(10.0) == pytest.approx(0.51)
    assert load.failure_now(10.0 + FAILURE_DECAY_S) == pytest.approx(0.51 / math.e)


def test_successes_make_it_fade_faster_until_nothing_is_left() -> None:
    load = Load()
    load.failed(10.0)
    load.succeeded(10.0)
    assert load.failure_now(10.0) == pytest.approx(0.21)

    for _ in range(30):
        load.succeeded(10.0)
    assert load.failure == 0.0


@given(
    st.lists(
        st.tuples(st.floats(0.0, 20.0), st.sampled_from(["failed", "succeeded", "token"]), st.floats(0.0, 60.0)),
        max_size=60,
    )
)
def test_averages_stay_within_what_was_seen(steps: list[tuple[float, str, float]]) -> None:
    load = Load()
    now = 0.0
    slowest_s = 0.0
    for pause_s, event, ttft_s in steps:
        now += pause_s
        before = load.failure_now(now)
        if event == "token":
            slowest_s = max(slowest_s, ttft_s)
            load.first_token(ttft_s, now)
        elif event == "failed":
            load.failed(now)
            assert load.failure_now(now) >= before
        else:
            load.succeeded(now)
            assert load.failure_now(now) <= before
        assert 0.0 <= load.failure_now(now) <= 1.0
        assert 0.0 <= load.ttft_s <= slowest_s or math.isclose(load.ttft_s, slowest_s)


# Counts that are not made good


def test_a_count_that_was_always_too_high_is_taken_off_after_its_time() -> None:
    leak = Leak()
    looks = [leak.look(excess, float(at)) for at, excess in enumerate([3, 2, 5] + [2] * 40)]

    assert looks[: int(LEAK_S)] == [0] * int(LEAK_S)
    assert looks[int(LEAK_S)] == 2


def test_requests_on_their_way_are_no_leak() -> None:
    leak = Leak()

    assert [leak.look(at % 7, float(at)) for at in range(200)] == [0] * 200


def test_the_pace_is_known_after_some_first_tokens() -> None:
    load = Load()
    for _ in range(PACE_SAMPLES):
        assert not load.known_pace
        load.first_token(0.5, 1.0, 1000.0)

    assert load.known_pace
    assert load.s_per_token == pytest.approx(0.0005)
