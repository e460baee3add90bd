"""Traces, made-up traffic, specs and the command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random

import pytest

from loadtest.sim import plot, traces
from loadtest.sim.command import main
from loadtest.sim.fleet import Fault, SpecError, parse_fault, parse_fleet
from loadtest.sim.standard import DATA
from loadtest.sim.synthetic import AgentTraffic, generate


def test_mooncake_ticks_are_spread_and_partial_blocks_dropped() -> None:
    rows = [
        {"timestamp": at, "input_length": 1100, "output_length": 7, "hash_ids": [0, number, 900 + number]}
        for number, at in enumerate([0, 0, 0, 3000, 3000, 6000])
    ]
    arrivals = traces.mooncake(rows, Random(1))
    assert all(len(arrival.blocks) == 2 for arrival in arrivals)
    assert sum(arrival.at_s < 3.0 for arrival in arrivals) == 3
    assert len({arrival.at_s for arrival in arrivals}) == 6
    assert all(one.at_s <= other.at_s for one, other in itertools.pairwise(arrivals))


def test_the_committed_excerpts_load() -> None:
    assert len(traces.load(DATA / "mooncake_conversation_600.jsonl", Random(1))) == 600
    conv = traces.load(DATA / "azure2023_conv_800.csv", Random(1))
    assert len(conv) == 800
    assert conv[0].at_s == 0.0


def test_time_is_scaled_cut_and_pressed_together() -> None:
    arrivals = traces.load(DATA / "azure2023_conv_800.csv", Random(1))
    assert traces.scaled(arrivals, 2.0)[-1].at_s == pytest.approx(arrivals[-1].at_s / 2)
    cut = traces.excerpt(arrivals, 30.0, 60.0)
    assert cut
    assert all(0 <= arrival.at_s < 60 for arrival in cut)
    burst = traces.with_burst(arrivals, 60.0, 40.0, 4.0)
    assert len(burst) == len(arrivals)
    inside = sum(60 <= arrival.at_s < 70 for arrival in burst)
    assert inside == sum(60 <= arrival.at_s < 100 for arrival in arrivals)


def test_agents_repeat_what_was_said_below_a_shared_system_prompt() -> None:
    arrivals = list(generate(AgentTraffic(), 500, Random(1)))
    assert len(arrivals) == 500
    assert all(one.at_s <= other.at_s for one, other in itertools.pairwise(arrivals))
    seen: set[int] = set()
    shared = total = 0
    for arrival in arrivals:
        shared += sum(block in seen for block in arrival.blocks)
        total += len(arrival.blocks)
        seen.update(arrival.blocks)
    assert shared > 0.5 * total


def test_specs() -> None:
    assert [p.name for p in parse_fleet("2xh100-8b+l4-8b/2")] == ["h100-8b", "h100-8b", "l4-8b/2"]
    assert parse_fault("slow:1@60-90x3", 2) == Fault(kind="slow", node=1, from_s=60, until_s=90, factor=3)
    for bad in ("", "8xb200", "x"):
        with pytest.raises(SpecError):
            parse_fleet(bad)
    for bad in ("slow:0@5", "hang:9@5", "burn:0@1", "hang:0@1x3"):
        with pytest.raises(SpecError):
            parse_fault(bad, 2)


def test_the_command_prints_one_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    argv = ["--trace", "synthetic", "--requests", "200", "--fleet", "2xh100-8b", "--policy", "round_robin,random"]
    assert main([*argv, "predicted_cost", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[2:]] == ["round_robin", "random", "predicted_cost"]
    assert printed.err == ""  # no terminal, no progress bar
    assert [run["policy"] for run in json.loads(out.read_text())["runs"]] == ["round_robin", "random", "predicted_cost"]


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--fleet", "8xnothing"], 2),
        (["--policy", "magic"], 2),
        (["--trace", "nowhere.jsonl"], 1),
        (["--fault", "hang:99@1"], 2),
        (["--burst", "1,2"], 2),
    ],
)
def test_the_command_says_what_is_wrong(argv: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == status
    assert capsys.readouterr().err.startswith("gpu-balancer: ")


@pytest.mark.skipif(plot.available(), reason="matplotlib is installed")
def test_without_matplotlib_a_plot_is_refused_clearly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "10", "--plot", str(tmp_path / "a.png")]) == 1
    assert "matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(not plot.available(), reason="matplotlib is not installed")
def test_a_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    argv = ["--requests", "50", "--fleet", "2xh100-8b", "--policy", "random", "--plot", str(path)]
    assert main(argv) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
