"""Medians over the rounds, ratios to nginx, and whether what must hold does."""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.bench.measure import Sample
from loadtest.bench.rows import FIGURES, Row, Target


@dataclass(slots=True, kw_only=True)
class Result:
    """What one row gave: samples by cell, and why a cell has none."""

    row: Row
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)

    def median(self, figure: str, label: str) -> float | None:
        """The figure's median over the counted rounds, above that of the row's base cell if it has one."""
        values = self._values(figure, label)
        if not values:
            return None
        own = statistics.median(values)
        if not self.row.above or label == self.row.above:
            return own
        base = self.median(figure, self.row.above)
        return None if base is None else own - base

    def spread(self, figure: str, label: str) -> tuple[float, float]:
        """Least and most over the counted rounds, as measured."""
        values = self._values(figure, label)
        return min(values), max(values)

    def measured(self, target: Target) -> float | None:
        """What `target` judges: a ratio, or a figure where there is nothing to divide by."""
        own = self.median(target.figure, target.of)
        if own is None or not target.over:
            return own
        other = self.median(target.figure, target.over)
        return own / other if other and other > 0 else None

    def verdicts(self) -> list[dict[str, Any]]:
        """Every target with what was measured and whether it holds (None: not judged, or no figure)."""
        told = []
        for target in self.row.targets:
            measured = self.measured(target)
            judged = measured is not None and target.at_most is not None
            holds = measured <= target.at_most if judged else None  # type: ignore[operator]
            told.append(asdict(target) | {"measured": measured, "holds": holds})
        return told

    def counted(self, label: str) -> list[Sample]:
        """The rounds that other work on the machine left alone; all of them where it left none."""
        samples = self.samples.get(label, [])
        return [sample for sample in samples if not sample.by_others] or samples

    def _values(self, figure: str, label: str) -> list[float]:
        return [sample.figures[figure] for sample in self.counted(label)]


def lines(result: Result) -> list[str]:
    """The row as printed: a cell a line, then the ratios, then what to know about them."""
    row = result.row
    made = [f"{row.name}: {row.title}"]
    for cell in row.cells:
        if cell.label in result.without:
            made.append(f"  {cell.label:<11}no figure: {result.without[cell.label]}")
        elif result.samples.get(cell.label):
            made.append(f"  {cell.label:<11}" + "   ".join(_figures(result, cell.label)))
    made += [f"  {_verdict(target)}" for target in result.verdicts() if target["measured"] is not None]
    return made + [f"  note: {note}" for note in _notes(result)]


def _figures(result: Result, label: str) -> Iterable[str]:
    plus = "+" if result.row.above not in (None, label) else ""  # the sign of what it adds
    for figure in result.row.figures:
        unit, decimals = FIGURES[figure]
        low, high = result.spread(figure, label)
        value = f"{result.median(figure, label):{plus},.{decimals}f}"
        yield f"{value:>8} {unit} ({low:,.{decimals}f} to {high:,.{decimals}f})"
    rates = [sample.per_s for sample in result.counted(label) if sample.per_s is not None]
    if rates:
        yield f"{statistics.median(rates):>9,.0f}/s"


def _verdict(target: Mapping[str, Any]) -> str:
    unit, decimals = FIGURES[target["figure"]]
    measured, at_most = target["measured"], target["at_most"]
    decimals = 2 if target["over"] else decimals
    kind = f" {unit}" if target["figure"] in ("p50_us", "p99_us") else ""
    name = f"{target['of']} / {target['over']}{kind}" if target["over"] else f"{target['of']}, {unit}"
    text = f"{name} = {measured:.{decimals}f}"
    if at_most is None:
        return text
    judged = "holds" if target["holds"] else f"missed by {measured - at_most:.{decimals}f}"
    text += f"   at most {at_most:g}: {judged}"
    if (moonshot := target["moonshot"]) is not None:
        far = "reached" if measured <= moonshot else f"{measured - moonshot:.{decimals}f} away"
        text += f" (moonshot {moonshot:g}: {far})"
    return text


def _notes(result: Result) -> Iterable[str]:
    """The first sentence of each kind and cell, with the number of rounds it stands for."""
    for label, samples in result.samples.items():
        rounds = len(samples)
        if limited := [sample.limits for sample in samples if sample.limits]:
            yield f"{label}: {'; '.join(limited[0])} [{len(limited)} of {rounds} rounds]"
        if disturbed := [sample.by_others for sample in samples if sample.by_others]:
            fate = "not counted" if len(disturbed) < rounds else "counted, as there are no others"
            yield f"{label}: {len(disturbed)} of {rounds} rounds disturbed, {fate}: {'; '.join(disturbed[0])}"


def as_json(result: Result) -> dict[str, Any]:
    """Everything a row gave, each round of each cell with what its load generator told."""
    row = result.row
    cells = {
        cell.label: {
            "medians": {figure: result.median(figure, cell.label) for figure in row.figures},
            "setup": asdict(cell.setup),
            "traffic": asdict(cell.traffic),
            "without": result.without.get(cell.label),
            "rounds": [asdict(sample) for sample in result.samples.get(cell.label, ())],
        }
        for cell in row.cells
    }
    return {"name": row.name, "title": row.title, "above": row.above, "cells": cells, "targets": result.verdicts()}


def write(path: Path, facts: Mapping[str, Any], results: Iterable[Result]) -> None:
    """Keep all of it in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": [as_json(result) for result in results]}, indent=1) + "\n")
