"""One task that asks many things again and again: each at once when it appears, then every interval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable
from functools import partial
from random import Random
from typing import Any, Generic, TypeVar

from balancer.clock import Clock
from balancer.log import get_logger

# Work under way at once. A hung node holds a place for a whole time-out, so this must not be small.
AT_ONCE = 256
# Who is due is looked up this many times in an interval, and at least this often: what a newcomer may wait.
TICKS = 20
MAX_TICK_S = 0.1

K = TypeVar("K", bound=Hashable)

log = get_logger()


class Periodic(Generic[K]):
    """Does `work(key)` for each of `keys()`: first at once, then within every `interval_s` seconds.

    The starts are spread over the interval at random, and no key waits longer than the interval while there is room.
    The same key is never worked on twice at once. `work` returns None when there is nothing to do this time; it is
    called without an await, so that a thousand keys with nothing to do cost no task.
    """

    def __init__(
        self,
        name: str,
        keys: Callable[[], Iterable[K]],
        work: Callable[[K], Coroutine[Any, Any, None] | None],
        *,
        interval_s: float,
        clock: Clock,
        rng: Random,
        at_once: int = AT_ONCE,
    ) -> None:
        self._name = name
        self._keys = keys
        self._work = work
        self._interval_s = interval_s
        self._tick_s = min(MAX_TICK_S, interval_s / TICKS)
        self._clock = clock
        self._rng = rng
        self._at_once = at_once
        self._due_s: dict[K, float] = {}
        self._running: dict[K, asyncio.Task[None]] = {}
        self._loop_task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Periodic {self._name} keys={len(self._due_s)} running={len(self._running)}>"

    def start(self) -> None:
        """Begin; the first sweep comes with the loop's next turn."""
        self._loop_task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Stop, and cancel what is under way."""
        tasks = [*self._running.values()]
        if self._loop_task is not None:
            tasks.append(self._loop_task)
            self._loop_task = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                self._sweep(self._clock.now())
            except Exception:
                log.exception("sweep.failed", of=self._name)
            await self._clock.sleep(self._tick_s)

    def _sweep(self, now: float) -> None:
        """Begin everything that is due, the longest overdue first; what finds no room stays due."""
        self._due_s = due_s = {key: self._due_s.get(key, now) for key in self._keys()}
        late = [key for key, at_s in due_s.items() if at_s <= now and key not in self._running]
        for key in sorted(late, key=due_s.__getitem__):
            if len(self._running) >= self._at_once:
                return
            due_s[key] = now + self._period_s()
            self._begin(key)

    def _period_s(self) -> float:
        """The interval less up to a quarter at random, and less what the next tick may come late."""
        return self._interval_s * self._rng.uniform(0.75, 1.0) - self._tick_s

    def _begin(self, key: K) -> None:
        work = self._work(key)
        if work is not None:
            task = asyncio.get_running_loop().create_task(work)
            self._running[key] = task
            task.add_done_callback(partial(self._ended, key))

    def _ended(self, key: K, task: asyncio.Task[None]) -> None:
        self._running.pop(key, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work.failed", of=self._name, key=str(key), exc_info=error)
