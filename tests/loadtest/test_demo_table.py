"""How the demo looks on a terminal, and in a file."""

from __future__ import annotations

import io
import re

import pytest

from loadtest.demo_table import NodeRow, Screen, compact, table
from loadtest.demo_traffic import Totals

GIB = 1 << 30
WELL = NodeRow(
    name="sim-1",
    state="ready",
    in_flight=3,
    share=0.6,
    queue=1,
    ttft_s=0.0412,
    memory_used_bytes=50 * GIB,
    memory_total_bytes=140 * GIB,
    temperature_celsius=61,
)
DEAD = NodeRow(name="sim-2", state="down", in_flight=0, share=0.0)
ROWS = (WELL, DEAD)
TOTALS = Totals(requests=12, failed=1, broken=1, cut=2, retried=3, cache_hits=4)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def seen(written: str) -> list[str]:
    """What stands on a terminal after all that was written."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d+A\x1b\[J)", re.sub(r"\x1b\[\d+m", "", written)):
        if up := re.match(r"\x1b\[(\d+)A", part):
            lines[-1 - int(up[1]) :] = [""]
        else:
            lines[-1:] = (lines[-1] + part).split("\n")
    return lines


def test_table_has_a_line_for_each_node_and_one_for_the_counts() -> None:
    head, one, other, blank, counts = table(ROWS, TOTALS, 9.0)
    assert head.split()[:2] == ["node", "state"]
    assert one.split() == ["sim-1", "ready", "3", "1", "41", "ms", "60%", "50", "of", "140", "GiB", "61", "C"]
    assert other.split() == ["sim-2", "down", "0", "-", "-", "0%", "-", "-"]
    assert len(head) == len(one) == len(other)
    assert (blank, counts.split()[:3]) == ("", ["9", "s", "requests"])
    assert "failed 2, cut mid-way 2, retried 3, cache hits 4" in counts


def test_one_line_says_it_all_where_there_is_no_terminal() -> None:
    line = compact(ROWS, TOTALS, 9.0)
    assert "\n" not in line
    assert line.endswith("sim-1 ready 3 (60%)  sim-2 down 0 (0%)")


def test_file_gets_every_event_and_a_line_now_and_then() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    for second in range(7):
        screen.show(ROWS, TOTALS, float(second))
    screen.say("killed")
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "3", "6", "killed"]
    assert "\x1b" not in stream.getvalue()


@pytest.mark.usefixtures("wide_terminal")
def test_terminal_shows_the_table_in_one_place_below_the_events() -> None:
    stream = Terminal()
    screen = Screen(stream)
    screen.show(ROWS, TOTALS, 0.0)
    screen.show(ROWS, TOTALS, 1.0)
    screen.say("killed")
    screen.show(ROWS, TOTALS, 2.0)
    standing = seen(stream.getvalue())
    assert standing[:2] == ["killed", ""]
    assert [line.split()[0] for line in standing[2:] if line] == ["node", "sim-1", "sim-2", "2"]


@pytest.mark.usefixtures("wide_terminal")
def test_table_that_is_left_stands_above_what_comes_after() -> None:
    stream = Terminal()
    screen = Screen(stream)
    screen.show(ROWS, TOTALS, 1.0)
    screen.leave()
    screen.say("all in all")
    assert [line.split()[0] for line in seen(stream.getvalue()) if line] == ["node", "sim-1", "sim-2", "1", "all"]


def test_table_that_does_not_fit_becomes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "5")
    stream = Terminal()
    Screen(stream).show(ROWS, TOTALS, 0.0)
    assert len(stream.getvalue().splitlines()) == 1


def test_lines_are_cut_to_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "50")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    Screen(stream).show(ROWS, TOTALS, 0.0)
    assert max(map(len, stream.getvalue().splitlines())) == 39


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "50")
