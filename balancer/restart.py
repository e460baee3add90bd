"""Settings that are read once, at start. The others follow a reload; docs/configuration.md lists both."""

from __future__ import annotations

from functools import reduce
from typing import Any

from balancer.settings import Settings

RESTART_ONLY = (
    "listen",
    "ops_listen",
    "redis",
    "breaker",
    "health",
    "agents",
    "ops",
    "cors",
    "log",
    "limits.store",
    "limits.head_bytes",
    "limits.body_bytes",
    "limits.buffered_bytes",
    "limits.head_timeout_s",
    "limits.body_idle_s",
    "cache.memory_bytes",
    "cache.warmup_file",
    "cache.warmup_key",
    "cache.warmup_concurrency",
    "cache.semantic.enabled",
    "cache.semantic.embedder",
    "cache.semantic.embeddings_url",
    "cache.semantic.embeddings_model",
    "cache.semantic.api_key",
    "cache.semantic.model_dir",
    "cache.semantic.max_entries",
    "upstream.max_connections_per_node",
    "routing.share_interval_s",
)


def needs_restart(started_with: Settings, read: Settings) -> list[str]:
    """What was changed since the start and is not in force."""
    return [name for name in RESTART_ONLY if _setting(started_with, name) != _setting(read, name)]


def _setting(settings: Settings, name: str) -> Any:
    return reduce(getattr, name.split("."), settings)
