"""The response cache: what may be looked up, what may be stored, and how an answer is kept.

Exact only: an answer is shared between requests whose key is equal (`core.cache_key`). The store is this process's
memory, or Redis, shared by all balancers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from balancer.clock import Clock
from balancer.core import cache_key, convert, embeddings
from balancer.core.request import CacheMode, Dialect, InferenceRequest, TenantId
from balancer.core.token_bucket import TokenBucket
from balancer.errors import RateLimited
from balancer.metrics import Metrics
from balancer.settings import CacheConfig, ModelRule
from balancer.store import Store
from balancer.store.memory import MemoryStore

# The form of an entry. Another version is a miss.
_ENTRY_VERSION = 1


@dataclass(slots=True)
class Plan:
    """What the cache will do for one request. Without a name neither read nor written; `reason` says why."""

    name: str | None  # of the entry in the store
    read: bool
    write: bool
    ttl_s: float
    reason: str
    inputs: list[str] | None = None  # names of the vectors in an answer to an embeddings request, where they are kept


@dataclass(slots=True)
class Stored:
    """A whole good answer, as it came."""

    stream: bool  # server-sent events, else one body
    content_type: bytes
    body: bytes
    stored_wall_s: float
    node_seconds: float  # what a node took for it

    @classmethod
    def decode(cls, data: bytes) -> Stored | None:
        """Read an entry strictly; None for anything that is not exactly one."""
        line, _, body = data.partition(b"\n")
        try:
            version, stream, kind, stored_s, took_s, size = orjson.loads(line)
        except (orjson.JSONDecodeError, TypeError, ValueError):
            return None
        if version != _ENTRY_VERSION or type(stream) is not bool or type(kind) is not str or size != len(body):
            return None
        if type(stored_s) is not float or type(took_s) is not float:
            return None
        return cls(stream, kind.encode("latin-1", "replace"), body, stored_s, took_s)


def encode(stream: bool, content_type: bytes, body: bytes, wall_s: float, took_s: float) -> bytes:
    """An entry as it is kept: one line of JSON about it, then the body as it is."""
    about = (_ENTRY_VERSION, stream, content_type.decode("latin-1"), wall_s, took_s, len(body))
    return orjson.dumps(about) + b"\n" + body


@dataclass(slots=True)
class Hit:
    """A stored answer in the form that the request wants."""

    body: bytes
    content_type: bytes
    stream: bool
    age_s: float
    node_seconds: float


# What is neither looked up nor stored.
NO_PLAN = Plan(None, False, False, 0.0, "disabled")


class ResponseCache:
    """Looks answers up and keeps them. Never raises because of the store; what is soiled there is a miss."""

    def __init__(
        self,
        config: CacheConfig,
        *,
        store: Store,
        models: Mapping[str, ModelRule],
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._config = config
        self._store = store
        self._memory = store if isinstance(store, MemoryStore) else None
        self._models = models
        self._clock = clock
        self._metrics = metrics
        self._hits = 0
        self._misses = 0
        self._stored = 0
        self._hit_buckets: dict[TenantId, TokenBucket] = {}
        self._lookup_seconds = metrics.cache_seconds.of("lookup")

    def configure(self, config: CacheConfig, models: Mapping[str, ModelRule]) -> None:
        """New settings; what is stored stays until its time is over."""
        self._config = config
        self._models = models
        self._hit_buckets.clear()

    def plan(self, request: InferenceRequest) -> Plan:
        """Whether this request may share an answer, and under which key."""
        config = self._config
        if not config.enabled:
            return NO_PLAN
        rule = self._models.get(request.model)
        reason = cache_key.not_cacheable(
            request, everything=config.cacheable == "all", rule=rule.cacheable if rule else None
        )
        if reason is not None:
            return Plan(None, False, False, 0.0, reason)
        scope, key = self._scope_and_key(request, request.body, request.parsed)
        ttl_s = request.wishes.cache_ttl_s or (rule.ttl_s if rule and rule.ttl_s else config.ttl_s)
        name = cache_key.answer_name(scope, request.model, key)
        return Plan(name, request.wishes.cache_mode is not CacheMode.REFRESH, True, ttl_s, "")

    def _scope_and_key(
        self, request: InferenceRequest, body: bytes, parsed: dict[str, Any] | None
    ) -> tuple[TenantId | None, str]:
        rule = self._models.get(request.model)
        scope = None if self._config.shared_between_tenants else request.tenant.id
        key = cache_key.derive(
            tenant=scope,
            endpoint=request.endpoint.path,
            query=request.query,
            model=request.model,
            revision=rule.revision if rule else None,
            headers=request.forward,
            body=body,
            parsed=parsed,
            exact=request.is_exact,
        )
        return scope, key

    @property
    def is_local(self) -> bool:
        """Whether looking up takes no waiting."""
        return self._memory is not None

    def lookup_local(self, plan: Plan, request: InferenceRequest) -> Hit | None:
        """`lookup` where the answers are in this process."""
        assert plan.name is not None
        assert self._memory is not None
        begun_s = self._clock.now()
        return self._judge(self._memory.peek(plan.name), request, begun_s)

    async def lookup(self, plan: Plan, request: InferenceRequest) -> Hit | None:
        """The stored answer in the form that the request wants. Raises RateLimited beyond `hits_per_second`."""
        assert plan.name is not None
        begun_s = self._clock.now()
        return self._judge(await self._store.get(plan.name), request, begun_s)

    def _judge(self, data: bytes | None, request: InferenceRequest, begun_s: float) -> Hit | None:
        hit = self._serve(data, request) if data is not None else None
        now = self._clock.now()
        self._lookup_seconds.observe(now - begun_s)
        if hit is None:
            self._misses += 1
            return None
        self.bound_hits(request.tenant.id, now)
        self._hits += 1
        self._metrics.gpu_seconds_saved.inc(hit.node_seconds)
        return hit

    def store(
        self, plan: Plan, request: InferenceRequest, *, stream: bool, kind: bytes, body: bytes, took_s: float
    ) -> None:
        """Keep a whole good answer; returns at once. Too large an answer is not kept."""
        if plan.name is None or not plan.write or len(body) > self._config.max_entry_bytes:
            return
        entry = encode(stream, kind, body, self._clock.wall(), took_s)
        self._store.put(plan.name, entry, plan.ttl_s)
        self._stored += 1
        if plan.inputs is not None:
            self.store_inputs(plan, plan.inputs, body)

    # -- vectors, one by one

    @property
    def keeps_inputs(self) -> bool:
        """Whether vectors are kept one by one."""
        return self._config.embeddings.per_input

    def input_names(self, request: InferenceRequest, inputs: Sequence[Any]) -> list[str]:
        """Where the vector of each input of an embeddings request is kept."""
        assert request.parsed is not None
        rest = {name: value for name, value in request.parsed.items() if name != "input"}
        scope, base = self._scope_and_key(request, b"", rest)
        return [cache_key.answer_name(scope, request.model, digest) for digest in embeddings.digests(base, inputs)]

    async def entries(self, names: Sequence[str], within_s: float) -> list[bytes | None]:
        """What is kept under these names; all None where it is not known in time."""
        if self._memory is not None:
            return [self._memory.peek(name) for name in names]
        try:
            async with asyncio.timeout(within_s):
                return await asyncio.gather(*[self._store.get(name) for name in names])
        except TimeoutError:
            return [None] * len(names)

    def store_inputs(self, plan: Plan, names: Sequence[str], body: bytes) -> None:
        """Keep each vector of a whole good answer, where they can be told apart; returns at once."""
        for name, entry in zip(names, embeddings.entries_of(body, names, self._clock.wall()) or (), strict=False):
            if len(entry) <= self._config.max_entry_bytes:
                self._store.put(name, entry, plan.ttl_s)

    def saved(self, where: str, calls: int, node_seconds: float) -> None:
        """So many upstream calls were not made because an equal one was in flight; what each would have taken."""
        self._metrics.calls_saved.of(where).value += calls
        self._metrics.gpu_seconds_saved.inc(calls * node_seconds)

    @property
    def max_entry_bytes(self) -> int:
        """No larger answer is worth collecting."""
        return self._config.max_entry_bytes

    async def stats(self) -> dict[str, Any]:
        """Hit figures since the start, for the admin API."""
        looked = self._hits + self._misses
        return {
            "enabled": self._config.enabled,
            "store": self._store.state(),
            "hits": self._hits,
            "misses": self._misses,
            "hit_ratio": round(self._hits / looked, 4) if looked else None,
            "stored": self._stored,
        }

    async def delete(self, *, tenant: str | None, model: str | None, key: str | None) -> int:
        """Remove what matches all that is given; how many answers went."""
        return await self._store.delete(tenant=tenant, model=model, digest=key)

    def _serve(self, data: bytes, request: InferenceRequest) -> Hit | None:
        stored = Stored.decode(data)
        if stored is None:
            return None
        body = _in_form(stored, request)
        if body is None:
            return None
        kind = stored.content_type
        if request.stream != stored.stream:
            kind = b"text/event-stream; charset=utf-8" if request.stream else b"application/json"
        age_s = max(0.0, self._clock.wall() - stored.stored_wall_s)
        return Hit(body, kind, request.stream, age_s, stored.node_seconds)

    def bound_hits(self, tenant: TenantId, now: float) -> None:
        """Count an answer that cost no request token. Raises RateLimited beyond `hits_per_second`."""
        bucket = self._hit_buckets.get(tenant)
        if bucket is None:
            rate = self._config.hits_per_second
            bucket = self._hit_buckets[tenant] = TokenBucket(rate, max(1.0, rate))
        wait_s = bucket.try_take(1.0, now)
        if wait_s > 0.0:
            self._metrics.shed.of("cache_hits").inc()
            raise RateLimited("too many cached answers per second for this key", retry_after_s=wait_s)


def _in_form(stored: Stored, request: InferenceRequest) -> bytes | None:
    """The stored answer as this request wants it; None where it cannot be had faithfully, which is a miss."""
    if request.endpoint.dialect is not Dialect.OPENAI or not request.endpoint.streams:
        return stored.body if stored.stream == request.stream else None
    chat = request.endpoint.name == "chat"
    if stored.stream and request.stream:
        return convert.for_replay(stored.body, include_usage=request.wants_usage)
    if stored.stream:
        return convert.stream_to_unary(stored.body, chat=chat)
    if request.stream:
        return convert.unary_to_stream(stored.body, chat=chat, include_usage=request.wants_usage)
    return stored.body
