"""What stands in for the outside world in tests."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count


class ManualClock:
    """A clock that stands still until `advance` is called; sleepers wake then, in the order of their times."""

    def __init__(self, now: float = 1000.0, wall: float = 1_700_000_000.0) -> None:
        self._now = now
        self._wall = wall
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def __repr__(self) -> str:
        return f"<ManualClock now={self._now} sleepers={self.sleepers}>"

    @property
    def sleepers(self) -> int:
        """How many wait for time to pass."""
        return sum(not future.done() for _, _, future in self._sleepers)

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._wall

    def advance(self, delay_s: float) -> None:
        """Let time pass. Who wakes up runs when the event loop gets to it: await something after this."""
        until = self._now + delay_s
        self._wall += delay_s
        while self._sleepers and self._sleepers[0][0] <= until:
            due_s, _, future = heapq.heappop(self._sleepers)
            self._now = max(self._now, due_s)
            if not future.done():
                future.set_result(None)
        self._now = until

    async def sleep(self, delay_s: float) -> None:
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + delay_s, next(self._order), future))
        await future
