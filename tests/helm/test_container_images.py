"""The Dockerfile, as far as it can be judged without building it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from rendered_chart import CHART_DIR, REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
VALUES = yaml.safe_load((CHART_DIR / "values.yaml").read_text())

Instruction = tuple[str, str]


def stages() -> dict[str, tuple[str, list[Instruction]]]:
    """Stage name -> the image it stands on, and its instructions."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found: dict[str, tuple[str, list[Instruction]]] = {}
    current: list[Instruction] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            current = []
            found[name] = base, current
        else:
            current.append((keyword, rest.strip()))
    return found


def inherited(name: str) -> list[Instruction]:
    """The instructions that make the image `name`, those of the stages below it first."""
    base, own = stages()[name]
    return (inherited(base) if base in stages() else []) + own


def last(name: str, keyword: str) -> Any:
    text = [rest for word, rest in inherited(name) if word == keyword][-1]
    return json.loads(text) if text.startswith("[") else text


@pytest.mark.parametrize("target", ["balancer", "node-agent"])
def test_an_image_runs_as_the_charts_user_and_in_exec_form(target: str) -> None:
    section = VALUES["balancer" if target == "balancer" else "agent"]["podSecurityContext"]
    assert last(target, "USER") == f"{section['runAsUser']}:{section['runAsGroup']}"
    command = {"balancer": "gpu-balancer", "node-agent": "gpu-node-agent"}[target]
    assert last(target, "ENTRYPOINT") == [command], "SIGTERM has to reach the program itself, not a shell"
    assert last(target, "CMD")[0] == "serve"
    assert "HEALTHCHECK" not in {word for word, _ in inherited(target)}


def test_the_ports_are_the_charts() -> None:
    config = VALUES["config"]
    ports = [config[setting].rpartition(":")[2] for setting in ("listen", "ops_listen")]
    assert last("balancer", "EXPOSE").split() == ports
    assert last("node-agent", "EXPOSE") == str(VALUES["agent"]["port"])
    assert last("balancer", "CMD") == ["serve", "--listen", config["listen"], "--ops-listen", config["ops_listen"]]


def test_the_base_is_a_slim_python_named_without_a_host() -> None:
    match = re.search(r"^ARG PYTHON_IMAGE=python:3\.(\d+)-slim$", DOCKERFILE, flags=re.MULTILINE)
    assert match
    assert int(match[1]) >= 11
    bases = {base for base, _ in stages().values()}
    assert bases <= {"${PYTHON_IMAGE}", *stages()}


def test_each_image_has_its_own_extra_and_no_settings_that_would_override_a_file() -> None:
    for target, extra in {"balancer": "[balancer,semantic]", "node-agent": "[agent]"}.items():
        (source,) = [rest for word, rest in inherited(target) if word == "COPY"]
        stage = re.match(r"--from=(\S+) /opt/venv /opt/venv$", source)
        assert stage, "only the environment is taken over from the build"
        (install,) = [rest for _, rest in stages()[stage[1]][1]]
        assert extra in install
        assert "[dev]" not in install
        assert "--only-binary=:all:" in install
        assert not [
            rest for word, rest in inherited(target) if word == "ENV" and re.search(r"BALANCER_|NODE_AGENT_", rest)
        ]


def test_the_build_context_holds_what_the_wheel_is_made_of() -> None:
    admitted = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source.replace("*", "") for word, rest in stages()["build"][1] if word == "COPY" for source in rest.split()[:-1]
    }
    assert {name.replace(".txt", "") for name in admitted} == {name.replace(".txt", "") for name in copied}
    packages = re.search(r"^packages = (\[.*\])$", (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert packages
    assert set(json.loads(packages[1])) <= admitted
