"""Requests to embed a list of texts: known vectors come from the cache, the others from a node in one smaller call."""

from __future__ import annotations

from dataclasses import replace

from balancer.cache import Hit, Plan, ResponseCache
from balancer.clock import Clock
from balancer.core import embeddings, json_splice
from balancer.core.request import CacheMode, InferenceRequest
from balancer.errors import BalancerError
from balancer.flights import Flights
from balancer.meeting import STORE_S
from balancer.relay import ClientStream, Delivered

# Vectors are not put together beyond this size: reading and writing a megabyte of numbers takes about 10 ms.
MERGE_BYTES = 4 * 1024 * 1024
# Entries looked up for one request: in this process, and in Redis, where they have to come within milliseconds.
MAX_LOCAL, MAX_REMOTE = 2048, 64


class _Part(ClientStream):
    """Stands where the client does for the smaller call, and keeps what it gives."""

    __slots__ = ("answer", "body", "error", "parts", "size")

    @classmethod
    def of(cls, client: ClientStream) -> _Part:
        part = client.beside(cls)
        part.answer = None
        part.parts = []
        part.size = 0
        part.error = None
        return part

    answer: Delivered | None
    parts: list[bytes]
    size: int
    error: BalancerError | None

    def whole(self, answer: Delivered, body: bytes) -> None:
        self.answer = answer
        self.parts = [body]

    def begin(self, answer: Delivered, held: bytes) -> None:
        self.answer = answer
        self.write(held)

    def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= MERGE_BYTES:
            self.parts.append(data)

    def end(self) -> None:
        pass

    def fail(self, error: BalancerError) -> None:
        self.error = error


class Embedder:
    """Takes requests apart and puts their answers together."""

    def __init__(self, cache: ResponseCache, flights: Flights, clock: Clock) -> None:
        self._cache = cache
        self._flights = flights
        self._clock = clock

    def covers(self, request: InferenceRequest, plan: Plan) -> bool:
        """Whether the request is one to look at."""
        return self._cache.keeps_inputs and plan.name is not None and request.is_exact

    async def serve(self, request: InferenceRequest, plan: Plan, client: ClientStream) -> bool:
        """Answer the request, where some of its vectors are known; else note under which names to keep them."""
        inputs = embeddings.inputs_of(request.parsed)
        if inputs is None or len(inputs) > (MAX_REMOTE if self._cache.is_shared else MAX_LOCAL):
            return False
        plan.inputs = self._cache.input_names(request, inputs)
        if request.wishes.cache_mode is CacheMode.REFRESH:
            return False
        entries = await self._cache.entries(plan.inputs, STORE_S - client.call.store_s)
        size = max((len(entry) for entry in entries if entry is not None), default=0)
        if not size or size * len(inputs) > MERGE_BYTES:
            return False
        parts = embeddings.split([embeddings.decode(entry) for entry in entries])
        if not parts.known:
            return False
        self._cache.bound_hits(request.tenant.id)
        if parts.missing:
            return await self._ask_rest(request, plan, parts, client)
        body = embeddings.merge(parts, None)
        if body is None:
            return False
        client.call.cache = "hit"
        age_s = self._clock.wall() - min(entry.stored_wall_s for entry in parts.known.values())
        client.replay(Hit(body, b"application/json", False, max(0.0, age_s), 0.0))
        return True

    async def _ask_rest(
        self, request: InferenceRequest, plan: Plan, parts: embeddings.Split, client: ClientStream
    ) -> bool:
        assert request.parsed is not None
        assert plan.inputs is not None
        missing = [request.parsed["input"][place] for place in parts.missing]
        rest = replace(
            request,
            body=json_splice.replace_member(request.body, "input", missing),
            parsed={**request.parsed, "input": missing},
            tried=set(),
        )
        part = _Part.of(client)
        await self._flights.fly_alone(rest, part)
        if part.error is not None:
            raise part.error
        assert part.answer is not None
        body = b"".join(part.parts)
        if part.answer.status != 200:  # the node's own word about the request
            client.lines = part.lines
            client.whole(part.answer, body)
            return True
        merged = embeddings.merge(parts, body) if part.size <= MERGE_BYTES else None
        if merged is None:
            return False  # nothing to be put together exactly: the whole is asked for
        names = [plan.inputs[place] for place in parts.missing]
        self._cache.store_inputs(plan, names, body)
        client.lines = part.lines
        client.whole(part.answer, merged)
        return True
