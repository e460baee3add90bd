"""A Redis Cluster as one store: a `RedisStore` for each master, and who has which slot.

Every name has one hash tag, so each call concerns one master. A master that is away costs its share of the answers; the
map is asked for anew when a key has moved, and once a second while a master is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError

from balancer.clock import Clock
from balancer.log import get_logger
from balancer.store import Taken
from balancer.store.address import Address, Cluster
from balancer.store.redis import Facts, RedisStore

# Between looks at the map: while all is well, and while something is not.
CALM_S, TROUBLED_S = 30.0, 1.0
# A server that does not tell the map within this is passed over.
MAP_S = 0.25

log = get_logger()

OpenShard = Callable[[Address, Callable[[], None]], RedisStore]


class ClusterStore:
    """The Store protocol over all masters. `open_shard` makes the store of one, given whom to tell that keys moved."""

    def __init__(self, cluster: Cluster, *, open_shard: OpenShard, clock: Clock) -> None:
        self._cluster = cluster
        self._open_shard = open_shard
        self._clock = clock
        self._shards: dict[str, RedisStore] = {}  # by host:port
        self._servers: list[Address] = list(cluster.seeds)
        self._slots: list[RedisStore | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._stale = asyncio.Event()
        self._lost = False  # nobody told the map when last asked
        self._keeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ClusterStore {self._cluster} {self.state()} shards={len(self._shards)}>"

    # -- the store

    async def get(self, key: str) -> bytes | None:
        """As the shard that has the key; None where none is known to."""
        shard = self._slots[key_slot(key.encode())]
        return None if shard is None else await shard.get(key)

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """As the shard that has the key; dropped where none is known to."""
        shard = self._slots[key_slot(key.encode())]
        if shard is not None:
            shard.put(key, value, ttl_s)

    async def take(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> Taken | None:
        """As the shard that has the key; None where none is known to."""
        shard = self._slots[key_slot(key.encode())]
        return None if shard is None else await shard.take(key, rate_per_s=rate_per_s, burst=burst, cost=cost)

    def charge(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> None:
        """As the shard that has the key; dropped where none is known to."""
        shard = self._slots[key_slot(key.encode())]
        if shard is not None:
            shard.charge(key, rate_per_s=rate_per_s, burst=burst, cost=cost)

    async def delete(
        self, *, tenant: str | None, model: str | None, digest: str | None, before_wall_s: float | None = None
    ) -> int:
        """Remove from every shard what matches all that is given."""
        asked = {"tenant": tenant, "model": model, "digest": digest}
        shards = list(self._shards.values())
        return sum(await asyncio.gather(*(shard.delete(**asked, before_wall_s=before_wall_s) for shard in shards)))

    def state(self) -> str:
        """`ready`, `partial` while some shard is away, `unreachable` while none is there."""
        ready = sum(shard.state() == "ready" for shard in self._shards.values())
        if not ready:
            return "unreachable"
        return "ready" if ready == len(self._shards) and None not in self._slots else "partial"

    async def facts(self) -> list[Facts]:
        """How each master is doing."""
        found = await asyncio.gather(*(shard.facts() for shard in self._shards.values()))
        return [facts for shard in found for facts in shard]

    async def start(self) -> None:
        """Learn the map and connect; a Cluster that is away is a warning."""
        await self._learn()
        self._keeper = asyncio.create_task(self._keep(), name="cluster")

    async def written(self) -> None:
        """Return when every write so far has been answered or given up."""
        await asyncio.gather(*(shard.written() for shard in self._shards.values()))

    async def close(self) -> None:
        """Close every shard."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.gather(*(shard.close() for shard in self._shards.values()))

    # -- the map

    async def _keep(self) -> None:
        while True:
            pause_s = CALM_S if self.state() == "ready" else TROUBLED_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stale.wait()
                    await self._clock.sleep(MAP_S)  # a move of slots tells of itself with every key
            try:
                await self._learn()
            except Exception:
                log.exception("cluster.map_failed", address=str(self._cluster))

    async def _learn(self) -> None:
        """Ask one server after the other for the map, and follow it."""
        self._stale.clear()
        found: list[tuple[int, int, Address]] = []
        for server in self._servers:
            if found := await _ask_map(server):
                break
        if not found:
            if not self._lost:
                log.warning("cluster.unreachable", address=str(self._cluster))
            self._lost = True
            return
        self._lost = False
        masters = {address.server: address for _, _, address in found}
        opened = [name for name in masters if name not in self._shards]
        for name in opened:
            self._shards[name] = self._open_shard(masters[name], self._stale.set)
        slots: list[RedisStore | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, address in found:
            slots[first : last + 1] = [self._shards[address.server]] * (last + 1 - first)
        self._slots = slots
        gone = [self._shards.pop(name) for name in list(self._shards) if name not in masters]
        self._servers = [*masters.values(), *self._cluster.seeds]
        if opened or gone:
            log.info("cluster.mapped", shards=sorted(masters))
        await asyncio.gather(*(self._shards[name].start() for name in opened), *(shard.close() for shard in gone))


async def _ask_map(server: Address) -> list[tuple[int, int, Address]]:
    """Ranges of slots, first and last, with their masters; nothing where the server does not say."""
    try:
        ranges = await server.ask("CLUSTER", "SLOTS", within_s=MAP_S)
        return [
            (int(first), int(last), _master(server, master[0], int(master[1])))
            for first, last, master, *_ in ranges
            if 0 <= int(first) <= int(last) < REDIS_CLUSTER_HASH_SLOTS
        ]
    except (RedisError, OSError, TypeError, ValueError, LookupError):
        return []


def _master(asked: Address, host: Any, port: int) -> Address:
    """How to reach a master: as the server that was asked, but for host and port. No host: the same one."""
    named = host.decode() if isinstance(host, bytes) else ""
    return dataclasses.replace(asked, host=named or asked.host, port=port)
