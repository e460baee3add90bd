"""Rate arithmetic: what may pass now, and when the rest may."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenBucket:
    """Tokens refilled at a steady rate. Keeps no clock: every call says what time it is."""

    rate_per_s: float
    burst: float
    _tokens: float = field(init=False)
    _updated_s: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        self._tokens = self.burst

    def try_take(self, cost: float, now: float) -> float:
        """Take `cost` tokens; return 0.0, or the seconds until they would be there."""
        self._refill(now)
        if cost <= self._tokens:
            self._tokens -= cost
            return 0.0
        return (cost - self._tokens) / self.rate_per_s

    def charge(self, cost: float, now: float) -> None:
        """Take `cost` tokens that are already spent (or give some back); the balance may fall below zero."""
        self._refill(now)
        self._tokens = min(self.burst, self._tokens - cost)

    def remaining(self, now: float) -> float:
        """Tokens there now; negative while a debt is paid off."""
        self._refill(now)
        return self._tokens

    def reset_s(self, now: float) -> float:
        """Seconds until the bucket is full again."""
        self._refill(now)
        return (self.burst - self._tokens) / self.rate_per_s

    def _refill(self, now: float) -> None:
        if now > self._updated_s:
            if self._tokens < self.burst:
                self._tokens = min(self.burst, self._tokens + (now - self._updated_s) * self.rate_per_s)
            self._updated_s = now
