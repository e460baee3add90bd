"""Hedged first tokens: a second attempt beside a slow first one; whichever answers is used, the other is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

from balancer.core.hedge import FirstTokenTimes, HedgePolicy
from balancer.core.outcome import Outcome
from balancer.core.request import InferenceRequest
from balancer.metrics import Metrics
from balancer.settings import ModelRule

# What a task is cancelled with when the other attempt was quicker.
LOST = "hedge_lost"


class Tried(Protocol):
    """An attempt, as far as a race needs to know it."""

    @property
    def outcome(self) -> Outcome: ...

    def lose(self) -> None: ...


A = TypeVar("A", bound=Tried)


class Hedging:
    """Decides which requests are hedged and when, and runs the race."""

    def __init__(self, policy: HedgePolicy, models: Mapping[str, ModelRule], metrics: Metrics) -> None:
        self._metrics = metrics
        self._times = FirstTokenTimes(policy.quantile)
        self.configure(policy, models)

    def configure(self, policy: HedgePolicy, models: Mapping[str, ModelRule]) -> None:
        """New settings; the times that were learned stay."""
        self._policy = policy
        self._models = models
        self._times.quantile = policy.quantile
        self.is_on = policy.enabled or any(rule.hedge for rule in models.values())

    def covers(self, request: InferenceRequest) -> bool:
        """Whether the request may be hedged: a stream that may be sent twice, of a model that has it on."""
        rule = self._models.get(request.model)
        wanted = self._policy.enabled if rule is None or rule.hedge is None else rule.hedge
        return wanted and request.stream and request.replayable

    def delay_s(self, request: InferenceRequest) -> float | None:
        """How long the first attempt has the field to itself; None: not known yet."""
        return self._times.delay_s(request.model, len(request.body))

    def learned(self, request: InferenceRequest, first_token_s: float) -> None:
        """The first token came so many seconds after the request was sent."""
        self._times.learned(request.model, len(request.body), first_token_s)

    async def race(
        self, attempt: Callable[[], Coroutine[Any, Any, A]], delay_s: float, may_hedge: Callable[[], bool]
    ) -> A:
        """One attempt, and after `delay_s` another beside it, if `may_hedge` says so then. The first good one wins.

        With none good the first attempt's failure stands. The loser is cancelled before this returns.
        """
        tasks = [asyncio.ensure_future(attempt())]
        chosen: asyncio.Future[A] | None = None
        reason = None
        try:
            await asyncio.wait(tasks, timeout=delay_s)
            if tasks[0].done() or not may_hedge():
                await asyncio.wait(tasks)
                chosen = tasks[0]
                return chosen.result()
            tasks.append(asyncio.ensure_future(attempt()))
            while pending := [task for task in tasks if not task.done()]:
                await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for won, task in zip(("no", "yes"), tasks, strict=True):
                    if _is_good(task):
                        self._metrics.hedges.of(won).inc()
                        reason = LOST
                        chosen = task
                        return chosen.result()
            self._metrics.hedges.of("no").inc()
            chosen = tasks[1 if tasks[0].exception() else 0]
            return chosen.result()
        finally:
            losers = [task for task in tasks if task is not chosen]
            for task in losers:
                task.cancel(reason)
            try:
                if losers:
                    await asyncio.wait(losers)
            except asyncio.CancelledError:  # nobody gets the one that was chosen
                losers = tasks
                raise
            finally:
                for task in losers:
                    if task.done():
                        _lose(task)
                    else:
                        task.add_done_callback(_lose)


def _lose(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().lose()


def _is_good(task: asyncio.Future[A]) -> bool:
    return task.done() and task.exception() is None and task.result().outcome is Outcome.OK
