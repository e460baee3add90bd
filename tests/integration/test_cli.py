"""The program as people run it: what it says when it is told wrong, its exit status, and that it serves."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from balancer.cli import main
from loadtest.fake_node import FakeNode
from tests.answering import dead_url
from tests.client import chat, client_of, fleet
from tests.process import Process, serving, settings_file

NODE = "http://127.0.0.1:1"
FREE = ("--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0")
# Where nothing can be listened on: were something wrong let pass, the start would end there, with status 1.
NOWHERE = ("--listen", "192.0.2.1:1", "--ops-listen", "192.0.2.1:1")
SHA256 = "ab" * 32


async def ran(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, Process]:
    """Run it as a process to its end: the exit status, and what it said."""
    async with await Process.start("balancer", *arguments, environment=environment) as process:
        return await process.ended(), process


async def refused(*arguments: str) -> tuple[int, str]:
    """The exit status and the one line on standard error of a process that fails to start."""
    status, process = await ran(*arguments)
    assert process.out == []
    return status, only_line([line for line in process.err if not line.startswith("{")])  # but for what it logged


def only_line(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    assert lines[0].startswith("gpu-balancer: ")
    return lines[0].removeprefix("gpu-balancer: ")


Cli = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs the program in this process, as far as it gets without serving: exit status, standard output and error."""

    def run(*arguments: str, **environment: str) -> tuple[int, list[str], list[str]]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            status = 0
            try:
                main(arguments)
            except SystemExit as exit_:
                status = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


@contextmanager
def taken_port() -> Iterator[str]:
    """An address where somebody else listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"127.0.0.1:{other.getsockname()[1]}"


# -- settings that are wrong: status 2, before anything is opened


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("listne: x", "listne: no such setting"),
        ("retry: {max_atempts: 3}", "retry.max_atempts: no such setting"),
        ('nodes: [{url: "http://n:1", wieght: 2}]', "nodes.0.wieght: no such setting"),
        ("cache: {semantic: {treshold: 1}}", "cache.semantic.treshold: no such setting"),
        ("cache: {ttl_by_endpoint: {caht: 5}}", "cache.ttl_by_endpoint.caht: there is no such endpoint"),
        ("cache: {ttl_by_tenant: {acme: 0}}", "cache.ttl_by_tenant.acme: Input should be greater than 0"),
        ("cache: {sign_key: short}", "cache.sign_key: String should have at least 16 characters"),
        ("retry: {max_attempts: 0}", "retry.max_attempts: Input should be greater than or equal to 1"),
        ("timeouts: {connect_s: soon}", "timeouts.connect_s: Input should be a valid number"),
        ("models: [{name: m, fallbacks: [n]}]", "models.fallbacks: is not built yet; leave it out"),
        ("limits: {store: redis}", "limits.store: redis is asked for, and redis.url is not set"),
        ("auth: {keys: [{tenant: a, sha256: short}]}", "auth.keys.0.sha256: String should match pattern"),
        ("nodes: [{url: 'http://n:1'}, {url: 'http://n:1'}]", "nodes: the id n:1 is there twice"),
        ("nodes: [{url: 'not a url'}]", "nodes.0.url: "),
        ("nodes: [{url: 'ftp://n:1'}]", "nodes.0.url: "),
        ("nodes: [", "settings.yaml: not YAML: "),
        ("- retry", "settings.yaml: must hold a mapping of settings"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(cli: Cli, tmp_path: Path, text: str, line: str) -> None:
    file = str(settings_file(str(tmp_path), text))
    for words in (("check-config", file), ("serve", "--config", file)):
        status, out, err = cli(*words)
        assert (status, out) == (2, [])
        assert line in only_line(err)


def test_every_wrong_setting_is_named_in_a_line_of_its_own(cli: Cli, tmp_path: Path) -> None:
    file = settings_file(str(tmp_path), "listne: x\nretry: {max_attempts: 0}\nlog: {level: loud}")
    status, _, err = cli("check-config", str(file))
    assert status == 2
    assert sorted(line.split(":")[1] for line in err) == [" listne", " log.level", " retry.max_attempts"]


@pytest.mark.parametrize("path", ["/nowhere/settings.yaml", "/"])
def test_a_file_that_cannot_be_read_is_named(cli: Cli, path: str) -> None:
    for status, _, err in (
        cli("serve", "--config", path),
        cli("check-config", path),
        cli("serve", BALANCER_CONFIG=path),
    ):
        assert status == 2
        assert only_line(err).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("BALANCER_RETYR__MAX_ATTEMPTS", "5", "BALANCER_RETYR__MAX_ATTEMPTS: no such setting"),
        ("BALANCER_RETRY__MAX_ATEMPTS", "5", "max_atempts: no such setting"),
        ("BALANCER_RETRY__MAX_ATTEMPTS", "many", "retry.max_attempts: Input should be a valid integer"),
        ("BALANCER_NODES", "[{", "nodes"),
    ],
)
def test_a_wrong_variable_stops_the_start_with_its_name(cli: Cli, variable: str, value: str, line: str) -> None:
    status, _, err = cli("serve", *NOWHERE, "--node", NODE, **{variable: value})
    assert status == 2
    assert line in only_line(err)


@pytest.mark.parametrize(
    "spec",
    [
        "not-a-url",
        "ftp://node:1",
        "http://",
        "",
        f"{NODE},nonsense",
        f"{NODE},color=red",
        f"{NODE},weight=heavy",
        f"{NODE},weight=-1",
        f"{NODE},agent=nowhere",
    ],
)
def test_a_bad_node_spec_is_wrong_usage(cli: Cli, spec: str) -> None:
    status, _, err = cli("serve", *NOWHERE, "--node", spec)
    assert status == 2
    assert "node" in only_line(err)


def test_without_nodes_nothing_is_started(cli: Cli) -> None:
    status, _, err = cli("serve", *NOWHERE)
    assert status == 2
    assert only_line(err).startswith("nodes: none are configured")


@pytest.mark.parametrize("words", [(), ("fly",), ("serve", "--no-such-option"), ("check-config",), ("new-key",)])
def test_wrong_usage_is_told_as_usual(cli: Cli, words: tuple[str, ...]) -> None:
    status, _, err = cli(*words)
    assert (status, err[0].startswith("usage: ")) == (2, True)


@pytest.mark.parametrize(
    ("option", "address"),
    [("--listen", "nowhere"), ("--listen", "127.0.0.1:99999"), ("--ops-listen", "127.0.0.1:http")],
)
async def test_an_address_that_is_none_is_wrong_usage(cli: Cli, tmp_path: Path, option: str, address: str) -> None:
    name = option.removeprefix("--").replace("-", "_")
    status, told = await refused("serve", *FREE, "--node", NODE, option, address)
    assert (status, told.startswith(f"{name}: ")) == (2, True)
    status, _, err = cli("check-config", str(settings_file(str(tmp_path), {name: address})))
    assert (status, only_line(err).startswith(f"{name}: ")) == (2, True)


# -- what cannot be had: status 1


@pytest.mark.parametrize("option", ["--listen", "--ops-listen"])
async def test_a_port_in_use_is_named_and_ends_the_start(option: str) -> None:
    with taken_port() as address:
        status, told = await refused("serve", *FREE, "--node", NODE, option, address)
    assert status == 1
    assert told == f"{option.removeprefix('--').replace('-', '_')}: {address}: is in use"


# -- check-config


async def test_check_config_prints_what_is_in_force_without_a_secret(tmp_path: Path) -> None:
    secrets = ["node-key", "redis%2Fpassword", "embed-password", SHA256]
    settings: dict[str, Any] = {
        "nodes": [{"url": NODE, "api_key": "node-key"}],
        "auth": {"keys": [{"tenant": "acme", "sha256": SHA256, "burst": 7}]},
        "ops": {"admin_key_sha256": SHA256, "agent_token_sha256": SHA256},
        "redis": {"url": "redis://user:redis%2Fpassword@r:6379/0"},
        "cache": {"semantic": {"embeddings_url": "http://user:embed-password@e/v1"}},
        "retry": {"max_attempts": 5},
    }
    file = settings_file(str(tmp_path), settings)
    status, process = await ran("check-config", str(file))
    assert (status, process.err) == (0, [])
    told = "\n".join(process.out)
    shown = yaml.safe_load(told)
    assert (shown["retry"]["max_attempts"], shown["retry"]["base_s"]) == (5, 0.05)
    assert (shown["auth"]["keys"][0]["tenant"], shown["auth"]["keys"][0]["burst"]) == ("acme", 7)
    assert [secret for secret in secrets if secret in told] == []


def test_secrets_may_come_from_files_and_are_masked_as_well(cli: Cli, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("from-a-file\n")
    file = str(settings_file(str(tmp_path), {"nodes": [{"url": NODE, "api_key_file": str(secret)}]}))
    status, out, err = cli("check-config", file)
    assert (status, err) == (0, [])
    assert "from-a-file" not in "\n".join(out)
    assert yaml.safe_load("\n".join(out))["nodes"][0]["api_key"] == "***"
    secret.unlink()
    status, out, err = cli("check-config", file)
    assert (status, out) == (2, [])
    assert str(secret) in only_line(err)


@pytest.mark.parametrize("url", ["http://user:password@n:1", "http://n:1/?key=password"])
def test_a_url_with_a_secret_in_it_is_refused_without_repeating_it(cli: Cli, tmp_path: Path, url: str) -> None:
    for node in ({"url": url}, {"url": NODE, "agent": url}):
        status, _, err = cli("check-config", str(settings_file(str(tmp_path), {"nodes": [node]})))
        assert status == 2
        assert "password" not in only_line(err)


# -- new-key


async def test_a_new_key_works_with_the_line_that_comes_with_it() -> None:
    status, process = await ran("new-key", "--tenant", "acme")
    assert status == 0
    key = next(line.split()[1] for line in process.out if line.startswith("key:"))
    (entry,) = yaml.safe_load(next(line for line in process.out if line.startswith("settings:")).partition(":")[2])
    assert key not in str(entry)
    async with FakeNode(instant=True) as node:
        settings = {"nodes": fleet(node), "auth": {"keys": [entry]}}
        async with serving(settings) as balancer, client_of(balancer.url) as client:
            assert (await client.post(chat(), headers={"Authorization": f"Bearer {key}"})).is_whole
            assert (await client.post(chat(), headers={"Authorization": f"Bearer {key}x"})).code == "unauthenticated"
            assert (await client.post(chat())).status == 401
            await balancer.logged("request.finished")
            assert key not in "\n".join(balancer.process.err)
    assert balancer.events("request.finished")[0]["tenant"] == "acme"


def test_two_new_keys_differ_and_a_bad_tenant_gets_none(cli: Cli) -> None:
    keys = {cli("new-key", "--tenant", "acme")[1][0] for _ in range(2)}
    assert len(keys) == 2
    status, out, err = cli("new-key", "--tenant", "with space")
    assert (status, out) == (2, [])
    assert only_line(err).startswith("--tenant: ")


# -- serve


async def test_serve_answers_from_its_first_moment_with_nodes_named_on_the_command_line() -> None:
    async with FakeNode(instant=True) as node:
        spec = f"{node.url},id=first,weight=2.5,model=sim-model,model=other"
        words = ("serve", *FREE, "--node", f"{dead_url()},id=dead,model=sim-model", "--node", spec)
        async with await Process.start("balancer", *words) as process:
            await process.until(lambda: any("data.listening" in line for line in process.err))
            (address,) = re.findall(r'"address":"([^"]+)"', next(line for line in process.err if "data." in line))
            async with client_of(f"http://{address}") as client:
                reply = await client.post(chat())
                assert (reply.is_whole, reply.node) == (True, "first")
                assert (await client.get("/healthz")).status == 200
                models = (await client.get("/v1/models")).json["data"]
                assert {model["id"] for model in models} == {"sim-model", "other"}
        assert process.out == []


async def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    async with FakeNode(instant=True) as node:
        file = settings_file(
            str(tmp_path),
            {"listen": "127.0.0.1:1", "ops_listen": "127.0.0.1:0", "log": {"level": "info"}, "retry": {"max_s": 7}},
        )
        variables = {"BALANCER_CONFIG": str(file), "BALANCER_LISTEN": "127.0.0.1:2"}
        variables["BALANCER_RETRY__MAX_ATTEMPTS"] = "9"
        words = ("serve", "--listen", "127.0.0.1:0", "--node", node.url)
        async with await Process.start("balancer", *words, environment=variables) as process:
            await process.until(lambda: any("ops.listening" in line for line in process.err))
            (address,) = re.findall(r'"address":"([^"]+)"', next(line for line in process.err if "ops." in line))
            async with client_of(f"http://{address}") as client:
                shown = (await client.get("/admin/config")).json
        assert shown["listen"] == "127.0.0.1:0"
        assert (shown["retry"]["max_attempts"], shown["retry"]["max_s"]) == (9, 7.0)
        assert shown["nodes"][0]["url"] == node.url
