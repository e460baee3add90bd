"""Keeps an eye on the servers behind the store: memory, evictions, and whether they are set up to be a cache."""

from __future__ import annotations

import asyncio
from typing import Protocol

from balancer.clock import Clock
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.store.redis import Facts

# As often as Prometheus is wont to look.
INTERVAL_S = 15.0

log = get_logger()


class Watched(Protocol):
    """A store with servers of its own."""

    async def facts(self) -> list[Facts]:
        """How each server that is there is doing."""


class StoreWatch:
    """Asks in the background; what it last heard is on the metrics page."""

    def __init__(self, store: Watched, metrics: Metrics, clock: Clock, *, interval_s: float = INTERVAL_S) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._interval_s = interval_s
        self._heard: list[Facts] = []
        self._warned: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        metrics.redis_used.read = lambda: [((facts.server,), float(facts.used_bytes)) for facts in self._heard]
        metrics.redis_peak.read = lambda: [((facts.server,), float(facts.peak_bytes)) for facts in self._heard]
        metrics.redis_max.read = lambda: [((facts.server,), float(facts.max_bytes)) for facts in self._heard]
        metrics.redis_policy.read = lambda: [((facts.server, facts.policy), 1.0) for facts in self._heard]

    async def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.create_task(self._run(), name="store-watch")

    async def close(self) -> None:
        """Stop asking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Ask once."""
        self._heard = await self._store.facts()
        for facts in self._heard:
            self._metrics.redis_evicted.of(facts.server).value = float(facts.evicted)
            if facts.policy == "noeviction" and facts.server not in self._warned:
                self._warned.add(facts.server)
                log.warning(
                    "redis.never_evicts",
                    server=facts.server,
                    max_bytes=facts.max_bytes,
                    advice="set maxmemory, and maxmemory-policy allkeys-lru: full, this server drops every write",
                )
            elif facts.policy != "noeviction":
                self._warned.discard(facts.server)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("redis.watch_failed")
            await self._clock.sleep(self._interval_s)
