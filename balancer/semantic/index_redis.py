"""The index that all balancers share: a Redis vector set a partition (`VADD`, `VSIM`; Redis 8).

An element is the digest of its answer's key. A vector set has no lifetime per element, so the whole set expires with
the last of its answers, an element carries its own expiry in its attributes, and one whose answer is gone is removed
by who finds it so. Vectors are kept as they are (`NOQUANT`): quantised ones would rank differently from memory's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import orjson
from redis.exceptions import RedisError, ResponseError

from balancer.clock import Clock
from balancer.core.cache_key import VERSION
from balancer.core.semantic.guards import Features
from balancer.log import get_logger
from balancer.semantic import Entry, Unavailable, Vector
from balancer.store.address import Address, Sentinels

# Connections for lookups; more calls wait for one, within their deadline.
MAX_CONNECTIONS = 8
# Candidates that the search keeps in view: with fewer elements than this it is exact.
SEARCH_EFFORT = 500
SCAN_COUNT = 500
# After a failure nothing is asked for this long: a lookup must not pay for a Redis that is away.
PAUSE_S = 1.0

log = get_logger()


class RedisIndex:
    """Vector sets. `usable` says whether the server has them."""

    def __init__(self, where: Address | Sentinels, *, timeout_s: float, max_entries: int, clock: Clock) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._paused_until_s = -math.inf
        self._redis = where.client(timeout_s, connections=MAX_CONNECTIONS)
        self._redis.response_callbacks.clear()  # replies as the server sends them, whatever the version of redis-py

    async def start(self) -> None:
        """Nothing to find out: `usable` is asked before it is used."""

    async def usable(self) -> bool | None:
        """Whether the server has vector sets; None while it cannot be asked."""
        try:
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.execute_command("COMMAND", "INFO", "VADD")
            (known,) = await pipeline.execute()
        except (RedisError, OSError):
            return None
        return bool(known) and known[0] is not None

    async def nearest(self, key: str, vector: Vector, count: int) -> list[tuple[float, Entry]]:
        """The nearest elements and their attributes, in two steps: which, and what is known of them."""
        query = ("VSIM", key, "FP32", vector.astype("<f4").tobytes(), "WITHSCORES", "COUNT", count, "EF", SEARCH_EFFORT)
        found = await self._run(query)
        pairs = list(found.items()) if isinstance(found, dict) else list(zip(found[::2], found[1::2], strict=True))
        if not pairs:
            return []
        known = await self._run(*(("VGETATTR", key, element) for element, _ in pairs))
        known = known if len(pairs) > 1 else [known]
        now = self._clock.wall()
        entries = []
        for (element, score), attributes in zip(pairs, known, strict=True):
            entry = _entry(element, attributes)
            if entry is None or entry.expires_wall_s <= now:
                await self._run(("VREM", key, element))
            else:
                entries.append((2.0 * float(score) - 1.0, entry))  # Redis says (1 + cosine) / 2
        return entries

    async def add(self, key: str, vector: Vector, entry: Entry) -> None:
        """Keep it; the set lives as long as its longest-lived element."""
        attributes = orjson.dumps({"expires": entry.expires_wall_s, "features": entry.features.encode().decode()})
        ttl_s = max(1, math.ceil(entry.expires_wall_s - self._clock.wall()))
        blob = vector.astype("<f4").tobytes()
        *_, count = await self._run(
            ("VADD", key, "FP32", blob, entry.id, "NOQUANT", "SETATTR", attributes),
            ("EXPIRE", key, ttl_s, "NX"),
            ("EXPIRE", key, ttl_s, "GT"),
            ("VCARD", key),
        )
        if count > self._max_entries:
            await self._run(("VREM", key, await self._run(("VRANDMEMBER", key))))

    async def remove(self, key: str, id_: str) -> bool:
        """Forget an element."""
        return bool(await self._run(("VREM", key, id_)))

    async def find(self, id_: str) -> list[tuple[str, Vector]]:
        """Every set that has the element; scans the names of all."""
        found: list[tuple[str, Vector]] = []
        cursor: Any = 0
        while True:
            cursor, keys = await self._run(("SCAN", cursor, "MATCH", f"{VERSION}:sem:*", "COUNT", SCAN_COUNT))
            for key in keys:
                values = await self._run(("VEMB", key, id_))
                if values:
                    raw: Vector = np.array([float(value) for value in values], np.float32)
                    found.append((key.decode(), raw / np.linalg.norm(raw)))
            if int(cursor) == 0:
                return found

    async def close(self) -> None:
        """Let go of the connections."""
        await self._redis.aclose()

    async def _run(self, *commands: tuple[Any, ...]) -> Any:
        """One command's reply, or the replies of several sent together. Raises Unavailable."""
        if self._clock.now() < self._paused_until_s:
            raise Unavailable("paused")
        try:
            pipeline = self._redis.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies = await pipeline.execute()
        except ResponseError as error:
            raise Unavailable("refused") from error
        except (RedisError, OSError) as error:
            self._paused_until_s = self._clock.now() + PAUSE_S
            log.warning("semantic.index_unreachable", reason=type(error).__name__, for_s=PAUSE_S)
            raise Unavailable("unreachable") from error
        return replies[0] if len(commands) == 1 else replies


def _entry(element: bytes, attributes: Any) -> Entry | None:
    """Read strictly; None for anything that `add` did not write."""
    try:
        about = orjson.loads(attributes)
        features = Features.decode(about["features"].encode())
        expires_s = about["expires"]
        if features is None or type(expires_s) is not float:
            return None
        return Entry(element.decode("ascii"), features, expires_s)
    except (orjson.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return None
