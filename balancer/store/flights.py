"""Calls shared by several balancers: who makes one is agreed on in Redis, and the others read what it gives.

The one that holds the lease publishes only from when another asks, and what is asked for is seen when the lease is
renewed: a call that nobody else wants costs two small commands and one for each renewal. Every key expires.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable
from importlib.resources import files

from redis.exceptions import RedisError

from balancer.clock import Clock
from balancer.store.address import Address, Sentinels
from balancer.store.entries import BEGIN, DATA, END, RENEW_S, Entry, Source
from balancer.store.link import Reply, pack
from balancer.store.redis import RedisStore

# A balancer that dies is replaced this much later. Renewed often enough to survive a second without an answer.
LEASE_S = 2.0
# Renewals in a row at which nobody said so, after which nobody waits any more.
UNWANTED_BEATS = 4
# A stream outlives its last entry by this long, for those who have not read it yet.
KEEP_S = 10.0
# What is published goes out at most this often: a token's time on a fast engine is half of it.
PUBLISH_S = 0.02
# A stream holds the last of its entries up to this size: who comes later than that makes a call of its own.
STREAM_BYTES = 1024 * 1024
# How long one read waits, and how long it may take beyond that before Redis counts as away.
BLOCK_S, LATE_S = 0.25, 0.25
# Flights of others that are read at once, a connection each; beyond it calls are not shared.
READERS = 64
POOL_S = 0.01
# Entries taken in one read.
READ_COUNT = 16


class Board:
    """Where flights are claimed and found."""

    def __init__(self, store: RedisStore, address: Address | Sentinels, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._script = files("balancer.store").joinpath("scripts/flight.lua").read_text()
        self._reader = address.client(BLOCK_S + LATE_S, connect_s=LATE_S, connections=READERS, wait_s=POOL_S)

    @staticmethod
    def new_token() -> str:
        """A name for one attempt to hold a flight."""
        return secrets.token_hex(8)

    async def claim(self, name: str, token: str, *, wanted_s: float, within_s: float) -> str | None:
        """Take the flight `name`, or say that its holder's is wanted for so long.

        "" when it is ours, else the holder's token; None when Redis did not say within the time.
        """
        if within_s <= 0.0:
            return None
        wanted_ms = max(1, int(wanted_s * 1000))
        command = self._command("claim", name, token, int(LEASE_S * 1000), wanted_ms)
        reply = await self._store.ask("claim", command, within_s)
        return reply.decode("ascii", "replace") if type(reply) is bytes else None

    def lease(self, name: str, token: str, source: Source) -> Lease:
        """Hold a flight that was claimed, until `Lease.end`."""
        return Lease(self, name, token, source, self._clock)

    async def read(self, name: str, holder: str, after: int, *, wait: bool = True) -> list[Entry] | None:
        """The next entries of a holder's stream; none yet is an empty list. None where it cannot be read.

        A gap, which is what is left of a stream by the time it is read too late, makes it unreadable.
        """
        stream = stream_name(name, holder)
        try:
            reply = await self._reader.xread(
                {stream: f"{after}-1"}, count=READ_COUNT, block=int(BLOCK_S * 1000) if wait else None
            )
        except (RedisError, OSError, TimeoutError):
            return None
        if not reply:
            return []
        return _entries(reply[0][1] if isinstance(reply, list) else next(iter(reply.values())), after)

    async def close(self) -> None:
        """Let go of the connections."""
        await self._reader.aclose()

    # -- for leases

    def renew(self, name: str, token: str, then: Callable[[Reply], None]) -> None:
        """Hold it for longer; `then` gets what the script says, or None."""
        self._store.tell("claim", self._command("renew", name, token, int(LEASE_S * 1000)), then)

    def publish(self, name: str, token: str, entry: Entry, keep: int) -> None:
        """Add an entry; at most `keep` are kept."""
        stream, expiry_ms = stream_name(name, token), int((LEASE_S + KEEP_S) * 1000)
        add = pack((b"XADD", stream, b"MAXLEN", keep, f"{entry.number}-1", entry.kind, entry.data))
        self._store.tell("publish", add)
        self._store.tell("publish", pack((b"PEXPIRE", stream, expiry_ms)))

    def end(self, name: str, token: str, number: int, how: bytes, *, is_followed: bool = False) -> None:
        """Give it up, if it is ours; to those who wait the last entry says how it went."""
        keep_ms = int(KEEP_S * 1000)
        self._store.tell("claim", self._command("end", name, token, keep_ms, f"{number}-1", how, int(is_followed)))

    def _command(self, step: str, name: str, token: str, *words: str | bytes | int) -> bytes:
        return pack((b"EVAL", self._script, 2, name, stream_name(name, token), step, token, *words))


class Lease:
    """A flight that is ours: renewed by a timer, published from when it is wanted."""

    def __init__(self, board: Board, name: str, token: str, source: Source, clock: Clock) -> None:
        self._board = board
        self._name = name
        self._token = token
        self._source = source
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._number = 0  # of the entry published last
        self._sizes: deque[int] = deque()  # of the entries that the stream holds
        self._held_bytes = 0
        self._batch: list[bytes] = []
        self._flushing: asyncio.TimerHandle | None = None
        self._is_over = False
        self._is_wanted = False
        self._unwanted_beats = 0
        self._beat: asyncio.TimerHandle = self._loop.call_later(RENEW_S, self._renew)

    def begun(self) -> None:
        """There is something to read, should somebody want it."""
        if self._is_wanted:
            self._publish_so_far()

    def write(self, data: bytes) -> None:
        """More of the answer."""
        if self._number and not self._is_over:
            self._batch.append(data)
            if self._flushing is None:
                self._flushing = self._loop.call_later(PUBLISH_S, self._flush)

    def end(self, how: bytes) -> None:
        """The call is over; nothing is renewed any more."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flush()
        self._beat.cancel()
        if not self._is_over:
            self._is_over = True
            is_followed = self._is_wanted or self._number > 0
            self._board.end(self._name, self._token, self._number + 1, how, is_followed=is_followed)

    def _renew(self) -> None:
        self._beat = self._loop.call_later(RENEW_S, self._renew)
        self._board.renew(self._name, self._token, self._renewed)

    def _renewed(self, reply: Reply) -> None:
        if self._is_over or type(reply) is not int:
            return
        if reply < 0:  # it ran out while Redis was away, and is another's
            self._is_over = True
            self._beat.cancel()
            self._source.wanted_until(None)
            return
        self._unwanted_beats = 0 if reply else self._unwanted_beats + 1
        if reply:
            self._is_wanted = True
            self._source.wanted_until(self._clock.now() + reply / 1000)
            self._publish_so_far()
        elif self._is_wanted and self._unwanted_beats >= UNWANTED_BEATS:
            self._is_wanted = False
            self._source.wanted_until(None)

    def _publish_so_far(self) -> None:
        so_far = self._source.so_far()
        if so_far is not None and not self._number and not self._is_over:
            begin, data = so_far
            self._add(BEGIN, begin)
            if data:
                self._add(DATA, data)

    def _flush(self) -> None:
        self._flushing = None
        batch, self._batch = self._batch, []
        if batch and not self._is_over:
            self._add(DATA, b"".join(batch))

    def _add(self, kind: bytes, data: bytes) -> None:
        self._number += 1
        self._sizes.append(len(data))
        self._held_bytes += len(data)
        while self._held_bytes > STREAM_BYTES and len(self._sizes) > 1:
            self._held_bytes -= self._sizes.popleft()
        self._board.publish(self._name, self._token, Entry(self._number, kind, data), len(self._sizes))


def stream_name(name: str, token: str) -> str:
    """Where the answer of one holder is published."""
    return f"{name}:{token}"


def _entries(found: object, after: int) -> list[Entry] | None:
    """Read entries strictly: numbered on from `after`, one known field each."""
    entries = []
    if not isinstance(found, list):
        return None
    for id_, fields in found:
        after += 1
        if id_ != b"%d-1" % after or not isinstance(fields, dict) or len(fields) != 1:
            return None
        ((kind, data),) = fields.items()
        if kind not in (BEGIN, DATA, END) or len(data) > 2 * STREAM_BYTES:
            return None
        entries.append(Entry(after, kind, data))
    return entries
