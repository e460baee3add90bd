"""An answer on its way through, kept whole for the cache and for those who join late."""

from __future__ import annotations

from balancer.cache import NO_PLAN, Plan
from balancer.core.pace import record
from balancer.wire.buffered import Buffered


class Collection:
    """What was handed on so far. Let go of when it gets larger than the cache takes, or when memory is short."""

    __slots__ = ("_buffered", "_max_bytes", "_parts", "_reads", "is_open", "size")

    def __init__(self, plan: Plan, max_bytes: int, buffered: Buffered) -> None:
        self._buffered = buffered
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._reads: list[tuple[float, int]] | None = [] if plan.paced else None  # when, bytes
        self.is_open = plan.write and plan.name is not None
        self.size = 0

    def add(self, data: bytes, at_s: float) -> None:
        """More of the answer, read at `at_s`."""
        size = len(data)
        if not size:
            return  # nothing to be counted, and so nothing to be let go of
        if self.size + size > self._max_bytes:
            self.drop()
            return
        if not self.size:
            self._buffered.collections[self] = None
        self._parts.append(data)
        if self._reads is not None:
            self._reads.append((at_s, size))
        self.size += size
        self._buffered.bytes += size
        if self._buffered.bytes > self._buffered.limit:
            self._buffered.relieve()

    @property
    def body(self) -> bytes:
        """All of it so far."""
        return b"".join(self._parts)

    @property
    def pace(self) -> bytes:
        """When it came (`core.pace`); empty where that is not recorded."""
        return record(self._reads) if self._reads else b""

    def drop(self) -> None:
        """Let go of it (`wire.buffered.Droppable`)."""
        self.is_open = False
        if self.size:
            self._parts = []
            self._buffered.collections.pop(self, None)
            self._buffered.bytes -= self.size
            self.size = 0


# For all that the cache does not take: an idle stream has little room.
NOTHING = Collection(NO_PLAN, 0, Buffered(0))


def collection_of(plan: Plan, max_bytes: int, buffered: Buffered) -> Collection:
    """A new collection, where the answer may be kept."""
    return Collection(plan, max_bytes, buffered) if plan.write and plan.name is not None else NOTHING
