"""The agent's settings: defaults < YAML file < environment (NODE_AGENT_…) < command line; a misspelt one stops it."""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as PydanticSettingsError

from node_agent import engine_spec
from node_agent.engine_spec import EngineSpec, SpecError
from node_agent.engine_visit import ScrapePolicy
from node_agent.gpu_watch import GpuPolicy
from node_agent.log import LogPolicy
from node_agent.push import PushPolicy

PREFIX = "NODE_AGENT_"
CONFIG_VARIABLE = "NODE_AGENT_CONFIG"
DEFAULT_LISTEN = "127.0.0.1:9477"
SECRETS = ("balancer_token", "drain_token")
# Kubernetes puts these into every pod beside a Service called node-agent; they are no settings of ours.
_SERVICE_LINK = re.compile(r"NODE_AGENT_SERVICE_(HOST|PORT(_\w+)?)|NODE_AGENT_PORT_\d+_(TCP|UDP|SCTP)(_\w+)?")
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://")


class SettingsError(Exception):
    """The settings cannot be used; each line names one of them and says why."""


def _engines(value: object) -> tuple[EngineSpec, ...]:
    text = value.strip() if isinstance(value, str) else ""
    return engine_spec.all_from(json.loads(text) if text.startswith("[") else value)


def _urls(value: object) -> object:
    """Accept a list, or text with URLs apart by white space or commas."""
    items = re.split(r"[\s,]+", value.strip()) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("must be a list of URLs")
    return tuple(_balancer_url(item) for item in items if item)


def _balancer_url(item: object) -> str:
    url = str(item).rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{str(item)!r} must look like http://HOST:PORT, the balancer's operations port")
    if parts.username is not None:
        raise ValueError("a balancer URL may carry no user; set balancer_token")
    return url


class Settings(BaseSettings):
    """All settings of the agent; nested ones are the policies of the modules they steer."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid")

    listen: str = DEFAULT_LISTEN
    host: Annotated[str, Field(min_length=1)] = Field(default_factory=socket.gethostname)
    interval_s: Annotated[float, Field(ge=0.05, le=60)] = 1.0
    engines: Annotated[tuple[EngineSpec, ...], NoDecode, BeforeValidator(_engines)] = ()
    balancers: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_urls)] = ()
    balancer_token: str | None = Field(default=None, repr=False)
    balancer_token_file: str | None = None
    drain_token: str | None = Field(default=None, repr=False)
    drain_token_file: str | None = None
    scrape: ScrapePolicy = ScrapePolicy()
    gpu: GpuPolicy = GpuPolicy()
    push: PushPolicy = PushPolicy()
    log: LogPolicy = LogPolicy()

    @field_validator("listen")
    @classmethod
    def _listen_is_an_address(cls, value: str) -> str:
        address(value)
        return value


def load(command_line: Mapping[str, Any], config: str | None = None) -> Settings:
    """Read every layer; raises SettingsError with one line for each setting that is wrong."""
    _refuse_unknown_variables(os.environ)
    path = config or os.environ.get(CONFIG_VARIABLE)
    content = _from_file(path) if path else {}

    class Layered(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings, env_settings, InitSettingsSource(settings_cls, content))

    try:
        settings = Layered(**command_line)
        if not settings.engines:
            raise SettingsError("engines: none given; name at least one, such as --engine http://127.0.0.1:8000")
        return settings.model_copy(update={name: _secret(settings, name) for name in SECRETS})
    except ValidationError as error:
        raise SettingsError("\n".join(_explained(one) for one in error.errors())) from error
    except (SpecError, PydanticSettingsError) as error:
        raise SettingsError(str(error)) from error


def address(listen: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 host stands in brackets. Raises ValueError."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{listen!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _from_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"{path} must hold settings by name")
    return content


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {CONFIG_VARIABLE, *(PREFIX + name.upper().replace(".", "__") for name in names())}
    unknown = [
        name
        for name, value in environment.items()
        if name.upper().startswith(PREFIX) and name.upper() not in known and not _is_service_link(name, value)
    ]
    if unknown:
        raise SettingsError("\n".join(_unknown(name, known) for name in sorted(unknown)))


def _is_service_link(name: str, value: str) -> bool:
    if name == "NODE_AGENT_PORT":
        return _SERVICE_PORT.match(value) is not None
    return _SERVICE_LINK.fullmatch(name) is not None


def names() -> list[str]:
    """Every setting by its dotted name."""
    found: list[str] = []
    for name, info in Settings.model_fields.items():
        policy = info.default
        nested = is_dataclass(policy) and not isinstance(policy, type)
        found += [f"{name}.{inner.name}" for inner in fields(policy)] if nested else [name]
    return found


def _secret(settings: Settings, name: str) -> str | None:
    value, path = getattr(settings, name), getattr(settings, f"{name}_file")
    if value is not None and path is not None:
        raise SettingsError(f"{name}: give {name} or {name}_file, not both")
    return engine_spec.read_secret(path, f"{name}_file") if path is not None else value


def _explained(error: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _unknown(name, names())
    return f"{name}: {str(error['msg']).removeprefix('Value error, ')}"


def _unknown(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return f"unknown setting {name}" + (f"; did you mean {close[0]}?" if close else "")
