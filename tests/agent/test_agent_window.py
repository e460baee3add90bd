"""Figures of the last ~30 seconds, never those of the engine's whole life."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node_agent.exposition import parse
from node_agent.window import Histogram, Point, delta, extend, quantile, ratio, read_histogram, was_reset

BOUNDS = (0.1, 0.5, 1.0, math.inf)


def counted(at: float, **counters: float) -> Point:
    return Point(at=at, counters=counters)


def walked(*points: Point) -> tuple[Point, ...]:
    kept: tuple[Point, ...] = ()
    for point in points:
        kept = extend(kept, point)
    return kept


def seen(at: float, *counts: float) -> Point:
    return Point(at=at, histograms={"ttft": Histogram(BOUNDS, counts)})


def test_first_reading_says_nothing_about_the_last_seconds() -> None:
    points = walked(counted(0, latency_seconds=500.0, latency_count=100))
    assert delta(points, "latency_count") is None
    assert ratio(points, "latency_seconds", "latency_count") is None


def test_mean_is_that_of_the_window_and_not_of_the_lifetime() -> None:
    points = walked(
        counted(0, latency_seconds=500.0, latency_count=100), counted(10, latency_seconds=502.0, latency_count=104)
    )
    assert ratio(points, "latency_seconds", "latency_count") == 0.5


def test_no_request_finished_within_the_window_is_none() -> None:
    points = walked(*(counted(second, latency_seconds=5.0, latency_count=2) for second in range(5)))
    assert ratio(points, "latency_seconds", "latency_count") is None


def test_what_happened_before_the_window_is_forgotten() -> None:
    points = walked(counted(0, n=0), counted(1, n=100), *(counted(second, n=100) for second in range(2, 40)))
    assert delta(points, "n") == 0
    assert len(points) <= 32


def test_base_is_the_newest_reading_that_is_thirty_seconds_old() -> None:
    points = walked(*(counted(second, n=second) for second in range(100)))
    assert delta(points, "n") == 30


def test_counter_that_goes_backwards_starts_the_window_anew() -> None:
    points = walked(counted(0, n=100), counted(1, n=110), counted(2, n=3), counted(3, n=5))
    assert delta(points, "n") == 2


def test_gap_in_the_readings_starts_the_window_anew() -> None:
    points = walked(counted(0, n=100), counted(300, n=5000), counted(301, n=5001))
    assert delta(points, "n") == 1


def test_rounding_of_a_sum_is_no_reset() -> None:
    assert not was_reset(counted(0, seconds=0.1 + 0.2 + 0.3), counted(1, seconds=0.3 + 0.2 + 0.1))


def test_series_that_appears_or_vanishes_is_no_reset() -> None:
    assert not was_reset(counted(0, a=1), counted(1, b=0))


def test_histogram_count_that_goes_backwards_is_a_reset() -> None:
    assert was_reset(seen(0, 1, 2, 3, 4), seen(1, 0, 0, 0, 1))


def test_quantile_is_of_what_the_window_observed() -> None:
    # A life of fast answers, then ten that took between 0.5 and 1 s.
    points = walked(seen(0, 1000, 1000, 1000, 1000), seen(5, 1000, 1000, 1010, 1010))
    assert quantile(points, "ttft", 0.5) == pytest.approx(0.75)
    assert quantile(points, "ttft", 0.99) == pytest.approx(0.995)


def test_nothing_observed_within_the_window_is_none() -> None:
    assert quantile(walked(seen(0, 5, 5, 5, 5), seen(1, 5, 5, 5, 5)), "ttft", 0.5) is None
    assert quantile(walked(seen(0, 5, 5, 5, 5)), "ttft", 0.5) is None


def test_quantile_above_the_last_finite_bound_is_that_bound() -> None:
    assert quantile(walked(seen(0, 0, 0, 0, 0), seen(1, 0, 0, 0, 3)), "ttft", 0.5) == 1.0


def test_buckets_that_changed_cannot_be_compared() -> None:
    other = Point(at=1, histograms={"ttft": Histogram((1.0, math.inf), (5, 9))})
    assert quantile(walked(seen(0, 0, 0, 0, 0), other), "ttft", 0.5) is None


def test_buckets_are_summed_over_ranks_and_scaled_to_seconds() -> None:
    buckets = {("100", "0"): 1, ("+Inf", "0"): 2, ("100", "1"): 3, ("+Inf", "1"): 5}
    page = "\n".join(f'h_ms_bucket{{le="{le}",r="{rank}"}} {count}' for (le, rank), count in buckets.items())
    assert read_histogram(parse(page), ("h_ms",), 1e-3) == Histogram((0.1, math.inf), (4, 7))
    assert read_histogram(parse(page), ("other",)) is None


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=50), st.floats(0.01, 1))
def test_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    after = seen(1, *(sum(value <= bound for value in values) for bound in BOUNDS))
    estimate = quantile(walked(seen(0, 0, 0, 0, 0), after), "ttft", q)
    true = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    bucket = next(index for index, bound in enumerate(BOUNDS) if true <= bound)
    assert estimate is not None
    assert (BOUNDS[bucket - 1] if bucket else 0.0) - 1e-9 <= estimate <= BOUNDS[bucket] + 1e-9
