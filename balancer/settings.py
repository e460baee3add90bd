"""Settings: composed policies, one name and one default each. Defaults < YAML file < environment < command line."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as PydanticSettingsError

from balancer.core.breaker import BreakerPolicy
from balancer.core.health import HealthPolicy
from balancer.core.hedge import HedgePolicy
from balancer.core.node import NodeConfig
from balancer.core.outlier import OutlierPolicy
from balancer.core.retry import RetryPolicy
from balancer.core.selection import RoutingPolicy

PREFIX = "BALANCER_"
# Settings whose value may come from a file instead: `name_file: PATH`.
SECRETS = frozenset({"url", "api_key", "sha256", "admin_key_sha256", "agent_token_sha256", "sign_key", "warmup_key"})

Seconds = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]


def split_address(address: str) -> tuple[str, int]:
    """`HOST:PORT` or `[V6]:PORT`, taken apart. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address}: must be HOST:PORT")
    return host.strip("[]"), int(port)


def _address(address: str) -> str:
    split_address(address)
    return address


Address = Annotated[str, AfterValidator(_address)]


class SettingsError(Exception):
    """The settings are wrong; the message names the field and the reason, a line each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyConfig:
    """One API key, by its hash, and what its tenant may use."""

    tenant: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._@:-]+$")]
    sha256: Sha256
    requests_per_minute: Rate | None = None
    burst: Annotated[float, Field(ge=1)] | None = None
    tokens_per_minute: Rate | None = None
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    models: tuple[str, ...] | None = None
    prefer: Mapping[str, str] = field(default_factory=dict)  # labels of nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """No keys: open, one tenant `anonymous`. Any key: a key is required."""

    keys: tuple[KeyConfig, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRule:
    """What holds for one model."""

    name: str
    aliases: tuple[str, ...] = ()
    revision: str | None = None
    ttl_s: Seconds | None = None
    cacheable: bool | None = None
    hedge: bool | None = None
    semantic: bool | None = None
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsConfig:
    """Who may use the operations port beyond health and metrics."""

    admin_key_sha256: Sha256 | None = None
    agent_token_sha256: Sha256 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """The shared store. Without a URL everything is kept in this process."""

    url: str | None = None
    timeout_s: Annotated[float, Field(gt=0, le=0.03)] = 0.02  # 30 ms of store calls may stand before an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticConfig:
    """The semantic cache."""

    enabled: bool = False
    embedder: Literal["http", "local"] = "http"
    embeddings_url: str | None = None
    model_dir: str | None = None
    mode: Literal["guarded", "verified"] = "verified"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.90
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    shadow: bool = True
    embeddings_model: str | None = None
    api_key: str | None = None
    observe_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    timeout_s: Annotated[float, Field(gt=0, le=1)] = 0.05
    max_in_flight: Annotated[int, Field(ge=1)] = 8
    lookups_per_second: Rate = 50.0
    max_entries: Annotated[int, Field(ge=1)] = 20000


@dataclass(frozen=True, slots=True, kw_only=True)
class CoalesceConfig:
    """Equal cacheable requests in flight share one upstream call."""

    enabled: bool = True
    across: bool = False  # between balancers, through Redis


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingsConfig:
    """Vectors kept one by one."""

    per_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The response cache."""

    enabled: bool = True
    ttl_s: Seconds = 3600.0
    ttl_by_endpoint: Mapping[str, Seconds] = field(default_factory=dict)  # by the endpoint's short name
    ttl_by_tenant: Mapping[str, Seconds] = field(default_factory=dict)
    ttl_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1
    memory_bytes: Annotated[int, Field(ge=0)] = 268435456
    memory_ttl_s: Seconds = 60.0  # of copies of what stands in Redis
    max_entry_bytes: Annotated[int, Field(ge=1024)] = 1048576
    cacheable: Literal["deterministic", "all"] = "deterministic"
    shared_between_tenants: bool = False
    hits_per_second: Rate = 1000.0
    stale_if_error_s: Annotated[float, Field(ge=0)] = 0.0
    coalesce: CoalesceConfig = CoalesceConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    negative_ttl_s: Annotated[float, Field(ge=0)] = 10.0
    tools: bool = False
    replay: Literal["at_once", "recorded"] = "at_once"
    compress_bytes: Annotated[int, Field(ge=0)] = 8192
    sign_key: Annotated[str, Field(min_length=16)] | None = None
    keep_requests: bool = False
    warmup_file: str | None = None
    warmup_key: str | None = None
    warmup_concurrency: Annotated[int, Field(ge=1, le=1000)] = 5
    semantic: SemanticConfig = SemanticConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """Rates of tenants without their own, and what one connection may ask of us."""

    requests_per_minute: Rate | None = None
    burst: Annotated[float, Field(ge=1)] | None = None
    tokens_per_minute: Rate | None = None
    store: Literal["auto", "memory", "redis"] = "auto"
    fail_open: bool = True
    head_bytes: Annotated[int, Field(ge=1024)] = 65536
    body_bytes: Annotated[int, Field(ge=1)] = 33554432
    buffered_bytes: Annotated[int, Field(ge=1048576)] = 1073741824
    head_timeout_s: Seconds = 10.0
    body_idle_s: Seconds = 10.0
    json_depth: Annotated[int, Field(ge=1, le=1000)] = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutsConfig:
    """Time limits. Long on purpose: long prompts take long, and a hung node is found in other ways."""

    connect_s: Seconds = 1.0
    first_byte_s: Seconds = 60.0
    idle_s: Seconds = 30.0
    unary_s: Seconds | None = None  # None: total_s
    total_s: Seconds = 3600.0
    commit_s: Seconds = 2.0
    stall_s: Seconds = 3.0
    drain_grace_s: Annotated[float, Field(ge=0)] = 0.0
    drain_s: Annotated[float, Field(ge=0)] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentsConfig:
    """Polling of node agents."""

    interval_s: Seconds = 1.0
    stale_s: Seconds = 5.0  # an older report is no evidence any more


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueConfig:
    """Requests that wait for a slot."""

    max_waiting: Annotated[int, Field(ge=0)] = 1000
    max_wait_s: Annotated[float, Field(ge=0)] = 30.0
    comment_after_s: Annotated[float, Field(ge=0.1)] | None = None
    adaptive: bool = True  # nodes get no more at once than they show that they can take


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A feature that is on or off."""

    enabled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamConfig:
    """What goes to nodes and comes back, beyond the allow-lists."""

    ask_usage: bool = True
    forward_headers: tuple[str, ...] = ()
    return_headers: tuple[str, ...] = ()
    check_bytes: Annotated[int, Field(ge=0)] = 1048576
    max_connections_per_node: Annotated[int, Field(ge=1)] = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CorsConfig:
    """Origins whose pages may call the data port."""

    allow_origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """How much is logged, and how it looks."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Settings(BaseSettings):
    """Everything an operator can set. `docs/configuration.md` says what each name means and which reload."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    listen: Address = "127.0.0.1:8080"
    ops_listen: Address = "127.0.0.1:8081"
    nodes: tuple[NodeConfig, ...] = ()
    models: tuple[ModelRule, ...] = ()
    auth: AuthConfig = AuthConfig()
    ops: OpsConfig = OpsConfig()
    redis: RedisConfig = RedisConfig()
    cache: CacheConfig = CacheConfig()
    limits: LimitsConfig = LimitsConfig()
    routing: RoutingPolicy = RoutingPolicy()
    retry: RetryPolicy = RetryPolicy()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    breaker: BreakerPolicy = BreakerPolicy()
    outlier: OutlierPolicy = OutlierPolicy()
    health: HealthPolicy = HealthPolicy()
    agents: AgentsConfig = AgentsConfig()
    queue: QueueConfig = QueueConfig()
    hedge: HedgePolicy = HedgePolicy()
    resume: Switch = Switch(enabled=True)
    upstream: UpstreamConfig = UpstreamConfig()
    cors: CorsConfig = CorsConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, data: Any) -> Any:
        return _with_files_read(data, "")

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        ids = [node_id(node) for node in self.nodes]
        for id_ in ids:
            if ids.count(id_) > 1:
                raise ValueError(f"nodes: the id {id_} is there twice")
        if self.limits.store == "redis" and self.redis.url is None:
            raise ValueError("limits.store: redis is asked for, and redis.url is not set")
        if self.cache.coalesce.across and self.redis.url is None:
            raise ValueError("cache.coalesce.across: needs a redis.url that the balancers share")
        self._check_semantic()
        for name, asked in self._not_built():
            if asked:
                raise ValueError(f"{name}: is not built yet; leave it out")
        return self

    @property
    def uses_semantic(self) -> bool:
        """Whether the semantic cache is on for any model."""
        return self.cache.enabled and (self.cache.semantic.enabled or any(model.semantic for model in self.models))

    def _check_semantic(self) -> None:
        if not self.uses_semantic:
            return
        semantic = self.cache.semantic
        if semantic.embedder == "http" and semantic.embeddings_url is None:
            raise ValueError("cache.semantic.embeddings_url: must be set for the embedder http")
        if semantic.embedder == "local" and semantic.model_dir is None:
            raise ValueError("cache.semantic.model_dir: must be set for the embedder local")

    def _not_built(self) -> list[tuple[str, bool]]:
        return [
            ("models.fallbacks", any(model.fallbacks for model in self.models)),
        ]


def node_id(node: NodeConfig) -> str:
    """The node's name: its `id`, else `host:port`."""
    return node.id or re.sub(r"^https?://", "", node.url).split("/")[0]


def load(path: str | None, overrides: Mapping[str, Any]) -> Settings:
    """Read the settings from all sources. Raises SettingsError with a line for each thing that is wrong."""
    _refuse_unknown_variables(os.environ)
    from_file = read_file(path) if path else {}

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
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        return Layered(**overrides)
    except ValidationError as error:
        raise SettingsError("\n".join(_lines(error))) from error
    except PydanticSettingsError as error:
        raise SettingsError(str(error)) from error


def read_file(path: str) -> dict[str, Any]:
    """The YAML mapping in a file. Raises SettingsError."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SettingsError(f"{path}: must hold a mapping of settings")
    return {str(key): value for key, value in data.items()}


def masked(settings: Settings) -> dict[str, Any]:
    """The effective settings as plain data, with secrets masked."""
    return {name: _mask(_plain_value(getattr(settings, name)), name) for name in Settings.model_fields}


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain_value(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain_value(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _mask(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _mask(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_mask(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if name in SECRETS - {"url"}:
        return "***"
    return re.sub(r"(://)[^@/]*@", r"\1***@", value)


def _with_files_read(data: Any, where: str) -> Any:
    if isinstance(data, list | tuple):
        return [_with_files_read(item, f"{where}.{index}") for index, item in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    read: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).removesuffix("_file")
        if name != key and name in SECRETS and value is not None and data.get(name) is not None:
            raise ValueError(f"{where}.{key}".lstrip(".") + f": {name} is set as well; one of them, please")
        if name != key and name in SECRETS and isinstance(value, str):
            try:
                read[name] = Path(value).read_text(encoding="utf-8").strip()
            except OSError as error:
                raise ValueError(f"{where}.{key}".lstrip(".") + f": {value}: {error.strerror}") from error
        elif not (name != key and name in SECRETS and value is None):
            read[key] = _with_files_read(value, f"{where}.{key}")
    return read


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """pydantic-settings passes over variables it does not know; a misspelt one must stop the start."""
    known = set(Settings.model_fields) | {"config"}
    unknown = [
        name
        for name in environ
        if name.startswith(PREFIX) and name.removeprefix(PREFIX).lower().split("__")[0] not in known
    ]
    if unknown:
        raise SettingsError("\n".join(f"{name}: no such setting" for name in sorted(unknown)))


def _lines(error: ValidationError) -> list[str]:
    lines = []
    for detail in error.errors():
        where = ".".join(str(part) for part in detail["loc"])
        reason = "no such setting" if detail["type"] in _UNKNOWN else detail["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {reason}" if where else reason)
    return lines


_UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})
