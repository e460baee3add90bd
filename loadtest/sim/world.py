"""Virtual time: arrivals, engines' stages, deadlines, faults and the balancers' own timers, in one order."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from random import Random

from loadtest.sim.arrival import Arrival
from loadtest.sim.engine import NEVER_S, Engine
from loadtest.sim.policies import Attempt, Policy, Target
from loadtest.sim.predicted import Predicted, share
from loadtest.sim.reports import Agent
from loadtest.sim.results import End, Figures, Tally, figures
from loadtest.sim.scenario import Event, Flight, Scenario
from loadtest.sim.sequence import Sequence as Running
from loadtest.sim.troubles import Troubles
from loadtest.sim.watchdog import Watchdog

# How long a refused connection and a fast 500 take.
REFUSED_S = 0.001
FAST_500_S = 0.005
PROGRESS_EVERY = 2000


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
        self._open = 0
        self._deadlines: deque[tuple[float, Flight]] = deque()
        self._troubles = Troubles(self)
        self.watchdog = None if scenario.stall_s is None else Watchdog(self, scenario.stall_s)

    def answers(self, at: int) -> bool:
        """Whether a node takes a request and works on it."""
        return not (self.down[at] or self.failing[at] or self.engines[at].halted)

    def halted_s(self, at: int) -> float:
        """Since when a node has not moved; infinite while it does."""
        return self._troubles.halted_s[at] if self.engines[at].halted else math.inf

    def forget_flights(self, at: int) -> list[Flight]:
        """The requests at a node whose engine lost them."""
        lost = self.flights_at(at)
        self._flights[at].clear()
        for flight in lost:
            flight.sequence = None
        return lost

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
        return figures(self.policies[0].name, self.tally, self.engines, max(last_arrival_s, 1e-9))

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
            self.schedule(at)

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

    def fail(self, flight: Flight) -> None:
        """The node failed it before a first token: another try, if there is one."""
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
            self.schedule(at)
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

    def schedule(self, at: int) -> None:
        """See to it that the stage under way at a node will end."""
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
                self.fail(what)
        elif event is Event.FAULT or event is Event.MEND or event is Event.IDLE:
            self._troubles.happen(event, what)
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
        self.schedule(at)

    def _start(self) -> None:
        scenario = self.scenario
        self._troubles.announce(scenario.faults)
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
