"""Makes the semantic cache that the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from balancer.cache import ResponseCache
from balancer.clock import Clock
from balancer.metrics import Metrics
from balancer.semantic import Embedder, Index
from balancer.semantic.embed_http import HttpEmbedder
from balancer.semantic.embed_local import LocalEmbedder
from balancer.semantic.index_memory import MemoryIndex
from balancer.semantic.service import SemanticCache
from balancer.settings import ModelRule, SemanticConfig, Settings, SettingsError


def build(
    settings: Settings,
    *,
    cache: ResponseCache,
    models: Mapping[str, ModelRule],
    metrics: Metrics,
    clock: Clock,
    rng: Random,
) -> SemanticCache:
    """Everything of it, and its place behind the response cache. Raises SettingsError for a folder without weights."""
    semantic = SemanticCache(
        settings.cache,
        models=models,
        cache=cache,
        embedder=embedder_of(settings.cache.semantic, clock),
        index=_index_of(settings, clock),
        metrics=metrics,
        clock=clock,
        rng=rng,
    )
    cache.on_stored = semantic.offer
    return semantic


def embedder_of(config: SemanticConfig, clock: Clock) -> Embedder:
    """The embedder that is asked for. Raises SettingsError."""
    if config.embedder == "http":
        assert config.embeddings_url is not None
        return HttpEmbedder(config.embeddings_url, model=config.embeddings_model, api_key=config.api_key, clock=clock)
    assert config.model_dir is not None
    try:
        return LocalEmbedder(config.model_dir)
    except ValueError as error:
        raise SettingsError(f"cache.semantic.model_dir: {error}") from error


def _index_of(settings: Settings, clock: Clock) -> Index:
    memory = MemoryIndex(settings.cache.semantic.max_entries, clock)
    if settings.redis.url is None:
        return memory
    from balancer.semantic.index_redis import RedisIndex
    from balancer.semantic.index_shared import SharedIndex
    from balancer.store.address import Cluster, parse

    where = parse(settings.redis.url)
    if isinstance(where, Cluster):
        return memory
    redis = RedisIndex(
        where,
        timeout_s=settings.redis.timeout_s,
        max_entries=settings.cache.semantic.max_entries,
        clock=clock,
    )
    return SharedIndex(redis, memory, clock)
