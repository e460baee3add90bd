"""Candidates -> filter -> score -> pick.

Filters look at evidence (`sift`), a policy prices what is left (`choose`). Nothing here waits or reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from balancer.core.cost import CostPolicy
from balancer.core.node import CUT_S, RAMP_S, Node
from balancer.core.request import InferenceRequest, NodeId

# Up to this many candidates all are scored; of more, this many at random. 12 of 100 come within 1 % of all.
FULL_SCAN = 16
SAMPLE = 12
# While some node's share is cut, it is looked at again this often whether that is over.
CAUTION_LOOK_S = 1.0
# What a node that failed every recent attempt costs, in outstanding requests: more than a busy node ever holds.
FAILURE_PRICE_REQUESTS = 50.0

PolicyName = Literal["predicted_cost", "least_outstanding", "power_of_two", "prefix", "round_robin", "weighted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPolicy:
    """How a node is chosen. `panic_ratio`: with a smaller share of nodes eligible, evidence is ignored.

    `share_interval_s`: how often balancers with one Redis tell each other what they sent where; 0 is never.
    """

    policy: PolicyName = "predicted_cost"
    panic_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    share_interval_s: Annotated[float, Field(ge=0, le=1)] = 0.2
    cost: CostPolicy = field(default_factory=CostPolicy)


# What keeps a node that serves the model from being asked: an operator or its agent, its own Retry-After, active
# checks, its agent's verdict, its breaker.
Dropped = Literal["drained", "blocked", "down", "out", "wedged", "ejected", "breaker"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Who may be asked for one model now, good until `until_s` or until any evidence changes."""

    nodes: tuple[Node, ...]
    panic: bool
    until_s: float
    serving: int  # nodes that serve the model, whatever their state
    blocked_until_s: float | None  # set when back-pressure alone leaves nobody
    bounded: bool = False  # some node has a limit of requests in flight
    cautious: bool = False  # some node's share is cut: slow start, back-pressure, degraded
    uneven: bool = False  # some node's weight is not 1
    dropped: Mapping[NodeId, Dropped] = field(default_factory=dict, compare=False)  # nodes that serve it and may not


def sift(serving: Sequence[Node], policy: RoutingPolicy, now: float) -> Candidates:
    """Filter the nodes that serve a model by what is known of them.

    Drained nodes never pass. Nodes that asked to be left alone pass again after their time. When evidence of
    health leaves fewer than `panic_ratio` of the rest, breakers and ejections are ignored (panic); nodes that are
    known to be down stay out, since asking them costs time and cannot succeed. Nodes that are wedged pass only where
    there are no others.
    """
    ready = [node for node in serving if not node.drained]
    until_s = math.inf
    resting = [node for node in ready if node.blocked_until_s > now]
    for node in resting:
        until_s = min(until_s, node.blocked_until_s)
    awake = [node for node in ready if node.blocked_until_s <= now] if resting else ready
    up = [node for node in awake if not node.known_down]
    moving = [node for node in up if not node.is_wedged]
    all_wedged = bool(up) and not moving
    if not all_wedged:
        up = moving
    alone = not any(node.breaker.is_closed and node.ejected_until_s <= now for node in up)
    healthy = []
    for node in up:
        if node.ejected_until_s > now:
            until_s = min(until_s, node.ejected_until_s)
        elif node.breaker.admits(now, alone=alone):
            healthy.append(node)
        else:
            until_s = min(until_s, node.breaker.admits_from_s(alone=alone))
    panic = bool(up) and len(healthy) < max(1.0, policy.panic_ratio * len(ready)) and len(healthy) < len(up)
    panic = panic or all_wedged
    chosen = up if panic else healthy
    blocked_until_s = min(node.blocked_until_s for node in resting) if resting and not chosen else None
    cautious = any(_is_cut(node, now) for node in chosen)
    if cautious:
        until_s = min(until_s, now + CAUTION_LOOK_S)
    dropped: dict[NodeId, Dropped] = {}
    if len(chosen) < len(serving):
        passed = {node.id for node in chosen}
        dropped = {node.id: _dropped(node, now) for node in serving if node.id not in passed}
    bounded = any(node.limit < math.inf for node in chosen)
    uneven = any(node.weight != 1.0 for node in chosen)
    return Candidates(tuple(chosen), panic, until_s, len(serving), blocked_until_s, bounded, cautious, uneven, dropped)


def _dropped(node: Node, now: float) -> Dropped:
    """The filter that stopped it, in their order."""
    if node.drained:
        return "drained"
    if node.blocked_until_s > now:
        return "blocked"
    if node.check_up is False:
        return "down"
    if node.known_down:
        return "out"
    if node.is_wedged:
        return "wedged"
    return "ejected" if node.ejected_until_s > now else "breaker"


def _is_cut(node: Node, now: float) -> bool:
    return now - node.ramp_from_s < RAMP_S or now - node.cut_s < CUT_S or bool(node.health.reasons)


def usable(
    candidates: Candidates, excluded: Collection[NodeId], rng: Random, *, sampled: bool = True
) -> Sequence[Node]:
    """Candidates that have room and were not tried; of many, some at random."""
    nodes: Sequence[Node] = candidates.nodes
    if sampled and len(nodes) > FULL_SCAN:
        nodes = rng.sample(nodes, SAMPLE)
    if not (excluded or candidates.bounded):
        return nodes
    found = [node for node in nodes if node.has_room() and node.id not in excluded]
    if not found and len(candidates.nodes) > len(nodes):
        found = [node for node in candidates.nodes if node.has_room() and node.id not in excluded]
    return found


def pick(
    candidates: Candidates,
    request: InferenceRequest,
    choose: Choose,
    excluded: Collection[NodeId],
    now: float,
    rng: Random,
) -> tuple[Node | None, Sequence[Node]]:
    """One node among the candidates that has room and was not tried, and those it was compared with."""
    nodes = usable(candidates, excluded, rng, sampled=not isinstance(choose, RoundRobin))
    if not nodes:
        return None, nodes
    return (nodes[0] if len(nodes) == 1 else choose(nodes, request, now, rng)), nodes


Choose = Callable[[Sequence[Node], InferenceRequest, float, Random], Node]


def outstanding_score(node: Node, now: float) -> float:
    """Requests in flight over the node's share, plus the fading price of its failures (in requests).

    A share that is cut (slow start, back-pressure, degraded) is a price on what is there already: the first request to
    an idle newcomer costs what it costs elsewhere, so that it is tried at once.
    """
    load = node.load
    share = node.share(now) if _is_cut(node, now) else node.weight
    score = load.rif / share + 1.0 / node.weight
    if load.failure > 0.0:
        score += FAILURE_PRICE_REQUESTS * load.failure_now(now)
    return score


def _lowest(nodes: Iterable[Node], score: Callable[[Node, float], float], now: float, rng: Random) -> Node:
    best: Node | None = None
    best_score = math.inf
    ties = 1
    for node in nodes:
        value = score(node, now)
        if value < best_score:
            best, best_score, ties = node, value, 1
        elif value == best_score:
            ties += 1
            if rng.random() * ties < 1.0:
                best = node
    assert best is not None
    return best


def least_outstanding(nodes: Sequence[Node], request: InferenceRequest, now: float, rng: Random) -> Node:
    """The node with the fewest of our requests in flight for its weight."""
    return _lowest(nodes, outstanding_score, now, rng)


def power_of_two(nodes: Sequence[Node], request: InferenceRequest, now: float, rng: Random) -> Node:
    """The less loaded of two nodes drawn at random (Mitzenmacher 2001)."""
    return _lowest(rng.sample(nodes, 2), outstanding_score, now, rng)


# The prefix rule holds for a node that has at least this share of the prompt, while the fleet is even: requests in
# flight at most this many apart, or by at most this factor. The rule and its figures are those of cache-aware routers.
PREFIX_SHARE = 0.5
UNEVEN_REQUESTS = 32
UNEVEN_RATIO = 1.5


def prefix_first(nodes: Sequence[Node], held: Mapping[NodeId, int], blocks: int, now: float, rng: Random) -> Node:
    """Affinity as a rule: a node that holds the most of the prompt, if that is enough of it and the fleet is even.

    Else the fewest requests in flight for its weight. `held`: leading blocks at each node, of `blocks` in all.
    """
    if held:
        loads = [node.load.rif for node in nodes]
        fewest, most = min(loads), max(loads)
        if most - fewest <= UNEVEN_REQUESTS or most <= UNEVEN_RATIO * fewest:
            best = max(held.get(node.id, 0) for node in nodes)
            if best and best >= PREFIX_SHARE * blocks:
                nodes = [node for node in nodes if held.get(node.id) == best]
    return _lowest(nodes, outstanding_score, now, rng)


class RoundRobin:
    """Each node in turn, by the order of their ids, so that nodes coming and going do not restart the round."""

    def __init__(self) -> None:
        self._last: NodeId | None = None

    def __call__(self, nodes: Sequence[Node], request: InferenceRequest, now: float, rng: Random) -> Node:
        ordered = sorted(nodes, key=lambda node: node.id)
        last = self._last
        node = next((n for n in ordered if last is not None and n.id > last), ordered[0])
        self._last = node.id
        return node


# The score that people know: queue depth, latency, GPU memory, each as a share of the fleet's largest.
WEIGHTED_QUEUE = 0.5
WEIGHTED_LATENCY = 0.3
WEIGHTED_MEMORY = 0.2


def weighted(nodes: Sequence[Node], request: InferenceRequest, now: float, rng: Random) -> Node:
    """The lowest `0.5·queue + 0.3·latency + 0.2·GPU memory`, each normalised over the candidates.

    Our own picks since a node's last report count as queued there: a report knows nothing of them, and without
    them a whole interval's traffic goes to one node.
    """
    scores = weighted_scores(nodes)
    return _lowest(nodes, lambda node, at: scores[node.id] / node.share(at) + _failure(node, at), now, rng)


def _failure(node: Node, now: float) -> float:
    return 2.0 * node.load.failure_now(now)  # a node that always fails ranks behind the worst good one (score 1)


def weighted_scores(nodes: Sequence[Node]) -> Mapping[NodeId, float]:
    """The weighted score of each node (0 best, 1 worst); a part nobody reported counts as 0.5 for that node."""
    queues = _normalised({node.id: _queue_depth(node) for node in nodes})
    latencies = _normalised({node.id: node.report.avg_latency_seconds if node.report else None for node in nodes})
    memories = _normalised({node.id: node.report.gpu_memory_utilization if node.report else None for node in nodes})
    return {
        node.id: WEIGHTED_QUEUE * queues[node.id]
        + WEIGHTED_LATENCY * latencies[node.id]
        + WEIGHTED_MEMORY * memories[node.id]
        for node in nodes
    }


def _queue_depth(node: Node) -> float:
    reported = node.report.queue_depth if node.report else None
    return node.load.rif if reported is None else reported + node.load.picks_since_report


def _normalised(values: Mapping[NodeId, float | None]) -> Mapping[NodeId, float]:
    top = max((value for value in values.values() if value is not None), default=0.0)
    return {id_: 0.5 if value is None else (value / top if top > 0 else 0.0) for id_, value in values.items()}


def policy_named(name: PolicyName) -> Choose:
    """A scored policy with its own fresh state. KeyError for one that is not scored."""
    if name == "round_robin":
        return RoundRobin()
    return {"least_outstanding": least_outstanding, "power_of_two": power_of_two, "weighted": weighted}[name]
