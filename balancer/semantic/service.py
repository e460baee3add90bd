"""Looks for an answer given to another wording of the question, and learns from what nodes say. Never in the way:
it has places for a few lookups at a time, a deadline, a rate per tenant; beyond them, and in any trouble, it is a miss.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from balancer.cache import Hit, Plan, ResponseCache
from balancer.clock import Clock
from balancer.core import cache_key
from balancer.core.request import CacheMode, InferenceRequest, TenantId
from balancer.core.semantic import answers
from balancer.core.semantic.guards import FORM, Features, compare, read
from balancer.core.semantic.question import question_of
from balancer.core.semantic.tokens import Unreadable
from balancer.core.semantic.trust import BANDS, Pair, Sample, Serve, Trust
from balancer.core.token_bucket import TokenBucket
from balancer.errors import CapacityError
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.semantic import Embedder, Entry, Index, Unavailable, Vector
from balancer.settings import CacheConfig, ModelRule, SemanticConfig

# Neighbours that the guards look at: a cached question has few near ones that differ.
CANDIDATES = 8
# Neighbours whose trust an operator's kill lowers, at most.
KILLED_NEIGHBOURS = 64
# Answers being filed or compared at a time; one more is not learned from.
MAX_FILING = 32

_DIGEST = re.compile(r"\{([0-9a-f]{64})\}$")

log = get_logger()


@dataclass(slots=True)
class Would:
    """A stored answer that might have been served; the node is asked instead, and the two are compared."""

    pair: Pair
    text: str


@dataclass(slots=True)
class Asked:
    """What a lookup found out about a question, for when its answer comes."""

    key: str
    vector: Vector
    features: Features
    would: Would | None = None


class SemanticCache:
    """Beside the response cache, whose answers it serves."""

    def __init__(
        self,
        config: CacheConfig,
        *,
        models: Mapping[str, ModelRule],
        cache: ResponseCache,
        embedder: Embedder,
        index: Index,
        metrics: Metrics,
        clock: Clock,
        rng: Random,
    ) -> None:
        self._cache = cache
        self._embedder = embedder
        self._index = index
        self._metrics = metrics
        self._clock = clock
        self._trust = Trust(config.semantic.max_error_rate, config.semantic.observe_share, rng)
        self._lookup_seconds = metrics.cache_seconds.of("semantic")
        self._in_flight = 0
        self._filing: set[asyncio.Task[None]] = set()
        self._buckets: dict[TenantId, TokenBucket] = {}
        self.configure(config, models)

    def __repr__(self) -> str:
        return f"<SemanticCache {self._config.mode} shadow={self._config.shadow} in_flight={self._in_flight}>"

    def configure(self, config: CacheConfig, models: Mapping[str, ModelRule]) -> None:
        """New settings; what was learned stays."""
        self._config: SemanticConfig = config.semantic
        self._shared = config.shared_between_tenants
        self._models = models
        self._trust.max_error_rate = config.semantic.max_error_rate
        self._trust.observe_share = config.semantic.observe_share
        self._buckets.clear()

    async def start(self) -> None:
        """Find out what the index can do."""
        await self._index.start()

    # -- lookup

    def applies(self, request: InferenceRequest, plan: Plan) -> bool:
        """Whether a lookup may be made at all; costs next to nothing."""
        if plan.name is None or request.wishes.cache_mode in (CacheMode.REFRESH, CacheMode.EXACT):
            return False
        rule = self._models.get(request.model)
        return rule.semantic if rule is not None and rule.semantic is not None else self._config.enabled

    async def lookup(self, request: InferenceRequest, plan: Plan) -> Hit | None:
        """An answer to another wording of the question, where it may be given. Raises RateLimited like any hit."""
        found = await self._look(request, plan)
        result = found if isinstance(found, str) else "served"
        self._metrics.semantic_lookups.of(result).inc()
        if isinstance(found, str):
            return None
        self._cache.count_semantic(found, request)
        found.verdict = "semantic"
        return found

    async def _look(self, request: InferenceRequest, plan: Plan) -> Hit | str:
        """What may be served, or in a word why there is nothing."""
        tenant = None if self._shared else str(request.tenant.id)
        rule = self._models.get(request.model)
        question = question_of(
            request, tenant=tenant, revision=rule.revision if rule else None, embedder=f"{self._embedder.name} {FORM}"
        )
        if question is None:
            return "exact_only"
        if self._in_flight >= self._config.max_in_flight:
            return "busy"
        if not self._may_look(request.tenant.id):
            return "rate"
        try:
            features = read(question.text)
        except Unreadable:
            return "unreadable"
        key = cache_key.semantic_name(tenant, request.model, question.partition)
        begun_s = self._clock.now()
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._config.timeout_s):
                vector = await self._embedder.embed(features.gist)
                if vector is None:
                    return "unreadable"
                asked = plan.question = Asked(key, vector, features.hashed(bytes.fromhex(question.partition)))
                return await self._search(request, asked, tenant)
        except TimeoutError:
            self._embedder.failed("late")
            return "late"
        except Unavailable:
            return "unavailable"
        finally:
            self._in_flight -= 1
            self._lookup_seconds.observe(self._clock.now() - begun_s)

    async def _search(self, request: InferenceRequest, asked: Asked, tenant: str | None) -> Hit | str:
        """Look at the neighbours; the best pair whose answer is there is served, or is the one to learn about."""
        near = await self._index.nearest(asked.key, asked.vector, CANDIDATES)
        pairs = [
            Pair(entry.id, request.model, compare(asked.features, entry.features), cosine)
            for cosine, entry in near
            if cosine >= self._least()
        ]
        guarded = self._config.mode == "guarded"
        fit = [pair for pair in pairs if pair.verdict.reason is None and (pair.verdict.agree or not guarded)]
        for pair in sorted(fit, key=lambda pair: pair.rank):
            name = cache_key.answer_name(tenant, request.model, pair.entry)
            is_there, hit = await self._cache.fetch(name, request)
            if not is_there:
                await self._index.remove(asked.key, pair.entry)
            if hit is None:
                continue
            if not self._config.shadow and (guarded or isinstance(self._trust.decide(pair), Serve)):
                return hit
            text = answers.text_of(hit.body, stream=hit.stream, endpoint=request.endpoint)
            if text is not None:
                asked.would = Would(pair, text)
                return "shadow" if self._config.shadow else "asked"
        return "unlike" if pairs else "far"

    def _least(self) -> float:
        return self._config.threshold if self._config.mode == "guarded" else BANDS[-1]

    def _may_look(self, tenant: TenantId) -> bool:
        bucket = self._buckets.get(tenant)
        if bucket is None:
            rate = self._config.lookups_per_second
            bucket = self._buckets[tenant] = TokenBucket(rate, max(1.0, rate))
        return bucket.try_take(1.0, self._clock.now()) == 0.0

    # -- learning

    def offer(self, plan: Plan, request: InferenceRequest, stream: bool, body: bytes) -> None:
        """A node answered and the answer was stored: file the question, and compare with what might have been served.

        Returns at once.
        """
        asked = plan.question
        digest = _DIGEST.search(plan.name or "")
        if not isinstance(asked, Asked) or digest is None or len(self._filing) >= MAX_FILING:
            return
        plan.question = None
        text = answers.text_of(body, stream=stream, endpoint=request.endpoint)
        if text is None:
            return
        entry = Entry(digest.group(1), asked.features, self._clock.wall() + plan.ttl_s)
        self._spawn(self._file(asked, entry, text, request.id))

    async def _file(self, asked: Asked, entry: Entry, text: str, request_id: str) -> None:
        try:
            await self._index.add(asked.key, asked.vector, entry)
        except Unavailable:
            self._metrics.semantic_lookups.of("not_filed").inc()
        would = asked.would
        if would is None:
            return
        try:
            right = await self._agree(would.text, text)
        except Unavailable:
            return
        self._metrics.semantic_comparisons.of("right" if right else "wrong").inc()
        self._trust.observe(Sample(would.pair, request_id, right, self._clock.wall()))

    async def _agree(self, one: str, other: str) -> bool:
        """Whether two answers say the same; what cannot be told is a no."""
        if answers.same_words(one, other):
            return True
        if not answers.may_agree(one, other):
            return False
        vectors = [await self._embedder.embed(text[: answers.MAX_CHARS]) for text in (one, other)]
        if vectors[0] is None or vectors[1] is None:
            return False
        return float(np.dot(vectors[0], vectors[1])) >= answers.NEAR

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="semantic")
        self._filing.add(task)
        task.add_done_callback(self._filed)

    def _filed(self, task: asyncio.Task[None]) -> None:
        self._filing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("semantic.filing_failed", exc_info=task.exception())

    async def settled(self) -> None:
        """Return when everything offered so far is filed and compared."""
        while self._filing:
            await asyncio.wait(set(self._filing))

    # -- operators

    def report(self) -> dict[str, Any]:
        """What was looked for, what was found, and how far it can be trusted."""
        lookups = {values[0]: int(child.value) for values, child in self._metrics.semantic_lookups.children()}
        comparisons = {values[0]: int(child.value) for values, child in self._metrics.semantic_comparisons.children()}
        looked = sum(lookups.values()) - lookups.get("not_filed", 0)
        return {
            "mode": self._config.mode,
            "shadow": self._config.shadow,
            "max_error_rate": self._config.max_error_rate,
            "lookups": lookups,
            "hit_ratio": round(lookups.get("served", 0) / looked, 4) if looked else None,
            "would_hit_ratio": round(sum(lookups.get(name, 0) for name in ("served", "shadow", "asked")) / looked, 4)
            if looked
            else None,
            "comparisons": comparisons,
            "kinds": self._trust.report(),
            "samples": [
                {
                    "key": sample.pair.entry,
                    "request_id": sample.request_id,
                    "model": sample.pair.model,
                    "kind": sample.pair.relation,
                    "similarity": round(sample.pair.similarity, 4),
                    "right": sample.right,
                    "at": round(sample.at_s, 3),
                }
                for sample in reversed(self._trust.samples)
            ],
        }

    async def kill(self, id_: str) -> dict[str, int]:
        """Remove an answer for every wording, and trust its neighbours less. Raises CapacityError without the store."""
        neighbours: dict[str, float] = {}
        try:
            places = await self._index.find(id_)
            for key, vector in places:
                near = await self._index.nearest(key, vector, KILLED_NEIGHBOURS)
                neighbours |= {entry.id: cosine for cosine, entry in near if entry.id != id_ and cosine >= BANDS[-1]}
                await self._index.remove(key, id_)
        except Unavailable as error:
            raise CapacityError("the store of the semantic index is away", retry_after_s=1.0) from error
        self._trust.kill(id_, neighbours)
        deleted = await self._cache.delete(tenant=None, model=None, key=id_)
        return {"entries": len(places), "answers": deleted, "neighbours": len(neighbours)}

    async def close(self) -> None:
        """Let what is being filed go, and the embedder and the index after it."""
        for task in self._filing:
            task.cancel()
        await asyncio.gather(*self._filing, return_exceptions=True)
        await self._embedder.close()
        await self._index.close()
