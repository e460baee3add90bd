"""The live fleet: the only writer of Node, and the keeper of who may be asked for which model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any

from balancer.core.breaker import Breaker, BreakerPolicy, Change, Closed, HalfOpened, Opened, Permit
from balancer.core.health import HealthPolicy, HealthState, HostReport, NodeReport, Verdict, assess
from balancer.core.node import ANY_MODEL, NODE_STATES, Node, NodeConfig
from balancer.core.outcome import Outcome
from balancer.core.outlier import FORGIVEN, Ejection, Member, OutlierPolicy, eject_s, judge
from balancer.core.request import NodeId
from balancer.core.selection import Candidates, RoutingPolicy, sift
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.settings import node_id

# A node that says 429 or 503 without a Retry-After rests this long; with one, for what it says, up to the second.
DEFAULT_REST_S = 1.0
MAX_REST_S = 3600.0
# Models remembered because a node answered for them; nodes without a list may answer to any name.
VOUCHED_MODELS = 1024

NO_COMPARISON = OutlierPolicy(enabled=False)

log = get_logger()


class Registry:
    """Every node with its state. Anything that changes who is eligible goes through here and drops what was kept."""

    def __init__(
        self,
        *,
        routing: RoutingPolicy,
        breaker: BreakerPolicy,
        health: HealthPolicy,
        outlier: OutlierPolicy = NO_COMPARISON,
        stale_s: float,
        metrics: Metrics,
        now: Callable[[], float],
        rng: Random,
    ) -> None:
        self._routing = routing
        self._breaker_policy = breaker
        self._health_policy = health
        self._outlier_policy = outlier
        self._compared_s = now()
        self._stale_s = stale_s
        self._metrics = metrics
        self._now = now
        self._rng = rng
        self._nodes: dict[NodeId, Node] = {}
        self._candidates: dict[str, Candidates] = {}
        self._vouched: dict[str, None] = {}  # models that some node answered for, oldest first
        self._listeners: list[Callable[[], None]] = []
        self.on_report: Callable[[Node, NodeReport, float, float], None] | None = None
        self.on_gone: Callable[[NodeId], None] | None = None
        self.started_s = now()
        self.slow_factor = breaker.slow_factor  # times its prediction a first token may take; None: any
        self.listed_models: frozenset[str] = frozenset()  # that some node serves: they may be metrics' labels
        self.is_bounded = False  # some node has a limit of requests in flight
        self._adaptive = True
        self._register_gauges()

    def __repr__(self) -> str:
        return f"<Registry {' '.join(map(repr, self._nodes.values()))}>"

    def configure(self, routing: RoutingPolicy, outlier: OutlierPolicy, *, adaptive: bool) -> None:
        """New settings; `adaptive`: nodes get no more requests than they show that they can take."""
        self._routing = routing
        self._outlier_policy = outlier
        self._adaptive = adaptive
        for node in self._nodes.values():
            node.relimit(adaptive=adaptive)
            if not outlier.enabled:
                node.ejected_until_s = min(node.ejected_until_s, self._now())
        self.touch()

    # -- who is there

    @property
    def nodes(self) -> Mapping[NodeId, Node]:
        """All nodes by id."""
        return self._nodes

    def put(self, config: NodeConfig, *, at_run_time: bool = False) -> Node:
        """Add a node, or replace one of the same id.

        At the same URL its evidence and its requests stay with it. At another URL it is another server: only the
        operator's drain stays, and what runs at the old one ends there.
        """
        id_ = NodeId(node_id(config))
        old = self._nodes.get(id_)
        if old is not None and old.config.url == config.url:
            old.config = config
            old.models = frozenset(config.models) or None
            old.weight = config.weight
            old.relimit(adaptive=self._adaptive)
            old.added_at_run_time = at_run_time
            self.touch()
            return old
        if old is not None and self.on_gone is not None:
            self.on_gone(id_)
        node = Node(config, id_, Breaker(self._breaker_policy, self._rng))
        node.added_at_run_time = at_run_time
        node.drained_by_operator = old is not None and old.drained_by_operator
        if self._now() - self.started_s > 1.0:
            node.ramp_from_s = self._now()  # a newcomer among warm nodes
        self._nodes[id_] = node
        log.info("node.added", node=id_, url=config.url)
        self.touch()
        return node

    def remove(self, id_: NodeId) -> Node | None:
        """Forget a node; what runs there ends by itself."""
        node = self._nodes.pop(id_, None)
        if node is not None:
            self._metrics.attempts.forget("node", id_)
            if self.on_gone is not None:
                self.on_gone(id_)
            log.info("node.removed", node=id_)
            self.touch()
        return node

    def replace_all(self, configs: Iterable[NodeConfig]) -> None:
        """Make the fleet what the settings say, keeping the state of nodes that stay, and nodes added at run time."""
        wanted = {NodeId(node_id(config)): config for config in configs}
        for node in list(self._nodes.values()):
            if node.id not in wanted and not node.added_at_run_time:
                self.remove(node.id)
        for config in wanted.values():
            self.put(config)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever who is eligible may have changed: waiting requests look again."""
        self._listeners.append(listener)

    # -- who may be asked

    def candidates(self, model: str, now: float) -> Candidates:
        """The nodes that may be asked for `model` now; worked out anew only when evidence changed."""
        kept = self._candidates.get(model)
        if kept is not None and now < kept.until_s:
            return kept
        found = sift(self.serving(model), self._routing, now)
        if len(self._candidates) > 1024:
            self._candidates.clear()
        self._candidates[model] = found
        return found

    def serving(self, model: str) -> list[Node]:
        """Nodes whose list has the model; while a list is unknown its node stands in for models nobody lists."""
        known = [node for node in self._nodes.values() if node.serves(model)]
        return known or [node for node in self._nodes.values() if node.serves(model) is None]

    def vouches_for(self, model: str) -> bool:
        """Whether the model is real as far as is known: some node lists it, or has answered for it."""
        return model in self._vouched or model in self.listed_models

    def _vouch(self, model: str) -> None:
        if len(self._vouched) >= VOUCHED_MODELS:
            del self._vouched[next(iter(self._vouched))]
        self._vouched[model] = None

    def model_unknown(self, model: str) -> bool:
        """True when every node's list is known and lacks the model."""
        return bool(self._nodes) and all(node.serves(model) is False for node in self._nodes.values())

    def models(self) -> dict[str, list[Node]]:
        """Every listed model with the nodes that serve it."""
        listed: dict[str, list[Node]] = {}
        for node in self._nodes.values():
            for model in node.known_models or ():
                if model != "*":
                    listed.setdefault(model, []).append(node)
        return listed

    def ready(self, now: float) -> str | None:
        """None when a node is eligible by evidence, else the reason why not (`/readyz`)."""
        if not self._nodes:
            return "no nodes are configured"
        for node in self._nodes.values():
            waiting = not node.judged and now - self.started_s < 5.0
            if node.is_sound and node.breaker.is_closed and node.ejected_until_s <= now and (node.judged or waiting):
                return None
        return "no node is eligible by evidence"

    # -- evidence, each kind on its own

    def drain(self, id_: NodeId, *, drained: bool) -> Node | None:
        """The operator's word."""
        node = self._nodes.get(id_)
        if node is not None and node.drained_by_operator != drained:
            node.drained_by_operator = drained
            if not drained:
                node.ramp_from_s = self._now()
            log.info("node.drained" if drained else "node.undrained", node=id_, by="operator")
            self.touch()
        return node

    def observe(self, node: Node, host: HostReport, report: NodeReport, now: float) -> None:
        """What the agent measured."""
        previous = node.health
        node.report = report
        node.report_at_s = now - host.age_s
        node.load.picks_since_report = 0
        counters = (report.generation_tokens_total, report.uncached_prompt_tokens_total)
        if counters != node.counters:
            if node.counters != (None, None):
                node.moved_s = node.report_at_s
            node.counters = counters
        if report.running is not None:
            others = node.books.others_now(now).requests
            node.drift = node.load.rif - max(0.0, report.running + (report.queue_depth or 0.0) - others)
        if self.on_report is not None:
            self.on_report(node, report, node.report_at_s, now)
        node.concurrency.report(report, node.load.rif)
        self._relimit(node)
        node.health = assess(report, previous, self._health_policy, now)
        if host.drain != node.drained_by_agent:
            node.drained_by_agent = host.drain
            if not host.drain:
                node.ramp_from_s = now
            log.info("node.drained" if host.drain else "node.undrained", node=node.id, by="agent")
            self.touch()
        if node.health.verdict is not previous.verdict:
            if previous.verdict is Verdict.OUT:
                self._recovered(node, now)
            log.info("node.judged", node=node.id, verdict=node.health.verdict.value, reasons=list(node.health.reasons))
            self.touch()

    def lose_report(self, node: Node, now: float) -> None:
        """The agent has been silent too long: unknown, which is not down."""
        if node.report is not None and now - node.report_at_s > self._stale_s:
            log.warning("agent.lost", node=node.id, age_s=round(now - node.report_at_s, 1))
            node.report = None
            node.concurrency.forget_report()
            node.relimit(adaptive=self._adaptive)
            node.drift = None
            node.drained_by_agent = False
            if node.health.verdict is Verdict.OUT:
                self._recovered(node, now)
            node.health = HealthState()
            self.touch()

    def checked(self, node: Node, up: bool | None, reason: str, now: float) -> None:
        """The verdict of active checks, after `fall` and `rise`."""
        node.check_reason = reason
        if up == node.check_up:
            return
        was = node.check_up
        node.check_up = up
        if up and was is False:
            log.info("node.recovered", node=node.id)
            self._recovered(node, now)
        elif up is False:
            log.warning("node.lost", node=node.id, reason=reason)
        self.touch()

    def listed(self, node: Node, models: frozenset[str] | None) -> None:
        """The answer to GET /v1/models; None: it has no such list and takes any model."""
        new = ANY_MODEL if models is None else models
        if new != node.listed_models:
            node.listed_models = new
            log.info("node.listed_models", node=node.id, models=sorted(new))
            self.touch()

    def engine_told(self, node: Node, engine: str | None) -> None:
        """What the answer to GET /v1/models says of the engine."""
        if engine != node.listed_engine:
            node.listed_engine = engine
            log.info("node.engine_told", node=node.id, engine=engine)
            self._tell()

    def blocked(self, node: Node, for_s: float | None, status: int, now: float) -> None:
        """The node pushed back: leave it alone for its Retry-After, and cut its weight for a while."""
        node.blocked_until_s = now + min(MAX_REST_S, DEFAULT_REST_S if for_s is None else for_s)
        node.blocked_by = status
        node.cut_s = now
        node.concurrency.pushed_back(node.load.rif, now)
        node.relimit(adaptive=self._adaptive)
        self.touch()

    def wedged(self, node: Node, reason: str, now: float) -> None:
        """The watchdog found that nothing moves there: out, until it answers a probe."""
        node.wedged_since_s = now
        node.wedged_by = reason
        log.warning(
            "node.wedged",
            node=node.id,
            reason=reason,
            silent_s=round(now - node.heard_s, 1) if node.heard_s > 0.0 else None,
            in_flight=node.load.rif,
        )
        self.touch()

    def unwedged(self, node: Node, now: float) -> None:
        """It moves again."""
        assert node.wedged_since_s is not None
        log.info("node.unwedged", node=node.id, after_s=round(now - node.wedged_since_s, 1))
        node.wedged_since_s = None
        self._recovered(node, now)
        self.touch()

    def compare(self, now: float) -> None:
        """Once a second: who is worse than its peers is ejected, who has been out long enough comes back."""
        policy = self._outlier_policy
        keep = math.exp(-max(0.0, now - self._compared_s) / policy.window_s)
        self._compared_s = now
        groups: dict[frozenset[str] | None, list[Node]] = {}
        for node in self._nodes.values():
            groups.setdefault(node.known_models, []).append(node)
            if node.ejections:
                self._let_back(node, policy, now)
        if not policy.enabled:
            return
        for group in groups.values():
            members = [self._member(node, now) for node in group]
            for ejection in judge(members, policy):
                self._eject(group[ejection.at], ejection, now)
            for node in group:
                node.tally.fade(keep)

    def _member(self, node: Node, now: float) -> Member:
        ejected = node.ejected_until_s > now
        eligible = node.is_sound and not ejected and node.breaker.is_closed
        return Member(tally=node.tally, eligible=eligible, ejected=ejected, ejections=node.ejections)

    def _eject(self, node: Node, ejection: Ejection, now: float) -> None:
        node.ejected_until_s = now + ejection.for_s
        node.ejected_by = ejection.reason
        node.ejections += 1
        node.tally.clear()
        log.warning(
            "node.ejected",
            node=node.id,
            reason=ejection.reason,
            value=round(ejection.value, 3),
            others=round(ejection.others, 3),
            for_s=ejection.for_s,
        )
        self.touch()

    def _let_back(self, node: Node, policy: OutlierPolicy, now: float) -> None:
        if node.ejected_by and node.ejected_until_s <= now:
            node.ejected_by = ""
            node.ramp_from_s = now
            node.tally.clear()
            log.info("node.readmitted", node=node.id, ejections=node.ejections)
            self.touch()
        elif now - node.ejected_until_s > FORGIVEN * eject_s(policy, node.ejections - 1):
            node.ejections = 0

    def true_up(self, now: float) -> None:
        """Once a second: take off what is counted in flight and stands for no attempt."""
        for node in self._nodes.values():
            leaked = node.leak.look(node.load.rif - len(node.live), now)
            if leaked:
                node.load.rif -= leaked
                log.error("node.count_repaired", node=node.id, requests=leaked)
                self._tell()

    # -- what requests met

    def first_token(self, node: Node, ttft_s: float, prompt_tokens: float, now: float) -> None:
        """The first token of a stream came: the node's limit hears how long that took."""
        if node.concurrency.first_token(ttft_s, prompt_tokens, node.load.rif, now):
            self._relimit(node)

    def _relimit(self, node: Node) -> None:
        """What a node can take may have changed. That it is limited at all is evidence like any other."""
        was = node.limit
        if node.relimit(adaptive=self._adaptive):
            if math.isinf(was) or math.isinf(node.limit):
                self.touch()
            elif node.limit > was:
                self._tell()

    def acquire(self, node: Node, *, panic: bool, now: float) -> Permit | None:
        """Count one more request at the node and get its breaker's permit, in one step; None when it just closed."""
        breaker = node.breaker
        if breaker.is_closed:
            permit: Permit | None = breaker.unguarded()
        else:
            permit, change = breaker.try_acquire(now, alone=True)
            if permit is None and panic:
                permit = breaker.unguarded()
            self._changed(node, change)
            self.touch()
        if permit is not None:
            node.load.begin()
        return permit

    def give_back(self, node: Node, permit: Permit) -> None:
        """A permit that was not used."""
        node.load.end()
        node.breaker.release(permit)
        self._tell()

    def settle(
        self, node: Node, permit: Permit, outcome: Outcome, now: float, model: str = "", *, slow: bool = False
    ) -> None:
        """One attempt is over: its slot is free, and its outcome counts for what it says about the node.

        `slow`: its first token took far longer than predicted.
        """
        if outcome is Outcome.OK and model not in self._vouched:
            self._vouch(model)
        node.load.end()
        ruling = outcome.ruling
        if ruling.breaker:
            node.tally.good += 1.0
        elif ruling.breaker is False and outcome is not Outcome.WEDGED:  # it is out for that already
            node.tally.bad += 1.0
        if ruling.breaker is None:
            node.breaker.release(permit)
        elif ruling.breaker:
            node.answered_s = now
            node.load.succeeded(now)
            if not node.breaker.is_closed:
                change = node.breaker.record(permit, True, now)
                if isinstance(change, Closed):
                    self._recovered(node, now)
                self._changed(node, change)
            elif slow:
                self._changed(node, node.breaker.record(permit, True, now, slow=True))
            else:
                node.breaker.record(permit, True, now)
        else:
            self._changed(node, node.breaker.record(permit, False, now))
        if ruling.failure_price:
            node.load.failed(now)
        if node.limit < math.inf:
            if outcome is Outcome.OK and node.concurrency.succeeded(node.load.rif, now):
                self._relimit(node)
            if node.load.rif + 1 >= node.limit:  # it was full
                self._tell()

    def forgive(self, node: Node, permit: Permit, at_s: float) -> None:
        """A failure that was counted for the node at `at_s` was the request's own."""
        node.load.forgive()
        node.books.forgive()
        node.tally.bad = max(0.0, node.tally.bad - 1.0)
        if node.breaker.forgive(permit, at_s):
            self.touch()

    def touch(self) -> None:
        """Evidence changed: who is eligible is worked out anew."""
        self._candidates.clear()
        self.listed_models = frozenset(model for node in self._nodes.values() for model in node.known_models or ())
        self.is_bounded = any(node.limit < math.inf for node in self._nodes.values())
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _recovered(self, node: Node, now: float) -> None:
        node.ramp_from_s = now
        node.concurrency.forget_trouble()
        node.relimit(adaptive=self._adaptive)
        node.load.failure = 0.0  # what it did before says nothing of what it is now
        node.tally.clear()
        node.books.recovered()
        node.breaker.nudge()

    def _changed(self, node: Node, change: Change | None) -> None:
        if change is None:
            return
        if isinstance(change, Opened):
            log.warning("breaker.opened", node=node.id, reason=change.reason, for_s=round(change.for_s, 2))
        elif isinstance(change, HalfOpened):
            log.info("breaker.half_opened", node=node.id)
        else:
            log.info("breaker.closed", node=node.id)
        self.touch()

    # -- for people

    def describe(self, node: Node, now: float) -> dict[str, Any]:
        """One node as the admin API shows it."""
        ejected = node.ejected_until_s > now
        by_evidence = node.is_sound and not ejected and node.breaker.admits(now)
        by_panic = not by_evidence and any(kept.panic and node in kept.nodes for kept in self._candidates.values())
        return {
            "id": node.id,
            "url": node.config.url,
            "weight": node.config.weight,
            "max_in_flight": node.config.max_in_flight,
            "limit": None if math.isinf(node.limit) else int(node.limit),
            "engine": node.engine,
            "models": sorted(node.known_models) if node.known_models is not None else None,
            "state": node.state(now),
            "eligible": "evidence" if by_evidence else "panic" if by_panic else None,
            "admin": {"drained_by_operator": node.drained_by_operator, "drained_by_agent": node.drained_by_agent},
            "health": {"verdict": node.health.verdict.value, "reasons": list(node.health.reasons)},
            "check": {"up": node.check_up, "reason": node.check_reason},
            "wedged": {"by": node.wedged_by, "for_s": round(now - node.wedged_since_s, 3)}
            if node.wedged_since_s is not None
            else None,
            "ejected": {"by": node.ejected_by, "for_s": round(node.ejected_until_s - now, 3)} if ejected else None,
            "breaker": node.breaker.state,
            "load": {
                "requests_in_flight": node.load.rif,
                "ttft_s": round(node.load.ttft_s, 6),
                "itl_s": round(node.load.itl_s, 6),
                "failure": round(node.load.failure_now(now), 4),
            },
            "share": round(node.share(now), 4),
            "blocked_for_s": round(max(0.0, node.blocked_until_s - now), 3),
            "report": dict(node.report.raw) if node.report else None,
            "report_age_s": round(now - node.report_at_s, 3) if node.report else None,
        }

    def _register_gauges(self) -> None:
        breaker_values = {"closed": 0.0, "half-open": 1.0, "open": 2.0}
        nodes = self._nodes
        metrics = self._metrics
        metrics.node_requests_in_flight.read = lambda: [((n.id,), float(n.load.rif)) for n in nodes.values()]
        metrics.node_limit.read = lambda: [((n.id,), n.limit) for n in nodes.values() if n.limit < math.inf]
        metrics.node_cost.read = lambda: [((n.id,), n.books.backlog_s(self._now())) for n in nodes.values()]
        metrics.breaker_state.read = lambda: [((n.id,), breaker_values[n.breaker.state]) for n in nodes.values()]
        metrics.report_age.read = lambda: [
            ((n.id,), self._now() - n.report_at_s) for n in nodes.values() if n.report is not None
        ]
        metrics.node_drift.read = lambda: [((n.id,), n.drift) for n in nodes.values() if n.drift is not None]
        metrics.node_state.read = lambda: [
            ((n.id, state), float(n.state(self._now()) == state)) for n in nodes.values() for state in NODE_STATES
        ]
