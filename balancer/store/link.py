"""One connection to Redis on an asyncio protocol, parsed by hiredis.

One batcher on redis-py's pipeline costs 100 µs of CPU for a lone GET and 12.5 for each of 64; this costs 36 and 3.1,
because no task, stream or lock stands between a caller and its answer. redis-py does what is in no request's way.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import hiredis

from balancer.clock import Clock

# While a batch is under way later calls wait to go together, but not longer and not more than this: a round trip
# on one machine is 0.1 ms, and the waiting has to stay small beside a call's time limit.
HOLD_S = 0.001
HOLD_CALLS = 64
# A late answer may be in the socket while the event loop was busy: it gets one more look before the link is given up.
GRACE_S = 0.002
# Writing batches up to this size in one piece is cheaper than handing over many.
JOIN_BYTES = 64 * 1024

# What hiredis makes of an answer; None stands for no answer.
Reply = Any

# One command as bytes. (The annotation that hiredis has for it allows one word only.)
pack = cast(Callable[[tuple[str | bytes | int | float, ...]], bytes], hiredis.pack_command)


class Link(asyncio.Protocol):
    """Sends calls in batches and answers them in order. The first answer that is too late ends it."""

    def __init__(self, *, timeout_s: float, clock: Clock, on_end: Callable[[Link, str, bool], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_s
        self._now = clock.now
        self._on_end = on_end
        self._reader = hiredis.Reader()
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[tuple[asyncio.Future[Reply], float]] = deque()  # answer, due; in the order of calls
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._unanswered = 0  # of those sent
        self._flush_scheduled = False
        self._watched = False  # a timer looks at the oldest call
        self._suspect: asyncio.Future[Reply] | None = None  # late when last looked at
        self.ended = False
        self.since_s = clock.now()

    def __repr__(self) -> str:
        return f"<Link {'ended' if self.ended else 'up'} waiting={len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, command: bytes) -> asyncio.Future[Reply]:
        """Send a packed command soon; the future gets the reply (an error reply as a value), or None for no answer."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self.ended:
            future.set_result(None)
            return future
        self._waiting.append((future, self._now() + self._timeout_s))
        self._unsent.append(command)
        self._unsent_bytes += len(command)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            if self._unanswered:
                self._loop.call_later(HOLD_S, self._flush)
            else:
                self._loop.call_soon(self._flush)
        elif len(self._unsent) == HOLD_CALLS and self._unanswered:
            self._loop.call_soon(self._flush)
        if not self._watched:
            self._watched = True
            self._loop.call_later(self._timeout_s, self._look)
        return future

    async def drained(self) -> None:
        """Return when everything asked so far is answered or given up."""
        if self._waiting:
            await asyncio.wait([future for future, _ in self._waiting])

    def end(self, reason: str) -> None:
        """Give the connection up: every call that waits gets None."""
        if self.ended:
            return
        self.ended = True
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        self._unsent.clear()
        for future, _ in waiting:
            if not future.done():
                future.set_result(None)
        self._on_end(self, reason, bool(waiting))

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is there; nothing has been said on it."""
        self._transport = cast(asyncio.Transport, transport)
        if self.ended:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side closed it, or we did."""
        self.end("lost")

    def data_received(self, data: bytes) -> None:
        """Hand each whole reply to the oldest call."""
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not False:
                if not self._unanswered:
                    self.end("unasked")
                    return
                self._unanswered -= 1
                future, _ = waiting.popleft()
                if not future.done():
                    future.set_result(reply)
        except hiredis.ProtocolError:
            self.end("protocol")
            return
        if self._unsent and not self._unanswered:
            self._flush()

    def _flush(self) -> None:
        self._flush_scheduled = False
        unsent = self._unsent
        if not unsent or self._transport is None or self.ended:
            return
        if self._unsent_bytes <= JOIN_BYTES:
            self._transport.write(b"".join(unsent))
        else:
            self._transport.writelines(unsent)
        self._unanswered += len(unsent)
        self._unsent = []
        self._unsent_bytes = 0

    def _look(self) -> None:
        """End the link if its oldest call is late and was late a moment ago."""
        self._watched = False
        if not self._waiting:
            return
        future, due_s = self._waiting[0]
        left_s = due_s - self._now()
        if left_s <= 0:
            if future is self._suspect:
                self.end("timeout")
                return
            self._suspect, left_s = future, GRACE_S
        self._watched = True
        self._loop.call_later(left_s, self._look)
