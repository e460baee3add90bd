"""Who is worse than the others, who only looks like it, and how many may be left alone for it."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.breaker import BreakerPolicy, Permit
from balancer.core.health import HealthPolicy
from balancer.core.node import Node, NodeConfig
from balancer.core.outcome import Outcome
from balancer.core.outlier import Ejection, Member, OutlierPolicy, Tally, eject_s, judge, most_ejected
from balancer.core.request import InferenceRequest
from balancer.core.selection import RoutingPolicy, least_outstanding, pick
from balancer.metrics import Metrics
from balancer.registry import Registry

POLICY = OutlierPolicy()


def a_tally(
    *, good: int = 0, bad: int = 0, begun: int = 0, broken: int = 0, slow: float = 1.0, timed: int = 0
) -> Tally:
    tally = Tally()
    tally.good, tally.bad, tally.begun, tally.broken = good, bad, begun, min(begun, broken)
    for _ in range(timed):
        tally.took(slow * 0.2, 0.2)
    return tally


def member(eligible: bool = True, ejected: bool = False, ejections: int = 0, **counts: Any) -> Member:
    return Member(tally=a_tally(**counts), eligible=eligible, ejected=ejected, ejections=ejections)


def judged(*group: Member, **policy: Any) -> list[Ejection]:
    return judge(group, OutlierPolicy(**policy))


GOOD = {"good": 40}


# Compared


@pytest.mark.parametrize("size", [2, 3, 4, 8, 50])
def test_a_node_that_fails_while_the_others_do_not_stands_out(size: int) -> None:
    found = judged(member(good=15, bad=5), *(member(**GOOD) for _ in range(size - 1)))

    assert [(one.at, one.reason, one.value, one.others) for one in found] == [(0, "failures", 0.25, 0.0)]


def test_a_node_that_breaks_streams_stands_out_though_most_of_its_answers_are_good() -> None:
    found = judged(member(good=95, bad=5, begun=20, broken=5), *(member(good=100, begun=20) for _ in range(3)))

    assert [(one.at, one.reason) for one in found] == [(0, "broken_streams")]


def test_a_node_ten_times_slower_stands_out() -> None:
    found = judged(member(timed=12, slow=10.0), *(member(timed=30) for _ in range(3)))

    assert [(one.at, one.reason) for one in found] == [(0, "slow")]
    assert found[0].value == pytest.approx(10.0)


@pytest.mark.parametrize("slow", [2.0, 4.9])
def test_another_kind_of_gpu_does_not(slow: float) -> None:
    assert judged(member(timed=100, slow=slow), *(member(timed=100) for _ in range(3))) == []


def test_what_hurts_nobody_is_no_slowness() -> None:
    quick = [Member(tally=Tally(), eligible=True) for _ in range(4)]
    for at, one in enumerate(quick):
        for _ in range(50):
            one.tally.took(0.01 if at == 0 else 0.001, 0.01)

    assert judge(quick, POLICY) == []


def test_everybody_failing_alike_is_nobodys_fault() -> None:
    assert judged(*(member(good=20, bad=20) for _ in range(4))) == []


def test_few_requests_say_nothing() -> None:
    assert judged(member(bad=9), *(member(**GOOD) for _ in range(3))) == []
    assert judged(member(good=40, bad=1), *(member(**GOOD) for _ in range(3))) == []


def test_a_node_alone_has_nobody_to_be_compared_with() -> None:
    assert judged(member(bad=100)) == []
    assert judged(member(bad=100), member(good=3)) == []


def test_two_bad_ones_do_not_hide_each_other() -> None:
    found = judged(*(member(bad=30) for _ in range(2)), *(member(**GOOD) for _ in range(6)))

    assert {one.at for one in found} == {0, 1}


def test_one_that_came_back_needs_less_to_be_sent_away_again() -> None:
    others = [member(**GOOD) for _ in range(3)]
    assert judged(member(bad=3), *others) == []
    assert [one.for_s for one in judged(member(bad=3, ejections=2), *others)] == [POLICY.eject_s * 4]


def test_it_can_be_left_out() -> None:
    others = [member(timed=100) for _ in range(3)]
    assert judged(member(timed=100, slow=50.0), *others, slow_factor=None) == []


# How long, and how many


def test_ejections_grow_up_to_the_longest() -> None:
    assert [eject_s(POLICY, count) for count in (0, 1, 2, 5, 1000)] == [10.0, 20.0, 40.0, 300.0, 300.0]


@pytest.mark.parametrize(("size", "most"), [(1, 0), (2, 1), (3, 1), (4, 1), (7, 2), (10, 3), (1000, 300)])
def test_no_more_than_its_share_of_a_fleet_is_ejected(size: int, most: int) -> None:
    assert most_ejected(POLICY, size) == most


counts = st.integers(0, 60)
members = st.builds(
    member,
    eligible=st.booleans(),
    ejected=st.booleans(),
    ejections=st.integers(0, 5),
    good=counts,
    bad=counts,
    begun=counts,
    broken=counts,
    timed=st.integers(0, 30),
    slow=st.floats(0.1, 100.0),
)


@given(st.lists(members, max_size=12), st.floats(0.0, 1.0))
def test_half_of_the_nodes_stay_and_the_cap_holds_whatever_they_do(group: list[Member], ratio: float) -> None:
    policy = OutlierPolicy(max_ejected_ratio=ratio)
    ejections = judge(group, policy)

    gone = {one.at for one in ejections}
    assert len(gone) == len(ejections)
    assert not any(group[at].ejected for at in gone)
    if gone:
        assert len(gone) + sum(one.ejected for one in group) <= most_ejected(policy, len(group))
        left = sum(one.eligible and at not in gone for at, one in enumerate(group))
        assert left >= max(1, math.ceil(len(group) / 2))


@given(st.lists(st.integers(0, 100), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_nobody_is_ejected_for_a_share_within_the_margin(bads: list[int], rng: Random) -> None:
    group = [member(good=1000 - bad, bad=bad) for bad in bads]
    worst = max(bads) - min(bads)

    if worst < 100:
        assert judge(group, POLICY) == []


# A fleet, by the second: 40 requests a second on four nodes, half of them streams


class Served:
    """What a registry's nodes are sent, on a clock of its own."""

    def __init__(self, nodes: int = 4, seed: int = 1, **policy: Any) -> None:
        self.now = 1000.0
        self.rng = Random(seed)
        self.registry = Registry(
            routing=RoutingPolicy(),
            breaker=BreakerPolicy(),
            health=HealthPolicy(),
            outlier=OutlierPolicy(**policy),
            stale_s=5.0,
            metrics=Metrics(),
            now=lambda: self.now,
            rng=self.rng,
        )
        for number in range(nodes):
            self.registry.put(NodeConfig(url=f"http://n{number}:1", id=f"n{number}", models=("m",)))
        self.bad = next(iter(self.registry.nodes.values()))
        self.picked: list[tuple[float, str]] = []
        self.ends: list[tuple[float, int, Node, Permit, bool, float, Outcome]] = []
        self.least_eligible = nodes

    def run(self, seconds: float, answer: Callable[[Node, bool], tuple[float, Outcome]], rate: float = 40.0) -> None:
        """`answer`: node, whether a stream -> seconds it takes, and how it ends."""
        ends = self.ends
        until_s, look_s = self.now + seconds, self.now
        while self.now < until_s:
            self.now += 1.0 / rate
            while ends and ends[0][0] <= self.now:
                at_s, _, node, permit, stream, took_s, outcome = heapq.heappop(ends)
                self._end(node, permit, stream, took_s, outcome, at_s)
            if self.now >= look_s + 1.0:
                look_s = self.now
                self.registry.compare(self.now)
            candidates = self.registry.candidates("m", self.now)
            self.least_eligible = min(self.least_eligible, len(candidates.nodes))
            request = cast(InferenceRequest, None)
            node, _ = pick(candidates, request, least_outstanding, (), self.now, self.rng)
            assert node is not None
            permit = self.registry.acquire(node, panic=candidates.panic, now=self.now)
            assert permit is not None
            stream = self.rng.random() < 0.5
            took_s, outcome = answer(node, stream)
            took_s *= self.rng.uniform(0.5, 1.5)
            self.picked.append((self.now, node.id))
            heapq.heappush(ends, (self.now + took_s, len(self.picked), node, permit, stream, took_s, outcome))

    def _end(self, node: Node, permit: Permit, stream: bool, took_s: float, outcome: Outcome, now: float) -> None:
        if stream:
            node.tally.begun += 1.0
            node.tally.broken += outcome is not Outcome.OK
        node.tally.took(took_s, 0.5)
        self.registry.settle(node, permit, outcome, now)

    def share(self, from_s: float) -> float:
        """The bad node's share of what was sent from then on."""
        sent = Counter(id_ for at_s, id_ in self.picked if at_s >= from_s)
        return sent[self.bad.id] / sum(sent.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("broken", [0.3, 0.5, 1.0])
def test_a_node_that_breaks_streams_midway_has_five_percent_of_traffic_after_three_seconds(
    broken: float, seed: int
) -> None:
    fleet = Served(seed=seed)

    def answer(node: Node, stream: bool) -> tuple[float, Outcome]:
        if node is fleet.bad and stream and fleet.rng.random() < broken:
            return 0.2, Outcome.TRUNCATED
        return 0.5, Outcome.OK

    fleet.run(30.0, lambda node, stream: (0.5, Outcome.OK))
    begun_s = fleet.now
    fleet.run(63.0, answer)
    assert fleet.share(begun_s + 3.0) <= 0.05


@pytest.mark.parametrize("seed", range(5))
def test_a_node_ten_times_slower_has_five_percent_of_requests(seed: int) -> None:
    fleet = Served(seed=seed)
    fleet.run(30.0, lambda node, stream: (0.5, Outcome.OK))
    begun_s = fleet.now
    fleet.run(63.0, lambda node, stream: (5.0 if node is fleet.bad else 0.5, Outcome.OK))
    assert fleet.share(begun_s) <= 0.05
    assert fleet.bad.ejections >= 1


def test_a_node_that_is_well_again_gets_its_share_back() -> None:
    fleet = Served()
    fleet.run(10.0, lambda node, stream: (0.5, Outcome.TRUNCATED if node is fleet.bad else Outcome.OK))
    assert fleet.share(fleet.now - 3.0) <= 0.05
    fleet.run(200.0, lambda node, stream: (0.5, Outcome.OK))
    assert fleet.share(fleet.now - 60.0) == pytest.approx(0.25, abs=0.03)
    assert fleet.bad.ejections == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("failing", [0.0, 0.3, 0.5])
def test_a_fleet_that_fails_at_random_is_not_halved(failing: float, seed: int) -> None:
    fleet = Served(seed=seed)

    def answer(node: Node, stream: bool) -> tuple[float, Outcome]:
        return 0.2, Outcome.SERVER_ERROR if fleet.rng.random() < failing else Outcome.OK

    fleet.run(120.0, answer)
    assert fleet.least_eligible >= 2
    assert sum(node.ejections > 0 for node in fleet.registry.nodes.values()) <= 1
