"""Whether a failed attempt is followed by another, and after how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Annotated

from pydantic import Field

from balancer.core.outcome import Again, Outcome
from balancer.core.poison import VERDICT_S
from balancer.core.retry_budget import RetryBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a failed attempt may be followed by another."""

    max_attempts: Annotated[int, Field(ge=1)] = 3
    base_s: Annotated[float, Field(ge=0)] = 0.05  # first back-off; doubles each time
    max_s: Annotated[float, Field(ge=0)] = 2.0
    budget_ratio: Annotated[float, Field(ge=0, le=1)] = 0.2  # retries per success, fleet-wide
    min_retries_per_s: Annotated[float, Field(ge=0)] = 10.0  # so a quiet service can still retry
    verdict_s: Annotated[float, Field(ge=0)] = VERDICT_S  # equal requests are refused after one that broke its nodes


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after `after_s` seconds."""

    after_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The last outcome stands; `reason` says why there is no other try."""

    reason: str


@dataclass(slots=True)
class RetryPlan:
    """The retries of one request. Owns its count of attempts; shares the fleet's budget."""

    policy: RetryPolicy
    budget: RetryBudget
    rng: Random
    deadline_s: float
    counted: int = field(init=False, default=0)  # attempts that used up one of `max_attempts`

    def next(self, outcome: Outcome, now: float, *, replayable: bool = True) -> Retry | GiveUp:
        """The answer to one failed attempt. `replayable`: whether its request may be sent a second time."""
        again = outcome.ruling.again
        if again is Again.NEVER:
            return GiveUp("final")
        if not replayable:
            return GiveUp("not_replayable")
        if again is Again.FREE:
            return Retry(0.0) if now < self.deadline_s else GiveUp("deadline")
        if again is Again.ELSEWHERE:
            return self._paid(0.0, now)
        self.counted += 1
        if self.counted >= self.policy.max_attempts:
            return GiveUp("max_attempts")
        return self._paid(self._backoff_s(), now)

    def _paid(self, after_s: float, now: float) -> Retry | GiveUp:
        if now + after_s >= self.deadline_s:
            return GiveUp("deadline")
        return Retry(after_s) if self.budget.try_spend(now) else GiveUp("budget")

    def _backoff_s(self) -> float:
        """Exponential, half of it jitter, so that the victims of one death do not arrive together."""
        full_s = min(self.policy.max_s, self.policy.base_s * 2.0 ** (self.counted - 1))
        return full_s * self.rng.uniform(0.5, 1.0)
