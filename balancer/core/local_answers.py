"""Answers in this process, in front of a shared store or alone: bounded by bytes, the least recently used go first."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from balancer.core import cache_key
from balancer.core.cache_entry import Stored

# What an entry costs beyond its name, body and forms: objects, expiry, shares of the tables (tracemalloc: 510 to 540).
ENTRY_OVERHEAD_BYTES = 544
# Expiries that belong to nothing any more are cleared away when they are this many, and more than the others.
SPARE_EXPIRIES = 1024

# How an answer is asked for: as a stream, with usage in it.
Form = tuple[bool, bool]


class Kept:
    """One answer, and the forms that were made of it."""

    __slots__ = ("forms", "name", "size", "stored", "until_s")

    def __init__(self, name: str, stored: Stored, until_s: float) -> None:
        self.name = name
        self.stored = stored
        self.until_s = until_s
        self.forms: dict[Form, bytes] | None = None
        self.size = len(name) + len(stored.body) + len(stored.pace) + ENTRY_OVERHEAD_BYTES


class LocalAnswers:
    """Keeps no clock: every call says what time it is."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._expiries: list[tuple[float, str]] = []
        self.size_bytes = 0  # what the entries take, overhead included
        self.evicted = 0  # that went for want of room

    def __repr__(self) -> str:
        return f"<LocalAnswers entries={len(self._kept)} bytes={self.size_bytes}>"

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, name: str, now: float) -> Kept | None:
        """What is kept under a name, while it is."""
        kept = self._kept.get(name)
        if kept is None:
            return None
        if now >= kept.until_s:
            self._drop(name)
            return None
        self._kept.move_to_end(name)
        return kept

    def put(self, name: str, stored: Stored, until_s: float) -> None:
        """Keep an answer until then, or until room is needed. One that cannot fit only removes the old one."""
        if name in self._kept:
            self._drop(name)
        kept = Kept(name, stored, until_s)
        if kept.size > self._max_bytes:
            return
        self._kept[name] = kept
        heapq.heappush(self._expiries, (until_s, name))
        self._grown(kept.size)

    def add_form(self, kept: Kept, form: Form, body: bytes) -> None:
        """Remember what an answer looks like in another form, so that it is converted once."""
        if self._kept.get(kept.name) is not kept or kept.size + len(body) > self._max_bytes:
            return
        if kept.forms is None:
            kept.forms = {}
        kept.forms[form] = body
        added = len(body) if body is not kept.stored.body else 0
        kept.size += added
        self._grown(added)

    def drop(self, name: str) -> None:
        """Forget one name."""
        if name in self._kept:
            self._drop(name)

    def delete(
        self, *, tenant: str | None, model: str | None, digest: str | None, before_wall_s: float | None = None
    ) -> int:
        """Remove the answers that match all that is given; how many went."""
        matches = cache_key.answer_matcher(tenant, model, digest)
        going = [
            name
            for name, kept in self._kept.items()
            if matches(name) and (before_wall_s is None or kept.stored.stored_wall_s < before_wall_s)
        ]
        for name in going:
            self._drop(name)
        return len(going)

    def purge(self, now: float, most: int = 1000) -> int:
        """Let go of what has expired, at most so many at once; how many went."""
        gone = 0
        while self._expiries and self._expiries[0][0] <= now and gone < most:
            until_s, name = heapq.heappop(self._expiries)
            kept = self._kept.get(name)
            if kept is not None and kept.until_s == until_s:
                self._drop(name)
                gone += 1
        return gone

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._expiries.clear()
        self.size_bytes = 0

    def _drop(self, name: str) -> None:
        self.size_bytes -= self._kept.pop(name).size
        if len(self._expiries) > 2 * len(self._kept) + SPARE_EXPIRIES:
            self._expiries = [(kept.until_s, kept.name) for kept in self._kept.values()]
            heapq.heapify(self._expiries)

    def _grown(self, by: int) -> None:
        self.size_bytes += by
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))
            self.evicted += 1
