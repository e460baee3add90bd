"""Reads `lexicon.txt`, the closed lists of English that the guards go by."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files


def _sections() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in files("balancer.core.semantic").joinpath("lexicon.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections[line.strip("[]")] = []
        elif line.startswith("  "):
            lines[-1] += " " + line.strip()
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


_SECTIONS = _sections()


def lines(section: str) -> list[list[str]]:
    """A section's lines, each as its words."""
    return [line.split() for line in _SECTIONS[section]]


def words(section: str) -> frozenset[str]:
    """All words of a section."""
    return frozenset(word for line in lines(section) for word in line)


def named(section: str) -> Iterator[tuple[str, str]]:
    """The lines of a section in the form `name: rest`."""
    for line in _SECTIONS[section]:
        name, _, rest = line.partition(": ")
        yield name, rest
