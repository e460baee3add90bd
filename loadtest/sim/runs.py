"""From names to runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from loadtest.sim.arrival import Arrival
from loadtest.sim.oracle import Oracle
from loadtest.sim.policies import Policy, PrefixFirst, Target, TokenCount, simple
from loadtest.sim.predicted import Predicted
from loadtest.sim.results import Figures
from loadtest.sim.scenario import Scenario
from loadtest.sim.traces import scaled
from loadtest.sim.world import World

POLICIES = (
    "random",
    "round_robin",
    "least_outstanding",
    "power_of_two",
    "weighted",
    "weighted_blind",
    "prefix",
    "token_count",
    "predicted_cost",
    "oracle",
)


def make(name: str, targets: Sequence[Target], rng: Random, world: World) -> Policy:
    """The policy of that name for one balancer."""
    block_tokens = world.scenario.fleet[0].block_tokens
    if name == "predicted_cost":
        return Predicted(name, targets, rng, block_tokens, world.scenario.cost)
    if name == "oracle":
        return Oracle(name, targets, rng, world.engines, world.answers)
    policy = simple(name, targets, rng)
    if isinstance(policy, PrefixFirst | TokenCount):
        policy.resize(block_tokens)
    return policy


def simulate(
    name: str,
    scenario: Scenario,
    arrivals: Sequence[Arrival],
    progress: Callable[[int], None] | None = None,
) -> Figures:
    """One policy, one run."""
    world = World(scenario, lambda targets, rng, world: make(name, targets, rng, world))
    return world.run(arrivals, progress)


# Near saturation: the largest rate at which the oracle still keeps the SLO for this share of requests.
SATURATED_SLO_RATIO = 0.80


def saturation(scenario: Scenario, arrivals: Sequence[Arrival], low: float, high: float, steps: int) -> float:
    """The largest rate scale, by bisection between two scales, at which the oracle meets the SLO for 80 %."""
    calm = replace(scenario, faults=(), balancers=1)
    for _ in range(steps):
        middle = (low * high) ** 0.5
        if simulate("oracle", calm, scaled(arrivals, middle)).slo_ratio >= SATURATED_SLO_RATIO:
            low = middle
        else:
            high = middle
    return low
