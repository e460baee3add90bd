"""Triples written for this project: a question, another wording of it, and one that differs in what is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("contrast.txt")


@dataclass(frozen=True, slots=True)
class Triple:
    """`same` may be answered with what was said to `base`; `diff` may not."""

    kind: str
    base: str
    same: str
    diff: str


def triples() -> Iterator[Triple]:
    """Every template with everything that fills it."""
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        kind, *texts, fillings = line.split(" | ")
        for filling in fillings.split("; "):
            a, _, b = filling.partition(", ")
            base, same, diff = (text.replace("{a}", a).replace("{b}", b) for text in texts)
            yield Triple(kind, base, same, diff)
