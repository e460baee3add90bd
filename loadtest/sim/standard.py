"""The standard table: `python -m loadtest.sim.standard` (`make sim`), every bound with by how much it holds or not.

Each cell is the mean over a few seeds (a seed draws arrivals within their ticks and all that policies draw): a P99 of
some hundred requests is one or two long prompts.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from balancer.core.cost import CostPolicy
from loadtest.sim import traces
from loadtest.sim.arrival import Arrival
from loadtest.sim.fleet import SpecError, parse_cost
from loadtest.sim.results import Figures, mean
from loadtest.sim.rows import ROWS, STANDARD_POLICIES, Row
from loadtest.sim.runs import POLICIES, saturation, simulate
from loadtest.sim.synthetic import AgentTraffic, generate
from loadtest.sim.table import as_json, clear_bar, progress_bar, render

DATA = Path(__file__).parent / "data"
EXCERPT_S = 300.0
# Near saturation is looked for between these scales, to within 4 %.
LOW_SCALE, HIGH_SCALE, STEPS = 1.2, 4.8, 5
AGENT_REQUESTS = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Where the traces are, and how much of them is used (seconds; None: all)."""

    mooncake: Path
    conv: Path
    code: Path | None = None
    length_s: float | None = None
    cost: CostPolicy = field(default_factory=CostPolicy)  # predicted_cost's weights

    def arrivals(self, row: Row, rate_scale: float, seed: int) -> list[Arrival]:
        """A row's requests."""
        rng = Random(seed)
        if row.trace == "agents":
            return list(generate(AgentTraffic(requests_per_s=rate_scale), AGENT_REQUESTS, rng))
        path = {"conv": self.conv, "code": self.code, "mooncake": self.mooncake}[row.trace]
        assert path is not None, "a row without its trace is left out"
        found = traces.load(path, rng)
        if self.length_s is not None:
            found = traces.excerpt(found, 0.0, self.length_s)
        return traces.scaled(found, rate_scale)


# A row goes to a worker by its name: what judges it is code, which does not travel.
_BY_NAME = {row.name: row for row in ROWS}


def _saturated(name: str, traffic: Traffic) -> float:
    row = _BY_NAME[name]
    return saturation(row.scenario(1), traffic.arrivals(row, 1.0, 1), LOW_SCALE, HIGH_SCALE, STEPS)


def _run(name: str, traffic: Traffic, rate_scale: float, policy: str, changes: Mapping[str, Any], seed: int) -> Figures:
    row = _BY_NAME[name]
    return simulate(
        policy, replace(row.scenario(seed), cost=traffic.cost, **changes), traffic.arrivals(row, rate_scale, seed)
    )


def _cells(row: Row, policies: Iterable[str]) -> list[tuple[str, str, Mapping[str, Any]]]:
    return [
        *((policy, policy, {}) for policy in policies if policy not in row.without),
        *((label, policy, changes) for label, (policy, changes) in row.variants.items()),
    ]


def run(rows: Sequence[Row], traffic: Traffic, policies: Sequence[str], seeds: int, workers: int) -> tuple[int, str]:
    """Play all rows and print them; returns how many bounds were missed, and everything as JSON."""
    missed = 0
    kept: list[str] = []
    with ProcessPoolExecutor(max_workers=workers) as pool:
        scales = {
            row.name: pool.submit(_saturated, row.name, traffic) if row.rate_scale is None else row.rate_scale
            for row in rows
        }
        # Rows whose rate is known go first: the others wait for their bisection without a worker idling.
        futures: dict[tuple[str, str], list[Future[Figures]]] = {}
        for row in sorted(rows, key=lambda row: row.rate_scale is None):
            scale = scales[row.name]
            rate = scale if isinstance(scale, float) else scale.result()
            scales[row.name] = rate
            for label, policy, changes in _cells(row, policies):
                futures[row.name, label] = [
                    pool.submit(_run, row.name, traffic, rate, policy, changes, seed) for seed in range(1, seeds + 1)
                ]
        everything = [future for cell in futures.values() for future in cell]
        bar = progress_bar(sys.stderr, "standard table", len(everything))
        for count, future in enumerate(everything, 1):
            future.result()
            if bar is not None:
                bar(count)
        clear_bar(sys.stderr)
        for row in rows:
            labels = [label for label, _, _ in _cells(row, policies)]
            cells = {
                label: replace(mean([future.result() for future in futures[row.name, label]]), policy=label)
                for label in labels
            }
            missed += _show(row, cells, scales[row.name])
            kept.append(as_json(list(cells.values()), row=row.name, rate_scale=scales[row.name], seeds=seeds))
    return missed, "[" + ",\n".join(kept) + "]\n"


def _show(row: Row, cells: Mapping[str, Figures], scale: object) -> int:
    near = " (near saturation, by bisection with the oracle)" if row.rate_scale is None else ""
    print(f"\n{row.title}: {row.fleet}, {row.trace} x {scale:.3g}{near}, {cells['predicted_cost'].requests} requests")
    print(render(list(cells.values())))
    verdicts = [bound.verdict(cells) for bound in row.bounds]
    print("\n".join(verdicts), flush=True)
    return sum("MISSED" in verdict for verdict in verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when all bounds hold, 1 when one is missed (with --strict), 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.sim.standard", description=__doc__)
    parser.add_argument("--full", action="store_true", help="whole traces instead of 5 minutes, all policies")
    parser.add_argument("--mooncake", type=Path, default=DATA / "mooncake_conversation_600.jsonl", metavar="FILE")
    parser.add_argument("--conv", type=Path, default=DATA / "azure2023_conv_800.csv", metavar="FILE")
    parser.add_argument("--code", type=Path, default=None, metavar="FILE", help="Azure code trace: one more row")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row; may be repeated")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs a cell, of which the mean is shown")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), metavar="N")
    parser.add_argument("--cost", default="", metavar="NAME=VALUE,…", help="other weights for predicted_cost")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.add_argument("--strict", action="store_true", help="exit status 1 when a bound is missed")
    args = parser.parse_args(argv)
    rows = [row for row in ROWS if row.name in (args.row or _BY_NAME) and (row.trace != "code" or args.code)]
    if not rows or args.seeds < 1 or args.workers < 1:
        print(f"rows: {', '.join(row.name for row in ROWS)}; seeds and workers: at least 1", file=sys.stderr)
        return 2
    try:
        length_s = None if args.full else EXCERPT_S
        traffic = Traffic(
            mooncake=args.mooncake, conv=args.conv, code=args.code, length_s=length_s, cost=parse_cost(args.cost)
        )
        for path in (args.mooncake, args.conv, args.code):
            if path is not None:
                traces.load(path, Random(1))
        policies = [name for name in POLICIES if args.full or name in STANDARD_POLICIES]
        missed, text = run(rows, traffic, policies, args.seeds, args.workers)
        if args.json is not None:
            args.json.write_text(text, "utf-8")
    except (OSError, SpecError, traces.TraceError) as error:
        print(f"standard table: {error}", file=sys.stderr)
        return 2
    bounds = sum(len(row.bounds) for row in rows)
    print(f"\n{bounds - missed} of {bounds} bounds hold")
    return 1 if missed and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
