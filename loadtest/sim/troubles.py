"""What befalls nodes: slow, hung, crashed, failing fast; and their mending."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loadtest.sim.fleet import Fault
from loadtest.sim.scenario import Event

if TYPE_CHECKING:
    from loadtest.sim.world import World

# A stream without a byte for so long is broken off (the balancer's idle limit).
IDLE_S = 30.0


class Troubles:
    """Brings the faults of a scenario about."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.halted_s = [math.inf] * len(world.engines)

    def announce(self, faults: Sequence[Fault]) -> None:
        """They will happen."""
        for fault in faults:
            self._world.push(fault.from_s, Event.FAULT, fault)
            if fault.until_s < math.inf:
                self._world.push(fault.until_s, Event.MEND, fault)

    def happen(self, event: Event, what: object) -> None:
        """One of our events."""
        if isinstance(what, Fault):
            (self._befall if event is Event.FAULT else self._mend)(what)
            self._world.schedule(what.node)
        elif isinstance(what, int) and self._world.engines[what].halted:
            for flight in self._world.flights_at(what):
                if not math.isnan(flight.first_s):
                    self._world.break_off(flight)

    def _befall(self, fault: Fault) -> None:
        world, at = self._world, fault.node
        engine = world.engines[at]
        if fault.kind == "slow":
            engine.slow = fault.factor
            return
        if fault.kind == "fail":
            world.failing[at] = True
            return
        self.halted_s[at] = world.now
        if fault.kind == "hang":
            engine.halt()
            world.push(world.now + IDLE_S, Event.IDLE, at)
            return
        world.down[at] = True
        world.agents[at].restarted()
        engine.crash()
        for flight in world.forget_flights(at):
            if math.isnan(flight.first_s):
                world.fail(flight)
            else:
                world.break_off(flight)

    def _mend(self, fault: Fault) -> None:
        world, at = self._world, fault.node
        if fault.kind == "slow":
            world.engines[at].slow = 1.0
        elif fault.kind == "fail":
            world.failing[at] = False
        else:
            world.down[at] = False
            world.engines[at].resume(world.now)
