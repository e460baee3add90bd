"""Where equal requests meet: who begins a flight, and who joins one."""

from __future__ import annotations

import asyncio

from balancer.admission import Admission
from balancer.attempts import Attempts
from balancer.cache import NO_PLAN, Plan, ResponseCache
from balancer.clock import Clock
from balancer.core.outcome import Outcome
from balancer.core.request import CacheMode, InferenceRequest
from balancer.errors import BalancerError, Draining
from balancer.flight import Flight
from balancer.log import get_logger
from balancer.meeting import Meeting, name_of
from balancer.relay import ClientStream
from balancer.resume import Resumes
from balancer.settings import CoalesceConfig
from balancer.wire.buffered import Buffered

log = get_logger()

# Requests that may share a flight: the name of their answer, and the form in which they want it.
Key = tuple[str, bool, bool]


class Flights:
    """Begins flights, each with its admission, and knows those that may be joined."""

    __slots__ = (
        "_admission",
        "_attempts",
        "_buffered",
        "_cache",
        "_clock",
        "_config",
        "_flights",
        "_meeting",
        "_resumes",
    )

    def __init__(
        self,
        admission: Admission,
        attempts: Attempts,
        cache: ResponseCache,
        resumes: Resumes,
        clock: Clock,
        buffered: Buffered,
        config: CoalesceConfig,
        meeting: Meeting | None,
    ) -> None:
        self._admission = admission
        self._attempts = attempts
        self._cache = cache
        self._resumes = resumes
        self._clock = clock
        self._buffered = buffered
        self._config = config
        self._meeting = meeting  # with other balancers, where there are any
        self._flights: dict[Key, Flight] = {}  # that may be joined

    def sizes(self) -> list[int]:
        """How many clients each flight has that may be joined, the oldest first."""
        return [len(flight) for flight in self._flights.values()]

    @property
    def is_wanted(self) -> bool:
        """Whether other balancers wait for a call that is made here."""
        return any(flight.is_wanted for flight in self._flights.values())

    async def close(self) -> None:
        """End what only other balancers still want, and let go of connections."""
        for flight in self._flights.values():
            flight.cancel()
        await asyncio.sleep(0)
        if self._meeting is not None:
            await self._meeting.close()

    def configure(self, config: CoalesceConfig) -> None:
        """New settings, for requests that come from now on."""
        self._config = config

    def may_join(self, request: InferenceRequest, plan: Plan) -> bool:
        """Whether an equal call is in flight that this request would join."""
        if plan.name is None or not self._config.enabled:
            return False
        there = self._flights.get((plan.name, request.stream, request.wants_usage))
        return there is not None and there.may_be_joined(request)

    async def fly(self, request: InferenceRequest, plan: Plan, client: ClientStream) -> None:
        """Join an equal call in flight; else admit the request and make the call. Deliver it.

        Raises BalancerError while nothing is out.
        """
        if plan.name is None or not self._config.enabled:
            await self._make(self._new(request, plan, client))
            return
        key = (plan.name, request.stream, request.wants_usage)
        there = self._flights.get(key)
        fresh = request.wishes.cache_mode is CacheMode.REFRESH
        if there is not None and there.may_be_joined(request) and not fresh:
            self._cache.bound_hits(request.tenant.id)
            await there.join(request, client).ride()
            return
        flight = self._flights[key] = self._new(request, plan, client)
        name = None
        if self._meeting is not None and self._config.across and there is None and not fresh:
            name = name_of(plan.name, request)
        try:
            await self._carry(flight, plan, name)
        finally:
            if self._flights.get(key) is flight:
                del self._flights[key]
            if flight.is_shared:
                flight.disband()

    async def fly_alone(self, request: InferenceRequest, client: ClientStream) -> None:
        """Make a call that is neither shared nor kept. Raises BalancerError while nothing is out."""
        await self._make(self._new(request, NO_PLAN, client))

    async def _carry(self, flight: Flight, plan: Plan, name: str | None) -> None:
        """Lead; where that fails before anything was handed on and others wait, one of them leads once more.

        Raises only while nobody shares the flight: passengers are told by it.
        """
        try:
            try:
                if self._meeting is None or name is None:
                    await self._make(flight)
                else:
                    await self._meeting.meet(flight, plan, name, self._make)
            except BalancerError as error:
                if not flight.lead_again(error):
                    raise
                await self._make(flight)
        except BalancerError as error:
            if not flight.is_shared:
                raise
            flight.fail(error)
        except asyncio.CancelledError:
            if not flight.is_shared:
                raise
            flight.fail(Draining("this balancer was shut down before the answer was complete"))
        except Exception:
            if not flight.is_shared:
                raise
            log.exception("flight.crashed", request_id=flight.call.id)
            flight.fail(BalancerError("an internal error; the log has the request's id"))

    def _new(self, request: InferenceRequest, plan: Plan, client: ClientStream) -> Flight:
        shell = (self._attempts, self._cache, self._resumes, self._clock, self._buffered)
        return Flight(*shell, request, plan, client)

    async def _make(self, flight: Flight) -> None:
        """Admit the request in whose name the flight is made, and make the call."""
        request, call = flight.request, flight.call
        admitted = await self._admission.admit(request, call)
        flight.client.lines += admitted.lines
        try:
            if await flight.run() is Outcome.OK:
                self._attempts.succeeded(request)
        finally:
            admitted.leave()
            if flight.tokens is not None:
                self._admission.used(request, admitted, *flight.tokens)
            elif not call.node:
                self._admission.used(request, admitted, 0, 0)  # no node worked for it: the estimate goes back
