"""Who waits for a slot, in which order, and who is refused."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field

from balancer.core.request import Priority

# Weight of one new gap between freed slots in the drain rate: about the last 20 count.
DRAIN_WEIGHT = 0.05


@dataclass(slots=True, eq=False)
class Ticket:
    """One waiting request's place."""

    priority: Priority
    model: str
    deadline_s: float
    granted: bool = False
    left: bool = False


@dataclass(slots=True)
class AdmissionQueue:
    """A bounded queue: by priority, and first come first served within one."""

    max_waiting: int
    _heap: list[tuple[int, int, Ticket]] = field(init=False, default_factory=list)
    _sequence: int = field(init=False, default=0)
    _waiting: Counter[Priority] = field(init=False, default_factory=Counter)
    _drained_s: float | None = field(init=False, default=None)
    _gap_s: float = field(init=False, default=0.0)

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def waiting(self, priority: Priority) -> int:
        """How many of a priority wait."""
        return self._waiting[priority]

    def enter(self, priority: Priority, model: str, deadline_s: float) -> Ticket | None:
        """A place in the queue, or None when it is full."""
        if len(self) >= self.max_waiting:
            return None
        ticket = Ticket(priority, model, deadline_s)
        self._sequence += 1
        heapq.heappush(self._heap, (priority.value, self._sequence, ticket))
        self._waiting[priority] += 1
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The request waits no longer, whether it was granted or not; harmless the second time."""
        if not ticket.left:
            ticket.left = True
            self._waiting[ticket.priority] -= 1

    def in_order(self) -> list[Ticket]:
        """Everyone who waits and was not granted a slot, first to be served first."""
        self._heap = [entry for entry in self._heap if not entry[2].left]
        heapq.heapify(self._heap)
        return [ticket for _, _, ticket in sorted(self._heap, key=lambda e: e[:2]) if not ticket.granted]

    def drained(self, now: float) -> None:
        """A waiting request got its slot: the drain rate learns the gap since the one before."""
        if self._drained_s is not None:
            gap_s = now - self._drained_s
            self._gap_s = gap_s if self._gap_s == 0.0 else self._gap_s + DRAIN_WEIGHT * (gap_s - self._gap_s)
        self._drained_s = now

    def retry_after_s(self) -> float:
        """When a newcomer refused now could expect a slot: those ahead times the gap between freed slots."""
        return max(1.0, (len(self) + 1) * (self._gap_s or 0.1))
