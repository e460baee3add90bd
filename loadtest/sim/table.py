"""Figures as a table for people, as JSON, and how far a long run is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import IO, Any

from loadtest.sim.results import Figures

_HEAD = (
    "policy",
    "TTFT s P50",
    "P95",
    "P99",
    "e2e s P50",
    "P95",
    "P99",
    "TPOT ms P50",
    "P95",
    "P99",
    "timeouts",
    "errors",
    "SLO",
    "good/s",
    "hits",
    "uneven",
    "preempt",
)


def _cells(figures: Figures) -> list[str]:
    return [
        figures.policy,
        *(f"{value:.2f}" for value in figures.ttft_s),
        *(f"{value:.1f}" for value in figures.e2e_s),
        *(f"{1000 * value:.0f}" for value in figures.tpot_s),
        f"{100 * figures.timeout_ratio:.2f}%",
        f"{100 * figures.error_ratio:.2f}%",
        f"{100 * figures.slo_ratio:.1f}%",
        f"{figures.goodput_per_s:.2f}",
        f"{100 * figures.hit_ratio:.1f}%",
        f"{100 * figures.imbalance:.0f}%",
        str(figures.preemptions),
    ]


def render(runs: Sequence[Figures]) -> str:
    """One line a run, columns aligned. Times of what ended well; a timeout counts as a first token at its deadline."""
    lines = [list(_HEAD), *(_cells(figures) for figures in runs)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in lines)
    )


def as_json(runs: Sequence[Figures], **about: Any) -> str:
    """All figures, unrounded, with what they were measured on."""
    return json.dumps({**about, "runs": [dataclasses.asdict(figures) for figures in runs]}, indent=2)


def progress_bar(out: IO[str], label: str, total: int) -> Callable[[int], None] | None:
    """Shows on `out` how many of `total` arrived; None where nobody looks (no terminal)."""
    if not out.isatty():
        return None

    def show(count: int) -> None:
        share = min(1.0, count / max(1, total))
        out.write(f"\r{label:18} [{'#' * int(30 * share):30}] {100 * share:3.0f} %")
        out.flush()

    return show


def clear_bar(out: IO[str]) -> None:
    """Wipe the progress bar."""
    if out.isatty():
        out.write("\r\033[K")
        out.flush()
