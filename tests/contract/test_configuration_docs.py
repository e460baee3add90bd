"""docs/configuration.md names every setting, with its default, its variable and what a reload does to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import node_agent.settings as agent
from balancer.core.node import NodeConfig
from balancer.restart import RESTART_ONLY
from balancer.settings import SECRETS, KeyConfig, ModelRule, Settings, SettingsError, load
from tests.contract.markdown import code_blocks, page, tables, ticked

LISTS = {"nodes": NodeConfig, "models": ModelRule, "auth.keys": KeyConfig}
DOCUMENT = page("docs/configuration.md")


def by_name(*headings: str) -> dict[str, list[str]]:
    rows = tables(DOCUMENT, *headings)
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1:] for row in rows}


SECTIONS = by_name("setting", "default", "environment", "reload", "meaning")
ENTRIES = by_name("setting", "default", "reload", "meaning")
AGENT = by_name("setting", "default", "environment", "meaning")
RELOADS = {"yes", "new nodes", "restart", "not built"}
# Defaults that are not the same on every machine are told in words.
TOLD_IN_WORDS = {"host"}


def is_policy(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if is_policy(value):
        for field in dataclasses.fields(value):
            yield from leaves(f"{name}.{field.name}", getattr(value, field.name))
    else:
        yield name, value


def settings() -> dict[str, Any]:
    """Every setting that is no entry of a list, with its default."""
    every = [leaf for name, info in Settings.model_fields.items() for leaf in leaves(name, info.default)]
    return {name: value for name, value in every if name not in LISTS}


def entries() -> dict[str, Any]:
    """Every field of a list's entries, with its default; `required` where it has none."""
    found: dict[str, Any] = {}
    for prefix, kind in LISTS.items():
        for field in dataclasses.fields(kind):
            made = field.default_factory
            default = made() if made is not dataclasses.MISSING else field.default
            found[f"{prefix}[].{field.name}"] = "required" if default is dataclasses.MISSING else default
    return found


def written(value: Any) -> str:
    """A default as the table writes it: text as it is, all else as JSON, whole numbers without a point."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def test_every_setting_is_in_the_tables_and_nothing_else() -> None:
    assert set(SECTIONS) == set(settings())
    assert set(ENTRIES) == set(entries())


@pytest.mark.parametrize(("name", "default"), [*settings().items(), *entries().items()])
def test_default_is_the_one_in_force(name: str, default: Any) -> None:
    assert {**SECTIONS, **ENTRIES}[name][0] == written(default)


def test_variables_are_named_after_their_settings() -> None:
    for name, (_, variable, _, _) in SECTIONS.items():
        assert variable == "BALANCER_" + name.upper().replace(".", "__")


@pytest.mark.parametrize(
    "name", [name for name, default in settings().items() if isinstance(default, bool | int | float)]
)
def test_variable_reaches_its_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number or a switch refuses this value, and says so under the setting's name."""
    monkeypatch.setenv(SECTIONS[name][1], "no-such-value")
    with pytest.raises(SettingsError, match=rf"(?m)^{name}: (?!no such setting)"):
        load(None, {})


def test_lists_in_sections_are_set_by_json_of_the_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "acme"
    secret.write_text("0" * 64)
    variables = dict(line.split("=", 1) for block in code_blocks(DOCUMENT, "sh") for line in block.splitlines())
    assert len(variables) == 3
    for name, value in variables.items():
        monkeypatch.setenv(name, value.strip("'").replace("/run/secrets/acme", str(secret)))
    loaded = load(None, {})
    assert (loaded.nodes[0].id, loaded.auth.keys[0].tenant) == ("a100-0", "acme")
    assert loaded.cors.allow_origins == ("https://chat.example.com",)


def test_what_is_read_once_needs_a_restart() -> None:
    for name, (_, _, reload, _) in SECTIONS.items():
        assert reload in RELOADS, name
        if name.split(".")[0] in RESTART_ONLY:
            assert reload == "restart", name
    assert {reload for _, reload, _ in ENTRIES.values()} <= RELOADS


def test_what_stops_the_start_because_it_is_not_built_is_marked() -> None:
    refused = {name for name, _ in Settings()._not_built()}
    marked = {
        name.replace("models[].", "models.") for name, row in {**SECTIONS, **ENTRIES}.items() if "not built" in row
    }
    assert refused <= marked
    for name in refused:
        meaning = {**SECTIONS, **ENTRIES}.get(name, ENTRIES.get(name.replace("models.", "models[]."), []))[-1]
        assert meaning.startswith("Must be"), name


def test_secrets_that_may_come_from_files_are_named() -> None:
    told = DOCUMENT.partition("### Secrets")[2].partition("\n\n")[2].partition("\n\n")[0]
    secrets = {name for name in {**SECTIONS, **ENTRIES} if name.rpartition(".")[2] in SECRETS}
    assert secrets == {word for word in ticked(told) if "." in word and "_file" not in word}


def test_agents_settings_are_in_its_table() -> None:
    assert list(AGENT) == agent.names()
    found: dict[str, Any] = {}
    for name, info in agent.Settings.model_fields.items():
        found.update(leaves(name, info.default))
    for name, (default, variable, _) in AGENT.items():
        assert variable == agent.PREFIX + name.upper().replace(".", "__")
        if name not in TOLD_IN_WORDS:
            assert default == written(found[name]), name


def test_agents_engine_fields_are_in_the_table() -> None:
    fields = {row[0] for row in tables(DOCUMENT, "field", "default", "meaning")}
    assert fields == set(agent.engine_spec._FIELDS)


@pytest.mark.parametrize("name", ["README.md", "docs/configuration.md", "docs/runbook.md", "docs/architecture.md"])
def test_yaml_in_the_documents_loads(name: str, tmp_path: Path) -> None:
    for block in code_blocks(page(name), "yaml"):
        file = tmp_path / "settings.yaml"
        file.write_text(block, encoding="utf-8")
        assert isinstance(yaml.safe_load(block), dict)
        load(str(file), {})
