"""Rate limit, then queue and slot: what a request passes between the cache and its first attempt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from balancer.clock import Clock
from balancer.core.admission_queue import AdmissionQueue, Refused, Ticket
from balancer.core.cache_key import limit_name
from balancer.core.request import InferenceRequest, Priority, Tenant, TenantId
from balancer.errors import BalancerError, CapacityError, DeadlineExceeded, QueueFull, QueueTimeout, RateLimited
from balancer.explain import Call
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.settings import LimitsConfig, ModelRule, QueueConfig
from balancer.store import Store, Taken

T = TypeVar("T")

# With the cache's look-up before it, no more than 30 ms of store calls stand before an answer.
TAKE_S = 0.01
# Without a burst of its own a tenant may send this many seconds' worth of requests at once.
DEFAULT_BURST_S = 10.0


@dataclass(slots=True)
class Usage:
    """What one tenant has used since the start."""

    requests: int = 0
    in_flight: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: int = 0


@dataclass(slots=True)
class Admitted:
    """What a request holds once it was let in; `leave` gives it back. `lines` are its X-RateLimit headers."""

    admission: Admission
    usage: Usage
    model: str
    call: Call
    lines: bytes = b""
    charged_tokens: float = 0.0

    def leave(self) -> None:
        """The request is over."""
        self.usage.in_flight -= 1
        if self.call.queue_s > 0.0:
            self.admission.served(self.call)
        self.admission.left(self.model)


@dataclass(frozen=True, slots=True)
class Rates:
    """A tenant's limits, with the defaults filled in; None is unlimited. And what its buckets are called."""

    requests_name: str
    tokens_name: str
    requests_per_s: float | None
    burst: float
    tokens_per_s: float | None
    max_in_flight: int | None


class Admission:
    """Decides who may go on now, who waits and who is refused. Rates live in the store, slots in this process."""

    def __init__(
        self,
        *,
        limits: LimitsConfig,
        queue: QueueConfig,
        models: Mapping[str, ModelRule],
        store: Store,
        fallback: Store,
        registry: Registry,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._limits = limits
        self._queue_config = queue
        self._models = models
        self._store = store
        self._fallback = fallback
        self._registry = registry
        self._metrics = metrics
        self._clock = clock
        self._queue = AdmissionQueue(queue.max_waiting)
        self._waiters: dict[Ticket, tuple[asyncio.Future[Any], Callable[[], Any]]] = {}
        self._granting = False
        self._again = False
        self._model_in_flight: dict[str, int] = {}
        self._usage: dict[TenantId, Usage] = {}
        self._rates: dict[Tenant, Rates] = {}
        metrics.queue_depth.read = lambda: [
            ((priority.name.lower(),), float(self._queue.waiting(priority))) for priority in Priority
        ]
        registry.on_change(self.look_again)

    def configure(self, limits: LimitsConfig, queue: QueueConfig, models: Mapping[str, ModelRule]) -> None:
        """New settings; what is in flight and what waits stays."""
        self._limits = limits
        self._queue_config = queue
        self._queue.max_waiting = queue.max_waiting
        self._models = models
        self._rates.clear()

    def tenants(self) -> dict[str, dict[str, int]]:
        """Use per tenant since the start."""
        return {id_: {name: getattr(usage, name) for name in Usage.__slots__} for id_, usage in self._usage.items()}

    async def admit(self, request: InferenceRequest, call: Call) -> Admitted:
        """Let the request in: its rates, then a slot. Raises RateLimited, CapacityError or DeadlineExceeded."""
        tenant = request.tenant
        usage = self._usage.get(tenant.id)
        if usage is None:
            usage = self._usage[tenant.id] = Usage()
        rates = self._rates.get(tenant) or self._rates_of(tenant)
        admitted = Admitted(self, usage, request.model, call)
        if rates.requests_per_s is not None or rates.tokens_per_s is not None:
            try:
                await self._limit(request, rates, admitted)
            except (RateLimited, CapacityError):
                usage.refused += 1
                raise
        try:
            await self._enter_tenant(request, call, rates, usage)
        except BaseException:
            if admitted.charged_tokens:
                self.used(request, admitted, 0, 0)  # no node will work for it
            raise
        return admitted

    async def _enter_tenant(self, request: InferenceRequest, call: Call, rates: Rates, usage: Usage) -> None:
        """Count it among its tenant's in flight, and take a slot of its model."""
        if rates.max_in_flight is not None and usage.in_flight >= rates.max_in_flight:
            usage.refused += 1
            self._metrics.shed.of("tenant_in_flight").inc()
            raise RateLimited(f"{rates.max_in_flight} requests are in flight already", retry_after_s=1.0)
        usage.in_flight += 1
        usage.requests += 1
        try:
            model = request.model
            if (self._waiters and self._queue.is_waiting(model)) or not self._take_model_slot(model):
                await self.wait_for(
                    request, call, model, lambda: self._take_model_slot(model), lambda _: self.left(model)
                )
        except BaseException:
            usage.in_flight -= 1
            raise

    def used(self, request: InferenceRequest, admitted: Admitted, prompt: int, completion: int) -> None:
        """What the answer cost in tokens: the estimate taken on the way in is put right."""
        admitted.usage.prompt_tokens += prompt
        admitted.usage.completion_tokens += completion
        rates = self._rates.get(request.tenant)
        if rates is not None and rates.tokens_per_s is not None:
            difference = prompt + completion - admitted.charged_tokens
            self._store.charge(
                rates.tokens_name,
                rate_per_s=rates.tokens_per_s,
                burst=rates.tokens_per_s * 60.0,
                cost=difference,
            )

    # -- rates

    def _rates_of(self, tenant: Tenant) -> Rates:
        per_minute = tenant.requests_per_minute or self._limits.requests_per_minute
        tokens = tenant.tokens_per_minute or self._limits.tokens_per_minute
        per_s = per_minute / 60.0 if per_minute is not None else None
        burst = tenant.burst or (self._limits.burst if tenant.requests_per_minute is None else None)
        rates = Rates(
            requests_name=limit_name(tenant.id),
            tokens_name=limit_name(tenant.id, "tokens"),
            requests_per_s=per_s,
            burst=burst or max(1.0, (per_s or 0.0) * DEFAULT_BURST_S),
            tokens_per_s=tokens / 60.0 if tokens is not None else None,
            max_in_flight=tenant.max_in_flight,
        )
        self._rates[tenant] = rates
        return rates

    async def _limit(self, request: InferenceRequest, rates: Rates, admitted: Admitted) -> None:
        if rates.requests_per_s is not None:
            taken = await self._take(rates.requests_name, rates.requests_per_s, rates.burst, 1.0)
            admitted.lines = _lines(_REQUEST_LINES, rates.burst, taken)
            if taken.wait_s > 0.0:
                raise self._limited("requests", taken.wait_s, admitted.lines)
        if rates.tokens_per_s is not None:
            burst = rates.tokens_per_s * 60.0
            cost = min(burst, request.prompt_tokens() + request.max_tokens())
            taken = await self._take(rates.tokens_name, rates.tokens_per_s, burst, cost)
            admitted.lines += _lines(_TOKEN_LINES, burst, taken)
            if taken.wait_s > 0.0:
                raise self._limited("tokens", taken.wait_s, admitted.lines)
            admitted.charged_tokens = cost

    async def _take(self, key: str, rate_per_s: float, burst: float, cost: float) -> Taken:
        taken: Taken | None = None
        if self._store is self._fallback:
            taken = await self._store.take(key, rate_per_s=rate_per_s, burst=burst, cost=cost)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TAKE_S):
                    taken = await self._store.take(key, rate_per_s=rate_per_s, burst=burst, cost=cost)
        if taken is not None:
            return taken
        if not self._limits.fail_open:
            self._metrics.shed.of("limits_unavailable").inc()
            raise CapacityError("rate limits cannot be checked just now", retry_after_s=1.0)
        self._metrics.limits_unchecked.inc()
        taken = await self._fallback.take(key, rate_per_s=rate_per_s, burst=burst, cost=cost)
        assert taken is not None  # the memory store always answers
        return taken

    def _limited(self, what: str, wait_s: float, lines: bytes) -> RateLimited:
        self._metrics.shed.of("rate_limited").inc()
        error = RateLimited(f"too many {what} per minute for this key", retry_after_s=wait_s)
        error.lines = lines
        return error

    # -- slots

    def left(self, model: str) -> None:
        """A request is over: whoever waits may go on."""
        in_flight = self._model_in_flight[model] - 1
        if in_flight:
            self._model_in_flight[model] = in_flight
        else:
            del self._model_in_flight[model]
        self.look_again()

    def served(self, call: Call) -> None:
        """A request that had waited is over: what it took after its slot tells others whether waiting is worth it."""
        if call.status == 200 and not call.code:
            took_s = self._clock.now() - call.received_s - call.queue_s
            self._queue.rate(self._label(call.model)).served(took_s)

    @property
    def is_contended(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiters)

    def must_wait(self, request: InferenceRequest) -> bool:
        """Whether others wait for a node that would do for this request: newcomers must not overtake."""
        return bool(self._waiters) and self._queue.is_waiting(self.lane(request))

    def lane(self, request: InferenceRequest) -> Hashable:
        """Who waits for the same nodes: the same model, and the same nodes tried before; a suspect on its own."""
        suspect = request.id if request.account is not None else ""
        return self._label(request.model), frozenset(request.tried), suspect

    def _label(self, model: str) -> str:
        """The model's name where a node lists it. Names of clients' making are one: the same nodes take them all."""
        return model if model in self._registry.listed_models else ""

    def _take_model_slot(self, model: str) -> bool | None:
        rule = self._models.get(model)
        in_flight = self._model_in_flight.get(model, 0)
        if rule is not None and rule.max_in_flight is not None and in_flight >= rule.max_in_flight:
            return None
        self._model_in_flight[model] = in_flight + 1
        return True

    async def wait_for(
        self,
        request: InferenceRequest,
        call: Call,
        lane: Hashable,
        take: Callable[[], T | None],
        give_back: Callable[[T], None],
    ) -> T:
        """Queue until `take` gives something; `core.admission_queue` says in which order.

        `take` is called when anything was freed and must take what it finds in one step, or return None; what it
        took for a request that left in the same moment goes to `give_back`. What `take` raises is raised here. When
        it finds nothing for the first of a `lane`, it would find nothing for the others either.
        Raises QueueFull, QueueTimeout or DeadlineExceeded.
        """
        begun_s = self._clock.now()
        ticket = self._enter(request, call, lane, begun_s)
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = (waiter, take)
        self.look_again()
        taken: T | None = None
        left_s = request.deadline_s - begun_s
        try:
            async with asyncio.timeout(min(self._queue_config.max_wait_s, left_s)):
                taken = await waiter
            return taken
        except TimeoutError:
            self._metrics.shed.of("queue_timeout").inc()
            if left_s <= self._queue_config.max_wait_s:
                raise DeadlineExceeded("the deadline passed while the request was waiting") from None
            wait_s = self._queue.retry_after_s(ticket, self._clock.now())
            raise QueueTimeout("no slot came free in time", retry_after_s=wait_s) from None
        finally:
            self._waiters.pop(ticket, None)
            self._queue.leave(ticket)
            if taken is None and waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                give_back(waiter.result())
            waited_s = self._clock.now() - begun_s
            call.queue_s += waited_s
            self._metrics.queue_seconds.observe(waited_s)

    def _enter(self, request: InferenceRequest, call: Call, lane: Hashable, now: float) -> Ticket:
        """A place in the queue, with the request it displaces told to leave. Raises QueueFull or QueueTimeout."""
        placed = self._queue.enter(
            lane,
            model=self._label(request.model),
            priority=request.wishes.priority,
            tenant=request.tenant.id,
            cost=request.prompt_tokens() + request.max_tokens(),
            deadline_s=request.deadline_s,
            until_s=now + self._queue_config.max_wait_s,
            now=now,
            waited_s=call.queue_s,
        )
        if isinstance(placed, Refused):
            self._metrics.shed.of(placed.reason).inc()
            if placed.reason == "queue_full":
                raise QueueFull("too many requests are waiting", retry_after_s=placed.retry_after_s)
            raise QueueTimeout("no slot would come free in time", retry_after_s=placed.retry_after_s)
        if placed.displaced is not None:
            self._displace(placed.displaced, now)
        return placed

    def _displace(self, ticket: Ticket, now: float) -> None:
        waiter, _ = self._waiters.pop(ticket)
        if not waiter.done():  # else its client has just left
            self._metrics.shed.of("displaced").inc()
            wait_s = self._queue.retry_after_s(ticket, now)
            waiter.set_exception(
                QueueFull("the queue is full, and others had a claim to a place", retry_after_s=wait_s)
            )

    def look_again(self) -> None:
        """Something was freed, or may be: hand it to those whose turn it is."""
        if not self._waiters:
            return
        if self._granting:  # what `take` changes may call this again
            self._again = True
            return
        self._granting = True
        try:
            self._grant()
            if self._again:
                self._grant()
        finally:
            self._granting = self._again = False

    def _grant(self) -> None:
        """Hand out what is free, in the queue's order; a full lane holds up only itself."""
        full: set[Hashable] = set()
        while (ticket := self._queue.first(full)) is not None:
            waiter, take = self._waiters[ticket]
            if waiter.done():  # its client has just left
                self._queue.leave(ticket)
                continue
            try:
                taken = take()
            except BalancerError as error:
                self._queue.leave(ticket)
                waiter.set_exception(error)
                continue
            if taken is None:
                full.add(ticket.lane.key)
            else:
                self._queue.granted(ticket, self._clock.now())
                waiter.set_result(taken)


_LINES = "x-ratelimit-limit-{0}: %d\r\nx-ratelimit-remaining-{0}: %d\r\nx-ratelimit-reset-{0}: %b\r\n"
_REQUEST_LINES = _LINES.format("requests").encode()
_TOKEN_LINES = _LINES.format("tokens").encode()


def _lines(form: bytes, limit: float, taken: Taken) -> bytes:
    """X-RateLimit headers as OpenAI sends them."""
    return form % (limit, max(0, int(taken.remaining)), b"%.3gs" % taken.reset_s)
