"""The key-value cache of a simulated engine: blocks in use, and blocks kept for the next equal prompt head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """A fixed number of blocks. Keyed ones are shared between prompts; unused keyed ones stay until room is needed.

    `strict=False` lends more than there is, for engines that never make anybody wait.
    """

    def __init__(self, capacity: int, *, strict: bool = True) -> None:
        self.capacity = capacity
        self._strict = strict
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0

    def __repr__(self) -> str:
        return f"<BlockPool {self.used}/{self.capacity} used, {len(self._idle)} idle>"

    @property
    def used(self) -> int:
        """Blocks that running sequences need."""
        return len(self._holders) + self._private

    @property
    def usage_ratio(self) -> float:
        """Share of the blocks in use, 0..1."""
        return min(1.0, self.used / self.capacity)

    def matching(self, keys: Iterable[int]) -> int:
        """How many leading keys are held already."""
        count = 0
        for key in keys:
            if key not in self._holders and key not in self._idle:
                break
            count += 1
        return count

    def can_hold(self, keys: Sequence[int], fresh: int) -> bool:
        """Whether `hold(keys)` and then `take(fresh)` would succeed."""
        woken = sum(key in self._idle for key in keys)
        return not self._strict or self.used + woken + fresh <= self.capacity

    def hold(self, keys: Iterable[int]) -> None:
        """Share keyed blocks that are there."""
        for key in keys:
            self._idle.pop(key, None)
            self._holders[key] = self._holders.get(key, 0) + 1

    def take(self, count: int) -> bool:
        """Lend `count` private blocks; False, and nothing lent, when they are not there."""
        if self._strict and self.used + count > self.capacity:
            return False
        self._private += count
        self._evict()
        return True

    def give_back(self, keys: Iterable[int], private: int) -> None:
        """End a sequence's hold on keyed blocks, which stay as idle ones, and free its private ones."""
        self._private -= private
        for key in keys:
            self._holders[key] -= 1
            if not self._holders[key]:
                del self._holders[key]
                self._idle[key] = None
                self._idle.move_to_end(key)

    def publish(self, keys: Iterable[int]) -> None:
        """Turn as many private blocks of a sequence as there are keys into shared ones, which it goes on holding."""
        for key in keys:
            self._private -= 1
            self.hold((key,))

    def remember(self, keys: Iterable[int]) -> None:
        """Keep blocks of a finished answer for a next turn, as far as there is room."""
        for key in keys:
            if key not in self._holders:
                self._idle[key] = None
                self._idle.move_to_end(key)
        self._evict()

    def _evict(self) -> None:
        while self._idle and self.used + len(self._idle) > self.capacity:
            self._idle.popitem(last=False)
