"""The quick trials of `make chaos`: counts only. Its time bounds need a quiet machine and three rounds."""

from __future__ import annotations

import pytest

from loadtest.chaos.__main__ import play
from loadtest.chaos.figure import PROMISES, Figure, Promise, Row

QUICK = sorted((one for one in PROMISES if one.quick), key=lambda one: one.number)


@pytest.mark.parametrize("one", QUICK, ids=lambda one: f"{one.number}-{one.trial.__name__}")
async def test_a_promise_holds(one: Promise) -> None:
    figures = await play(one)
    broken = [figure for figure in figures if not figure.unit and not figure.holds(figure.value)]
    assert figures
    assert broken == []


def test_the_median_is_judged() -> None:
    row = Row([Figure(name="late", value=value, bound=1.0, unit=" s") for value in (0.5, 9.0, 0.7)])
    assert row.holds
    assert (row.text(), row.bound_text()) == ("0.7 s (0.5 to 9)", "≤ 1 s")
