"""The KV cache of one simulated engine: shared prefix blocks, private tokens, and what is kept for the next prompt."""

from __future__ import annotations

from collections.abc import Sequence


class KvPool:
    """A fixed number of tokens. Blocks nobody uses stay until room is needed, the least recently used go first."""

    __slots__ = ("_idle", "_users", "block_tokens", "capacity", "used")

    def __init__(self, capacity: int, block_tokens: int) -> None:
        self.capacity = capacity
        self.block_tokens = block_tokens
        self.used = 0  # tokens that running sequences need, shared ones counted once
        self._users: dict[int, int] = {}  # block -> sequences that use it
        self._idle: dict[int, None] = {}  # in the order they will be given up

    def __repr__(self) -> str:
        return f"<KvPool {self.used}/{self.capacity} tokens used, {len(self._idle)} blocks idle>"

    def clone(self) -> KvPool:
        """An independent copy."""
        other = KvPool(self.capacity, self.block_tokens)
        other.used = self.used
        other._users = self._users.copy()
        other._idle = self._idle.copy()
        return other

    @property
    def free(self) -> int:
        """Tokens that can be had, idle blocks included."""
        return self.capacity - self.used

    def matching(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are there."""
        users, idle = self._users, self._idle
        count = 0
        for block in blocks:
            if block not in users and block not in idle:
                break
            count += 1
        return count

    def fits(self, hits: Sequence[int], tokens: int) -> bool:
        """Whether `use(hits)` and `take(tokens)` would stay within the capacity."""
        if self.used + tokens > self.capacity:
            return False
        woken = sum(1 for block in hits if block in self._idle)
        return self.used + tokens + woken * self.block_tokens <= self.capacity

    def use(self, blocks: Sequence[int]) -> None:
        """One more sequence uses these blocks, which are there."""
        users, idle = self._users, self._idle
        for block in blocks:
            if block in users:
                users[block] += 1
            else:
                del idle[block]
                users[block] = 1
                self.used += self.block_tokens

    def take(self, tokens: int) -> None:
        """Lend private tokens; give up idle blocks for them. The caller has looked at `free`."""
        self.used += tokens
        self._evict()

    def give(self, tokens: int) -> None:
        """Private tokens come back."""
        self.used -= tokens

    def publish(self, block: int) -> None:
        """One block's worth of a sequence's private tokens is computed: from now on it may be shared."""
        users = self._users
        if block in users:  # somebody computed the same in the meantime: one copy is enough
            users[block] += 1
            self.used -= self.block_tokens
            return
        self._idle.pop(block, None)
        users[block] = 1

    def leave(self, blocks: Sequence[int]) -> None:
        """A sequence is done with these blocks; their tails will be given up before their heads."""
        users = self._users
        for block in reversed(blocks):
            count = users[block]
            if count == 1:
                del users[block]
                self._idle[block] = None
                self.used -= self.block_tokens
            else:
                users[block] = count - 1

    def clear(self) -> None:
        """The engine restarted."""
        self.used = 0
        self._users.clear()
        self._idle.clear()

    def _evict(self) -> None:
        idle = self._idle
        spare = (self.capacity - self.used) // self.block_tokens
        while idle and len(idle) > spare:
            del idle[next(iter(idle))]
