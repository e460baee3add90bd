"""How the demo looks: a table that is drawn anew in place, or a line now and then where there is no terminal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from loadtest.demo_traffic import Totals

HEAD = ("node", "state", "in flight", "queue", "p50 TTFT", "share", "GPU memory", "GPU temp")
WIDTHS = (10, 10, 9, 6, 9, 6, 16, 8)
# Without a terminal every third look is told, or a log of a minute would be a page long.
LOOKS_PER_LINE = 3
RED, YELLOW, PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[0m"
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    """What is known of one node; None is unknown. `state` and `in_flight` are the balancer's, the rest is measured."""

    name: str
    state: str
    in_flight: int
    share: float
    queue: int | None = None
    ttft_s: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_celsius: int | None = None


def table(rows: Sequence[NodeRow], totals: Totals, elapsed_s: float) -> list[str]:
    """The lines of the table, without colour."""
    lines = [_line(HEAD), *(_line(_cells(row)) for row in rows)]
    return [*lines, "", f"{elapsed_s:4.0f} s   {summary(totals)}"]


def compact(rows: Sequence[NodeRow], totals: Totals, elapsed_s: float) -> str:
    """The same in one line."""
    nodes = "  ".join(f"{row.name} {row.state} {row.in_flight} ({row.share:.0%})" for row in rows)
    return f"{elapsed_s:4.0f} s  {summary(totals)} | {nodes}"


def summary(totals: Totals) -> str:
    """All counts."""
    return (
        f"requests {totals.requests}, failed {totals.failed + totals.broken}, cut mid-way {totals.cut}, "
        f"retried {totals.retried}, cache hits {totals.cache_hits}"
    )


class Screen:
    """Where all of it is shown: events stay, the table below them is drawn over."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._in_colour = self._is_terminal and not os.environ.get("NO_COLOR")
        self._drawn = 0  # lines of the table that stand on the screen, the last ones
        self._looks = 0

    def say(self, text: str) -> None:
        """Text that stays; the table comes back below it with the next look."""
        self._write([*text.splitlines(), ""] if self._is_terminal else text.splitlines())

    def leave(self) -> None:
        """Let the table stand as it is: what is said from now on goes below it."""
        self._drawn = 0

    def show(self, rows: Sequence[NodeRow], totals: Totals, elapsed_s: float) -> None:
        """One look at everything."""
        columns, lines = shutil.get_terminal_size()
        if self._is_terminal and len(rows) + 4 < lines:
            head, *rest = (line[: columns - 1] for line in table(rows, totals, elapsed_s))
            nodes = [self._coloured(row, line) for row, line in zip(rows, rest, strict=False)]
            self._write([head, *nodes, *rest[len(rows) :]], keep=False)
            return
        if self._looks % LOOKS_PER_LINE == 0:
            self._write([compact(rows, totals, elapsed_s)])
        self._looks += 1

    def _coloured(self, row: NodeRow, line: str) -> str:
        if not self._in_colour or row.state == "ready":
            return line
        return f"{RED if row.state in ('down', 'out', 'open') else YELLOW}{line}{PLAIN}"

    def _write(self, lines: Sequence[str], *, keep: bool = True) -> None:
        """Write lines in the place of the table; unless they are kept, they are the new one."""
        erase = f"\x1b[{self._drawn}A\x1b[J" if self._drawn else ""
        self._stream.write(erase + "".join(f"{line}\n" for line in lines))
        self._stream.flush()
        self._drawn = 0 if keep else len(lines)


def _cells(row: NodeRow) -> tuple[str, ...]:
    memory = temperature = "-"
    if row.memory_used_bytes is not None and row.memory_total_bytes is not None:
        memory = f"{row.memory_used_bytes / GIB:.0f} of {row.memory_total_bytes / GIB:.0f} GiB"
    if row.temperature_celsius is not None:
        temperature = f"{row.temperature_celsius} C"
    queue = "-" if row.queue is None else str(row.queue)
    ttft = "-" if row.ttft_s is None else f"{row.ttft_s * 1000:.0f} ms"
    return (row.name, row.state, str(row.in_flight), queue, ttft, f"{row.share:.0%}", memory, temperature)


def _line(cells: Sequence[str]) -> str:
    """Names to the left, figures to the right."""
    return "  ".join(
        f"{cell:<{width}}" if place < 2 else f"{cell:>{width}}"
        for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )
