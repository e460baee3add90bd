"""What a node can take: no limit without evidence, no cut below the floor, back up when the trouble is over."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.concurrency import (
    FORGET_S,
    LATE_FLOOR,
    LEAST_AHEAD,
    PUSHED_BACK_FLOOR,
    WINDOW_S,
    Concurrency,
)
from balancer.core.health import NodeReport


def report(**figures: Any) -> NodeReport:
    return NodeReport(id="n", url="http://n:1", **figures)


def tokens(
    node: Concurrency, ttft_s: float, *, at_s: float, in_flight: int, count: int = 20, prompt: int = 100
) -> None:
    """First tokens over a bit more than one window."""
    for number in range(count):
        node.first_token(ttft_s, prompt, in_flight, at_s + number * 1.2 * WINDOW_S / count)


# -- reports


def test_without_evidence_there_is_no_limit() -> None:
    node = Concurrency()
    node.report(report(), 500)
    node.report(report(running=300.0, queue_depth=0.0, kv_usage_ratio=0.9), 300)
    tokens(node, 0.3, at_s=0.0, in_flight=500)
    assert node.limit == math.inf


@pytest.mark.parametrize(("slots", "limit"), [(1.0, 1 + LEAST_AHEAD), (4.0, 4 + LEAST_AHEAD), (256.0, 288.0)])
def test_slots_are_filled_with_a_little_work_ahead(slots: float, limit: float) -> None:
    node = Concurrency()
    node.report(report(slots=slots), 0)
    assert node.limit == limit
    node.report(report(slots=slots, running=slots, queue_depth=limit - slots), int(limit))
    assert node.limit == limit, "its own work ahead is no queue to be cut"
    node.forget_report()
    assert node.limit == math.inf


def test_slots_of_none_are_no_slots() -> None:
    node = Concurrency()
    node.report(report(slots=0.0), 0)
    assert node.limit == math.inf


def test_balancers_that_share_an_engine_come_to_share_its_slots() -> None:
    nodes = [Concurrency(), Concurrency()]
    for _ in range(30):
        held = [min(200, int(node.reported)) if node.reported < math.inf else 200 for node in nodes]
        running = min(256, sum(held))
        seen = report(slots=256.0, running=float(running), queue_depth=float(sum(held) - running))
        for node, own in zip(nodes, held, strict=True):
            node.report(seen, own)
    assert sum(held) <= 256 * 1.4
    assert min(held) >= 128


def test_a_queue_beside_a_full_kv_cache_is_what_it_cannot_take() -> None:
    node = Concurrency()
    node.report(report(running=40.0, queue_depth=60.0, kv_usage_ratio=0.97), 100)
    assert 40 <= node.limit <= 50
    for _ in range(20):
        node.report(report(running=40.0, queue_depth=0.0, kv_usage_ratio=0.6), 15)
    assert node.limit == math.inf, "and once there is room, and nobody feels the limit, it goes"


def test_a_burst_of_prompts_that_waits_to_be_read_is_no_lack_of_room() -> None:
    node = Concurrency()
    node.report(report(slots=256.0, running=3.0, queue_depth=80.0, kv_usage_ratio=0.1), 83)
    assert node.limit == 288.0


# -- first tokens


def test_a_standing_queue_lowers_the_limit_step_by_step_to_a_floor() -> None:
    node = Concurrency()
    tokens(node, 0.1, at_s=0.0, in_flight=100)
    assert node.limit == math.inf
    for at_s in (10.0, 14.0):  # the first of these still holds the last quick ones
        tokens(node, 3.0, at_s=at_s, in_flight=100)
    assert node.limit == pytest.approx(90.0)
    for step in range(60):
        tokens(node, 3.0, at_s=20.0 + 10.0 * step, in_flight=90)
    assert node.limit == LATE_FLOOR


def test_long_prompts_among_short_ones_are_no_standing_queue() -> None:
    node = Concurrency()
    for number in range(200):
        node.first_token(30.0 if number % 8 else 0.2, 100, 200, number * 0.1)
    assert node.limit == math.inf


def test_prompts_that_are_all_long_may_take_long() -> None:
    node = Concurrency()
    tokens(node, 0.1, at_s=0.0, in_flight=100)
    tokens(node, 20.0, at_s=30.0, in_flight=100, prompt=30_000)
    assert node.limit == math.inf


def test_a_node_that_is_slow_by_nature_is_cut_once_at_most() -> None:
    node = Concurrency()
    for step in range(20):
        tokens(node, 5.0, at_s=10.0 * step, in_flight=50)
    assert node.limit == pytest.approx(45.0)


def test_tokens_of_requests_sent_before_a_cut_cause_no_second_one() -> None:
    node = Concurrency()
    tokens(node, 3.0, at_s=10.0, in_flight=100)
    assert node.limit == pytest.approx(90.0)
    tokens(node, 3.0, at_s=11.5, in_flight=95)
    assert node.limit == pytest.approx(90.0)


# -- back-pressure


def test_back_pressure_lowers_the_limit_to_what_was_there() -> None:
    node = Concurrency()
    assert node.pushed_back(64, 0.0)
    assert node.limit == pytest.approx(57.6)
    for in_flight in range(63, -1, -1):
        node.pushed_back(in_flight, 0.0)
    assert node.limit == pytest.approx(PUSHED_BACK_FLOOR, abs=1.0)


def test_a_node_that_pushes_back_with_next_to_nothing_there_has_another_reason() -> None:
    node = Concurrency()
    assert not node.pushed_back(1, 0.0)
    assert node.limit == math.inf


def test_the_limit_grows_while_it_is_felt_and_goes_once_it_is_not() -> None:
    node = Concurrency()
    node.pushed_back(100, 0.0)
    before = node.limit
    assert not node.succeeded(89, 0.5), "not so soon"
    assert not node.succeeded(60, 2.0), "a limit that nobody feels need not grow"
    assert node.succeeded(89, 3.0)
    assert before < node.limit < 1.2 * before
    assert not node.succeeded(89, 3.5)
    assert not node.succeeded(10, 8.0)
    assert node.succeeded(10, FORGET_S + 1.0)
    assert node.limit == math.inf


def test_a_recovered_node_starts_without_its_past() -> None:
    node = Concurrency()
    node.pushed_back(100, 0.0)
    node.forget_trouble()
    assert node.limit == math.inf


FIGURE = st.none() | st.floats(0, 1e6)


@given(
    st.lists(
        st.tuples(FIGURE, FIGURE, FIGURE, st.none() | st.floats(0, 1), st.integers(0, 5000), st.floats(0, 100)),
        max_size=40,
    )
)
def test_whatever_it_hears_the_limit_is_above_the_floor(heard: list[Any]) -> None:
    node, now = Concurrency(), 0.0
    for slots, running, queued, kv, in_flight, ttft_s in heard:
        now += 0.5
        node.report(report(slots=slots, running=running, queue_depth=queued, kv_usage_ratio=kv), in_flight)
        node.first_token(ttft_s, 10, in_flight, now)
        if in_flight % 3 == 0:
            node.pushed_back(in_flight, now)
        node.succeeded(in_flight, now)
        assert node.observed >= PUSHED_BACK_FLOOR
        assert node.limit >= min(PUSHED_BACK_FLOOR, 1 + LEAST_AHEAD)
