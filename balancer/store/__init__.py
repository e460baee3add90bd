"""Where answers and rate limits are kept: in this process (`memory`), or shared by all balancers (`redis`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# A value is kept no longer than this, whatever was asked for: Redis refuses an expiry that it cannot add to its clock.
MAX_TTL_S = 365 * 86400.0


@dataclass(slots=True, kw_only=True)
class Taken:
    """What became of one request for tokens from a bucket."""

    wait_s: float  # 0.0: granted; else the seconds until it would be
    remaining: float  # tokens left, after the grant
    reset_s: float  # seconds until the bucket is full again


class Store(Protocol):
    """Shared state. Nothing here raises because the store is away: reads miss, writes are dropped, `take` says None.

    Keys are the names that `core.cache_key` makes. `rate_per_s` and `burst` are positive.
    """

    async def get(self, key: str) -> bytes | None:
        """The value, or None: absent, expired, not a value that `put` wrote, or no answer in time."""

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keep `value` for `ttl_s` seconds. Returns at once; the write is never waited for.

        An empty value is not kept, nor one whose time is over before it begins.
        """

    async def take(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> Taken | None:
        """Take `cost` tokens from the bucket `key` in one atomic step; None when the store did not answer in time.

        Nothing is taken when `wait_s` is not 0. A `cost` above `burst` is never granted. A negative `cost` gives
        tokens back, up to the burst; a debt (from `charge`) shows as a negative `remaining`. After None it is not
        known whether tokens were taken.
        """

    def charge(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> None:
        """Take `cost` tokens whether they are there or not (or give back a negative cost). Returns at once."""

    async def delete(
        self, *, tenant: str | None, model: str | None, digest: str | None, before_wall_s: float | None = None
    ) -> int:
        """Remove cached answers that match all that is given; how many went. With nothing given: every answer.

        `before_wall_s` spares what was stored later; what is no entry goes with the old.
        """

    def state(self) -> str:
        """`ready`, or `unreachable` while its breaker is open."""

    async def start(self) -> None:
        """Begin background work (probes). A store that is away is a warning, never a failed start."""

    async def close(self) -> None:
        """Stop background work and let go of connections; what was written so far still gets a moment to arrive."""
