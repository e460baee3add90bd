"""`python -m loadtest.bench`: measure, print, keep."""

import argparse
import datetime
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.bench import processes, programs, report
from loadtest.bench.measure import Bench, CellFailed, Timing
from loadtest.bench.proxies import Balancer, Nginx, ProxyFailed
from loadtest.bench.report import Result
from loadtest.bench.rows import Row, all_rows

QUICK = Timing(warmup_s=0.7, window_s=1.0, latency_window_s=2.0)


def main() -> int:
    """0 when all was measured, with `--check` 1 when a target is missed or has no figure, 2 when nothing can be."""
    options = _options()
    rows = _chosen(all_rows(options.idle_streams), options.only)
    if options.list or not rows:
        print("\n".join(f"{row.name:<14}{row.title}" for row in rows or all_rows(options.idle_streams)))
        return 0 if options.list else 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended either way, what it started goes first
    try:
        bench = _bench(options)
    except (ValueError, programs.CannotCompile) as error:
        print(f"bench skipped: {error}")
        return 2
    facts = _facts(bench, options.rounds)
    print(f"{facts['processor']}; proxy on core {bench.cores.proxy}, load and backend on core {bench.cores.load}")
    print(f"medians of {options.rounds} rounds (least to most)\n", flush=True)
    results: list[Result] = []
    try:
        for row in rows:
            results.append(Result(row=row))
            _measure(bench, results[-1], _rounds(row, options))
            print("\n".join(report.lines(results[-1])) + "\n", flush=True)
    except KeyboardInterrupt:
        print("interrupted; what was measured until now is kept")
        return 130
    finally:
        path = options.json or Path("bench-results") / f"{facts['started'].replace(':', '')}.json"
        report.write(path, facts, results)
        print(f"kept as {path}")
    missed = [target for result in results for target in result.verdicts() if target["at_most"] and not target["holds"]]
    return 1 if options.check and missed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench", description="The balancer's cost beside nginx.")
    parser.add_argument("--rounds", type=int, help="times each cell is measured (5; 1 with --quick)")
    parser.add_argument("--only", default="", metavar="ROW,…", help="rows by name or beginning of it (see --list)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep the figures (bench-results/TIME.json)")
    parser.add_argument("--quick", action="store_true", help="one short round: a look, not a figure to quote")
    parser.add_argument("--seconds", type=float, help="length of a measured window (2.5, latency 5)")
    parser.add_argument("--idle-streams", type=int, default=5000, metavar="N")
    parser.add_argument("--cores", metavar="PROXY,LOAD", help="cores to use (the first two allowed)")
    parser.add_argument("--balancer-command", metavar="WORDS", help="another balancer than this checkout's")
    parser.add_argument("--profile", action="store_true", help="print how to attach py-spy (best with --seconds 30)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--list", action="store_true", help="name the rows")
    options = parser.parse_args()
    options.rounds = max(1, options.rounds or (1 if options.quick else 5))
    return options


def _chosen(rows: Sequence[Row], only: str) -> list[Row]:
    wanted = [name for name in only.split(",") if name]
    return [row for row in rows if not wanted or any(row.name.startswith(name) for name in wanted)]


def _bench(options: argparse.Namespace) -> Bench:
    timing = QUICK if options.quick else Timing()
    if options.seconds:
        timing = Timing(warmup_s=timing.warmup_s, window_s=options.seconds, latency_window_s=options.seconds)
    cores = processes.choose_cores(options.cores)
    made = programs.compile_all()
    processes.stay_on(cores.load)
    known = {proxy.name: proxy for proxy in (Nginx(), Balancer(options.balancer_command))}
    return Bench(programs=made, cores=cores, timing=timing, proxies=known, profile=options.profile)


def _rounds(row: Row, options: argparse.Namespace) -> int:
    wanted: int = options.rounds if options.quick else max(options.rounds, row.rounds_at_least)
    return wanted if row.rounds_at_most is None else min(wanted, row.rounds_at_most)


def _measure(bench: Bench, result: Result, rounds: int) -> None:
    """All rounds of one row; a cell that fails is not tried again."""
    for cell in result.row.cells:
        if reason := bench.missing(cell):
            result.without[cell.label] = reason
    for number in range(rounds):
        for cell in result.row.cells:
            if cell.label in result.without:
                continue
            _progress(f"{result.row.name} {number + 1}/{rounds} {cell.label}")
            try:
                result.samples.setdefault(cell.label, []).append(bench.measure(cell))
            except (CellFailed, ProxyFailed) as error:
                result.without[cell.label] = str(error)
    _progress("")


def _progress(text: str) -> None:
    """One line on a terminal, written over by the next; nothing anywhere else."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _facts(bench: Bench, rounds: int) -> dict[str, Any]:
    """Machine and versions, so that a figure found later can be judged."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "proxy_core": bench.cores.proxy,
        "load_core": bench.cores.load,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": _output(Nginx().path or "nginx", "-v").partition("/")[2] or None,
        "commit": _output("git", "describe", "--always", "--dirty") or None,
        "rounds": rounds,
        "window_s": bench.timing.window_s,
        "load_before": os.getloadavg(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _output(*words: str) -> str:
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return ""
    return (result.stdout + result.stderr).strip() if result.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
