"""When a first token is late, and where a second attempt would find room."""

from __future__ import annotations

from random import Random

import pytest

from balancer.core.breaker import Breaker, BreakerPolicy
from balancer.core.hedge import ANEW_EVERY, LEAST_SEEN, MOST_SEEN, FirstTokenTimes, has_room
from balancer.core.node import Node, NodeConfig
from balancer.core.request import NodeId


def node(id_: str, **config: object) -> Node:
    url = f"http://127.0.0.1:1/{id_}"
    return Node(NodeConfig(url=url, **config), NodeId(id_), Breaker(BreakerPolicy(), Random(1)))  # type: ignore[arg-type]


def taught(times: FirstTokenTimes, count: int, seconds: float = 0.1, size_bytes: int = 1000) -> None:
    for number in range(count):
        times.learned("m", size_bytes, seconds + number * 1e-6)


def test_the_delay_is_not_known_before_enough_prompts_of_that_length_were_seen() -> None:
    times = FirstTokenTimes(0.95)
    taught(times, LEAST_SEEN - 1)
    assert times.delay_s("m", 1000) is None
    taught(times, 1)
    assert times.delay_s("m", 1000) == pytest.approx(0.1, abs=1e-3)
    assert times.delay_s("m", 1023) == times.delay_s("m", 1000), "lengths count in powers of two"
    assert times.delay_s("m", 4000) is None
    assert times.delay_s("other", 1000) is None


def test_the_delay_is_the_quantile_of_what_was_seen_lately() -> None:
    times = FirstTokenTimes(0.95)
    for number in range(100):
        times.learned("m", 1000, float(number))
    assert times.delay_s("m", 1000) == pytest.approx(95.0, abs=1.0)
    taught(times, MOST_SEEN + ANEW_EVERY, seconds=2.0)
    assert times.delay_s("m", 1000) == pytest.approx(2.0, abs=0.01)


def test_there_is_room_where_nothing_is_queued_and_the_request_was_not_yet() -> None:
    first, second = node("a"), node("b")
    assert has_room([first, second], {first.id}, 0.1, 100.0)
    assert not has_room([first], {first.id}, 0.1, 100.0)
    full = node("c", max_in_flight=1)
    full.load.begin()
    assert not has_room([first, full], {first.id}, 0.1, 100.0)
    second.breaker.record(second.breaker.unguarded(), False, 100.0)
    assert has_room([first, second], {first.id}, 0.1, 100.0), "one failure opens no breaker"
    for _ in range(5):
        second.breaker.record(second.breaker.unguarded(), False, 100.0)
    assert not has_room([first, second], {first.id}, 0.1, 100.0)
