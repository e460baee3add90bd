"""`python -m loadtest.compare`: play one trace through the balancer under several policies, and print one table."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from statistics import median

from loadtest.children import CannotRun
from loadtest.clock import SystemClock
from loadtest.compare import table, trace
from loadtest.compare.run import NODE, TIMEOUT_S, Measured, measure, profiles
from loadtest.compare.trace import Turn
from loadtest.sim.results import Figures
from loadtest.sim.runs import simulate
from loadtest.sim.scenario import Scenario

POLICIES = ("round_robin", "least_outstanding", "power_of_two", "weighted", "predicted_cost")


def main() -> int:
    """0 when all of it ran, 1 when the balancer did not, or with `--check` when the order is not the simulator's."""
    options = _options()
    traces = [
        trace.make(options.requests, options.rate, Random(options.seed + number)) for number in range(options.rounds)
    ]
    print(_about(traces[0], options.rounds), flush=True)
    try:
        http = asyncio.run(_measured(options.policy, traces))
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 1
    simulated = {policy: [_simulated(policy, turns) for turns in traces] for policy in options.policy}
    rows = [table.http_row(policy, http[policy]) for policy in options.policy]
    there = [table.simulated_row(policy, simulated[policy]) for policy in options.policy]
    runs = [run for rounds in http.values() for run in rounds]
    load_cpu, balancer_cpu = (median(run.load_cpu for run in runs), median(run.balancer_cpu for run in runs))
    print(table.render("over HTTP", rows))
    print(table.render("simulated", there))
    print(table.verdict(rows, there))
    print(f"CPU, of one core: nodes and clients {load_cpu:.0%}, balancer {balancer_cpu:.0%}")
    if options.json is not None:
        kept = {policy: [asdict(run) for run in rounds] for policy, rounds in http.items()}
        options.json.write_text(json.dumps({"seed": options.seed, "rate": options.rate, "runs": kept}, indent=1) + "\n")
    return 1 if options.check and table.order(rows) != table.order(there) else 0


async def _measured(policies: Sequence[str], traces: Sequence[Sequence[Turn]]) -> Mapping[str, list[Measured]]:
    """Every policy on every trace; in each round another one goes first."""
    clock = SystemClock()
    found: dict[str, list[Measured]] = {policy: [] for policy in policies}
    for number, turns in enumerate(traces):
        first = number % len(policies)
        for policy in [*policies[first:], *policies[:first]]:
            run = await measure(policy, turns, clock)
            found[policy].append(run)
            ttft = "/".join(f"{value:.2f}" for value in run.ttft_s)
            print(f"  round {number + 1} {policy}: TTFT {ttft} s, hits {run.hit_ratio:.0%}", flush=True)
    return found


def _simulated(policy: str, turns: Sequence[Turn]) -> Figures:
    scenario = Scenario(fleet=profiles(), deadline_s=TIMEOUT_S, report_s=None, seed=1)
    return simulate(policy, scenario, [turn.arrival(NODE.block_tokens) for turn in turns])


def _about(turns: Sequence[Turn], rounds: int) -> str:
    arrivals = [turn.arrival(NODE.block_tokens) for turn in turns]
    prompt = sum(arrival.prompt_tokens for arrival in arrivals) / len(arrivals)
    output = sum(arrival.output_tokens for arrival in arrivals) / len(arrivals)
    return (
        f"{len(turns)} requests in {turns[-1].at_s:.0f} s, on average {prompt:.0f} prompt and {output:.0f} output"
        f" tokens; 8 nodes, 2 of them half as fast; medians of {rounds} rounds"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description="Routing policies over HTTP.")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, metavar="NAME", help=", ".join(POLICIES))
    parser.add_argument("--requests", type=int, default=300, help="in each run (default %(default)s)")
    parser.add_argument("--rate", type=float, default=10.0, help="requests/s (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="each on a trace of its own (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures there")
    parser.add_argument("--check", action="store_true", help="exit 1 when the order is not the simulator's")
    options = parser.parse_args()
    options.policy = options.policy or ["round_robin", "least_outstanding", "predicted_cost"]
    if options.requests < 1 or options.rounds < 1 or options.rate <= 0:
        parser.error("--requests, --rounds and --rate: more than 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
