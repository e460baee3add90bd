"""The last ~30 seconds of an engine's counters: differences, means and quantiles, never those of its whole life."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from node_agent.exposition import Families, first

# How far back means and quantiles look; the contract fixes it for avg_latency_seconds.
WINDOW_S = 30.0
# A base older than this describes another time: after a gap in the scrapes the window starts anew.
OLDEST_BASE_S = 45.0
# Sums of seconds over ranks differ by rounding when the series come in another order.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative counts per upper bound, in seconds, the last one infinite."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]

    def since(self, base: Histogram) -> Histogram | None:
        """Return what was observed after `base`; None if the buckets changed."""
        if self.bounds != base.bounds:
            return None
        return Histogram(self.bounds, tuple(new - old for new, old in zip(self.counts, base.counts, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What an engine had counted at one moment; names are ours."""

    at: float
    counters: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


def read_histogram(families: Families, names: tuple[str, ...], unit_s: float = 1.0) -> Histogram | None:
    """Add up the buckets of all ranks and models under the first name that has any, in seconds."""
    counts: dict[float, float] = {}
    for series in first(families, [f"{name}_bucket" for name in names]):
        try:
            bound = float(series.labels["le"]) * unit_s
        except (KeyError, ValueError):
            continue
        counts[bound] = counts.get(bound, 0.0) + series.value
    bounds = tuple(sorted(counts))
    return Histogram(bounds, tuple(counts[bound] for bound in bounds)) if bounds else None


def was_reset(before: Point, after: Point) -> bool:
    """True if a counter went backwards: the engine began to count anew."""
    shared = [(value, after.counters[name]) for name, value in before.counters.items() if name in after.counters]
    if any(new < old - ROUNDING * abs(old) for old, new in shared):
        return True
    pairs = [(old, after.histograms[name]) for name, old in before.histograms.items() if name in after.histograms]
    return any(new.counts[-1] < old.counts[-1] for old, new in pairs)


def extend(points: tuple[Point, ...], point: Point) -> tuple[Point, ...]:
    """Add a point; keeps one base about 30 s old, and starts anew after a reset or a gap."""
    if points and (was_reset(points[-1], point) or point.at - points[-1].at > OLDEST_BASE_S):
        return (point,)
    base = max(0, bisect.bisect_right(points, point.at - WINDOW_S, key=lambda one: one.at) - 1)
    kept = [one for one in points[base:] if point.at - one.at <= OLDEST_BASE_S]
    return (*kept, point)


def delta(points: tuple[Point, ...], name: str) -> float | None:
    """Return how far a counter moved within the window; None with fewer than two readings of it."""
    values = [point.counters[name] for point in points if name in point.counters]
    return values[-1] - values[0] if len(values) > 1 else None


def ratio(points: tuple[Point, ...], part: str, whole: str) -> float | None:
    """Return Δpart / Δwhole over the window; None while the whole stands still."""
    above, below = delta(points, part), delta(points, whole)
    return None if above is None or below is None or below <= 0 else above / below


def quantile(points: tuple[Point, ...], name: str, q: float) -> float | None:
    """Return a quantile of what was observed within the window; None if nothing was.

    Interpolates linearly in the bucket, as Prometheus does; above the last finite bound that bound is the answer.
    """
    readings = [point.histograms[name] for point in points if name in point.histograms]
    moved = readings[-1].since(readings[0]) if len(readings) > 1 else None
    if moved is None or moved.counts[-1] <= 0:
        return None
    rank = q * moved.counts[-1]
    index = next(i for i, count in enumerate(moved.counts) if count >= rank)
    if math.isinf(moved.bounds[index]):
        return moved.bounds[index - 1] if index else None
    low_bound, low_count = (moved.bounds[index - 1], moved.counts[index - 1]) if index else (0.0, 0.0)
    inside = moved.counts[index] - low_count
    return low_bound + (moved.bounds[index] - low_bound) * ((rank - low_count) / inside if inside > 0 else 1.0)
