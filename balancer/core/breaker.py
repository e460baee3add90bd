"""The per-node circuit breaker: closed, open, half-open, driven by our own `now`.

pybreaker holds the state and tells its listeners; counting, timing and probing are ours, because its own clock
cannot be passed in and its half-open state admits everybody.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from random import Random
from typing import Annotated

import pybreaker
from pydantic import Field

# A probe that was never reported frees its place after this long (its request was cancelled, say).
PROBE_LEASE_S = 10.0
# At most one probe a second, so that a sick node is asked and not hammered.
PROBE_INTERVAL_S = 1.0
# While a model has no other node, waiting longer than this only adds refusals.
ALONE_OPEN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """When a node is left alone, and for how long."""

    consecutive_failures: Annotated[int, Field(ge=1)] = 5
    failure_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    min_requests: Annotated[int, Field(ge=1)] = 20  # below this the ratio says nothing
    window_s: Annotated[float, Field(gt=0)] = 10.0
    open_s: Annotated[float, Field(gt=0)] = 3.0  # doubles on each failed probe
    max_open_s: Annotated[float, Field(gt=0)] = 60.0
    # A stream is slow whose first token took so many times longer than predicted; None: slow ones are not counted.
    slow_factor: Annotated[float, Field(gt=1)] | None = None
    slow_ratio: Annotated[float, Field(gt=0, le=1)] = 0.8  # share of slow ones among good and bad within the window


@dataclass(frozen=True, slots=True)
class Opened:
    """The breaker opened; nothing passes for `for_s` seconds."""

    for_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class HalfOpened:
    """The open time is over; one probe at a time may pass."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A probe succeeded."""


Change = Opened | HalfOpened | Closed


@dataclass(frozen=True, slots=True)
class Permit:
    """The right to one attempt; its generation dates it, so that late results cannot move a newer state."""

    generation: int
    probe: bool = False


class Breaker:
    """One node's breaker. Keeps no clock: every call says what time it is."""

    __slots__ = (
        "_consecutive",
        "_generation",
        "_machine",
        "_open_for_s",
        "_open_until_s",
        "_opened_s",
        "_permit",
        "_policy",
        "_probe",
        "_probe_at_s",
        "_probe_lease_s",
        "_rng",
        "_window",
        "is_closed",
    )

    def __init__(self, policy: BreakerPolicy, rng: Random) -> None:
        # fail_max and reset_timeout are out of reach: pybreaker never decides by itself.
        self._machine = pybreaker.CircuitBreaker(fail_max=2**31, reset_timeout=2**31)
        self._policy = policy
        self._rng = rng
        self._generation = 0
        self._permit = Permit(0)
        self._probe: Permit | None = None  # the one that holds the lease
        self._consecutive = 0
        self._window: deque[list[float]] = deque()  # [second, successes, failures, slow successes]
        self._open_for_s = policy.open_s
        self._opened_s = self._open_until_s = 0.0
        self._probe_lease_s = self._probe_at_s = float("-inf")
        self.is_closed = True  # read on every pick

    def __repr__(self) -> str:
        return f"<Breaker {self.state} failures={self._consecutive}>"

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        return str(self._machine.current_state)

    def admits(self, now: float, *, alone: bool = False) -> bool:
        """Whether `try_acquire` would give a permit now; changes nothing."""
        if self.is_closed:
            return True
        return now >= self.admits_from_s(alone=alone)

    def admits_from_s(self, *, alone: bool = False) -> float:
        """The earliest time at which an attempt may pass; -inf when closed."""
        if self.is_closed:
            return float("-inf")
        if self.state == pybreaker.STATE_OPEN:
            return min(self._open_until_s, self._opened_s + ALONE_OPEN_S) if alone else self._open_until_s
        return max(self._probe_lease_s, self._probe_at_s + PROBE_INTERVAL_S)

    def try_acquire(self, now: float, *, alone: bool = False) -> tuple[Permit | None, Change | None]:
        """A permit for one attempt, or None; and the change that asking made (open -> half-open)."""
        if self.is_closed:
            return self._permit, None
        if not self.admits(now, alone=alone):
            return None, None
        change: Change | None = None
        if self.state == pybreaker.STATE_OPEN:
            self._machine.half_open()
            self._next_generation()
            change = HalfOpened()
        self._probe_at_s = now
        self._probe_lease_s = now + PROBE_LEASE_S
        self._probe = Permit(self._generation, probe=True)
        return self._probe, change

    def unguarded(self) -> Permit:
        """A permit outside the breaker's say, for panic: its result counts only while the breaker is closed."""
        return self._permit if self.is_closed else Permit(-1)

    def record(self, permit: Permit, success: bool, now: float, *, slow: bool = False) -> Change | None:
        """Count one result. A result from an older generation is dropped. A probe may be slow: it came back."""
        if permit.generation != self._generation:
            return None
        if permit.probe:
            return self._close() if success else self._open(now, "probe_failed")
        if success:
            self._consecutive = 0
            self._count(now, 1)
            if not slow:
                return None
            self._window[-1][3] += 1
            return self._open(now, "slow_calls") if self._drags(now) else None
        self._consecutive += 1
        self._count(now, 2)
        reason = self._tripped(now)
        return self._open(now, reason) if reason else None

    def release(self, permit: Permit) -> None:
        """Give a permit back without a result: nobody learned anything about the node.

        The next probe still waits for its second. A probe that outlived its lease frees nothing: another holds it.
        """
        if permit is self._probe:
            self._probe_lease_s = float("-inf")

    def nudge(self) -> bool:
        """Other evidence turned good: end the open time early. True when that granted a probe."""
        if self.state != pybreaker.STATE_OPEN:
            return False
        self._open_until_s = float("-inf")
        return True

    def forgive(self, permit: Permit, at_s: float) -> bool:
        """Take back a failure recorded at `at_s` with this permit: it was not the node's. True if that ends a break."""
        second = float(int(at_s))
        for bucket in self._window:
            if bucket[0] == second and bucket[2]:
                bucket[2] -= 1
                break
        if permit.generation == self._generation:
            self._consecutive = max(0, self._consecutive - 1)
            return False
        return permit.generation == self._generation - 1 and self.nudge()

    def recently(self, now: float, *, whole_seconds: bool) -> tuple[int, int]:
        """Results within the window, and how many of them were failures; without this second's if `whole_seconds`."""
        self._expire(now)
        second = float(int(now))
        buckets = [bucket for bucket in self._window if not (whole_seconds and bucket[0] == second)]
        failures = int(sum(bucket[2] for bucket in buckets))
        return int(sum(bucket[1] for bucket in buckets)) + failures, failures

    def _tripped(self, now: float) -> str | None:
        if self._consecutive >= self._policy.consecutive_failures:
            return "consecutive_failures"
        self._expire(now)
        successes = sum(bucket[1] for bucket in self._window)
        failures = sum(bucket[2] for bucket in self._window)
        total = successes + failures
        if total >= self._policy.min_requests and failures >= self._policy.failure_ratio * total:
            return "failure_ratio"
        return None

    def _drags(self, now: float) -> bool:
        self._expire(now)
        total = sum(bucket[1] + bucket[2] for bucket in self._window)
        slow = sum(bucket[3] for bucket in self._window)
        return total >= self._policy.min_requests and slow >= self._policy.slow_ratio * total

    def _count(self, now: float, column: int) -> None:
        second = float(int(now))
        if not self._window or self._window[-1][0] != second:
            self._expire(now)
            self._window.append([second, 0, 0, 0])
        self._window[-1][column] += 1

    def _expire(self, now: float) -> None:
        while self._window and self._window[0][0] <= now - self._policy.window_s - 1.0:
            self._window.popleft()

    def _open(self, now: float, reason: str) -> Opened:
        if reason == "probe_failed":
            self._open_for_s = min(self._policy.max_open_s, self._open_for_s * 2.0)
        else:
            self._open_for_s = self._policy.open_s
        for_s = min(self._policy.max_open_s, self._open_for_s * self._rng.uniform(0.9, 1.1))
        self._opened_s = now
        self._open_until_s = now + for_s
        self._probe_lease_s = self._probe_at_s = float("-inf")
        self._machine.open()
        self.is_closed = False
        self._next_generation()
        return Opened(for_s, reason)

    def _close(self) -> Closed:
        self._machine.close()
        self.is_closed = True
        self._consecutive = 0
        self._window.clear()
        self._open_for_s = self._policy.open_s
        self._next_generation()
        return Closed()

    def _next_generation(self) -> None:
        self._generation += 1
        self._permit = Permit(self._generation)
        self._probe = None
