"""What a node's state comes to: its share, its word for people, what it serves."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.breaker import Breaker, BreakerPolicy
from balancer.core.health import HealthState, NodeReport, Verdict
from balancer.core.node import ANY_MODEL, CUT_FLOOR, CUT_S, NODE_STATES, RAMP_FLOOR, RAMP_S, Node, NodeConfig, plain_url
from balancer.core.request import NodeId


def a_node(**config: Any) -> Node:
    breaker = Breaker(BreakerPolicy(consecutive_failures=1), Random(1))
    return Node(NodeConfig(url="http://n:1", **config), NodeId("n"), breaker)


DEGRADED = HealthState(verdict=Verdict.DEGRADED, reasons=("clock_low",))
OUT = HealthState(verdict=Verdict.OUT, reasons=("gpu_lost",))


# Its share


def test_a_node_in_good_state_has_all_of_its_weight() -> None:
    assert a_node(weight=2.5).share(100.0) == 2.5


def test_a_node_that_joins_or_recovers_ramps_up() -> None:
    node = a_node(weight=2.0)
    node.ramp_from_s = 100.0

    assert node.share(100.0) == pytest.approx(2.0 * RAMP_FLOOR)
    assert node.share(100.5) < 2.0 * 0.15  # far below its share in the first half second
    assert node.share(100.0 + RAMP_S / 2) == pytest.approx(2.0 * 0.55)
    assert node.share(100.0 + RAMP_S) == 2.0


def test_a_ramp_that_is_still_to_begin_counts_as_its_start() -> None:
    node = a_node()
    node.ramp_from_s = 100.0

    assert node.share(99.0) == pytest.approx(RAMP_FLOOR)


def test_a_node_that_pushed_back_is_cut_and_comes_back() -> None:
    node = a_node()
    node.cut_s = 100.0

    assert node.share(100.0) == pytest.approx(CUT_FLOOR)
    assert node.share(100.0 + CUT_S / 2) == pytest.approx((1.0 + CUT_FLOOR) / 2)
    assert node.share(100.0 + CUT_S) == 1.0


def test_degraded_health_halves_it() -> None:
    node = a_node(weight=4.0)
    node.health = DEGRADED

    assert node.share(100.0) == 2.0


@given(st.floats(0.01, 100.0), st.floats(0.0, 30.0), st.floats(0.0, 30.0), st.booleans())
def test_a_share_is_never_nothing_and_never_more_than_the_weight(
    weight: float, since_ramp_s: float, since_cut_s: float, degraded: bool
) -> None:
    node = a_node(weight=weight)
    node.ramp_from_s = 100.0 - since_ramp_s
    node.cut_s = 100.0 - since_cut_s
    node.health = DEGRADED if degraded else HealthState()

    assert 0.0 < node.share(100.0) <= weight
    assert node.share(100.0) <= node.share(100.5) + 1e-9


# Its word


def test_each_state_has_its_word_and_the_gravest_counts() -> None:
    node = a_node()
    words = [node.state(100.0)]
    node.health = DEGRADED
    words.append(node.state(100.0))
    node.blocked_until_s = 101.0
    words.append(node.state(100.0))
    node.ejected_until_s = 101.0
    words.append(node.state(100.0))
    node.breaker.record(node.breaker.unguarded(), False, 100.0)
    words.append(node.state(100.0))
    node.breaker.nudge()
    node.breaker.try_acquire(100.0)
    words.append(node.state(100.0))
    node.wedged_since_s = 99.0
    words.append(node.state(100.0))
    node.health = OUT
    words.append(node.state(100.0))
    node.check_up = False
    words.append(node.state(100.0))
    node.drained_by_agent = True
    words.append(node.state(100.0))

    assert tuple(words) == NODE_STATES


def test_a_node_is_blocked_until_its_time_is_over() -> None:
    node = a_node()
    node.blocked_until_s = 101.0

    assert (node.state(100.9), node.state(101.0)) == ("blocked", "ready")


@pytest.mark.parametrize("by", ["drained_by_operator", "drained_by_agent"])
def test_either_may_drain(by: str) -> None:
    node = a_node()
    assert not node.drained
    setattr(node, by, True)

    assert node.drained
    assert node.state(0.0) == "drained"


def test_it_is_known_down_by_checks_or_by_its_agent_only() -> None:
    node = a_node()
    node.breaker.record(node.breaker.unguarded(), False, 100.0)
    node.blocked_until_s = 200.0
    node.health = DEGRADED
    assert not node.known_down

    node.health = OUT
    assert node.known_down
    node.health = HealthState()
    node.check_up = False
    assert node.known_down
    node.check_up = True
    assert not node.known_down


def test_any_evidence_judges_it() -> None:
    assert not a_node().judged
    for name, value in [("check_up", False), ("answered_s", 1.0), ("report", NodeReport(id="n", url="u"))]:
        node = a_node()
        setattr(node, name, value)
        assert node.judged


# What it takes


def test_it_has_room_up_to_its_limit() -> None:
    node = a_node(max_in_flight=2)
    node.load.begin()
    assert node.has_room()
    node.load.begin()
    assert not node.has_room()
    node.load.end()
    assert node.has_room()

    unlimited = a_node()
    unlimited.load.rif = 10**6
    assert unlimited.has_room()


def test_it_serves_what_is_configured_before_what_it_lists() -> None:
    node = a_node(models=("a",))
    node.listed_models = frozenset({"b"})

    assert (node.serves("a"), node.serves("b")) == (True, False)


def test_it_serves_what_it_lists_and_nobody_knows_before() -> None:
    node = a_node()
    assert node.serves("a") is None

    node.listed_models = frozenset({"a"})
    assert (node.serves("a"), node.serves("b")) == (True, False)
    node.listed_models = frozenset()
    assert node.serves("a") is False


def test_a_node_without_a_list_serves_any_model() -> None:
    node = a_node()
    node.listed_models = ANY_MODEL

    assert node.serves("whatever") is True


def test_it_tells_its_state() -> None:
    node = a_node()
    node.load.begin()

    assert repr(node) == "<Node n ready rif=1 breaker=closed>"


# Where it is


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000", "https://gpu-7", "http://[::1]:8000/prefix", "http://n:1/"])
def test_a_plain_url_is_taken_as_it_is(url: str) -> None:
    assert plain_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        *("", "n:1", "ftp://n", "http://", "http://:80", "http://user@n", "http://n?x=1", "http://n#x", "http://n:0"),
        *("http://n:99999", "http://n:x", "http://n/a b", "http://n\r\nx: y", "http://gpü"),
    ],
)
def test_a_url_with_anything_else_in_it_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        plain_url(url)


# What it is


def test_a_nodes_engine_is_the_configured_one_else_its_agents_else_its_model_lists() -> None:
    node = a_node()
    assert node.engine is None
    node.listed_engine = "vllm"
    assert node.engine == "vllm"
    node.report = NodeReport(id="n", url="http://n:1", engine="sglang")
    assert node.engine == "sglang"
    node.report = NodeReport(id="n", url="http://n:1")
    assert node.engine == "vllm"
    node.config = NodeConfig(url="http://n:1", engine="other")
    assert node.engine == "other"
