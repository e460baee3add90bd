"""Many coarse time limits for the price of one timer.

A limit that moves with every chunk must not cost a timer per chunk: moving it is one assignment to `due_s`, and
the wheel looks at it when the time it last knew has come.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Protocol

# A limit is felt at most this much late. Finer ticks cost CPU, and no limit here is below 50 ms.
TICK_S = 0.02


class Watched(Protocol):
    """Something with a time limit. `due_s` may be moved at will; `bucket` belongs to the wheel."""

    due_s: float
    bucket: set[Watched] | None

    def on_due(self, now: float) -> None:
        """The limit has passed. May move `due_s` on and stay watched, or call `TimerWheel.forget`."""


class TimerWheel:
    """Buckets of watched things by the tick at which to look at them next."""

    __slots__ = ("_buckets", "_handle", "_next", "_now", "_ticks", "loop")

    def __init__(self, now: Callable[[], float], loop: asyncio.AbstractEventLoop) -> None:
        self._now = now
        self.loop = loop
        self._buckets: dict[int, set[Watched]] = {}
        self._ticks: list[int] = []  # a heap of the buckets' keys
        self._handle: asyncio.TimerHandle | None = None
        self._next = 0  # the tick at which the timer goes off

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self._buckets.values())

    def watch(self, item: Watched) -> None:
        """Call `item.on_due` once its `due_s` has passed. Its `due_s` may only move later while it is watched."""
        tick = int(item.due_s / TICK_S) + 1
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = set()
            heapq.heappush(self._ticks, tick)
        bucket.add(item)
        item.bucket = bucket
        if self._handle is None or tick < self._next:
            self._arm(tick)

    def sooner(self, item: Watched) -> None:
        """Look at an item again whose `due_s` moved to an earlier time."""
        self.forget(item)
        self.watch(item)

    @staticmethod
    def forget(item: Watched) -> None:
        """Stop watching; harmless for something that is not watched."""
        if item.bucket is not None:
            item.bucket.discard(item)
            item.bucket = None

    def _arm(self, tick: int) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._next = tick
        self._handle = self.loop.call_later(max(0.0, tick * TICK_S - self._now()), self._turn)

    def _turn(self) -> None:
        now = self._now()
        current = int(now / TICK_S)
        while self._ticks and self._ticks[0] <= current:
            bucket = self._buckets.pop(heapq.heappop(self._ticks))
            while bucket:  # what one of them does may end another
                item = bucket.pop()
                item.bucket = None
                if item.due_s > now:
                    self.watch(item)
                    continue
                try:
                    item.on_due(now)
                except Exception as error:  # noqa: BLE001 -- the limits of all others stand on this timer
                    self.loop.call_exception_handler({"message": "a time limit failed", "exception": error})
        self._handle = None
        if self._ticks:
            self._arm(self._ticks[0])

    def close(self) -> None:
        """Forget everything."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._buckets.clear()
        self._ticks.clear()
