"""What a trial of a promise measures, and whether that keeps it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loadtest.chaos.stage import Theatre


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured value with its bound; `least` says that the bound is from below."""

    name: str
    value: float
    bound: float
    least: bool = False
    unit: str = ""

    def holds(self, value: float) -> bool:
        """Whether `value` keeps the bound."""
        return value >= self.bound if self.least else value <= self.bound


Trial = Callable[["Theatre"], Awaitable[Sequence[Figure]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One promise: its number, what is done to try it, and whether the trial is among the quick ones."""

    number: int
    title: str
    trial: Trial
    quick: bool = False


PROMISES: list[Promise] = []


def promise(number: int, title: str, *, quick: bool = False) -> Callable[[Trial], Trial]:
    """Enter a trial into the list. A promise may have several."""

    def enter(trial: Trial) -> Trial:
        PROMISES.append(Promise(number=number, title=title, trial=trial, quick=quick))
        return trial

    return enter


@dataclass(frozen=True, slots=True)
class Row:
    """The same figure of every round of a trial."""

    figures: Sequence[Figure]

    @property
    def median(self) -> float:
        return median(figure.value for figure in self.figures)

    @property
    def holds(self) -> bool:
        """Judged by the median: machines are shared, and one round may have met something else."""
        return self.figures[0].holds(self.median)

    def text(self) -> str:
        """The median, and the range where rounds differ."""
        values = sorted(figure.value for figure in self.figures)
        unit = self.figures[0].unit
        shown = f"{_number(self.median)}{unit}"
        return shown if values[0] == values[-1] else f"{shown} ({_number(values[0])} to {_number(values[-1])})"

    def bound_text(self) -> str:
        figure = self.figures[0]
        return f"{'≥' if figure.least else '≤'} {_number(figure.bound)}{figure.unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"
