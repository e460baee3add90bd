"""Settings: layers, and that nothing misspelt passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from node_agent.settings import Settings, SettingsError, address, load, names

ENGINE = {"engines": ["http://h:1,id=a"]}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("NODE_AGENT_"):
            monkeypatch.delenv(name)


def written(folder: Path, text: str) -> str:
    path = folder / "agent.yaml"
    path.write_text(text)
    return str(path)


def refused(command_line: dict[str, object], config: str | None = None) -> str:
    with pytest.raises(SettingsError) as error:
        load(command_line, config)
    return str(error.value)


def test_defaults_are_those_of_the_contract() -> None:
    settings = load(ENGINE)
    assert settings.listen == "127.0.0.1:9477"
    assert settings.interval_s == 1.0
    assert settings.balancers == ()
    assert settings.host


def test_file_then_environment_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = written(
        tmp_path,
        "engines: [{url: 'http://h:1', id: file}]\ninterval_s: 2\nlisten: 127.0.0.1:1\n"
        "scrape: {timeout_s: 3, facts_every_s: 20}\n",
    )
    monkeypatch.setenv("NODE_AGENT_LISTEN", "127.0.0.1:2")
    monkeypatch.setenv("NODE_AGENT_SCRAPE__TIMEOUT_S", "4")
    settings = load({"engines": ["http://h:1,id=line"]}, config)
    assert settings.interval_s == 2.0
    assert settings.listen == "127.0.0.1:2"
    assert (settings.scrape.timeout_s, settings.scrape.facts_every_s) == (4.0, 20.0)
    assert [one.id for one in settings.engines] == ["line"]


def test_file_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_AGENT_CONFIG", written(tmp_path, "interval_s: 2\n"))
    assert load(ENGINE).interval_s == 2.0


@pytest.mark.parametrize("text", ["http://h:1,id=a http://h:2,id=b", '["http://h:1,id=a", "http://h:2,id=b"]'])
def test_engines_from_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_AGENT_ENGINES", text)
    assert [one.id for one in load({}).engines] == ["a", "b"]


def test_balancers_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_AGENT_BALANCERS", "http://b1:8081/, http://b2:8081")
    assert load(ENGINE).balancers == ("http://b1:8081", "http://b2:8081")


def test_unknown_variable_stops_the_start_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_AGENT_INTERVL_S", "2")
    assert refused(ENGINE) == "unknown setting NODE_AGENT_INTERVL_S; did you mean NODE_AGENT_INTERVAL_S?"


@pytest.mark.parametrize("name", ["NODE_AGENT_SCRAPE__TIMEOUT", "NODE_AGENT_SCRAPE", "node_agent_intervl_s"])
def test_variable_that_names_no_setting_stops_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    assert f"unknown setting {name}" in refused(ENGINE)


def test_what_kubernetes_adds_for_a_service_of_this_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "NODE_AGENT_SERVICE_HOST": "10.0.0.1",
        "NODE_AGENT_SERVICE_PORT": "9477",
        "NODE_AGENT_SERVICE_PORT_HTTP": "9477",
        "NODE_AGENT_PORT": "tcp://10.0.0.1:9477",
        "NODE_AGENT_PORT_9477_TCP": "tcp://10.0.0.1:9477",
        "NODE_AGENT_PORT_9477_TCP_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    assert load(ENGINE).listen == "127.0.0.1:9477"
    monkeypatch.setenv("NODE_AGENT_PORT", "9477")
    assert "unknown setting NODE_AGENT_PORT" in refused(ENGINE)


def test_each_wrong_line_of_the_file_is_named(tmp_path: Path) -> None:
    text = "scrape:\n  timeut_s: 3\nintervall_s: 1\nlog: {level: loud}\ngpu: {deadline_s: -1}\n"
    lines = refused(ENGINE, written(tmp_path, text)).splitlines()
    assert "unknown setting scrape.timeut_s; did you mean scrape.timeout_s?" in lines
    assert "unknown setting intervall_s; did you mean interval_s?" in lines
    assert any(line.startswith("log.level: ") for line in lines)
    assert any(line.startswith("gpu.deadline_s: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [("- a\n", "must hold settings by name"), ("a: [", "is not YAML"), ("1: 2\n", "must hold settings")],
)
def test_file_that_holds_no_settings_is_refused(text: str, says: str, tmp_path: Path) -> None:
    assert says in refused(ENGINE, written(tmp_path, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert (
        refused(ENGINE, str(tmp_path / "nope.yaml")) == f"cannot read {tmp_path}/nope.yaml: No such file or directory"
    )


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load(ENGINE, written(tmp_path, "")).interval_s == 1.0


def test_agent_without_an_engine_does_not_start() -> None:
    assert "engines: none given" in refused({})


@pytest.mark.parametrize("listen", ["9477", ":9477", "h:", "h:x", "h:70000"])
def test_listen_must_be_host_and_port(listen: str) -> None:
    assert refused({**ENGINE, "listen": listen}) == f"listen: {listen!r} is not HOST:PORT"


def test_address_takes_ipv6_in_brackets() -> None:
    assert address("[::1]:9477") == ("::1", 9477)
    assert address("0.0.0.0:0") == ("0.0.0.0", 0)


@pytest.mark.parametrize("url", ["b:8081", "http://u:p@b:8081", "http://b:8081?x=1"])
def test_balancer_must_be_a_plain_url(url: str) -> None:
    assert "balancers: " in refused({**ENGINE, "balancers": [url]})


def test_secrets_come_from_files_and_are_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("NODE_AGENT_BALANCER_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("NODE_AGENT_DRAIN_TOKEN", "other")
    settings = load(ENGINE)
    assert (settings.balancer_token, settings.drain_token) == ("s3cret", "other")
    assert "s3cret" not in repr(settings)
    assert "other" not in repr(settings)


def test_secret_given_twice_or_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_AGENT_BALANCER_TOKEN_FILE", str(tmp_path / "nope"))
    assert "balancer_token_file: cannot read" in refused(ENGINE)
    monkeypatch.setenv("NODE_AGENT_BALANCER_TOKEN", "x")
    assert "give balancer_token or balancer_token_file, not both" in refused(ENGINE)


def test_names_list_every_setting() -> None:
    assert {"listen", "scrape.timeout_s", "gpu.enabled", "push.timeout_s", "log.level"} <= set(names())
    assert not {"scrape", "gpu", "push", "log"} & set(names())
    assert {name.partition(".")[0] for name in names()} == set(Settings.model_fields)
