"""What came out, for people: medians over the rounds, and the order of the policies here and in the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from loadtest.compare.run import Measured
from loadtest.sim.results import Figures

_HEAD = ("", "TTFT s P50", "P95", "P99", "e2e s P50", "P95", "P99", "failures", "hits", "uneven")
# What the policies are ordered by: the tail of the wait that users feel.
BY = "P95 TTFT"

Row = tuple[str, tuple[float, ...], tuple[float, ...], float, float, float]


def http_row(policy: str, rounds: Sequence[Measured]) -> Row:
    """The median of each figure over the rounds; failures of all rounds together, as a share."""
    return (
        policy,
        tuple(median(one.ttft_s[at] for one in rounds) for at in range(3)),
        tuple(median(one.e2e_s[at] for one in rounds) for at in range(3)),
        sum(one.failures for one in rounds) / sum(one.requests for one in rounds),
        median(one.hit_ratio for one in rounds),
        median(one.uneven for one in rounds),
    )


def simulated_row(policy: str, rounds: Sequence[Figures]) -> Row:
    """The same of simulated runs."""
    return (
        policy,
        tuple(median(one.ttft_s[at] for one in rounds) for at in range(3)),
        tuple(median(one.e2e_s[at] for one in rounds) for at in range(3)),
        median(one.timeout_ratio + one.error_ratio for one in rounds),
        median(one.hit_ratio for one in rounds),
        median(one.imbalance for one in rounds),
    )


def order(rows: Sequence[Row]) -> list[str]:
    """The policies, best first."""
    return [row[0] for row in sorted(rows, key=lambda row: row[1][1])]


def render(title: str, rows: Sequence[Row]) -> str:
    """One table, columns aligned."""
    cells = [[title, *_HEAD[1:]]]
    for name, ttft_s, e2e_s, failures, hits, uneven in rows:
        times = [*(f"{value:.2f}" for value in ttft_s), *(f"{value:.1f}" for value in e2e_s)]
        cells.append([name, *times, f"{100 * failures:.2f}%", f"{100 * hits:.1f}%", f"{100 * uneven:.0f}%"])
    widths = [max(len(line[at]) for line in cells) for at in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(row))
        for row in (list(zip(line, widths, strict=True)) for line in cells)
    )


def verdict(http: Sequence[Row], simulated: Sequence[Row]) -> str:
    """The order here and there, and how far the policies are apart."""
    here, there = order(http), order(simulated)
    p95: Mapping[str, float] = {row[0]: row[1][1] for row in http}
    ratios = ", ".join(f"{name} {p95[name] / p95[here[0]]:.2f}" for name in here)
    same = "the same" if here == there else f"another one: {' < '.join(there)}"
    return f"by {BY}: {' < '.join(here)} ({ratios}); in the simulator {same}"
