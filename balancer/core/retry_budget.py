"""How many retries the fleet can afford now."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

# The budget looks back this far: long enough to ride out a node's death, short enough to forget a good hour.
WINDOW_S = 10.0


@dataclass(slots=True)
class RetryBudget:
    """Retries allowed over the last ten seconds: a floor per second plus a share of the requests that succeeded.

    Nothing is earned while everything fails, so a failing fleet is not asked twice for everything.
    """

    ratio: float
    min_per_s: float
    _buckets: deque[list[float]] = field(init=False, default_factory=deque)  # [second, successes, retries]
    _successes: float = field(init=False, default=0.0)
    _spent: float = field(init=False, default=0.0)

    def succeeded(self, now: float) -> None:
        """A request was answered well."""
        self._bucket(now)[1] += 1
        self._successes += 1

    def try_spend(self, now: float) -> bool:
        """Take one retry from the budget; False when there is none left."""
        bucket = self._bucket(now)
        if self._spent + 1 > self.allowed():
            return False
        bucket[2] += 1
        self._spent += 1
        return True

    def allowed(self) -> float:
        """Retries that the window allows in all, as of the last call."""
        return self.min_per_s * WINDOW_S + self.ratio * self._successes

    def _bucket(self, now: float) -> list[float]:
        buckets = self._buckets
        second = float(int(now))
        if buckets and buckets[-1][0] == second:
            return buckets[-1]
        while buckets and buckets[0][0] <= now - WINDOW_S - 1.0:  # what came at the end of its second counts in full
            _, successes, spent = buckets.popleft()
            self._successes -= successes
            self._spent -= spent
        buckets.append([second, 0.0, 0.0])
        return buckets[-1]
