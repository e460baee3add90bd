"""The response cache: what may be looked up, what may be stored, and in which form it comes back.

Exact only: an answer is shared between requests whose key is equal (`core.cache_key`). Two levels: this process's
memory (`core.local_answers`), and behind it, where there is one, the store that all balancers share.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import orjson

from balancer.clock import Clock
from balancer.core import cache_entry, cache_key, convert, embeddings
from balancer.core.cache_entry import Soiled, Stored
from balancer.core.local_answers import Kept, LocalAnswers
from balancer.core.popularity import Asked, Popularity
from balancer.core.request import CacheMode, Dialect, InferenceRequest, TenantId
from balancer.core.token_bucket import TokenBucket
from balancer.core.tool_calls import has_tool_calls
from balancer.errors import RateLimited
from balancer.metrics import Metrics
from balancer.settings import CacheConfig, ModelRule
from balancer.store import Store

# A node's refusals that the same request would meet again: bad schema, context too long.
REFUSALS = frozenset({400, 413, 422})
# Room for refusals; each is at most 64 KiB (`wire.answer.ERROR_BYTES`).
REFUSAL_BYTES = 4 * 1024 * 1024
# Larger bodies are compressed, signed and read in a thread: 64 KiB of prose take 0.6 ms.
THREAD_BYTES = 64 * 1024
# Names remembered of requests that were hits, and how large body and head are at most: 16 MiB in all. A hit without
# parsing, sorting and hashing for its name costs a quarter less.
REMEMBERED_NAMES, REMEMBERED_BYTES = 2048, 8 * 1024
# Expired answers let go of at once, between requests: 1 ms.
PURGED_AT_ONCE = 1000


# All that a name is derived from, as it came: equal bytes have equal names, without their being parsed and hashed.
Asking = tuple[bytes, tuple[tuple[bytes, bytes], ...], str, bytes, TenantId | None, str | None]


@dataclass(slots=True)
class Plan:
    """What the cache will do for one request. Without a name neither read nor written; `reason` says why."""

    name: str | None  # of the entry in the store
    read: bool
    write: bool
    ttl_s: float
    reason: str
    inputs: list[str] | None = None  # names of the vectors in an answer to an embeddings request, where they are kept
    refusable: bool = False  # a node's refusal may be kept and read
    paced: bool = False  # record when what came
    asked: Asking | None = None  # to be remembered with its name, once it was a hit
    refusal_name: str | None = None  # once it was needed
    stale: Stored | None = None  # found, and past its lifetime
    question: object = None  # what a semantic lookup found out, for when the answer comes


@dataclass(slots=True)
class Hit:
    """A stored answer in the form that the request wants."""

    body: bytes
    content_type: bytes
    stream: bool
    age_s: float
    node_seconds: float
    status: int = 200
    pace: bytes = b""  # not empty: to be replayed as it came
    verdict: str = "hit"  # or `stale`


# Tenant, model and key, each None for any, and the time before which it was stored.
OnDelete = Callable[[str | None, str | None, str | None, float | None], None]

# What is neither looked up nor stored.
NO_PLAN = Plan(None, False, False, 0.0, "disabled")


class ResponseCache:
    """Looks answers up and keeps them. Never raises because of the store; what is soiled there is a miss.

    Without a `store` the answers are in this process alone.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        local: LocalAnswers,
        store: Store | None,
        vectors: Store,
        models: Mapping[str, ModelRule],
        metrics: Metrics,
        clock: Clock,
        rng: Random,
    ) -> None:
        self.local = local
        self._refusals = LocalAnswers(REFUSAL_BYTES)
        self._store = store
        self._vectors = vectors  # of single inputs: the shared store, or a part of this process's memory
        self._clock = clock
        self._metrics = metrics
        self._rng = rng
        self._popularity = Popularity()
        self.on_delete: OnDelete | None = None  # to be told to other balancers
        self._names: dict[Asking, str] = {}
        self._misses = 0
        self._stored = 0
        self._hit_buckets: dict[TenantId, TokenBucket] = {}
        self.on_stored: Callable[[Plan, InferenceRequest, bool, bytes], None] | None = (
            None  # plan, request, stream, body
        )
        self._lookup_seconds = metrics.cache_seconds.of("lookup")
        self._hits = {
            level: metrics.cache_hits.of(level) for level in ("memory", "redis", "refusal", "stale", "semantic")
        }
        self._saved = metrics.gpu_seconds_saved.of()
        self._evicted = metrics.cache_memory_evictions.of()
        self.configure(config, models)
        metrics.cache_memory_bytes.read = lambda: [((), float(local.size_bytes))]
        metrics.cache_memory_entries.read = lambda: [((), float(len(local)))]

    def configure(self, config: CacheConfig, models: Mapping[str, ModelRule]) -> None:
        """New settings; what is stored stays until its time is over."""
        self._config = config
        self._models = models
        self._sign_key = config.sign_key.encode() if config.sign_key is not None else None
        self._recorded = config.replay == "recorded"
        self._refuses = config.enabled and config.negative_ttl_s > 0
        self._hit_buckets.clear()
        self._refusals.clear()
        if not config.keep_requests:
            self._popularity.forget_requests()

    def plan(self, request: InferenceRequest) -> Plan:
        """Whether this request may share an answer, and under which key."""
        config = self._config
        if not config.enabled:
            return NO_PLAN
        rule = self._models.get(request.model)
        mode = request.wishes.cache_mode
        reason = cache_key.not_cacheable(
            request, everything=config.cacheable == "all", rule=rule.cacheable if rule else None
        )
        refusable = self._refuses and mode is not CacheMode.REFRESH and reason in (None, "sampling")
        refusable = refusable and len(request.body) <= cache_key.CANONICAL_BYTES  # more takes long to hash
        if reason is not None:
            return Plan(None, False, False, 0.0, reason, refusable=refusable)
        scope = None if config.shared_between_tenants else request.tenant.id
        name, asked = None, None
        if len(request.body) + len(request.head_lines) + len(request.target) <= REMEMBERED_BYTES:
            revision = rule.revision if rule is not None else None
            asked = (request.body, request.forward, request.model, request.target, scope, revision)
            name = self._names.get(asked)
        if name is None:
            name = cache_key.answer_name(scope, request.model, self._digest(request, scope, request.parsed))
        else:
            asked = None
        ttl_s = request.wishes.cache_ttl_s or self._ttl_s(request, rule)
        paced = self._recorded and request.stream
        reads = mode is not CacheMode.REFRESH
        return Plan(name, reads, True, ttl_s, "", refusable=refusable, paced=paced, asked=asked)

    def _ttl_s(self, request: InferenceRequest, rule: ModelRule | None) -> float:
        """The lifetime by the settings: of the tenant, else the model, else the endpoint, else of all."""
        config = self._config
        if config.ttl_by_tenant and (found := config.ttl_by_tenant.get(request.tenant.id)) is not None:
            return found
        if rule is not None and rule.ttl_s is not None:
            return rule.ttl_s
        if config.ttl_by_endpoint and (found := config.ttl_by_endpoint.get(request.endpoint.name)) is not None:
            return found
        return config.ttl_s

    def _digest(
        self,
        request: InferenceRequest,
        scope: TenantId | None,
        parsed: Mapping[str, Any] | None,
        body: bytes | None = None,
    ) -> str:
        """The key of a request; of another `body` than its own, where one is given."""
        rule = self._models.get(request.model)
        return cache_key.derive(
            tenant=scope,
            endpoint=request.endpoint.path,
            query=request.query,
            model=request.model,
            revision=rule.revision if rule else None,
            headers=request.forward,
            body=request.body if body is None else body,
            parsed=parsed,
            exact=request.is_exact,
        )

    @property
    def max_entry_bytes(self) -> int:
        """No larger answer is worth collecting."""
        return self._config.max_entry_bytes

    @property
    def is_shared(self) -> bool:
        """Whether there is a store behind this process's memory."""
        return self._store is not None

    # -- looking up

    def lookup_local(self, plan: Plan, request: InferenceRequest) -> Hit | None:
        """What this process holds: a good answer, or a node's refusal of this very request.

        Raises RateLimited beyond `hits_per_second`.
        """
        if plan.read and plan.name is not None:
            begun_s = self._clock.now()
            hit = None
            kept = self.local.get(plan.name, begun_s)
            if kept is not None:
                hit = self._serve(kept.stored, plan, request, kept)
            if hit is not None:
                self._found("memory", plan.name, hit, request)
                if plan.asked is not None:
                    self._remember(plan.asked, plan.name)
                self._lookup_seconds.observe(self._clock.now() - begun_s)
                return hit
            if self._store is None:
                self._misses += 1
                self._lookup_seconds.observe(self._clock.now() - begun_s)
        if self._refusals and plan.refusable:
            return self._refused(plan, request)
        return None

    def _remember(self, asked: Asking, name: str) -> None:
        if len(self._names) >= REMEMBERED_NAMES:
            del self._names[next(iter(self._names))]
        self._names[asked] = name

    async def lookup(self, plan: Plan, request: InferenceRequest) -> Hit | None:
        """What the shared store holds, after this process had nothing; a hit is kept here for a while.

        Raises RateLimited beyond `hits_per_second`.
        """
        assert plan.name is not None
        assert self._store is not None
        begun_s = self._clock.now()
        hit = None
        data = await self._store.get(plan.name)
        if data is not None and (stored := await self._decoded(data, plan.name)) is not None:
            hit = self._serve(stored, plan, request, None)
            if hit is not None:
                self._keep(plan.name, stored)
        self._lookup_seconds.observe(self._clock.now() - begun_s)
        if hit is None:
            self._misses += 1
            return None
        self._found("redis", plan.name, hit, request)
        return hit

    async def fetch(self, name: str, request: InferenceRequest) -> tuple[bool, Hit | None]:
        """Whether there is an answer under another request's name, and it in the form that this one wants."""
        kept = self.local.get(name, self._clock.now())
        stored = kept.stored if kept is not None else None
        if stored is None and self._store is not None:
            data = await self._store.get(name)
            stored = None if data is None else await self._decoded(data, name)
        if stored is None or not stored.is_fresh(self._clock.wall()):
            return stored is not None, None
        return True, self._hit(stored, request, kept)

    def count_semantic(self, hit: Hit, request: InferenceRequest) -> None:
        """An answer that was fetched is served. Raises RateLimited where it is one too many."""
        self.bound_hits(request.tenant.id)
        self._hits["semantic"].value += 1
        self._saved.value += hit.node_seconds

    def stale(self, plan: Plan, request: InferenceRequest) -> Hit | None:
        """The answer past its lifetime that the look-up met, where it may stand in for an error."""
        stored, grace_s = plan.stale, self._config.stale_if_error_s
        if stored is None or plan.name is None or self._clock.wall() > stored.stored_wall_s + stored.ttl_s + grace_s:
            return None
        hit = self._hit(stored, request, None)
        if hit is not None:
            hit.verdict = "stale"
            self._found("stale", plan.name, hit, request)
        return hit

    def _serve(self, stored: Stored, plan: Plan, request: InferenceRequest, kept: Kept | None) -> Hit | None:
        if stored.grace_s and not stored.is_fresh(self._clock.wall()):
            plan.stale = stored
            return None
        return self._hit(stored, request, kept)

    def _hit(self, stored: Stored, request: InferenceRequest, kept: Kept | None) -> Hit | None:
        form = (request.stream, request.wants_usage)
        body = kept.forms.get(form) if kept is not None and kept.forms is not None else None
        if body is None:
            body = _in_form(stored, request)
            if body is None:
                return None
            if kept is not None and body is not stored.body:
                self.local.add_form(kept, form, body)
        kind = stored.content_type
        if request.stream != stored.stream:
            kind = b"text/event-stream; charset=utf-8" if request.stream else b"application/json"
        age_s = max(0.0, self._clock.wall() - stored.stored_wall_s)
        pace = stored.pace if self._recorded and request.stream else b""
        return Hit(body, kind, request.stream, age_s, stored.node_seconds, stored.status, pace)

    def _found(self, level: str, name: str, hit: Hit, request: InferenceRequest) -> None:
        """Count a hit. Raises RateLimited where it is one too many."""
        self.bound_hits(request.tenant.id)
        self._hits[level].value += 1
        self._saved.value += hit.node_seconds
        popular = self._popularity.hit(name, len(hit.body), hit.node_seconds)
        if self._config.keep_requests and popular.request is None:
            headers = tuple(pair for pair in request.forward if pair[0] not in cache_key.LEFT_OUT_HEADERS)
            self._popularity.keep_request(popular, Asked(request.endpoint.path, headers, request.body))

    async def _decoded(self, data: bytes, name: str) -> Stored | None:
        decode = partial(cache_entry.decode, data, name, max_bytes=self._config.max_entry_bytes, key=self._sign_key)
        try:
            if len(data) > THREAD_BYTES:
                return await asyncio.get_running_loop().run_in_executor(None, decode)
            return decode()
        except Soiled as soiled:
            self._metrics.cache_entries_refused.of(soiled.reason).inc()
            return None

    # -- storing

    def store(
        self,
        plan: Plan,
        request: InferenceRequest,
        *,
        stream: bool,
        kind: bytes,
        body: bytes,
        node_seconds: float,
        pace: bytes = b"",
    ) -> str:
        """Keep a whole good answer; returns at once: why it was not kept, or nothing."""
        config = self._config
        if plan.name is None or not plan.write:
            return plan.reason
        if not body or len(body) > config.max_entry_bytes:
            return "size"
        if not config.tools and request.endpoint.samples and has_tool_calls(body):
            return "tool_calls"
        ttl_s = plan.ttl_s
        if not request.wishes.cache_ttl_s:  # what a caller asks for is kept to
            ttl_s *= 1.0 - config.ttl_jitter * self._rng.random()
        stored = Stored(stream, kind, body, self._clock.wall(), node_seconds, ttl_s, config.stale_if_error_s, pace)
        self._stored += 1
        self._keep(plan.name, stored)
        if self._store is not None:
            self._write(self._store, plan.name, stored)
        if plan.inputs is not None:
            self.store_inputs(plan, plan.inputs, body)
        if self.on_stored is not None:
            self.on_stored(plan, request, stream, body)
        return ""

    def _keep(self, name: str, stored: Stored) -> None:
        """Here: to the end of its lifetime, or, where others can flush the shared store, for a while."""
        left_s = stored.left_s(self._clock.wall()) + stored.grace_s
        if self._store is not None:
            left_s = min(left_s, self._config.memory_ttl_s)
        if left_s > 0:
            self.local.put(name, stored, self._clock.now() + left_s)

    def _write(self, store: Store, name: str, stored: Stored) -> None:
        compress_bytes, key = self._config.compress_bytes, self._sign_key
        made = partial(cache_entry.encode, stored, name, compress_bytes=compress_bytes, key=key)
        kept_s = stored.ttl_s + stored.grace_s
        if len(stored.body) <= THREAD_BYTES or not (compress_bytes or key):
            store.put(name, made(), kept_s)
            return
        writing = asyncio.get_running_loop().run_in_executor(None, made)
        writing.add_done_callback(lambda done: store.put(name, done.result(), kept_s))

    # -- vectors, one by one

    @property
    def keeps_inputs(self) -> bool:
        """Whether vectors are kept one by one."""
        return self._config.embeddings.per_input

    def input_names(self, request: InferenceRequest, inputs: Sequence[Any]) -> list[str]:
        """Where the vector of each input of an embeddings request is kept."""
        assert request.parsed is not None
        rest = {name: value for name, value in request.parsed.items() if name != "input"}
        scope = None if self._config.shared_between_tenants else request.tenant.id
        base = self._digest(request, scope, rest, b"")
        return [cache_key.answer_name(scope, request.model, digest) for digest in embeddings.digests(base, inputs)]

    async def entries(self, names: Sequence[str], within_s: float) -> list[bytes | None]:
        """What is kept under these names; all None where it is not known in time."""
        try:
            async with asyncio.timeout(within_s):
                found = await asyncio.gather(*[self._vectors.get(name) for name in names])
        except TimeoutError:
            return [None] * len(names)
        kept = [await self._decoded(data, name) if data else None for name, data in zip(names, found, strict=True)]
        return [stored.body if stored is not None else None for stored in kept]

    def store_inputs(self, plan: Plan, names: Sequence[str], body: bytes) -> None:
        """Keep each vector of a whole good answer, where they can be told apart; returns at once."""
        for name, entry in zip(names, embeddings.entries_of(body, names, self._clock.wall()) or (), strict=False):
            if len(entry) <= self._config.max_entry_bytes:
                stored = Stored(False, b"application/json", entry, self._clock.wall(), 0.0, plan.ttl_s)
                self._write(self._vectors, name, stored)

    def saved(self, where: str, calls: int, node_seconds: float) -> None:
        """So many upstream calls were not made because an equal one was in flight; what each would have taken."""
        self._metrics.calls_saved.of(where).value += calls
        self._saved.value += calls * node_seconds

    # -- what nodes refuse

    def store_refusal(self, plan: Plan, request: InferenceRequest, *, status: int, kind: bytes, body: bytes) -> None:
        """Keep a node's refusal in this process, for this tenant and this very body, for a short time."""
        if not plan.refusable or status not in REFUSALS or not body:
            return
        ttl_s = self._config.negative_ttl_s
        stored = Stored(False, kind, body, self._clock.wall(), 0.0, ttl_s, status=status)
        self._refusals.put(self._refusal_name(plan, request), stored, self._clock.now() + ttl_s)

    def _refused(self, plan: Plan, request: InferenceRequest) -> Hit | None:
        name = self._refusal_name(plan, request)
        kept = self._refusals.get(name, self._clock.now())
        if kept is None:
            return None
        stored = kept.stored
        age_s = max(0.0, self._clock.wall() - stored.stored_wall_s)
        hit = Hit(stored.body, stored.content_type, False, age_s, 0.0, stored.status)
        self.bound_hits(request.tenant.id)
        self._hits["refusal"].value += 1
        return hit

    def _refusal_name(self, plan: Plan, request: InferenceRequest) -> str:
        """By the body's own bytes: a field that changes no answer may well be what a node refuses."""
        if plan.refusal_name is None:
            tenant = request.tenant.id
            plan.refusal_name = cache_key.answer_name(tenant, request.model, self._digest(request, tenant, None))
        return plan.refusal_name

    # -- for operators

    async def stats(self) -> dict[str, Any]:
        """Hit figures since the start, for the admin API."""
        hits = {level: int(counter.value) for level, counter in self._hits.items()}
        total = sum(hits.values())
        looked = hits["memory"] + hits["redis"] + self._misses
        return {
            "enabled": self._config.enabled,
            "store": "ready" if self._store is None else self._store.state(),
            "hits": total,
            "hits_by_level": hits,
            "misses": self._misses,
            "hit_ratio": round((hits["memory"] + hits["redis"]) / looked, 4) if looked else None,
            "stored": self._stored,
            "memory": {
                "entries": len(self.local),
                "bytes": self.local.size_bytes,
                "evicted": self.local.evicted,
                "refusals": len(self._refusals),
            },
        }

    def top(self, count: int, *, requests: bool) -> list[dict[str, Any]]:
        """The answers hit most at this balancer, in order; with the requests to them where these are kept."""
        found = []
        for popular in self._popularity.top(count):
            tenant, model, digest = cache_key.answer_parts(popular.name)
            about: dict[str, Any] = {
                "key": digest,
                "tenant": tenant,
                "model": model,
                "hits": popular.hits,
                "bytes": popular.size_bytes,
                "saved_s": round(popular.saved_s, 3),
            }
            asked = popular.request
            if requests and asked is not None:
                about["path"] = asked.path
                about["headers"] = {name.decode("latin-1"): value.decode("latin-1") for name, value in asked.headers}
                about["body"] = orjson.Fragment(asked.body)
            found.append(about)
        return found

    async def delete(
        self, *, tenant: str | None, model: str | None, key: str | None, older_than_s: float | None = None
    ) -> int:
        """Remove what matches all that is given, here and in the shared store; how many answers went."""
        before_wall_s = None if older_than_s is None else self._clock.wall() - older_than_s
        gone = self.forget_local(tenant, model, key, before_wall_s)
        there = await self._vectors.delete(tenant=tenant, model=model, digest=key, before_wall_s=before_wall_s)
        self.forget_local(tenant, model, key, before_wall_s)  # what was read meanwhile
        if self.on_delete is not None:
            self.on_delete(tenant, model, key, before_wall_s)
        return gone + there if self._store is None else max(gone, there)  # copies here are of what is there

    def forget_local(
        self, tenant: str | None, model: str | None, digest: str | None, before_wall_s: float | None = None
    ) -> int:
        """Remove from this process what matches all that is given; how many answers went."""
        self._refusals.delete(tenant=tenant, model=model, digest=digest, before_wall_s=before_wall_s)
        return self.local.delete(tenant=tenant, model=model, digest=digest, before_wall_s=before_wall_s)

    def purge(self, now: float) -> None:
        """Let go of some of what has expired here; called between requests."""
        self.local.purge(now, PURGED_AT_ONCE)
        self._refusals.purge(now, PURGED_AT_ONCE)
        self._evicted.value = self.local.evicted

    def bound_hits(self, tenant: TenantId) -> None:
        """Count an answer that cost no request token. Raises RateLimited beyond `hits_per_second`."""
        bucket = self._hit_buckets.get(tenant)
        if bucket is None:
            rate = self._config.hits_per_second
            bucket = self._hit_buckets[tenant] = TokenBucket(rate, max(1.0, rate))
        wait_s = bucket.try_take(1.0, self._clock.now())
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
