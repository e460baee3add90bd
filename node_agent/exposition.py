"""Reads the Prometheus text format, keeping only what is asked for, and adds series up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# name{labels} value [timestamp]; label values may hold braces, commas and escaped quotes.
_LINE = re.compile(r'([^\s{#]+)\s*(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)')
_LABEL = re.compile(r'([A-Za-z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"')
_SELECTOR = re.compile(r"([^{]+)(?:\{(\w+)=([^}]*)\})?")
_ESCAPES = {"\\n": "\n", '\\"': '"', "\\\\": "\\"}

# Every tensor-parallel rank repeats the numbers of its data-parallel rank: count such twins once.
_TWIN_LABELS = frozenset({"tp_rank", "pp_rank", "moe_ep_rank", "pid"})


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its labels and its value."""

    labels: Mapping[str, str]
    value: float


Families = Mapping[str, list[Series]]


def parse(text: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, list[Series]]:
    """Return the series of each wanted name. A line that cannot be read, or is NaN, is as if it were not there."""
    families: dict[str, list[Series]] = {}
    for line in text.split("\n"):
        if line.startswith("#") or not wanted(line.partition("{")[0].partition(" ")[0]):
            continue  # most lines end here, before the dear part
        match = _LINE.match(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if not math.isnan(value):
            families.setdefault(match[1], []).append(Series(_labels(match[2]), value))
    return families


def _labels(block: str | None) -> dict[str, str]:
    if not block:
        return {}
    return {name: _unescape(value) for name, value in _LABEL.findall(block)}


def _unescape(value: str) -> str:
    return re.sub(r'\\[n"\\]', lambda match: _ESCAPES[match[0]], value) if "\\" in value else value


def select(families: Families, selector: str) -> list[Series]:
    """Return the series of `name` or `name{label=value}`; a breakdown by priority is left out beside its total."""
    match = _SELECTOR.fullmatch(selector)
    if match is None:
        return []
    series = families.get(match[1], [])
    if match[2]:
        series = [one for one in series if one.labels.get(match[2]) == match[3]]
    totals = [one for one in series if not one.labels.get("priority")]
    return totals or series


def first(families: Families, names: Iterable[str]) -> list[Series]:
    """Return the series of the first of `names` that has any: names stand newest first."""
    for name in names:
        if series := select(families, name):
            return series
    return []


def total(families: Families, names: Iterable[str]) -> float | None:
    """Sum over data-parallel ranks and models, counting tensor-parallel twins once; None without a series."""
    series = first(families, names)
    if not series:
        return None
    ranks: dict[frozenset[tuple[str, str]], float] = {}
    for one in series:
        rank = frozenset(item for item in one.labels.items() if item[0] not in _TWIN_LABELS)
        ranks[rank] = max(ranks.get(rank, -math.inf), one.value)
    return sum(ranks.values())


def total_of(families: Families, groups: Iterable[Iterable[str]]) -> float | None:
    """Sum several signals, each a list of names; None only if none of them has a series."""
    sums = [value for names in groups if (value := total(families, names)) is not None]
    return sum(sums) if sums else None


def peak(families: Families, names: Iterable[str]) -> float | None:
    """Return the largest value over all ranks; None without a series."""
    return max((one.value for one in first(families, names)), default=None)


def mean(families: Families, names: Iterable[str]) -> float | None:
    """Return the mean over all ranks; None without a series."""
    series = first(families, names)
    return sum(one.value for one in series) / len(series) if series else None
