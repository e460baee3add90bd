"""Calls shared with other balancers: one of them makes it, the others hand on what it gives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from balancer.across import Followed
from balancer.cache import Plan, ResponseCache
from balancer.clock import Clock
from balancer.core import cache_key
from balancer.core.request import InferenceRequest
from balancer.errors import Truncated
from balancer.flight import Flight
from balancer.store.entries import BAD, END, GOOD, RENEW_S, Entry

if TYPE_CHECKING:
    from balancer.store.flights import Board

# Look-up and claim together wait no longer than this for Redis: a rate limit's 10 ms come on top.
STORE_S = 0.02
# Calls of other balancers that a flight waits for before it makes its own.
FOLLOWED = 2


def name_of(answer: str, request: InferenceRequest) -> str:
    """The flight's name among balancers, for the answer of that name in the form that the request wants it in."""
    form = f"{'s' if request.stream else 'u'}{request.wants_usage:d}{request.wishes.priority.value}"
    return cache_key.flight_name(cache_key.digest_of(answer), form)


class Meeting:
    """Where balancers agree on who makes a call."""

    __slots__ = ("_board", "_cache", "_clock")

    def __init__(self, board: Board, cache: ResponseCache, clock: Clock) -> None:
        self._board = board
        self._cache = cache
        self._clock = clock

    async def meet(self, flight: Flight, plan: Plan, name: str, make: Callable[[Flight], Awaitable[None]]) -> None:
        """Have what another balancer's equal call gives, or `make` the call and let others have it."""
        board, call = self._board, flight.call
        token = board.new_token()
        holder = await self._claim(flight, name, token, STORE_S - call.store_s)
        if holder:
            self._cache.bound_hits(flight.request.tenant.id)
            flight.share()
            result, call.cache = call.cache, "coalesced"
            for _ in range(FOLLOWED):
                is_over, holder = await self._follow(flight, plan, name, token, holder)
                if is_over:
                    return
                if not holder:
                    break
            call.cache = result
        if holder is None or holder:
            await make(flight)
            return
        lease = board.lease(name, token, flight)
        flight.hold(lease)
        try:
            await make(flight)
        finally:
            flight.hold(None)
            lease.end(GOOD if flight.is_good else BAD)

    async def close(self) -> None:
        """Let go of connections."""
        await self._board.close()

    async def _claim(self, flight: Flight, name: str, token: str, within_s: float) -> str | None:
        wanted_s = flight.request.deadline_s - self._clock.now()
        return await self._board.claim(name, token, wanted_s=wanted_s, within_s=within_s)

    async def _follow(self, flight: Flight, plan: Plan, name: str, token: str, holder: str) -> tuple[bool, str | None]:
        """Hand on what the holder's flight gives: whether all is done, and else who holds it now, as `Board.claim`.

        Nothing is done where its call failed before anything was handed on, or its balancer or Redis died till then.
        """
        board = self._board
        after, said_s = 0, self._clock.now()
        now_held: str | None = holder
        while True:
            await flight.is_read()
            entries = await board.read(name, holder, after, wait=now_held == holder)
            for entry in entries or ():
                after = entry.number
                if not flight.take(entry, self._clock.now()):
                    return await self._ended(flight, plan, name, token, entry)
            if entries is None:
                now_held = None
            if now_held != holder and not entries:
                break
            if now_held == holder and self._clock.now() - said_s >= RENEW_S:
                said_s = self._clock.now()
                now_held = await self._claim(flight, name, token, STORE_S)  # what the old one said last comes first
        if flight.has_begun:
            flight.follow_to_end(Truncated("the answer broke off"))
        elif now_held is None or not await self._deliver_stored(flight, plan):  # it may have ended without a word
            return False, now_held
        board.end(name, token, 1, GOOD)
        return True, None

    async def _ended(self, flight: Flight, plan: Plan, name: str, token: str, last: Entry) -> tuple[bool, str | None]:
        """Another's flight is over. Where nothing was handed on, its answer is a stored one."""
        is_good = last.kind == END and last.data == GOOD
        if flight.has_begun:
            flight.follow_to_end(None if is_good else Truncated("the answer broke off"))
        elif not (is_good and await self._deliver_stored(flight, plan)):
            return False, await self._claim(flight, name, token, STORE_S)
        self._board.end(name, token, 1, GOOD)  # in case it was taken over meanwhile
        return True, None

    async def _deliver_stored(self, flight: Flight, plan: Plan) -> bool:
        hit = await self._cache.lookup(plan, flight.request)
        if hit is None:
            return False
        kind, size = hit.content_type.decode("latin-1"), len(hit.body)
        answer = Followed(kind, "", size, is_stream=hit.stream, now=self._clock.now())
        flight.follow_whole(answer, hit.body)
        return True
