"""`python -m loadtest.chaos`: try every promise and print what happened."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.chaos import availability, caching, overload, security, truth
from loadtest.chaos.figure import PROMISES, Figure, Promise, Row
from loadtest.chaos.stage import Theatre
from loadtest.children import CannotRun

TRIALS = (truth, availability, overload, caching, security)  # importing them enters their promises


def main() -> int:
    """0 when every promise that was tried holds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos", description="Every promise, tried.")
    parser.add_argument("--rounds", type=int, default=3, help="times each trial is made; the median counts (3)")
    parser.add_argument("--only", default="", metavar="N,…", help="promises by number")
    parser.add_argument("--quick", action="store_true", help="the quick trials, one round: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    numbers = {int(number) for number in options.only.split(",") if number}
    chosen = [one for one in sorted(PROMISES, key=lambda one: one.number) if not numbers or one.number in numbers]
    if options.quick:
        chosen = [one for one in chosen if one.quick]
    results = asyncio.run(try_all(chosen, 1 if options.quick else max(1, options.rounds), options.markdown))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    kept = sum(result["holds"] for result in results)
    print(f"\n{kept} of {len(results)} figures hold")
    return 0 if kept == len(results) else 1


async def try_all(chosen: Sequence[Promise], rounds: int, markdown: bool = False) -> list[dict[str, Any]]:
    """Make every trial `rounds` times, print a line for each of its figures, and return them.

    A trial that cannot be played breaks its promise.
    """
    results = []
    print(_HEAD if markdown else f"{'':>3} {'what was tried':<64} {'figure':<42} {'measured':<26} bound", flush=True)
    for one in chosen:
        tried: list[Sequence[Figure]] = []
        for number in range(rounds):
            _progress(f"promise {one.number}, round {number + 1}: {one.title}")
            try:
                tried.append(await play(one))
            except (TimeoutError, CannotRun, aiohttp.ClientError) as error:
                tried = [(Figure(name=f"could not be played: {error or 'too late'}", value=1, bound=0),)]
                break
        _progress("")
        for figures in zip(*tried, strict=True):
            row = Row(figures)
            results.append(_result(one, row))
            print(_line(one, row, markdown), flush=True)
    return results


async def play(one: Promise) -> Sequence[Figure]:
    """One round of a trial, on a stage of its own."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await one.trial(Theatre(Path(folder), session))


_HEAD = "| promise | what was tried | figure | measured | bound | |\n| --- | --- | --- | --- | --- | --- |"


def _line(one: Promise, row: Row, markdown: bool) -> str:
    name, holds = row.figures[0].name, "holds" if row.holds else "BROKEN"
    if markdown:
        return f"| {one.number} | {one.title} | {name} | {row.text()} | {row.bound_text()} | {holds} |"
    return f"{one.number:>3} {one.title:<64} {name:<42} {row.text():<26} {row.bound_text():<12} {holds}"


def _result(one: Promise, row: Row) -> dict[str, Any]:
    first = row.figures[0]
    return {
        "promise": one.number,
        "title": one.title,
        "figure": first.name,
        "median": row.median,
        "rounds": [figure.value for figure in row.figures],
        "bound": first.bound,
        "least": first.least,
        "unit": first.unit,
        "holds": row.holds,
    }


def _progress(text: str) -> None:
    """One line on a terminal, written over by the next; nothing anywhere else."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
