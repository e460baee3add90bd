"""One request from accept to last byte; reads top-down."""

from __future__ import annotations

import asyncio

import structlog

from balancer.cache import ResponseCache
from balancer.clock import Clock
from balancer.core.request import CacheMode, InferenceRequest
from balancer.errors import BalancerError, CacheMiss, Draining
from balancer.explain import Call, Ring
from balancer.flight import Flights
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.relay import ClientStream
from balancer.wire.framing import DateHeader
from balancer.wire.inbound import InboundRequest


class Proxy:
    """Serves understood requests: cache, then limit, then node, then attempt with retry, then cache write."""

    def __init__(self, *, cache: ResponseCache, flights: Flights, clock: Clock, date: DateHeader) -> None:
        self._cache = cache
        self._flights = flights
        self._clock = clock
        self._date = date

    async def handle(self, request: InferenceRequest, inbound: InboundRequest, call: Call) -> None:
        """Serve one request; every refusal is a BalancerError, every exit frees what it took."""
        client = ClientStream(inbound, request, call, self._clock, self._date)
        try:
            await self._serve(request, client, call)
        except BalancerError as error:
            client.fail(error)
        except asyncio.CancelledError:
            if not client.gone:  # cut by a shutdown
                client.fail(Draining("this balancer was shut down before the answer was complete"))
            raise

    async def _serve(self, request: InferenceRequest, client: ClientStream, call: Call) -> None:
        plan = self._cache.plan(request)
        call.cache_reason = plan.reason
        if plan.key is not None and plan.read:
            hit = await self._cache.lookup(plan, request)
            if hit is not None:
                call.cache = "hit"
                client.replay(hit)
                return
            call.cache = "miss"
        if request.cache_mode is CacheMode.ONLY:
            raise CacheMiss("there is no stored answer to this request")
        await self._flights.fly(request, plan, client)


class Journal:
    """Turns a finished call into its metrics, its log line and its place in the ring; once per request."""

    def __init__(self, metrics: Metrics, ring: Ring, registry: Registry, clock: Clock) -> None:
        self._metrics = metrics
        self._ring = ring
        self._registry = registry
        self._clock = clock
        self._log: structlog.typing.FilteringBoundLogger = structlog.get_logger()

    def close(self, call: Call) -> None:
        """The request is over, well or badly."""
        now = call.finished_s = self._clock.now()
        metrics = self._metrics
        seconds = now - call.received_s
        model = self._known(call)
        metrics.requests.of(model, call.endpoint, str(call.status), call.code).inc()
        metrics.request_seconds.of(call.endpoint).observe(seconds)
        metrics.cache_lookups.of(call.cache).inc()
        if call.sent_s:
            metrics.overhead.observe(call.sent_s - call.received_s - call.queue_s)
        if call.first_token_s:
            metrics.time_to_first_token.of(model).observe(call.first_token_s - call.received_s)
            if call.completion_tokens is not None and call.completion_tokens > 1:
                gap_s = (now - call.first_token_s) / (call.completion_tokens - 1)
                metrics.inter_token.of(model).observe(gap_s)
        if call.prompt_tokens is not None:
            metrics.tokens.of(model, "prompt").inc(call.prompt_tokens)
            metrics.tokens.of(model, "completion").inc(call.completion_tokens or 0)
        self._ring.add(call)
        self._log.info(
            "request.finished",
            request_id=call.id,
            tenant=call.tenant,
            endpoint=call.endpoint,
            model=call.model,
            stream=call.stream,
            status=call.status,
            code=call.code,
            node=call.node,
            attempts=call.attempts_begun,
            outcomes=[outcome for _, outcome, _ in call.attempts],
            cache=call.cache,
            seconds=round(seconds, 6),
            queue_s=round(call.queue_s, 6),
            ttft_s=round(call.first_token_s - call.received_s, 6) if call.first_token_s else None,
            prompt_tokens=call.prompt_tokens,
            completion_tokens=call.completion_tokens,
        )

    def _known(self, call: Call) -> str:
        """A model name that is bounded: one that some node answered for, or `other`."""
        if call.node or (call.model and self._registry.serving_known(call.model)):
            return call.model or "other"
        return "other"
