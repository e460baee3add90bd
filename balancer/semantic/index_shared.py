"""The index to use with a Redis: its vector sets where the server has them, else this process's memory."""

from __future__ import annotations

import math

from balancer.clock import Clock
from balancer.log import get_logger
from balancer.semantic import Entry, Index, Unavailable, Vector
from balancer.semantic.index_memory import MemoryIndex
from balancer.semantic.index_redis import RedisIndex

# A server that could not be asked is asked again after this long.
ASK_AGAIN_S = 5.0

log = get_logger()


class SharedIndex:
    """Decides once the server has said what it can do; until then every call is Unavailable."""

    def __init__(self, redis: RedisIndex, memory: MemoryIndex, clock: Clock) -> None:
        self._redis = redis
        self._memory = memory
        self._clock = clock
        self._chosen: Index | None = None
        self._ask_at_s = -math.inf

    def __repr__(self) -> str:
        return f"<SharedIndex {self._chosen or 'undecided'}>"

    async def start(self) -> None:
        """Ask the server; a server that is away is asked again later."""
        self._ask_at_s = self._clock.now() + ASK_AGAIN_S
        usable = await self._redis.usable()
        if usable is not None:
            self._chosen = self._redis if usable else self._memory
            log.info("semantic.index_chosen", where="redis" if usable else "memory")

    async def nearest(self, key: str, vector: Vector, count: int) -> list[tuple[float, Entry]]:
        """The nearest entries."""
        return await (await self._index()).nearest(key, vector, count)

    async def add(self, key: str, vector: Vector, entry: Entry) -> None:
        """Keep an entry."""
        await (await self._index()).add(key, vector, entry)

    async def remove(self, key: str, id_: str) -> bool:
        """Forget an entry."""
        return await (await self._index()).remove(key, id_)

    async def find(self, id_: str) -> list[tuple[str, Vector]]:
        """Where an entry is."""
        return await (await self._index()).find(id_)

    async def close(self) -> None:
        """Let go of the connections."""
        await self._redis.close()

    async def _index(self) -> Index:
        if self._chosen is None:
            if self._clock.now() >= self._ask_at_s:
                await self.start()
            if self._chosen is None:
                raise Unavailable("undecided")
        return self._chosen
