"""A pytest plugin: which real parts of the outside world a run used, and which it skipped and why, said at its end.

Tests that need one carry the mark `real(part)`. Where CI=true, skipping a part that can be had anywhere fails the run.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

# What may stand in a mark, and what people call it.
PARTS: Mapping[str, str] = {
    "redis": "Redis server",
    "openai": "openai client",
    "llama": "llama-server engine",
    "vectors": "Redis vector sets",
    "weights": "MiniLM weights",
}
# A package index is enough to have these.
NEVER_SKIPPED_IN_CI = ("redis", "openai")
PROPERTY = "real_part"


@dataclass(slots=True)
class Use:
    """What became of the tests of one part."""

    ran: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason


class RealParts:
    """Collects what the tests of each part did; under pytest-xdist the workers' reports bring it here."""

    def __init__(self) -> None:
        self.uses = {part: Use() for part in PARTS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, part in report.user_properties:
            if name != PROPERTY:
                continue
            if report.skipped:
                self.uses[str(part)].skipped[_reason(report)] += 1
            elif report.when == "call" or (report.when == "setup" and report.failed):
                self.uses[str(part)].ran += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.missing_in_ci and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        lines = [_line(part, use) for part, use in self.uses.items() if use.ran or use.skipped]
        if lines:
            terminalreporter.section("real parts")
            for line in lines:
                terminalreporter.write_line(line)
        for part in self.missing_in_ci:
            terminalreporter.write_line(f"CI=true: {PARTS[part]} must not be skipped", red=True)

    @property
    def missing_in_ci(self) -> list[str]:
        """Parts that were skipped where they may not be."""
        if os.environ.get("CI") != "true":
            return []
        return [part for part in NEVER_SKIPPED_IN_CI if self.uses[part].skipped]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker's reports go to its controller
        config.pluginmanager.register(RealParts(), "real-parts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("real"):
            if len(mark.args) != 1 or mark.args[0] not in PARTS:
                raise pytest.UsageError(f"{item.nodeid}: the mark real(part) knows {', '.join(PARTS)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    for mark in item.iter_markers("real"):
        report.user_properties.append((PROPERTY, mark.args[0]))
    return report


def _line(part: str, use: Use) -> str:
    tests = use.ran + use.skipped.total()
    what = f"used      {_what_it_is(part)}" if use.ran else "skipped"
    reasons = "; ".join(f"{count} skipped: {reason}" for reason, count in use.skipped.items())
    return f"{PARTS[part]:<20} {tests:>3} tests  {what}{'  ' + reasons if reasons else ''}"


def _reason(report: pytest.TestReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(reason).removeprefix("Skipped: ")


def _what_it_is(part: str) -> str:
    """Name and version of what was used, as far as it is known."""
    if part == "openai":
        return f"openai {importlib.metadata.version('openai')}"
    if part == "weights":
        return f"of {os.environ.get('SEMANTIC_MODEL_DIR', 'nowhere')}"
    if part == "vectors":
        from tests.real import vector_server

        return vector_server.name()
    if part == "llama":
        from tests.real import engine

        return engine.name()
    from tests.redis_server import program

    path = program()
    if path is None:
        return ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = next((word.removeprefix("v=") for word in said.split() if word.startswith("v=")), "")
    return f"{Path(path).name} {version}".strip()
