"""Who may be asked, and who is."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.breaker import Breaker, BreakerPolicy
from balancer.core.health import HealthState, NodeReport, Verdict
from balancer.core.node import Node, NodeConfig
from balancer.core.request import InferenceRequest, NodeId
from balancer.core.selection import (
    FULL_SCAN,
    SAMPLE,
    Candidates,
    Choose,
    RoutingPolicy,
    least_outstanding,
    outstanding_score,
    pick,
    policy_named,
    power_of_two,
    sift,
    weighted,
    weighted_scores,
)

NOW = 100.0
REQUEST = cast(InferenceRequest, None)  # no policy looks at it yet
POLICY = RoutingPolicy()
OUT = HealthState(verdict=Verdict.OUT, reasons=("gpu_lost",))


def a_node(id_: str, *, rif: int = 0, breaker: BreakerPolicy | None = None, **config: Any) -> Node:
    policy = breaker or BreakerPolicy(consecutive_failures=1)
    node = Node(NodeConfig(url=f"http://{id_}:1", **config), NodeId(id_), Breaker(policy, Random(id_)))
    node.load.rif = rif
    return node


def fleet(count: int, **config: Any) -> list[Node]:
    return [a_node(f"n{at:03d}", **config) for at in range(count)]


def trip(node: Node, now: float = NOW) -> Node:
    node.breaker.record(node.breaker.unguarded(), False, now)
    assert not node.breaker.is_closed
    return node


def ids(nodes: Sequence[Node]) -> list[str]:
    return [node.id for node in nodes]


def chosen(choose: Choose, nodes: Sequence[Node], times: int, *, hold: bool = False, now: float = NOW) -> Counter[str]:
    """Who is chosen how often; with `hold` every choice stays in flight."""
    rng = Random(1)
    counts: Counter[str] = Counter()
    for _ in range(times):
        node = choose(nodes, REQUEST, now, rng)
        counts[node.id] += 1
        if hold:
            node.load.begin()
    return counts


# Who may be asked


def test_nodes_in_good_state_may_all_be_asked() -> None:
    nodes = fleet(4)

    assert sift(nodes, POLICY, NOW) == Candidates(tuple(nodes), False, math.inf, 4, None)


def test_a_drained_node_is_never_asked() -> None:
    nodes = fleet(3)
    nodes[0].drained_by_operator = True
    nodes[1].drained_by_agent = True

    assert ids(sift(nodes, POLICY, NOW).nodes) == ["n002"]
    nodes[2].drained_by_operator = True
    assert sift(nodes, POLICY, NOW) == Candidates((), False, math.inf, 3, None)


def test_a_node_known_to_be_down_is_never_asked_not_even_in_panic() -> None:
    nodes = fleet(4)
    nodes[0].check_up = False
    nodes[1].health = OUT

    assert ids(sift(nodes, POLICY, NOW).nodes) == ["n002", "n003"]
    nodes[2].check_up = nodes[3].check_up = False
    assert sift(nodes, POLICY, NOW).nodes == ()


def test_a_silent_node_may_be_asked() -> None:
    nodes = fleet(2)
    nodes[0].check_up = None
    nodes[0].health = HealthState()

    assert len(sift(nodes, POLICY, NOW).nodes) == 2


def test_an_open_breaker_keeps_its_node_out_until_its_time_is_over() -> None:
    nodes = fleet(4)
    trip(nodes[0])
    until_s = nodes[0].breaker.admits_from_s()

    found = sift(nodes, POLICY, NOW)

    assert ids(found.nodes) == ["n001", "n002", "n003"]
    assert (found.panic, found.until_s) == (False, until_s)
    assert len(sift(nodes, POLICY, until_s).nodes) == 4


def test_a_node_that_pushed_back_is_left_alone_for_its_time() -> None:
    nodes = fleet(2)
    nodes[0].blocked_until_s = NOW + 2.0

    found = sift(nodes, POLICY, NOW)

    assert ids(found.nodes) == ["n001"]
    assert (found.panic, found.until_s, found.blocked_until_s) == (False, NOW + 2.0, None)
    assert len(sift(nodes, POLICY, NOW + 2.0).nodes) == 2


def test_when_all_push_back_nobody_is_asked_and_the_first_to_be_over_is_known() -> None:
    nodes = fleet(3)
    for at, node in enumerate(nodes):
        node.blocked_until_s = NOW + 5.0 - at

    found = sift(nodes, POLICY, NOW)

    assert (found.nodes, found.panic, found.blocked_until_s, found.until_s) == ((), False, NOW + 3.0, NOW + 3.0)


def test_with_fewer_than_half_left_breakers_are_ignored() -> None:
    nodes = fleet(4)
    trip(nodes[0])
    trip(nodes[1])
    assert not sift(nodes, POLICY, NOW).panic

    trip(nodes[2])
    found = sift(nodes, POLICY, NOW)

    assert found.panic
    assert len(found.nodes) == 4


def test_the_only_node_is_asked_though_its_breaker_is_open() -> None:
    found = sift([trip(a_node("a"))], POLICY, NOW)

    assert (ids(found.nodes), found.panic) == (["a"], True)


def test_nodes_that_nobody_could_miss_are_no_reason_for_panic() -> None:
    nodes = fleet(4)
    for node in nodes[1:]:
        node.check_up = False

    assert not sift(nodes, POLICY, NOW).panic  # what is left is all that is up: ignoring breakers would add nobody


def test_without_a_panic_ratio_one_good_node_is_enough() -> None:
    nodes = fleet(4)
    for node in nodes[1:]:
        trip(node)

    assert ids(sift(nodes, RoutingPolicy(panic_ratio=0.0), NOW).nodes) == ["n000"]


STATES = st.sampled_from(["good", "good", "open", "half-open", "probing", "down", "out", "blocked", "drained"])


@st.composite
def fleets(draw: st.DrawFn) -> list[Node]:
    nodes = []
    for at, state in enumerate(draw(st.lists(STATES, max_size=12))):
        node = a_node(f"n{at:03d}", breaker=BreakerPolicy(consecutive_failures=1, open_s=30.0))
        if state in ("open", "half-open", "probing"):
            trip(node, NOW - 20.0)
        if state in ("half-open", "probing"):
            node.breaker.nudge()
            permit, _ = node.breaker.try_acquire(NOW - 5.0)
            assert permit is not None
            if state == "half-open":
                node.breaker.release(permit)
        node.check_up = False if state == "down" else None
        node.health = OUT if state == "out" else HealthState()
        node.blocked_until_s = NOW + 3.0 if state == "blocked" else NOW - 1.0
        node.drained_by_agent = state == "drained"
        nodes.append(node)
    return nodes


@given(fleets(), st.sampled_from([0.0, 0.5, 1.0]))
def test_evidence_never_takes_away_more_than_it_may(nodes: list[Node], ratio: float) -> None:
    found = sift(nodes, RoutingPolicy(panic_ratio=ratio), NOW)
    free = [node for node in nodes if not node.drained and node.blocked_until_s <= NOW]
    up = [node for node in free if not node.known_down]

    assert set(found.nodes) <= set(up)
    assert len(found.nodes) >= min(len(up), max(1, math.ceil(ratio * len(up))))  # half stay, and never fewer than one
    assert all(node in found.nodes for node in up if node.breaker.is_closed)
    if found.panic:
        assert list(found.nodes) == up
    else:
        assert all(node.breaker.admits(NOW, alone=True) for node in found.nodes)
    assert found.serving == len(nodes)
    assert found.until_s > NOW
    assert (found.blocked_until_s is None) or not found.nodes


@given(fleets())
def test_what_was_found_holds_until_its_time(nodes: list[Node]) -> None:
    found = sift(nodes, POLICY, NOW)
    later = min(found.until_s, NOW + 1000.0)

    again = sift(nodes, POLICY, math.nextafter(later, NOW))

    assert (again.nodes, again.panic) == (found.nodes, found.panic)


# Who is asked


def candidates(nodes: Sequence[Node]) -> Candidates:
    bounded = any(node.config.max_in_flight is not None for node in nodes)
    return Candidates(tuple(nodes), False, math.inf, len(nodes), None, bounded)


def picked(nodes: Sequence[Node], choose: Choose = least_outstanding, excluded: Sequence[str] = ()) -> Node | None:
    return pick(candidates(nodes), REQUEST, choose, {NodeId(id_) for id_ in excluded}, NOW, Random(1))[0]


def test_nobody_is_picked_from_nobody() -> None:
    assert picked([]) is None


def test_a_node_is_tried_once() -> None:
    nodes = fleet(2)

    node = picked(nodes, excluded=["n000"])

    assert node is nodes[1]
    assert picked(nodes, excluded=["n000", "n001"]) is None


def test_a_full_node_is_passed_over() -> None:
    nodes = [a_node("full", rif=2, max_in_flight=2), a_node("free", rif=50)]

    assert picked(nodes) is nodes[1]
    assert picked(nodes[:1]) is None


class Looked:
    """A policy that remembers how many nodes it was shown."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def __call__(self, nodes: Sequence[Node], request: InferenceRequest, now: float, rng: Random) -> Node:
        self.counts.append(len(nodes))
        return least_outstanding(nodes, request, now, rng)


@pytest.mark.parametrize(("count", "shown"), [(2, 2), (FULL_SCAN, FULL_SCAN), (FULL_SCAN + 1, SAMPLE), (1000, SAMPLE)])
def test_of_many_nodes_a_few_are_priced(count: int, shown: int) -> None:
    looked = Looked()
    picked(fleet(count), looked)

    assert looked.counts == [shown]


def test_sampling_spreads_over_the_whole_fleet() -> None:
    nodes = fleet(100)
    rng = Random(1)
    for _ in range(1000):
        node, _ = pick(candidates(nodes), REQUEST, least_outstanding, (), NOW, rng)
        assert node is not None
        node.load.begin()

    assert max(node.load.rif for node in nodes) <= 12  # 10 each would be even
    assert min(node.load.rif for node in nodes) >= 8


def test_the_last_node_with_room_is_found_though_no_sample_has_it() -> None:
    nodes = fleet(200, max_in_flight=1)
    for node in nodes:
        node.load.begin()
    nodes[137].load.end()

    assert picked(nodes) is nodes[137]


@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.sets(st.integers(0, 39)), st.integers(0, 2**32))
def test_a_usable_node_is_always_found_and_no_other(count: int, full: set[int], tried: set[int], seed: int) -> None:
    nodes = fleet(count, max_in_flight=1)
    for at in full:
        if at < count:
            nodes[at].load.begin()
    excluded = {NodeId(f"n{at:03d}") for at in tried}
    usable = [node for at, node in enumerate(nodes) if at not in full and at not in tried]

    for choose in map(policy_named, ("least_outstanding", "power_of_two", "round_robin", "weighted")):
        node, _ = pick(candidates(nodes), REQUEST, choose, excluded, NOW, Random(seed))
        assert node in usable if usable else node is None


# Least outstanding


def test_the_least_busy_node_for_its_weight_is_asked() -> None:
    nodes = [a_node("a", rif=3), a_node("b", rif=5, weight=2.0), a_node("c", rif=4)]

    assert chosen(least_outstanding, nodes, 20) == {"b": 20}  # 6 / 2 before 4 / 1


def test_load_spreads_by_weight() -> None:
    nodes = [a_node("a"), a_node("b", weight=3.0)]

    assert chosen(least_outstanding, nodes, 400, hold=True) == {"a": 100, "b": 300}


def test_among_equals_chance_decides() -> None:
    counts = chosen(least_outstanding, fleet(4), 4000)

    assert all(900 < counts[node.id] < 1100 for node in fleet(4))


def test_a_node_that_ramps_up_was_cut_or_is_degraded_counts_for_less() -> None:
    plain, ramping, cut, degraded = nodes = fleet(4)
    ramping.ramp_from_s = NOW - 1.0
    cut.cut_s = NOW
    degraded.health = HealthState(verdict=Verdict.DEGRADED, reasons=("clock_low",))

    assert [outstanding_score(node, NOW) for node in nodes] == [1.0] * 4, "an idle one is tried at once"
    for node in nodes:
        node.load.rif = 1
    scores = [outstanding_score(node, NOW) for node in nodes]

    assert scores == pytest.approx([2.0, 1.0 + 1.0 / 0.19, 3.0, 3.0])
    assert chosen(least_outstanding, nodes, 10) == {plain.id: 10}


def test_the_price_of_failures_fades() -> None:
    good, failing = nodes = fleet(2)
    good.load.rif = 3
    failing.load.failed(NOW)

    assert chosen(least_outstanding, nodes, 10) == {good.id: 10}
    assert chosen(least_outstanding, nodes, 10, now=NOW + 60.0) == {failing.id: 10}


# Power of two


def test_of_two_drawn_the_less_loaded_is_asked() -> None:
    nodes = [a_node("busy", rif=9), a_node("b"), a_node("c")]
    counts = chosen(power_of_two, nodes, 3000)

    assert counts["busy"] == 0
    assert abs(counts["b"] - counts["c"]) < 200


def test_two_choices_keep_the_fleet_even() -> None:
    counts = chosen(power_of_two, fleet(10), 1000, hold=True)

    assert max(counts.values()) - min(counts.values()) <= 6


# Round robin


def test_each_node_has_its_turn_in_the_order_of_ids() -> None:
    nodes = [a_node(id_) for id_ in ("c", "a", "b")]
    turns = policy_named("round_robin")
    rng = Random(1)

    assert [turns(nodes, REQUEST, NOW, rng).id for _ in range(7)] == ["a", "b", "c", "a", "b", "c", "a"]


def test_nodes_that_come_and_go_do_not_restart_the_round() -> None:
    a, b, c, d = (a_node(id_) for id_ in "abcd")
    turns = policy_named("round_robin")
    rng = Random(1)

    seen = [turns(nodes, REQUEST, NOW, rng).id for nodes in ([a, b, d], [a, b, d], [a, d], [a, c], [a, b, c])]

    assert seen == ["a", "b", "d", "a", "b"]


def test_two_services_do_not_share_their_turns() -> None:
    nodes = fleet(2)
    first, second = policy_named("round_robin"), policy_named("round_robin")
    rng = Random(1)
    first(nodes, REQUEST, NOW, rng)

    assert second(nodes, REQUEST, NOW, rng).id == "n000"


# The weighted score


def reported(id_: str, queue: float | None, latency_s: float | None, memory: float | None, **config: Any) -> Node:
    node = a_node(id_, **config)
    node.report = NodeReport(
        id=id_, url="u", queue_depth=queue, avg_latency_seconds=latency_s, gpu_memory_utilization=memory
    )
    return node


def test_the_score_is_the_weighted_sum_of_shares_of_the_largest() -> None:
    nodes = [reported("a", 10, 1.0, 0.4), reported("b", 5, 4.0, 0.8), reported("c", 0, 2.0, 0.0)]

    scores = weighted_scores(nodes)

    assert scores == pytest.approx({"a": 0.5 + 0.075 + 0.1, "b": 0.25 + 0.3 + 0.2, "c": 0.15})
    assert chosen(weighted, nodes, 10) == {"c": 10}


def test_what_nobody_reported_counts_half() -> None:
    silent = a_node("silent")

    assert weighted_scores([silent, reported("a", 4, None, 1.0)]) == pytest.approx(
        {"silent": 0.5 * 0.0 + 0.3 * 0.5 + 0.2 * 0.5, "a": 0.5 + 0.15 + 0.2}
    )


def test_without_any_report_our_own_requests_are_the_queue() -> None:
    nodes = [a_node("a", rif=4), a_node("b", rif=1)]

    assert chosen(weighted, nodes, 10) == {"b": 10}


def test_an_idle_fleet_scores_alike() -> None:
    assert set(weighted_scores([reported("a", 0, 0.0, 0.0), reported("b", 0, 0.0, 0.0)]).values()) == {0.0}


def test_between_two_reports_nobody_is_herded_upon() -> None:
    nodes = [reported(f"n{at}", 10 + at % 2, 1.0, 0.5) for at in range(4)]

    counts = chosen(weighted, nodes, 100, hold=True)

    assert all(20 <= counts[node.id] <= 30 for node in nodes)


def test_a_node_that_always_fails_ranks_last() -> None:
    failing, worst = reported("failing", 0, 0.1, 0.1), reported("worst", 50, 9.0, 1.0)
    for _ in range(5):
        failing.load.failed(NOW)

    assert chosen(weighted, [failing, worst], 10) == {"worst": 10}


# A small fleet at work


def run(choose: Choose, nodes: list[Node], service_s: Callable[[Node], float | None], until_s: float) -> Counter[str]:
    """40 requests/s for a while, tried again elsewhere when they fail; who got how many attempts.

    `service_s` says how long a node takes; None fails at once. No breaker takes part.
    """
    rng = Random(11)
    running: list[tuple[float, int, Node]] = []
    attempts: Counter[str] = Counter()
    for at in range(int(40 * until_s)):
        now = at / 40
        while running and running[0][0] <= now:
            ended, _, node = heapq.heappop(running)
            node.load.end()
            node.load.succeeded(ended)
        tried: set[NodeId] = set()
        while (node := pick(candidates(nodes), REQUEST, choose, tried, now, rng)[0]) is not None:
            attempts[node.id] += 1
            tried.add(node.id)
            takes_s = service_s(node)
            if takes_s is not None:
                node.load.begin()
                heapq.heappush(running, (now + takes_s * rng.uniform(0.8, 1.2), at, node))
                break
            node.load.failed(now)
    return attempts


POLICIES = {"least_outstanding": 0.01, "power_of_two": 0.02, "weighted": 0.03}


@pytest.mark.parametrize(("name", "most"), POLICIES.items())
def test_a_black_hole_draws_next_to_nothing(name: Any, most: float) -> None:
    nodes = fleet(4)

    attempts = run(policy_named(name), nodes, lambda node: None if node.id == "n002" else 0.5, 120.0)

    assert attempts["n002"] / attempts.total() <= most


@pytest.mark.parametrize("name", POLICIES)
def test_a_black_hole_that_heals_is_found_again(name: Any) -> None:
    nodes = fleet(4)
    run(policy_named(name), nodes, lambda node: None if node.id == "n002" else 0.5, 30.0)
    for node in nodes:
        node.load.rif = 0
        node.load.failure_at_s -= 30.0  # the clock of the next run begins at 0 again

    attempts = run(policy_named(name), nodes, lambda node: 0.5, 120.0)

    assert attempts["n002"] / attempts.total() >= 0.15


def test_a_node_ten_times_slower_draws_a_fraction() -> None:
    nodes = fleet(4)

    attempts = run(least_outstanding, nodes, lambda node: 5.0 if node.id == "n001" else 0.5, 120.0)

    assert attempts["n001"] / attempts.total() <= 0.05


def test_a_fleet_of_equals_is_loaded_evenly() -> None:
    for name in POLICIES:
        attempts = run(policy_named(cast(Any, name)), fleet(4), lambda node: 0.5, 60.0)

        assert all(0.2 < count / attempts.total() < 0.3 for count in attempts.values())


# Wedged and ejected


def wedge(node: Node) -> Node:
    node.wedged_since_s = NOW - 1.0
    return node


def eject(node: Node, for_s: float = 5.0) -> Node:
    node.ejected_until_s = NOW + for_s
    return node


def test_a_wedged_node_is_not_asked_not_even_in_panic() -> None:
    nodes = fleet(4)
    wedge(nodes[0])
    assert ids(sift(nodes, POLICY, NOW).nodes) == ids(nodes[1:])
    for node in nodes[1:]:
        trip(node)
    found = sift(nodes, POLICY, NOW)
    assert (ids(found.nodes), found.panic) == (ids(nodes[1:]), True)


def test_wedged_nodes_are_asked_where_there_are_no_others() -> None:
    nodes = [wedge(node) for node in fleet(2)]
    found = sift(nodes, POLICY, NOW)
    assert (ids(found.nodes), found.panic) == (ids(nodes), True)


def test_an_ejected_node_passes_again_after_its_time() -> None:
    nodes = fleet(4)
    eject(nodes[0])
    found = sift(nodes, POLICY, NOW)
    assert (ids(found.nodes), found.panic, found.until_s) == (ids(nodes[1:]), False, NOW + 5.0)
    assert ids(sift(nodes, POLICY, NOW + 5.0).nodes) == ids(nodes)


def test_ejections_are_ignored_when_too_few_would_be_left() -> None:
    nodes = fleet(4)
    eject(nodes[0])
    for node in nodes[1:3]:
        trip(node)
    found = sift(nodes, POLICY, NOW)
    assert (ids(found.nodes), found.panic) == (ids(nodes), True)


@given(
    st.lists(st.sampled_from(["well", "wedged", "ejected", "open", "down"]), min_size=1, max_size=10),
    st.floats(0.0, 1.0),
)
def test_somebody_is_asked_while_somebody_might_answer(states: list[str], ratio: float) -> None:
    nodes = fleet(len(states))
    for node, state in zip(nodes, states, strict=True):
        if state == "wedged":
            wedge(node)
        elif state == "ejected":
            eject(node)
        elif state == "open":
            trip(node)
        elif state == "down":
            node.check_up = False
    found = sift(nodes, RoutingPolicy(panic_ratio=ratio), NOW)
    asked = {state for node, state in zip(nodes, states, strict=True) if node in found.nodes}

    assert "down" not in asked
    assert bool(asked) == (set(states) != {"down"})
    if asked & {"well", "open", "ejected"}:
        assert "wedged" not in asked
