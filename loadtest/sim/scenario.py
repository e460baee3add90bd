"""What a run is made of, apart from its traffic and its policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from balancer.core.cost import CostPolicy
from loadtest.sim.arrival import Arrival
from loadtest.sim.fleet import Fault
from loadtest.sim.policies import Attempt
from loadtest.sim.profiles import EngineProfile
from loadtest.sim.results import Slo
from loadtest.sim.sequence import Sequence as Running


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything about a run but the traffic and the policy. Intervals of None: never."""

    fleet: Sequence[EngineProfile]
    faults: Sequence[Fault] = ()
    deadline_s: float = 30.0  # to the first token
    slo: Slo = field(default_factory=Slo)
    balancers: int = 1
    share_s: float | None = 0.2  # between balancers, of what they sent where
    report_s: float | None = 5.0  # of agents, for the policies that live on them; predicted_cost: see `agents`
    agents: bool = False  # whether predicted_cost gets the reports as well
    stall_s: float | None = None  # watchdog on nodes that stopped moving
    attempts: int = 1  # tries before a first token
    cost: CostPolicy = field(default_factory=CostPolicy)  # predicted_cost's weights
    seed: int = 1


class Event(IntEnum):
    """What the heap holds."""

    STAGE = 0
    FAIL = 1
    FAULT = 2
    MEND = 3
    IDLE = 4
    REPORT = 5
    SHARE = 6
    WATCH = 7


class Flight:
    """One request on its way."""

    __slots__ = ("arrival", "attempt", "balancer", "first_s", "open", "sequence", "tried", "tries")

    def __init__(self, arrival: Arrival, balancer: int) -> None:
        self.arrival = arrival
        self.balancer = balancer
        self.open = True
        self.first_s = math.nan
        self.tries = 0
        self.tried: set[int] = set()
        self.attempt: Attempt | None = None
        self.sequence: Running | None = None
