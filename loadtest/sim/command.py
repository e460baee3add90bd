"""`gpu-balancer simulate`: policies side by side, on a trace or on made-up agents, in virtual time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

from loadtest.sim import plot, traces
from loadtest.sim.arrival import Arrival
from loadtest.sim.fleet import SpecError, parse_cost, parse_fault, parse_fleet
from loadtest.sim.profiles import PROFILES
from loadtest.sim.results import Slo
from loadtest.sim.runs import POLICIES, SATURATED_SLO_RATIO, saturation, simulate
from loadtest.sim.scenario import Scenario
from loadtest.sim.synthetic import AgentTraffic, generate
from loadtest.sim.table import as_json, clear_bar, progress_bar, render

DEFAULT_POLICIES = "round_robin,least_outstanding,weighted,token_count,predicted_cost"


def parser() -> argparse.ArgumentParser:
    """What can be asked."""
    found = argparse.ArgumentParser(
        prog="gpu-balancer simulate",
        description="Try routing policies on a simulated fleet; nothing is sent anywhere.",
        epilog=f"profiles: {', '.join(PROFILES)}. policies: {', '.join(POLICIES)}.",
    )
    add = found.add_argument
    add("--trace", default="synthetic", metavar="FILE|synthetic", help="Mooncake .jsonl, Azure .csv; default: agents")
    add("--fleet", default="8xh100-70b", metavar="SPEC", help="e.g. 2xh100-8b+4xa100-8b+2xl4-8b; /2 = half as fast")
    add(
        "--policy",
        nargs="+",
        default=[DEFAULT_POLICIES],
        metavar="NAME",
        help=f"one or more, also comma-separated; 'all' for all (default {DEFAULT_POLICIES})",
    )
    add("--rate-scale", type=_positive, default=1.0, metavar="F", help="arrivals come F times as fast (default 1)")
    add("--requests", type=int, default=5000, metavar="N", help="synthetic: how many (default 5000)")
    add("--minutes", type=_positive, default=None, metavar="M", help="only the first M minutes of the trace")
    add("--burst", default=None, metavar="AT,SECONDS,F", help="what comes in SECONDS from AT on comes F times as fast")
    add("--fault", action="append", default=[], metavar="SPEC", help="slow:2@60x3, hang:0@30-90, crash:…, fail:…")
    add("--balancers", type=int, default=1, metavar="N", help="that many, each with requests of its own (default 1)")
    add("--share", type=float, default=0.2, metavar="SECONDS", help="how often they tell each other; 0: never")
    add("--report", type=_positive, default=5.0, metavar="SECONDS", help="how often agents report (default 5)")
    add("--agents", action="store_true", help="predicted_cost gets the reports as well")
    add("--stall", type=_positive, default=None, metavar="SECONDS", help="watchdog on nodes that stop moving")
    add("--attempts", type=int, default=1, metavar="N", help="tries before a first token (default 1)")
    add("--cost", default="", metavar="NAME=VALUE,…", help="other weights for predicted_cost, e.g. decode=0.2,waste=1")
    add("--deadline", type=_positive, default=30.0, metavar="SECONDS", help="to the first token (default 30)")
    add("--saturation", action="store_true", help="first find the rate scale near saturation, and use it")
    add("--seed", type=int, default=1, metavar="N", help="same seed, same figures (default 1)")
    add("--json", type=Path, default=None, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, default=None, metavar="FILE.png", help="draw them (needs matplotlib)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 0, 1 (could not do it) or 2 (wrong usage)."""
    args = parser().parse_args(argv)
    try:
        policies = _policies(args.policy)
        scenario = _scenario(args)
        arrivals = _arrivals(args)
    except (SpecError, traces.TraceError) as error:
        return _complain(str(error), 2)
    except OSError as error:
        return _complain(str(error), 1)
    if args.plot is not None and not plot.available():
        return _complain("--plot needs matplotlib, which is not installed (pip install 'gpu-balancer[plot]')", 1)
    if not arrivals:
        return _complain("--trace: no requests in it", 2)
    rate_scale = args.rate_scale
    if args.saturation:
        found = saturation(scenario, arrivals, 0.1, 20.0, 8)
        print(f"near saturation: {found:.2f} x (largest rate with {SATURATED_SLO_RATIO:.0%} within the SLO, oracle)")
        arrivals, rate_scale = traces.scaled(arrivals, found), rate_scale * found
    runs = []
    for name in policies:
        runs.append(simulate(name, scenario, arrivals, progress_bar(sys.stderr, name, len(arrivals))))
        clear_bar(sys.stderr)
    print(_about(args, scenario, arrivals, rate_scale))
    print(render(runs))
    try:
        if args.json is not None:
            about = {"trace": Path(args.trace).name, "fleet": args.fleet, "rate_scale": rate_scale, "seed": args.seed}
            args.json.write_text(as_json(runs, **about) + "\n", "utf-8")
        if args.plot is not None:
            plot.draw(runs, args.plot)
    except OSError as error:
        return _complain(str(error), 1)
    return 0


def _about(args: argparse.Namespace, scenario: Scenario, arrivals: Sequence[Arrival], rate_scale: float) -> str:
    length_s = max(arrivals[-1].at_s, 1e-9)
    return (
        f"{Path(args.trace).name} x {rate_scale:g}: {len(arrivals)} requests in {length_s:.0f} s"
        f" ({len(arrivals) / length_s:.2f}/s), {args.fleet}, {scenario.balancers} balancer(s), seed {args.seed};"
        f" {_slo(scenario.slo)}"
    )


def _slo(slo: Slo) -> str:
    return (
        f"SLO: TTFT <= {slo.ttft_s:g} s + {1000 * slo.ttft_s_per_token:g} ms a prompt token,"
        f" TPOT <= {1000 * slo.tpot_s:g} ms"
    )


def _policies(asked: Sequence[str]) -> list[str]:
    names = [name for part in asked for name in part.split(",") if name]
    if names == ["all"]:
        return list(POLICIES)
    for name in names:
        if name not in POLICIES:
            raise SpecError(f"--policy {name}: there are {', '.join(POLICIES)}")
    return names


def _scenario(args: argparse.Namespace) -> Scenario:
    fleet = parse_fleet(args.fleet)
    if args.balancers < 1 or args.attempts < 1 or args.requests < 1:
        raise SpecError("--balancers, --attempts and --requests: at least 1")
    return Scenario(
        fleet=fleet,
        faults=[parse_fault(spec, len(fleet)) for spec in args.fault],
        deadline_s=args.deadline,
        balancers=args.balancers,
        share_s=args.share if args.share > 0 else None,
        report_s=args.report,
        agents=args.agents,
        stall_s=args.stall,
        attempts=args.attempts,
        cost=parse_cost(args.cost),
        seed=args.seed,
    )


def _arrivals(args: argparse.Namespace) -> list[Arrival]:
    rng = Random(args.seed)
    if args.trace == "synthetic":
        arrivals = list(generate(AgentTraffic(), args.requests, rng))
    else:
        arrivals = traces.load(Path(args.trace), rng)
    if args.minutes is not None:
        arrivals = traces.excerpt(arrivals, 0.0, 60.0 * args.minutes)
    arrivals = traces.scaled(arrivals, args.rate_scale)
    if args.burst is not None:
        try:
            at_s, length_s, factor = (float(part) for part in args.burst.split(","))
        except ValueError:
            raise SpecError(f"--burst {args.burst}: want AT,SECONDS,F") from None
        arrivals = traces.with_burst(arrivals, at_s, length_s, factor)
    return arrivals


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: want a positive number")
    return value


def _complain(message: str, status: int) -> int:
    print(f"gpu-balancer: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
