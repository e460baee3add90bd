"""What a balancer could do that knew everything: true KV content, true output lengths, exact engine state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from loadtest.sim.arrival import Arrival
from loadtest.sim.engine import NEVER_S, Engine
from loadtest.sim.forecast import finish_s
from loadtest.sim.policies import Policy, Target


class Oracle(Policy):
    """Greedy on the simulated finish: the request goes where a copy of the engine would be done with it first.

    It does not weigh what it does to others: it bounds what knowing buys, not what planning would.
    """

    def __init__(
        self,
        name: str,
        targets: Sequence[Target],
        rng: Random,
        engines: Sequence[Engine],
        answers: Callable[[int], bool],
    ) -> None:
        super().__init__(name, targets, rng)
        self._engines = engines
        self._answers = answers

    def choose(self, arrival: Arrival, among: Sequence[Target], now: float) -> tuple[Target, int]:
        best, best_s = None, NEVER_S
        # The least busy first: then most of the others are given up early.
        for target in sorted(among, key=lambda target: len(self._engines[target.at].running)):
            if self._answers(target.at):
                end_s = finish_s(self._engines[target.at], arrival, now, best_s)
                if end_s < best_s:
                    best, best_s = target, end_s
        return (best or self.rng.choice(among)), 0
