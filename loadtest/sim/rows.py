"""The rows of the standard table: what is run, and what has to come out (the routing notes' "What it has to reach")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loadtest.sim.fleet import Fault, parse_fleet
from loadtest.sim.results import Figures
from loadtest.sim.scenario import Scenario

TraceName = Literal["mooncake", "conv", "code", "agents"]
STANDARD_POLICIES = (
    "round_robin",
    "least_outstanding",
    "weighted",
    "token_count",
    "predicted_cost",
    "oracle",
)
OURS = "predicted_cost"

Judge = Callable[[Mapping[str, Figures]], tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a row has to show: `judge` gives (seen, allowed) from the runs by their labels; seen may not exceed it."""

    text: str
    judge: Judge

    def verdict(self, runs: Mapping[str, Figures]) -> str:
        """One line: held or missed, and by how much."""
        seen, allowed = self.judge(runs)
        if seen <= allowed:
            return f"  holds   {self.text}: {seen:.3g} (allowed {allowed:.3g})"
        by = f" by {100 * (seen / allowed - 1):.0f} %" if allowed > 0 and math.isfinite(seen) else ""
        return f"  MISSED  {self.text}: {seen:.3g} (allowed {allowed:.3g}){by}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row. `rate_scale`: of the trace's own time (agents: requests/s); None: found near saturation.

    `variants` are further runs of a policy under other conditions: label -> (policy, changes of the scenario).
    """

    name: str
    title: str
    trace: TraceName
    fleet: str
    rate_scale: float | None
    bounds: tuple[Bound, ...]
    faults: tuple[Fault, ...] = ()
    stall_s: float | None = None
    balancers: int = 1
    without: tuple[str, ...] = ()  # policies left out of the standard table
    variants: Mapping[str, tuple[str, Mapping[str, Any]]] = field(default_factory=dict)

    def scenario(self, seed: int) -> Scenario:
        """Everything but traffic and policy; deadline 30 s and SLO are the defaults."""
        return Scenario(
            fleet=parse_fleet(self.fleet),
            faults=self.faults,
            stall_s=self.stall_s,
            balancers=self.balancers,
            seed=seed,
        )


def _ratio(figure: Callable[[Figures], float], other: str, allowed: float) -> Judge:
    return lambda runs: (figure(runs[OURS]) / figure(runs[other]), allowed)


def _p99_ttft(figures: Figures) -> float:
    return figures.ttft_s[2]


def _p99_e2e(figures: Figures) -> float:
    return figures.e2e_s[2]


def _points_below(ours: str, other: str, allowed: float) -> Judge:
    return lambda runs: (100 * (runs[other].slo_ratio - runs[ours].slo_ratio), allowed)


# Rates: `equal` near saturation (about 2.4 with the excerpt), `half` and `mixed` at 80 % of what bisection found for
# their fleets, the fault rows at 75 % of `equal`'s, so that seven good nodes still carry it, agents where one balancer
# keeps the SLO for about nine in ten.
HALF_SCALE = 1.0
MIXED_SCALE = 9.4
FAULT_SCALE = 1.75
AGENTS_PER_S = 70.0

ROWS: tuple[Row, ...] = (
    Row(
        name="equal",
        title="8 equal nodes near saturation",
        trace="mooncake",
        fleet="8xh100-70b",
        rate_scale=None,
        bounds=(
            Bound(text="P99 TTFT / oracle's", judge=_ratio(_p99_ttft, "oracle", 1.1)),
            Bound(text="P99 TTFT / least outstanding's", judge=_ratio(_p99_ttft, "least_outstanding", 0.6)),
        ),
    ),
    Row(
        name="half",
        title="half of 8 nodes half as fast",
        trace="mooncake",
        fleet="4xh100-70b+4xh100-70b/2",
        rate_scale=HALF_SCALE,
        bounds=(
            Bound(text="P99 e2e / least outstanding's", judge=_ratio(_p99_e2e, "least_outstanding", 0.75)),
            Bound(text="timeouts, %", judge=lambda runs: (100 * runs[OURS].timeout_ratio, 0.1)),
        ),
    ),
    Row(
        name="mixed",
        title="2 fast, 4 middling, 2 slow nodes on short chat",
        trace="conv",
        fleet="2xh100-8b+4xa100-8b+2xl4-8b",
        rate_scale=MIXED_SCALE,
        bounds=(Bound(text="P99 e2e / least outstanding's", judge=_ratio(_p99_e2e, "least_outstanding", 0.4)),),
    ),
    Row(
        name="slow",
        title="one of 8 nodes three times slower from mid-run",
        trace="mooncake",
        fleet="8xh100-70b",
        rate_scale=FAULT_SCALE,
        faults=(Fault(kind="slow", node=0, from_s=60.0, factor=3.0),),
        bounds=(Bound(text="SLO share below the oracle's, points", judge=_points_below(OURS, "oracle", 2.0)),),
    ),
    Row(
        name="black hole",
        title="one of 8 nodes answers 500 in 5 ms from mid-run, no retries",
        trace="mooncake",
        fleet="8xh100-70b",
        rate_scale=FAULT_SCALE,
        faults=(Fault(kind="fail", node=0, from_s=60.0),),
        bounds=(Bound(text="errors, %", judge=lambda runs: (100 * runs[OURS].error_ratio, 1.5)),),
    ),
    Row(
        name="hang",
        title="one of 8 nodes hangs from mid-run, watchdog 3 s",
        trace="mooncake",
        fleet="8xh100-70b",
        rate_scale=FAULT_SCALE,
        faults=(Fault(kind="hang", node=0, from_s=60.0),),
        stall_s=3.0,
        bounds=(
            Bound(
                text="timeouts beyond the oracle's, %",
                judge=lambda runs: (100 * (runs[OURS].timeout_ratio - runs["oracle"].timeout_ratio), 0.0),
            ),
        ),
    ),
    Row(
        name="four",
        title="four balancers sharing every 200 ms, agents",
        trace="agents",
        fleet="8xh100-70b",
        rate_scale=AGENTS_PER_S,
        balancers=4,
        without=("oracle",),  # it has nothing to share, and forecasts of so many streams take minutes
        variants={
            "one balancer": (OURS, {"balancers": 1}),
            "not sharing": (OURS, {"share_s": None}),
        },
        bounds=(Bound(text="SLO share below one balancer's, points", judge=_points_below(OURS, "one balancer", 5.0)),),
    ),
    Row(
        name="code",  # its trace is not committed: only with --code FILE
        title="8 equal nodes, code completion: long prompts, a few tokens",
        trace="code",
        fleet="8xa100-8b",
        rate_scale=3.0,
        bounds=(),
    ),
)
