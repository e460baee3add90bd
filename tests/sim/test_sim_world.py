"""Whole runs: every request ends exactly once, and the same seed gives the same figures."""

from __future__ import annotations

from random import Random

import pytest

from loadtest.sim.fleet import Fault, parse_fleet
from loadtest.sim.results import End
from loadtest.sim.runs import POLICIES, simulate
from loadtest.sim.scenario import Scenario
from loadtest.sim.synthetic import AgentTraffic, generate

TROUBLES = (
    Fault(kind="hang", node=0, from_s=20.0, until_s=70.0),
    Fault(kind="crash", node=1, from_s=30.0, until_s=60.0),
    Fault(kind="fail", node=2, from_s=25.0),
    Fault(kind="slow", node=3, from_s=10.0, factor=4.0),
)
FLEET = parse_fleet("3xa100-8b+2xl4-8b+h100-8b")


def traffic(count: int, rate: float, seed: int = 1) -> list:
    return list(generate(AgentTraffic(requests_per_s=rate, longest_prompt=20_000), count, Random(seed)))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "oracle"])
@pytest.mark.parametrize("stall_s", [None, 3.0])
def test_every_request_ends_exactly_once_whatever_befalls_the_nodes(policy: str, stall_s: float | None) -> None:
    scenario = Scenario(fleet=FLEET, faults=TROUBLES, balancers=2, attempts=2, stall_s=stall_s)
    arrivals = traffic(500, 12.0)
    figures = simulate(policy, scenario, arrivals)  # it asserts that no request ends twice
    assert sum(figures.ends) == figures.requests == len(arrivals)
    assert figures.ends[End.DONE] > 0


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    arrivals = traffic(400, 20.0)
    runs = [simulate("predicted_cost", Scenario(fleet=FLEET, seed=seed), arrivals) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_prompt_beyond_the_cache_is_rejected_and_not_waited_for() -> None:
    arrivals = [arrival for arrival in traffic(200, 5.0) if arrival.prompt_tokens > 0]
    tiny = Scenario(fleet=parse_fleet("l4-8b"))
    long = [type(arrivals[0])(0.0, 50_000, 10)]
    assert simulate("random", tiny, long).ends[End.REJECTED] == 1


def test_a_hung_node_without_a_watchdog_times_out_what_it_was_sent() -> None:
    scenario = Scenario(fleet=parse_fleet("2xh100-8b"), faults=(Fault(kind="hang", node=0, from_s=5.0),))
    figures = simulate("round_robin", scenario, traffic(200, 10.0))
    assert figures.ends[End.TIMEOUT] > 20
    guarded = Scenario(fleet=scenario.fleet, faults=scenario.faults, stall_s=3.0)
    assert simulate("round_robin", guarded, traffic(200, 10.0)).ends[End.TIMEOUT] == 0


def test_a_crashed_node_comes_back_empty() -> None:
    crash = (Fault(kind="crash", node=0, from_s=30.0, until_s=31.0),)
    arrivals = traffic(400, 10.0)
    whole = simulate("round_robin", Scenario(fleet=parse_fleet("h100-8b")), arrivals)
    cold = simulate("round_robin", Scenario(fleet=parse_fleet("h100-8b"), faults=crash), arrivals)
    assert cold.hit_ratio < whole.hit_ratio
    assert cold.error_ratio > 0 == whole.error_ratio
