"""What the documents name is there: functions, files, settings, log events, headings that are linked to."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

import balancer
import node_agent
from balancer.core.cost import PRICES
from balancer.core.outcome import RULINGS, Outcome
from balancer.core.selection import PolicyName
from tests.contract.markdown import PAGES, ROOT, anchors, page, tables, ticked

DOCUMENT = page("docs/architecture.md")
CALLS = re.compile(r"(?:([\w.]+)\.)?(\w+)\(\)")
EVENT = re.compile(r"[a-z_]+\.[a-z_]+")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BREAKER = {True: "success", False: "failure", None: ""}


def modules() -> list[ModuleType]:
    found = []
    for package in (balancer, node_agent):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not info.name.endswith("__main__"):
                found.append(importlib.import_module(info.name))
    return found


def owners() -> dict[str, list[Any]]:
    """Every module and class by its name; a module by the last parts of its path, too."""
    found: dict[str, list[Any]] = {}
    for module in modules():
        parts = module.__name__.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(module)
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found.setdefault(name, []).append(value)
    return found


OWNERS = owners()
SOURCE = "\n".join(
    path.read_text(encoding="utf-8") for name in ("balancer", "node_agent") for path in (ROOT / name).rglob("*.py")
)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_named_exist(path: Path) -> None:
    for word in ticked(path.read_text(encoding="utf-8")):
        call = CALLS.fullmatch(word)
        if call is None or call[1] is None:
            continue
        assert call[1] in OWNERS, word
        assert any(hasattr(owner, call[2]) for owner in OWNERS[call[1]]), word


def test_classes_named_in_the_architecture_exist() -> None:
    for word in ticked(DOCUMENT):
        if re.fullmatch(r"[A-Z][a-z]+[A-Z]\w*", word) and "." not in word:
            assert word in OWNERS, word


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_named_exist(path: Path) -> None:
    for word in ticked(path.read_text(encoding="utf-8")):
        if re.fullmatch(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|md|toml|lua|yaml|c)", word) and "/" in word:
            assert any((folder / word).exists() for folder in (ROOT, ROOT / "balancer", ROOT / "node_agent")), word


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), target
        if heading:
            assert heading in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_log_events_named_are_logged(path: Path) -> None:
    """Words like `breaker.opened`: a noun and a past participle."""
    for word in ticked(path.read_text(encoding="utf-8")):
        if EVENT.fullmatch(word) and word.endswith(("ed", "lost", "begun", "unreachable", "wedged")):
            assert f'"{word}"' in SOURCE or word in OWNERS or _is_setting(word), word


def _is_setting(word: str) -> bool:
    return any(f"`{word}`" in line for line in page("docs/configuration.md").splitlines() if line.startswith("| `"))


def test_policies_are_the_ones_that_can_be_chosen() -> None:
    policies = set(get_args(PolicyName))
    assert {row[0] for row in tables(DOCUMENT, "routing.policy", "chooses")} == policies
    row = next(line for line in page("docs/configuration.md").splitlines() if line.startswith("| `routing.policy`"))
    assert policies <= set(ticked(row))


def test_prices_are_the_ones_that_are_added_up() -> None:
    told = DOCUMENT.partition("The prices of `predicted_cost`:")[2].partition(".\n")[0]
    assert ticked(told) == list(PRICES)


def test_outcome_table_is_the_one_in_force() -> None:
    rows = tables(DOCUMENT, "outcome", "what happened", "fault", "another node", "breaker", "price")
    told = {name: rest for name, _, *rest in rows}
    assert len(rows) == len(told)
    assert told == {
        outcome.label: [
            ruling.fault.value,
            ruling.again.value,
            BREAKER[ruling.breaker],
            "yes" if ruling.failure_price else "",
        ]
        for outcome, ruling in RULINGS.items()
    }
    assert len(told) == len(Outcome)
