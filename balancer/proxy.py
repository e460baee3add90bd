"""One request from accept to last byte; reads top-down."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from balancer.cache import Hit, Plan, ResponseCache
from balancer.clock import Clock
from balancer.core.request import CacheMode, InferenceRequest
from balancer.embeddings import Embedder
from balancer.errors import BalancerError, CacheMiss, NoEligibleNode, UpstreamFailed
from balancer.explain import Call, Ring
from balancer.flights import Flights
from balancer.log import EventWriter
from balancer.metrics import CounterChild, Metrics
from balancer.registry import Registry
from balancer.relay import ClientStream
from balancer.verdicts import Verdicts
from balancer.wire.framing import DateHeader
from balancer.wire.inbound_request import InboundRequest

if TYPE_CHECKING:
    from balancer.semantic.service import SemanticCache


class Proxy:
    """Serves understood requests: cache, verdict, limit, node, attempt with retry, cache write."""

    def __init__(
        self,
        *,
        cache: ResponseCache,
        verdicts: Verdicts,
        flights: Flights,
        clock: Clock,
        date: DateHeader,
        comment_after_s: float | None,
        semantic: SemanticCache | None = None,
    ) -> None:
        self._cache = cache
        self._verdicts = verdicts
        self._semantic = semantic
        self._flights = flights
        self._embedder = Embedder(cache, flights, clock)
        self._clock = clock
        self._date = date
        self.comment_after_s = comment_after_s

    def begin(self, request: InferenceRequest, inbound: InboundRequest, call: Call) -> Coroutine[Any, Any, None] | None:
        """Serve a request from this process's memory at once (None), or return what is left to do."""
        client = self._client(inbound, request, call)
        plan = self.plan(request)
        call.cache_reason = plan.reason
        hit = self._local_hit(plan, request, client)
        if hit is None:
            return self.handle(request, plan, client)
        replay = client.replay(hit)
        return replay if replay is None else _to_its_end(replay, client)

    def plan(self, request: InferenceRequest) -> Plan:
        """What the cache will do for a request; hashes its body."""
        return self._cache.plan(request)

    async def serve(self, request: InferenceRequest, plan: Plan, inbound: InboundRequest, call: Call) -> None:
        """`begin`, where the plan is made already."""
        call.cache_reason = plan.reason
        client = self._client(inbound, request, call)
        hit = self._local_hit(plan, request, client)
        if hit is None:
            await self.handle(request, plan, client)
        elif (replay := client.replay(hit)) is not None:
            await _to_its_end(replay, client)

    def _local_hit(self, plan: Plan, request: InferenceRequest, client: ClientStream) -> Hit | None:
        """What this process's memory holds; the verdict is noted."""
        hit = self._cache.lookup_local(plan, request)
        if hit is not None:
            client.call.cache = hit.verdict
        elif plan.read:
            client.call.cache = "miss"
            plan.read = self._cache.is_shared  # `handle` has to look there
        return hit

    def _client(self, inbound: InboundRequest, request: InferenceRequest, call: Call) -> ClientStream:
        return ClientStream(inbound, request, call, self._clock, self._date)

    async def handle(self, request: InferenceRequest, plan: Plan, client: ClientStream) -> None:
        """Serve one request; every refusal is an answer, every exit frees what it took."""
        if self.comment_after_s is not None:
            client.comment_every(self.comment_after_s)
        try:
            if plan.read and (hit := await self._looked_up(plan, request, client)) is not None:
                return await client.stand_in(hit)
            if self._semantic is not None and (hit := await self._reworded(self._semantic, plan, request)) is not None:
                return await client.stand_in(hit)
            if request.wishes.cache_mode is CacheMode.ONLY:
                raise CacheMiss("there is no stored answer to this request")
            if self._verdicts:
                self._verdicts.check(request)
            is_embeddings = request.endpoint.name == "embeddings" and self._embedder.covers(request, plan)
            if is_embeddings and await self._embedder.serve(request, plan, client):
                return None
            await self._flights.fly(request, plan, client)
        except (NoEligibleNode, UpstreamFailed) as error:
            stale = None if client.begun else self._cache.stale(plan, request)
            if stale is None:
                return client.fail(error)
            await _to_its_end(client.stand_in(stale), client)
        except BalancerError as error:
            client.fail(error)
        except asyncio.CancelledError:
            client.cut_short()
            raise
        finally:
            client.stop_comments()

    async def _reworded(self, semantic: SemanticCache, plan: Plan, request: InferenceRequest) -> Hit | None:
        """The answer to another wording, where it may be given; an equal call in flight is better."""
        if not semantic.applies(request, plan) or self._flights.may_join(request, plan):
            return None
        if self._verdicts:
            self._verdicts.check(request)
        return await semantic.lookup(request, plan)

    async def _looked_up(self, plan: Plan, request: InferenceRequest, client: ClientStream) -> Hit | None:
        begun_s = self._clock.now()
        hit = await self._cache.lookup(plan, request)
        client.call.store_s = self._clock.now() - begun_s
        return hit


async def _to_its_end(replay: Coroutine[Any, Any, None], client: ClientStream) -> None:
    try:
        await replay
    except asyncio.CancelledError:
        client.cut_short()
        raise


class _Series:
    """The metric series of one model and endpoint, looked up once."""

    __slots__ = ("completion", "inter_token", "prompt", "requests", "seconds", "ttft")

    def __init__(self, metrics: Metrics, model: str, endpoint: str) -> None:
        self.requests: dict[tuple[int, str], CounterChild] = {}
        self.seconds = metrics.request_seconds.of(endpoint)
        self.ttft = metrics.time_to_first_token.of(model)
        self.inter_token = metrics.inter_token.of(model)
        self.prompt = metrics.tokens.of(model, "prompt")
        self.completion = metrics.tokens.of(model, "completion")


class Journal:
    """Turns a finished call into its metrics, its log line and its place in the ring; once per request."""

    def __init__(
        self, metrics: Metrics, ring: Ring, registry: Registry, clock: Clock, write: EventWriter | None
    ) -> None:
        self._metrics = metrics
        self._ring = ring
        self._registry = registry
        self._clock = clock
        self._write = write
        self._series: dict[tuple[str, str], _Series] = {}
        self._overhead = metrics.overhead.of()
        self._lookups = {result: metrics.cache_lookups.of(result) for result in CACHE_RESULTS}

    def close(self, call: Call) -> None:
        """The request is over, well or badly."""
        now = call.finished_s = self._clock.now()
        self._count(call, now)
        self._ring.add(call)
        if self._write is not None:
            self._write("request.finished", self._clock.wall(), _facts(call, now))

    def _count(self, call: Call, now: float) -> None:
        model = call.model if call.model in self._registry.listed_models else "other"
        series = self._series.get((model, call.endpoint))
        if series is None:
            series = self._series[model, call.endpoint] = _Series(self._metrics, model, call.endpoint)
        ended = (call.status, call.code)
        counter = series.requests.get(ended)
        if counter is None:
            counter = self._metrics.requests.of(model, call.endpoint, str(call.status), call.code)
            series.requests[ended] = counter
        counter.value += 1
        series.seconds.observe(now - call.received_s)
        self._lookups[call.cache].value += 1
        if call.sent_s:
            self._overhead.observe(call.overhead_s)
        if call.first_token_s:
            series.ttft.observe(call.first_token_s - call.received_s)
            if call.completion_tokens is not None and call.completion_tokens > 1:
                series.inter_token.observe((now - call.first_token_s) / (call.completion_tokens - 1))
        if call.prompt_tokens is not None:
            series.prompt.value += call.prompt_tokens
            series.completion.value += call.completion_tokens or 0


CACHE_RESULTS = ("hit", "semantic", "coalesced", "stale", "miss", "bypass")


def _facts(call: Call, now: float) -> dict[str, Any]:
    """The whole story of a request in one line; never a prompt, an answer or a key. Seconds to the microsecond."""
    return {
        "request_id": call.id,
        "tenant": call.tenant,
        "endpoint": call.endpoint,
        "model": call.model,
        "stream": call.stream,
        "status": call.status,
        "code": call.code,
        "node": call.node,
        "attempts": call.attempts_begun,
        "outcomes": [outcome for _, outcome, _ in call.attempts],
        "resume": call.resume,
        "cache": call.cache,
        "seconds": round(now - call.received_s, 6),
        "queue_s": round(call.queue_s, 6) if call.queue_s else 0.0,
        "ttft_s": round(call.first_token_s - call.received_s, 6) if call.first_token_s else None,
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
    }
