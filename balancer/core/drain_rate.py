"""How fast a queue drains, as measured, and what that says to those who would join it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Weight that older grants keep at each new one: about the last 20 count.
MEMORY = 0.95
# Fewer grants than this (decayed) predict nothing: nobody is refused on their account.
ENOUGH_GRANTS = 5.0
# What was measured longer ago than this says nothing of now.
STALE_S = 60.0
# A wait that nothing is known of yet: seconds for each request ahead.
PRIOR_GAP_S = 0.1
# `Retry-After` stays within these. A client that stays away for longer than a minute has been told to give up.
LEAST_RETRY_S = 1.0
MOST_RETRY_S = 60.0
# Weights of a shorter and of a longer service than the one kept: it stays near the shortest tenth.
SHORTER_WEIGHT = 0.3
LONGER_WEIGHT = 0.03


@dataclass(slots=True)
class DrainRate:
    """The mean gap between grants while somebody waits, and how long the quicker requests run once granted.

    Time in which nobody waits is no gap. Keeps no clock.
    """

    service_s: float = 0.0
    _grants: float = field(init=False, default=0.0)
    _seconds: float = field(init=False, default=0.0)
    _since_s: float = field(init=False, default=-math.inf)

    def resumed(self, now: float) -> None:
        """Somebody waits again, after nobody did."""
        if now - self._since_s > STALE_S:
            self._grants = self._seconds = 0.0
        self._since_s = now

    def granted(self, now: float) -> None:
        """One of those who waited got a slot."""
        self._seconds = self._seconds * MEMORY + (now - self._since_s)
        self._grants = self._grants * MEMORY + 1.0
        self._since_s = now

    def served(self, seconds: float) -> None:
        """A request that had waited was answered, `seconds` after it got its slot."""
        if self.service_s == 0.0:
            self.service_s = seconds
        else:
            weight = SHORTER_WEIGHT if seconds < self.service_s else LONGER_WEIGHT
            self.service_s += weight * (seconds - self.service_s)

    def gap_s(self, now: float) -> float | None:
        """Seconds between grants; None while too little is known. A longer gap than usual counts as it is."""
        if self._grants < ENOUGH_GRANTS or now - self._since_s > STALE_S:
            return None
        return max(self._seconds / self._grants, (self._seconds + now - self._since_s) / (self._grants + 1.0))

    def wait_s(self, ahead: int, now: float) -> float | None:
        """When a newcomer with `ahead` requests before it would get its slot; None while too little is known."""
        gap_s = self.gap_s(now)
        return None if gap_s is None else (ahead + 1) * gap_s

    def retry_after_s(self, ahead: int, now: float) -> float:
        """When to come back: once those ahead now would have got their slots. Within 1 s and a minute."""
        wait_s = self.wait_s(ahead, now)
        if wait_s is None:
            wait_s = (ahead + 1) * PRIOR_GAP_S
        return min(MOST_RETRY_S, max(LEAST_RETRY_S, wait_s))
