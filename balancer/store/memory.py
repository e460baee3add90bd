"""The store in this process: the default without Redis, the rate limits' fallback, and the tests' store."""

from __future__ import annotations

from collections import OrderedDict

from balancer.clock import Clock
from balancer.core.cache_entry import is_older
from balancer.core.cache_key import answer_matcher
from balancer.core.token_bucket import TokenBucket
from balancer.store import MAX_TTL_S, Taken

# What an entry costs beyond its key and value (measured: 220 to 250): object headers, expiry, share of the table.
ENTRY_OVERHEAD_BYTES = 256
# Buckets looked at on each call, so that idle ones go without a timer; more than one, so that they go faster than
# they come.
SWEPT_PER_CALL = 2


class MemoryStore:
    """Answers up to `max_bytes`, the least recently used go first; and every bucket that is not full."""

    def __init__(self, max_bytes: int, clock: Clock) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # value, expires at
        self._bytes = 0
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __repr__(self) -> str:
        return f"<MemoryStore entries={len(self._entries)} bytes={self._bytes} buckets={len(self._buckets)}>"

    @property
    def size_bytes(self) -> int:
        """What the entries take, overhead included."""
        return self._bytes

    @property
    def buckets(self) -> int:
        """How many buckets are kept; full ones need not be."""
        return len(self._buckets)

    async def get(self, key: str) -> bytes | None:
        """The value, or None: absent or expired."""
        return self.peek(key)

    def peek(self, key: str) -> bytes | None:
        """`get` without waiting."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, expires_s = entry
        if self._clock.now() >= expires_s:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return value

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keep `value` for `ttl_s` seconds, or until room is needed. One that cannot fit only removes the old one."""
        if key in self._entries:
            self._drop(key)
        size = _size(key, value)
        if not value or not ttl_s > 0 or size > self._max_bytes:
            return
        self._entries[key] = (value, self._clock.now() + min(ttl_s, MAX_TTL_S))
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    async def take(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> Taken | None:
        """Take `cost` tokens from the bucket `key`; never None here."""
        now = self._clock.now()
        bucket = self._bucket(key, rate_per_s, burst, now)
        wait_s = 0.0
        if cost > 0:
            wait_s = bucket.try_take(cost, now)
        else:
            bucket.charge(cost, now)
        taken = Taken(wait_s=wait_s, remaining=bucket.remaining(now), reset_s=bucket.reset_s(now))
        self._sweep(now)
        return taken

    def charge(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> None:
        """Take `cost` tokens whether they are there or not, or give some back."""
        now = self._clock.now()
        self._bucket(key, rate_per_s, burst, now).charge(cost, now)
        self._sweep(now)

    async def delete(
        self, *, tenant: str | None, model: str | None, digest: str | None, before_wall_s: float | None = None
    ) -> int:
        """Remove the answers that match all that is given; how many went."""
        matches = answer_matcher(tenant, model, digest)
        going = [key for key, (value, _) in self._entries.items() if matches(key) and is_older(value, before_wall_s)]
        for key in going:
            self._drop(key)
        return len(going)

    def state(self) -> str:
        """Always `ready`."""
        return "ready"

    async def start(self) -> None:
        """Nothing to begin."""

    async def close(self) -> None:
        """Nothing to end."""

    def _drop(self, key: str) -> None:
        value, _ = self._entries.pop(key)
        self._bytes -= _size(key, value)

    def _bucket(self, key: str, rate_per_s: float, burst: float, now: float) -> TokenBucket:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(rate_per_s, burst)
        elif bucket.rate_per_s != rate_per_s or bucket.burst != burst:
            bucket.remaining(now)  # what was earned at the old rate stays earned
            bucket.rate_per_s, bucket.burst = rate_per_s, burst
            bucket.charge(0.0, now)  # no more than the new burst
        return bucket

    def _sweep(self, now: float) -> None:
        for _ in range(min(SWEPT_PER_CALL, len(self._buckets))):
            key, bucket = next(iter(self._buckets.items()))
            if bucket.remaining(now) >= bucket.burst:
                del self._buckets[key]
            else:
                self._buckets.move_to_end(key)


def _size(key: str, value: bytes) -> int:
    return len(key) + len(value) + ENTRY_OVERHEAD_BYTES
