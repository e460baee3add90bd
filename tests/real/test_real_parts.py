"""The table of real parts at the end of a run, and what CI does not let pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

@pytest.mark.real("redis")
def test_used(): ...

@pytest.mark.real("{skipped}")
def test_skipped():
    pytest.skip("nobody brought it")

def test_without_any_part(): ...
"""


def run(folder: Path, skipped: str, *options: str, ci: str) -> tuple[int, list[str]]:
    """Exit status and output of a run of TESTS."""
    (folder / "test_parts.py").write_text(TESTS.format(skipped=skipped))
    words = [sys.executable, "-m", "pytest", "-p", "tests.real_parts", "-p", "no:cacheprovider", *options, str(folder)]
    done = subprocess.run(
        [*words, "--rootdir", str(folder)],
        cwd=folder,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_table_tells_what_was_used_and_what_was_skipped_and_why(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, lines = run(tmp_path, "llama", *options, ci="false")
    assert status == 0, lines
    assert any(line.startswith("Redis server") and " 1 tests  used" in line for line in lines)
    assert any(line.startswith("llama-server engine") and "1 skipped: nobody brought it" in line for line in lines)
    assert not any(line.startswith("openai client") for line in lines)


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_ci_fails_where_a_part_is_skipped_that_can_be_had_anywhere(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, lines = run(tmp_path, "openai", *options, ci="true")
    assert status == 1
    assert "CI=true: openai client must not be skipped" in lines
    assert run(tmp_path, "openai", *options, ci="false")[0] == 0


def test_ci_lets_an_engine_be_skipped(tmp_path: Path) -> None:
    assert run(tmp_path, "llama", ci="true")[0] == 0


def test_unknown_part_stops_the_run(tmp_path: Path) -> None:
    status, _ = run(tmp_path, "lama", ci="false")
    assert status == pytest.ExitCode.USAGE_ERROR
