"""The settings file that operators rely on: every name in it exists, and its values are the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from balancer.settings import Settings, SettingsError, load

HASH = "0" * 64
CONTRACT = f"""\
listen: 127.0.0.1:8080
ops_listen: 127.0.0.1:8081
nodes:
  - {{url: "http://10.0.0.7:8000", id: a100-0, agent: "http://10.0.0.7:9477", weight: 1.0, max_in_flight: null,
     models: [], labels: {{}}, api_key: null}}
models:
  - {{name: qwen2.5-7b, aliases: [], revision: null, ttl_s: null, cacheable: null, hedge: null, semantic: null,
     max_in_flight: null, fallbacks: []}}
auth:
  keys:
    - {{tenant: acme, sha256: "{HASH}", requests_per_minute: 600, burst: 50, tokens_per_minute: null,
       max_in_flight: null, models: null}}
ops: {{admin_key_sha256: null, agent_token_sha256: null}}
redis: {{url: null, timeout_s: 0.02}}
cache:
  enabled: true
  ttl_s: 3600
  memory_bytes: 268435456
  max_entry_bytes: 1048576
  cacheable: deterministic
  shared_between_tenants: false
  hits_per_second: 1000
  stale_if_error_s: 0
  semantic: {{enabled: false, embedder: http, embeddings_url: null, model_dir: null, mode: verified, threshold: 0.90,
             max_error_rate: 0.01, shadow: true}}
limits: {{requests_per_minute: null, burst: null, tokens_per_minute: null, store: auto, fail_open: true,
         head_bytes: 65536, body_bytes: 33554432, buffered_bytes: 1073741824, head_timeout_s: 10, body_idle_s: 10,
         json_depth: 128}}
routing: {{policy: predicted_cost, panic_ratio: 0.5}}
retry: {{max_attempts: 3, base_s: 0.05, max_s: 2.0, budget_ratio: 0.2, min_retries_per_s: 10}}
timeouts: {{connect_s: 1.0, first_byte_s: 60, idle_s: 30, unary_s: null, total_s: 3600, commit_s: 2, stall_s: 3,
           drain_grace_s: 0, drain_s: 30}}
breaker: {{consecutive_failures: 5, failure_ratio: 0.5, min_requests: 20, window_s: 10, open_s: 3, max_open_s: 60}}
health: {{path: /health, interval_s: 1.0, timeout_s: 1.0, fall: 3, rise: 1}}
agents: {{interval_s: 1.0, stale_s: 5}}
queue: {{max_waiting: 1000, max_wait_s: 30, comment_after_s: null}}
hedge: {{enabled: false}}
resume: {{enabled: true}}
upstream: {{ask_usage: true, forward_headers: [], return_headers: [], check_bytes: 1048576,
           max_connections_per_node: 1024}}
log: {{level: info, format: auto}}
"""
# What the example sets to something of its own.
EXAMPLES = ("nodes", "models", "auth")


def places(data: Any, *path: str | int) -> Iterator[tuple[str | int, ...]]:
    """The path of every name in the file."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield (*path, name)
            yield from places(value, *path, name)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from places(value, *path, index)


PLACES = list(places(yaml.safe_load(CONTRACT)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def write(file: Path, data: Any) -> str:
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return str(file)


def test_contracts_settings_load(file: Path) -> None:
    settings = load(write(file, CONTRACT), {})
    assert (settings.nodes[0].id, settings.nodes[0].agent) == ("a100-0", "http://10.0.0.7:9477")
    assert settings.models[0].name == "qwen2.5-7b"
    assert (settings.auth.keys[0].tenant, settings.auth.keys[0].requests_per_minute) == ("acme", 600)


def test_contracts_values_are_the_defaults(file: Path) -> None:
    settings, defaults = load(write(file, CONTRACT), {}), Settings()
    for name in set(yaml.safe_load(CONTRACT)) - set(EXAMPLES):
        assert getattr(settings, name) == getattr(defaults, name), name


def test_every_name_of_the_contract_exists(file: Path) -> None:
    settings = load(write(file, CONTRACT), {})
    for path in PLACES:
        value: Any = settings
        for part in path:
            if isinstance(part, int):
                value = value[part]
            else:
                assert part in names_of(value), path
                value = getattr(value, part)


def names_of(value: Any) -> set[str]:
    if isinstance(value, Settings):
        return set(Settings.model_fields)
    return {field.name for field in dataclasses.fields(value)}


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_misspelt_name_stops_the_start_and_is_told(path: tuple[str | int, ...], file: Path) -> None:
    data: Any = yaml.safe_load(CONTRACT)
    place = data
    for part in path[:-1]:
        place = place[part]
    place[f"{path[-1]}x"] = place.pop(path[-1])
    with pytest.raises(SettingsError, match=rf"(?m)^{'.'.join(map(str, path))}x: no such setting$"):
        load(write(file, data), {})
