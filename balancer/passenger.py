"""One of several clients of a flight: its own deadline, its own pace, and its own way to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from balancer.cache import Hit
from balancer.clock import Clock
from balancer.core.request import InferenceRequest
from balancer.errors import BalancerError, DeadlineExceeded, NoEligibleNode, Truncated, UpstreamFailed
from balancer.relay import ClientStream, Delivered

# What a client may be behind the others. With what it got when it joined (`flight.JOIN_BYTES`) and what its
# connection holds before it counts as behind, a client that stops reading costs less than 2 MB.
BEHIND_BYTES = 768 * 1024


class Shared(Protocol):
    """The flight, as its passengers know it."""

    def leave(self, passenger: Passenger) -> None:
        """It wants nothing more; the last to leave ends the flight."""

    def pace(self) -> None:
        """A passenger stopped reading, or reads again."""


class Passenger:
    """Gets what the flight gives; `ride` returns when its answer is complete."""

    __slots__ = (
        "_behind_bytes",
        "_clock",
        "_done",
        "_flight",
        "_is_served",
        "client",
        "deadline_s",
        "is_behind",
        "joined_s",
        "request",
    )

    def __init__(self, flight: Shared, client: ClientStream, request: InferenceRequest, clock: Clock) -> None:
        self._flight = flight
        self._clock = clock
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._behind_bytes = 0
        self._is_served = False
        self.client = client
        self.request = request
        self.deadline_s = request.deadline_s  # its own; the request of the one that leads gets the latest of all
        self.joined_s = clock.now()
        self.is_behind = client.follow(self, self._left)

    async def ride(self) -> None:
        """Until the answer is complete, whichever way. Cancelled when the client leaves.

        Raises BalancerError while nothing is out.
        """
        try:
            async with asyncio.timeout(self.deadline_s - self._clock.now()):
                await self._done
        except TimeoutError:
            self._flight.leave(self)
            if self._has_all:
                return
            self._is_served = True
            self.client.unfollow()
            self.client.fail(DeadlineExceeded("the deadline passed before the answer was complete"))
        except asyncio.CancelledError:
            self._flight.leave(self)
            if self._has_all and not self.client.gone:
                return
            raise
        finally:
            if self._done.done() and not self._done.cancelled():
                self._done.exception()  # seen: a deadline may have come in the same moment

    @property
    def _has_all(self) -> bool:
        """Whether its answer ended in the moment in which it was to be cut: another end would be one too many."""
        return self._is_served and self.client.begun

    async def ride_on(self, stale: Callable[[], Hit | None]) -> None:
        """`ride` for the client that began the flight, in a task of its own; `stale` may stand in for an error."""
        try:
            try:
                await self.ride()
            except (NoEligibleNode, UpstreamFailed):
                hit = None if self.client.begun else stale()
                if hit is None:
                    raise
                await self.client.stand_in(hit)
        except BalancerError as error:
            self.client.fail(error)
        except asyncio.CancelledError:
            self.client.cut_short()
            raise

    # -- what the flight says

    def whole(self, answer: Delivered, body: bytes) -> None:
        """A complete answer."""
        self.client.whole(answer, body)
        self._end()

    def begin(self, answer: Delivered, held: bytes) -> None:
        """The head and what there is so far."""
        self.request.forget_body()
        try:
            self.client.begin(answer, held)
        except BalancerError as error:  # this one was promised a stream; the others were not
            self._flight.leave(self)
            self.fail(error)
        else:
            self.is_behind = self.client.follow(self, self._left)

    def go_on(self, answer: Delivered) -> None:
        """Another answer goes on with the stream; the flight sees to its pace."""

    def write(self, data: bytes) -> None:
        """More. A client that falls too far behind the others is cut off: they are not to wait for it."""
        self.client.write(data)
        if self.is_behind:
            self._behind_bytes += len(data)
            if self._behind_bytes > BEHIND_BYTES:
                self._flight.leave(self)
                self.fail(Truncated("the answer is shared, and this client reads it too slowly"))

    def end(self) -> None:
        """The good end."""
        self.client.end()
        self._end()

    def fail(self, error: BalancerError) -> None:
        """A bad end; nothing for one that is served already."""
        if self._is_served:
            return
        if self.client.begun:
            self.client.fail(error)
            self._end()
        else:
            self._end(error)

    def _end(self, error: BalancerError | None = None) -> None:
        self._is_served = True
        self.client.unfollow()
        if self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    # -- what the client's connection says

    def pause(self) -> None:
        """It reads more slowly than it is written to."""
        self.is_behind = True
        self._flight.pace()

    def resume(self) -> None:
        """It has caught up."""
        self.is_behind = False
        self._behind_bytes = 0
        self._flight.pace()

    def _left(self) -> None:
        self._flight.leave(self)
        self.client.unfollow()
        self._done.cancel()
