"""Who waits for a slot, in which order, and who is refused.

Order, from the outside in:

- A *lane* holds those who wait for the same slots. Where the first of a lane finds none, nobody in it would, and only
  the other lanes go on.
- Between priorities the lowest *rank* goes first: `rank = entered_s + AGING_S · priority` (high 0, normal 1, low 2).
  All that wait age alike, so a rank never changes: a request goes as if it had come AGING_S earlier for each step up.
- Within a priority tenants share by predicted tokens, with start-time fair queueing (Goyal, Vin, Cheng 1996): a
  request starts at `max(V, finish of its tenant's one before)` and finishes `cost` later; the lowest start goes first,
  and V is the start of the last one served. One tenant alone is served in the order of arrival.

Every operation costs O(log n) for n waiting, times the lanes in use.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import Literal

from balancer.core.drain_rate import DrainRate
from balancer.core.request import Priority, TenantId

# How much longer one priority waits than the next higher one, once both have waited: a third of the default
# `queue.max_wait_s`, so that a low request is served before it times out.
AGING_S = 10.0
# Places of those who left are cleared away once there are this many, and more than of those who wait.
LEAST_LEFT = 64
# Drain rates that are kept, one for each model: beyond it those of idle lanes go.
MODELS = 256


@dataclass(slots=True, eq=False)
class Ticket:
    """One waiting request's place."""

    priority: Priority
    lane: _Lane
    tenant: TenantId
    entered_s: float  # when it began to wait, all its waits taken together
    placed_s: float
    start: float
    displaced: Ticket | None = None  # who had to go for it
    waits: bool = True

    @property
    def rank(self) -> float:
        """Its rank between priorities; lower goes first."""
        return self.entered_s + AGING_S * self.priority.value


@dataclass(frozen=True, slots=True)
class Refused:
    """No place: the queue is full, or the slot would come too late. `retry_after_s`: when to try again."""

    reason: Literal["queue_full", "too_late"]
    retry_after_s: float


@dataclass(slots=True, eq=False)
class _Lane:
    """Those who wait for the same slots, of all priorities."""

    key: Hashable
    rate: DrainRate
    heaps: tuple[list[_Entry], ...] = field(default_factory=lambda: tuple([] for _ in Priority))
    tenants: tuple[dict[TenantId, int], ...] = field(default_factory=lambda: tuple({} for _ in Priority))
    waiting: list[int] = field(default_factory=lambda: [0] * len(Priority))
    left: int = 0  # places whose request waits no longer

    def first(self, priority: int) -> _Entry | None:
        """Who of one priority is next."""
        heap = self.heaps[priority]
        while heap and not heap[0][2].waits:
            heapq.heappop(heap)
            self.left -= 1
        return heap[0] if heap else None

    def ahead(self, priority: int, tenant: TenantId) -> int:
        """How many would go before a newcomer: all above it, and of its own priority each tenant's fair part."""
        counts = self.tenants[priority]
        own = counts.get(tenant, 0)
        beside = sum(min(count, own + 1) for other, count in counts.items() if other != tenant)
        return sum(self.waiting[:priority]) + own + beside

    def sweep(self) -> None:
        """Forget the places of those who left."""
        for heap in self.heaps:
            heap[:] = [entry for entry in heap if entry[2].waits]
            heapq.heapify(heap)
        self.left = 0


_Entry = tuple[float, int, Ticket]  # start, arrival, who


@dataclass(slots=True)
class _Tenant:
    """What one tenant has in the queue: by priority, in the order of arrival."""

    waiting: tuple[dict[Ticket, None], ...] = field(default_factory=lambda: tuple({} for _ in Priority))
    finish: list[float] = field(default_factory=lambda: [0.0] * len(Priority))
    count: int = 0

    def last(self, below: int = -1) -> Ticket | None:
        """Its newest request of the lowest priority, if that is below `below`."""
        for priority in range(len(self.waiting) - 1, below, -1):
            if self.waiting[priority]:
                return next(reversed(self.waiting[priority]))
        return None


@dataclass(slots=True)
class AdmissionQueue:
    """A bounded queue: three priorities that age, fair between tenants, aware of deadlines."""

    max_waiting: int
    _lanes: dict[Hashable, _Lane] = field(init=False, default_factory=dict)
    _rates: dict[str, DrainRate] = field(init=False, default_factory=dict)
    _tenants: dict[TenantId, _Tenant] = field(init=False, default_factory=dict)
    _waiting: list[int] = field(init=False, default_factory=lambda: [0] * len(Priority))
    _virtual: list[float] = field(init=False, default_factory=lambda: [0.0] * len(Priority))
    _arrivals: int = field(init=False, default=0)

    def __len__(self) -> int:
        return sum(self._waiting)

    def waiting(self, priority: Priority) -> int:
        """How many of a priority wait."""
        return self._waiting[priority.value]

    def is_waiting(self, lane: Hashable) -> bool:
        """Whether somebody waits in a lane."""
        return lane in self._lanes

    def enter(
        self,
        lane: Hashable,
        *,
        model: str,
        priority: Priority,
        tenant: TenantId,
        cost: float,
        deadline_s: float,
        until_s: float,
        now: float,
        waited_s: float = 0.0,
    ) -> Ticket | Refused:
        """A place in the queue, or why there is none.

        `cost` is in predicted tokens; the answer is due by `deadline_s`, the slot by `until_s`; `waited_s` is what the
        request has waited before. Where nobody waits ahead, nobody is refused as too late: somebody has to find out
        whether the drain rate still holds. A full queue makes room for a tenant that has less than an even share of
        it, and for a higher priority of the same tenant: the ticket says who was displaced.
        """
        level = priority.value
        rate = self.rate(model)
        kept = self._lanes.get(lane)
        ahead = kept.ahead(level, tenant) if kept is not None else 0
        wait_s = rate.wait_s(ahead, now) if ahead else None
        if wait_s is not None and (now + wait_s > until_s or now + wait_s + rate.service_s > deadline_s):
            return Refused("too_late", rate.retry_after_s(ahead, now))
        displaced = None
        if len(self) >= self.max_waiting:
            displaced = self._whom_to_displace(level, tenant)
            if displaced is None:
                return Refused("queue_full", rate.retry_after_s(ahead, now))
            self.leave(displaced)
            kept = self._lanes.get(lane)
        if kept is None:
            if not any(other.rate is rate for other in self._lanes.values()):
                rate.resumed(now)
            kept = self._lanes[lane] = _Lane(lane, rate)
        return self._place(kept, priority, tenant, cost, now, now - waited_s, displaced)

    def first(self, full: Collection[Hashable]) -> Ticket | None:
        """Who is next, lanes that are `full` left out."""
        best: Ticket | None = None
        for level in range(len(self._waiting)):
            if not self._waiting[level]:
                continue
            head: _Entry | None = None
            for lane in self._lanes.values():
                if lane.key not in full:
                    entry = lane.first(level)
                    if entry is not None and (head is None or entry < head):
                        head = entry
            if head is not None and (best is None or head[2].rank < best.rank):
                best = head[2]
        return best

    def granted(self, ticket: Ticket, now: float) -> None:
        """It got its slot."""
        level = ticket.priority.value
        self._virtual[level] = max(self._virtual[level], ticket.start)
        if now > ticket.placed_s:  # else it did not have to wait, and says nothing of those who do
            ticket.lane.rate.granted(now)
        self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        """The request waits no longer; harmless the second time."""
        if not ticket.waits:
            return
        ticket.waits = False
        level, lane, id_ = ticket.priority.value, ticket.lane, ticket.tenant
        self._waiting[level] -= 1
        tenant = self._tenants[id_]
        tenant.count -= 1
        del tenant.waiting[level][ticket]
        if not tenant.count:
            del self._tenants[id_]
        elif not tenant.waiting[level]:
            tenant.finish[level] = 0.0
        lane.waiting[level] -= 1
        counts = lane.tenants[level]
        counts[id_] -= 1
        if not counts[id_]:
            del counts[id_]
        lane.left += 1
        if not any(lane.waiting):
            del self._lanes[lane.key]
        elif lane.left > max(LEAST_LEFT, sum(lane.waiting)):
            lane.sweep()

    def retry_after_s(self, ticket: Ticket, now: float) -> float:
        """When a request that waited in vain should come back: by the queue that a newcomer like it would meet."""
        lane = ticket.lane
        return lane.rate.retry_after_s(lane.ahead(ticket.priority.value, ticket.tenant), now)

    def rate(self, model: str) -> DrainRate:
        """A model's drain rate."""
        rate = self._rates.get(model)
        if rate is None:
            if len(self._rates) >= MODELS:
                used = {id(lane.rate) for lane in self._lanes.values()}
                self._rates = {name: kept for name, kept in self._rates.items() if id(kept) in used}
            rate = self._rates[model] = DrainRate()
        return rate

    def _place(
        self,
        lane: _Lane,
        priority: Priority,
        id_: TenantId,
        cost: float,
        now: float,
        entered_s: float,
        displaced: Ticket | None,
    ) -> Ticket:
        level = priority.value
        tenant = self._tenants.get(id_)
        if tenant is None:
            tenant = self._tenants[id_] = _Tenant()
        start = max(self._virtual[level], tenant.finish[level])
        tenant.finish[level] = start + cost
        ticket = Ticket(priority, lane, id_, entered_s, now, start, displaced)
        tenant.waiting[level][ticket] = None
        tenant.count += 1
        self._waiting[level] += 1
        lane.waiting[level] += 1
        lane.tenants[level][id_] = lane.tenants[level].get(id_, 0) + 1
        self._arrivals += 1
        heapq.heappush(lane.heaps[level], (start, self._arrivals, ticket))
        return ticket

    def _whom_to_displace(self, level: int, id_: TenantId) -> Ticket | None:
        """Whose place a newcomer may have: the heaviest tenant's newest, or a lower priority of its own."""
        tenant = self._tenants.get(id_)
        own = tenant.count if tenant is not None else 0
        share = self.max_waiting // (len(self._tenants) + (tenant is None))
        if own < share:
            heaviest = max(self._tenants.values(), key=lambda kept: kept.count, default=None)
            if heaviest is not None and heaviest.count > share:
                return heaviest.last()
        return tenant.last(below=level) if tenant is not None else None
