"""Bars of the figures as a PNG; only where matplotlib is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from loadtest.sim.results import Figures


class NoPlot(Exception):
    """matplotlib is not there."""


def available() -> bool:
    """Whether a plot can be drawn."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return False
    return True


def draw(runs: Sequence[Figures], path: Path) -> None:
    """P50, P95 and P99 of TTFT, whole time and time per output token, a group of bars for each policy.

    Raises NoPlot, and OSError when the file cannot be written.
    """
    if not available():
        raise NoPlot("--plot needs matplotlib, which is not installed (pip install 'gpu-balancer[plot]')")
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    panels: tuple[tuple[str, list[tuple[float, ...]]], ...] = (
        ("time to first token, s", [run.ttft_s for run in runs]),
        ("whole time, s", [run.e2e_s for run in runs]),
        ("time per output token, ms", [tuple(1000 * value for value in run.tpot_s) for run in runs]),
    )
    for axis, (title, values) in zip(axes, panels, strict=True):
        for at, name in enumerate(("P50", "P95", "P99")):
            places = [number + 0.27 * (at - 1) for number in range(len(runs))]
            axis.bar(places, [three[at] for three in values], width=0.25, label=name)
        axis.set_title(title)
        axis.set_xticks(range(len(runs)), [run.policy for run in runs], rotation=40, ha="right")
    axes[0].legend()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)
