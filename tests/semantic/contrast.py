"""Triples written for this project: a question, another wording of it, and one that differs in what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Triple:
    """`same` may be answered with what was said to `base`; `diff` may not."""

    kind: str
    base: str
    same: str
    diff: str


def triples() -> Iterator[Triple]:
    """Every template with everything that fills it."""
    for line in (_FOLDER / "contrast.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        kind, *texts, fillings = line.split(" | ")
        for filling in fillings.split("; "):
            a, _, b = filling.partition(", ")
            base, same, diff = (text.replace("{a}", a).replace("{b}", b) for text in texts)
            yield Triple(kind, base, same, diff)


def pairs(name: str) -> list[tuple[str, str]]:
    """The pairs of `apart.txt` (two questions) or `alike.txt` (one question in two wordings)."""
    lines = (_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [(one, other) for one, _, other in (line.partition(" | ") for line in lines)]
