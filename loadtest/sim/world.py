"""Virtual time: arrivals, engines' stages, deadlines, faults and the balancers' own timers, in one order."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from random import Random

from loadtest.sim.arrival import Arrival
from loadtest.sim.engine import NEVER_S, Engine, Sequence as Running
from loadtest.sim.fleet import Fault
from loadtest.sim.policies import Attempt, Policy, Target
from loadtest.sim.predicted import Predicted, share
from loadtest.sim.profiles import EngineProfile
from loadtest.sim.reports import Agent
from loadtest.sim.results import End, Figures, Slo, Tally, three, variation
from loadtest.sim.watchdog import Watchdog

# How long a refused connection and a fast 500 take.
REFUSED_S = 0.001
FAST_500_S = 0.005
# A stream without a byte for so long is broken off (the balancer's idle limit).
IDLE_S = 30.0
PROGRESS_EVERY = 2000


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


PolicyFactory = Callable[[Sequence[Target], Random, "World"], Policy]


class World:
    """One run. `run()` ends when every request has ended."""

    def __init__(self, scenario: Scenario, policy: PolicyFactory) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.rng = Random(scenario.seed)
        self.engines = [Engine(profile) for profile in scenario.fleet]
        self.down = [False] * len(self.engines)
        self.failing = [False] * len(self.engines)
        self.halted_s = [math.nan] * len(self.engines)
        self.policies: list[Policy] = []
        for number in range(scenario.balancers):
            rng = Random(scenario.seed * 1009 + number)
            targets = [
                Target(at, profile.max_sequences, profile.kv_tokens, rng) for at, profile in enumerate(scenario.fleet)
            ]
            self.policies.append(policy(targets, rng, self))
        self.eligible: list[Sequence[Target]] = [chosen.targets for chosen in self.policies]
        self.tally = Tally(scenario.slo)
        self.agents = [Agent(at, engine) for at, engine in enumerate(self.engines)]
        self._heap: list[tuple[float, int, Event, object]] = []
        self._order = 0
        self._scheduled = [NEVER_S] * len(self.engines)
        self._flights: list[dict[Running, Flight]] = [{} for _ in self.engines]
        self._failing_now = 0
        self._open = 0
        self._deadlines: deque[tuple[float, Flight]] = deque()
        self.watchdog = None if scenario.stall_s is None else Watchdog(self, scenario.stall_s)

    def answers(self, at: int) -> bool:
        """Whether a node takes a request and works on it."""
        return not (self.down[at] or self.failing[at] or self.engines[at].halted)

    def flights_at(self, at: int) -> list[Flight]:
        """The requests at one node."""
        return list(self._flights[at].values())

    def push(self, at_s: float, event: Event, what: object) -> None:
        """Something to happen."""
        self._order += 1
        heapq.heappush(self._heap, (at_s, self._order, event, what))

    def run(self, arrivals: Sequence[Arrival], progress: Callable[[int], None] | None = None) -> Figures:
        """Play the arrivals, which are in the order of their times; every one of them ends."""
        scenario, heap, deadlines = self.scenario, self._heap, self._deadlines
        self._start()
        count, following = len(arrivals), 0
        many = len(self.policies)
        last_arrival_s = arrivals[-1].at_s if arrivals else 0.0
        while following < count or self._open:
            arrival_s = arrivals[following].at_s if following < count else NEVER_S
            while deadlines and not deadlines[0][1].open:
                deadlines.popleft()
            deadline_s = deadlines[0][0] if deadlines else NEVER_S
            event_s = heap[0][0] if heap else NEVER_S
            if event_s <= arrival_s and event_s <= deadline_s:
                self.now, _, event, what = heapq.heappop(heap)
                self._happen(event, what)
            elif arrival_s <= deadline_s:
                self.now = arrival_s
                balancer = self.rng.randrange(many) if many > 1 else 0
                flight = Flight(arrivals[following], balancer)
                following += 1
                self._open += 1
                deadlines.append((arrival_s + scenario.deadline_s, flight))
                self.dispatch(flight)
                if progress is not None and following % PROGRESS_EVERY == 0:
                    progress(following)
            else:
                self.now, flight = deadlines.popleft()
                if flight.open and math.isnan(flight.first_s):
                    self._leave(flight)
                    self._end(flight, End.TIMEOUT)
        return self._figures(max(last_arrival_s, 1e-9))

    # -- a request's life

    def dispatch(self, flight: Flight) -> None:
        """Choose a node and send the request there."""
        now, policy = self.now, self.policies[flight.balancer]
        among = self.eligible[flight.balancer]
        if flight.tried:
            among = [target for target in among if target.at not in flight.tried]
        if not among:
            self._end(flight, End.FAILED)
            return
        target, held_blocks = policy.choose(flight.arrival, among, now)
        flight.tries += 1
        attempt = flight.attempt = Attempt(flight.arrival, target, held_blocks, now)
        policy.dispatched(attempt, now)
        at = target.at
        if self.down[at] or self.failing[at]:
            self.push(now + (REFUSED_S if self.down[at] else FAST_500_S), Event.FAIL, flight)
        elif not self.engines[at].accepts(flight.arrival):
            policy.cancelled(attempt, now)
            self._end(flight, End.REJECTED)
        else:
            sequence = flight.sequence = Running(self._order, flight.arrival)
            self._flights[at][sequence] = flight
            self.engines[at].submit(sequence, now)
            self._schedule(at)

    def move(self, flight: Flight) -> None:
        """Take a request that got nothing yet away from a node that does not move; it does not count as a try."""
        assert flight.attempt is not None
        self.policies[flight.balancer].failed(flight.attempt, self.now)
        flight.tried.add(flight.attempt.target.at)
        self._detach(flight)
        self.dispatch(flight)

    def break_off(self, flight: Flight) -> None:
        """End a stream in the middle: its node moves no more."""
        assert flight.attempt is not None
        self.policies[flight.balancer].failed(flight.attempt, self.now)
        self._detach(flight)
        self._end(flight, End.BROKEN)

    def _fail(self, flight: Flight) -> None:
        assert flight.attempt is not None
        self.policies[flight.balancer].failed(flight.attempt, self.now)
        flight.tried.add(flight.attempt.target.at)
        flight.attempt = None
        flight.sequence = None
        if flight.tries < self.scenario.attempts:
            self.dispatch(flight)
        else:
            self._end(flight, End.FAILED)

    def _leave(self, flight: Flight) -> None:
        if flight.attempt is not None:
            self.policies[flight.balancer].cancelled(flight.attempt, self.now)
            self._detach(flight)

    def _detach(self, flight: Flight) -> None:
        assert flight.attempt is not None
        at, sequence = flight.attempt.target.at, flight.sequence
        if sequence is not None:
            del self._flights[at][sequence]
            self.engines[at].cancel(sequence, self.now)
            self._schedule(at)
        flight.attempt = None
        flight.sequence = None

    def _end(self, flight: Flight, end: End) -> None:
        assert flight.open, "a request ends once"
        flight.open = False
        self._open -= 1
        if end is End.DONE:
            arrival = flight.arrival
            ttft_s, e2e_s = flight.first_s - arrival.at_s, self.now - arrival.at_s
            self.tally.done(arrival.prompt_tokens, arrival.output_tokens, ttft_s, e2e_s)
        else:
            self.tally.lost(end, self.scenario.deadline_s)

    # -- events

    def _schedule(self, at: int) -> None:
        end_s = self.engines[at].stage_end_s
        if end_s != self._scheduled[at]:
            self._scheduled[at] = end_s
            if end_s < NEVER_S:
                self.push(end_s, Event.STAGE, at)

    def _happen(self, event: Event, what: object) -> None:
        if event is Event.STAGE:
            assert isinstance(what, int)
            if self.engines[what].stage_end_s == self.now:
                self._stage(what)
        elif event is Event.FAIL:
            assert isinstance(what, Flight)
            if what.open:
                self._fail(what)
        elif event is Event.FAULT or event is Event.MEND:
            assert isinstance(what, Fault)
            (self._befall if event is Event.FAULT else self._mend)(what)
        elif event is Event.IDLE:
            assert isinstance(what, int)
            if self.engines[what].halted:
                for flight in self.flights_at(what):
                    if not math.isnan(flight.first_s):
                        self.break_off(flight)
        elif event is Event.REPORT:
            self._report()
        elif event is Event.SHARE:
            assert self.scenario.share_s is not None
            share([policy for policy in self.policies if isinstance(policy, Predicted)], self.now)
            self.push(self.now + self.scenario.share_s, Event.SHARE, None)
        elif event is Event.WATCH:
            assert self.watchdog is not None
            self.watchdog.look()
            self.push(self.now + self.watchdog.EVERY_S, Event.WATCH, None)

    def _stage(self, at: int) -> None:
        now, flights, policies = self.now, self._flights[at], self.policies
        firsts, done = self.engines[at].end_stage()
        for sequence in firsts:
            flight = flights[sequence]
            flight.first_s = now
            assert flight.attempt is not None
            policies[flight.balancer].first_token(flight.attempt, now)
        for sequence in done:
            flight = flights.pop(sequence)
            assert flight.attempt is not None
            policies[flight.balancer].finished(flight.attempt, now)
            self.agents[at].answered(now - flight.attempt.sent_s)
            self._end(flight, End.DONE)
        self._schedule(at)

    def _start(self) -> None:
        scenario = self.scenario
        for fault in scenario.faults:
            self.push(fault.from_s, Event.FAULT, fault)
            if fault.until_s < math.inf:
                self.push(fault.until_s, Event.MEND, fault)
        if scenario.report_s is not None:
            self.push(0.0, Event.REPORT, None)
        if len(self.policies) > 1 and scenario.share_s is not None:
            for policy in self.policies:
                if isinstance(policy, Predicted):
                    policy.shares = True
            self.push(scenario.share_s, Event.SHARE, None)
        if self.watchdog is not None:
            self.push(self.watchdog.EVERY_S, Event.WATCH, None)

    def _report(self) -> None:
        assert self.scenario.report_s is not None
        for agent in self.agents:
            if not self.down[agent.at]:
                report = agent.report()
                for policy in self.policies:
                    if self.scenario.agents or not isinstance(policy, Predicted):
                        policy.reported(policy.targets[agent.at], report, self.now)
        self.push(self.now + self.scenario.report_s, Event.REPORT, None)

    def _befall(self, fault: Fault) -> None:
        at = fault.node
        engine = self.engines[at]
        if fault.kind == "slow":
            engine.slow = fault.factor
        elif fault.kind == "hang":
            engine.halt()
            self.halted_s[at] = self.now
            self.push(self.now + IDLE_S, Event.IDLE, at)
        else:
            if fault.kind == "crash":
                self.down[at] = True
                self.agents[at].restarted()
            else:
                self.failing[at] = True
            lost = self.flights_at(at)
            engine.crash()
            self._flights[at].clear()
            for flight in lost:
                flight.sequence = None
                if math.isnan(flight.first_s):
                    self._fail(flight)
                else:
                    self.break_off(flight)
        self._schedule(at)

    def _mend(self, fault: Fault) -> None:
        at = fault.node
        if fault.kind == "slow":
            self.engines[at].slow = 1.0
        else:
            self.down[at] = self.failing[at] = False
            self.engines[at].resume(self.now)
        self._schedule(at)

    def _figures(self, length_s: float) -> Figures:
        tally, engines = self.tally, self.engines
        requests = sum(tally.ends)
        total = max(1, requests)
        prompts = sum(engine.prompt_tokens for engine in engines)
        return Figures(
            policy=self.policies[0].name,
            requests=requests,
            ttft_s=three(tally.ttft_s),
            e2e_s=three(tally.e2e_s),
            tpot_s=three(tally.tpot_s),
            timeout_ratio=tally.ends[End.TIMEOUT] / total,
            error_ratio=(tally.ends[End.FAILED] + tally.ends[End.BROKEN] + tally.ends[End.REJECTED]) / total,
            slo_ratio=tally.good / total,
            goodput_per_s=tally.good / length_s,
            hit_ratio=sum(engine.hit_tokens for engine in engines) / max(1, prompts),
            imbalance=variation([engine.busy_s for engine in engines]),
            preemptions=sum(engine.preemptions for engine in engines),
            ends=tuple(tally.ends),
        )
