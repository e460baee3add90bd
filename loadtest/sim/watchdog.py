"""Nodes that stopped moving: the balancer's stall watchdog, as the routing notes define it.

A node is wedged for a balancer when one of its streams there has already produced a token, or its oldest first token
is overdue by more than `stall_s` and twice its predicted prefill; and no byte has come from the node for `stall_s`.
What got no token yet goes elsewhere; streams are broken off; one probe a second finds out when it moves again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from loadtest.sim.scenario import Flight
    from loadtest.sim.world import World


class Watchdog:
    """Looks at all nodes for all balancers."""

    EVERY_S: ClassVar[float] = 0.25
    PROBE_S: ClassVar[float] = 1.0

    def __init__(self, world: World, stall_s: float) -> None:
        self._world = world
        self._stall_s = stall_s
        self._out: list[dict[int, float]] = [{} for _ in world.policies]  # node -> last probe

    def look(self) -> None:
        """Judge every node, and ask those that are out."""
        world = self._world
        for at, engine in enumerate(world.engines):
            if engine.halted and not world.down[at]:
                for balancer in range(len(world.policies)):
                    mine = [flight for flight in world.flights_at(at) if flight.balancer == balancer]
                    if at not in self._out[balancer] and self._wedged(balancer, at, mine):
                        self._take_out(balancer, at, mine)
        for balancer, out in enumerate(self._out):
            for at, probed_s in list(out.items()):
                if world.now - probed_s >= self.PROBE_S:
                    out[at] = world.now
                    if world.answers(at):
                        del out[at]
                        self._choose_eligible(balancer)

    def _wedged(self, balancer: int, at: int, mine: list[Flight]) -> bool:
        """An engine that works sends a byte each step, so silence began when it halted (or when we last sent)."""
        world = self._world
        if world.now - world.halted_s(at) < self._stall_s:
            return False
        for flight in mine:
            if not math.isnan(flight.first_s):
                return True
            assert flight.attempt is not None
            expected_s, own_s = world.policies[balancer].predicted_s(flight.attempt)
            if world.now - flight.attempt.sent_s > expected_s + self._stall_s + 2.0 * own_s:
                return True
        return False

    def _take_out(self, balancer: int, at: int, mine: list[Flight]) -> None:
        self._out[balancer][at] = self._world.now
        self._choose_eligible(balancer)
        for flight in mine:
            if math.isnan(flight.first_s):
                self._world.move(flight)
            else:
                self._world.break_off(flight)

    def _choose_eligible(self, balancer: int) -> None:
        targets = self._world.policies[balancer].targets
        left = tuple(target for target in targets if target.at not in self._out[balancer])
        self._world.eligible[balancer] = left or targets
