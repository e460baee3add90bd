"""A node: one inference server and the GPUs it runs on; what we select."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from balancer.core.books import Books
from balancer.core.breaker import Breaker
from balancer.core.concurrency import Concurrency
from balancer.core.health import HealthState, NodeReport, Verdict
from balancer.core.load import Leak, Load
from balancer.core.outlier import Tally
from balancer.core.request import NodeId
from balancer.core.wedge import UnderWay

# After joining or recovering a node's share grows from RAMP_FLOOR to all of it over this many seconds.
RAMP_S = 10.0
RAMP_FLOOR = 0.1
# A node that pushed back keeps this share of its weight, and has all of it again after CUT_S.
CUT_FLOOR = 0.5
CUT_S = 10.0


def plain_url(url: str) -> str:
    """`url`, if a node or an agent may have it. Raises ValueError: a user or a query has no meaning there."""
    parts = urlsplit(url)
    good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    if not good or "@" in parts.netloc or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", url):
        raise ValueError("must be http(s)://HOST[:PORT][/PATH], without a user or a query")
    return url


Url = Annotated[str, AfterValidator(plain_url)]
# Kinds of inference server, by the names that agents use; `other` is none that we know.
EngineName = Literal["vllm", "sglang", "tgi", "llamacpp", "triton", "trtllm", "ollama", "other"]
# It goes into a response header, into logs and into metrics.
Id = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """A node as the operator names it."""

    url: Url
    id: Id | None = None
    agent: Url | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    models: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    api_key: str | None = None
    api_key_file: str | None = None
    engine: EngineName | None = None


ANY_MODEL: frozenset[str] = frozenset({"*"})  # a node without a model list: it takes what it is sent


@dataclass(slots=True, eq=False)
class Node:
    """The live state of one node. The registry is its only writer, apart from `load` and `breaker`."""

    config: NodeConfig
    id: NodeId
    breaker: Breaker
    load: Load = field(default_factory=Load)
    drained_by_operator: bool = False
    drained_by_agent: bool = False
    added_at_run_time: bool = False  # by the admin API: a reload leaves it alone
    listed_models: frozenset[str] | None = None  # from GET /v1/models; None: not heard yet
    listed_engine: str | None = None  # what the same answer says of the engine
    health: HealthState = field(default_factory=HealthState)
    report: NodeReport | None = None
    report_at_s: float = 0.0  # when what the report says was true
    check_up: bool | None = None  # active checks: None before the first
    check_reason: str = ""
    answered_s: float = float("-inf")  # last good answer: stands in for an active check
    blocked_until_s: float = float("-inf")  # its own Retry-After
    blocked_by: int = 0  # the status it said so with
    cut_s: float = float("-inf")  # when it last pushed back
    ramp_from_s: float = float("-inf")  # when it joined or recovered
    books: Books = field(default_factory=Books)
    concurrency: Concurrency = field(default_factory=Concurrency)
    limit: float = math.inf  # requests in flight; the registry keeps it up to date
    live: set[UnderWay] = field(default_factory=set)  # attempts that have not ended
    heard_s: float = float("-inf")  # a body's byte came; later ones stand with the attempts under way
    counters: tuple[float | None, float | None] = (None, None)  # the engine's: tokens generated, prompt tokens read
    moved_s: float = float("-inf")  # when they last did
    wedged_since_s: float | None = None
    wedged_by: str = ""
    tally: Tally = field(default_factory=Tally)
    ejected_until_s: float = float("-inf")  # worse than its peers
    ejected_by: str = ""
    ejections: int = 0  # in a row
    leak: Leak = field(default_factory=Leak)
    drift: float | None = None  # our requests less the engine's own count, when its agent last reported
    models: frozenset[str] | None = field(init=False)
    weight: float = field(init=False)

    def __post_init__(self) -> None:
        self.models = frozenset(self.config.models) or None
        self.weight = self.config.weight
        self.relimit(adaptive=True)

    def relimit(self, *, adaptive: bool) -> bool:
        """Work out `limit` anew: what is configured, and if `adaptive` what it can take; whether it changed."""
        configured = self.config.max_in_flight
        limit = math.inf if configured is None else float(configured)
        if adaptive:
            limit = min(limit, self.concurrency.limit)
        changed = limit != self.limit
        self.limit = limit
        return changed

    def __repr__(self) -> str:
        return f"<Node {self.id} {self.state(self.answered_s)} rif={self.load.rif} breaker={self.breaker.state}>"

    @property
    def known_models(self) -> frozenset[str] | None:
        """What it serves: as configured, else as it listed; None while nobody knows."""
        return self.models if self.models is not None else self.listed_models

    @property
    def engine(self) -> str | None:
        """What kind of inference server it is: as configured, else as its agent or its model list say."""
        reported = self.report.engine if self.report is not None else None
        return self.config.engine or reported or self.listed_engine

    def serves(self, model: str) -> bool | None:
        """Whether it serves `model`; None while nobody knows."""
        known = self.known_models
        return None if known is None else (model in known or "*" in known)

    @property
    def drained(self) -> bool:
        """Asked to take nothing new, by whom ever."""
        return self.drained_by_operator or self.drained_by_agent

    @property
    def known_down(self) -> bool:
        """Active checks or its agent say that nothing answers there."""
        return self.check_up is False or self.health.verdict is Verdict.OUT

    @property
    def is_wedged(self) -> bool:
        """Work was in flight there and nothing moved; until it answers a probe."""
        return self.wedged_since_s is not None

    @property
    def is_sound(self) -> bool:
        """Neither drained nor known to be of no use now; what its breaker says is another question."""
        return not (self.drained or self.known_down or self.is_wedged)

    @property
    def judged(self) -> bool:
        """Whether any evidence about it has come in yet."""
        return self.check_up is not None or self.report is not None or self.answered_s > float("-inf")

    def has_room(self) -> bool:
        """Whether one more request may be sent to it."""
        return self.load.rif < self.limit

    def share(self, now: float) -> float:
        """Its weight as it counts now: slow start, recent back-pressure and degraded health taken off."""
        share = self.weight * self.health.weight
        since_ramp_s = now - self.ramp_from_s
        if since_ramp_s < RAMP_S:
            share *= RAMP_FLOOR + (1.0 - RAMP_FLOOR) * max(0.0, since_ramp_s) / RAMP_S
        since_cut_s = now - self.cut_s
        if since_cut_s < CUT_S:
            share *= CUT_FLOOR + (1.0 - CUT_FLOOR) * since_cut_s / CUT_S
        return share

    def state(self, now: float) -> str:
        """One word for people and for the metric, the gravest of NODE_STATES that holds."""
        if self.drained:
            return "drained"
        if self.check_up is False:
            return "down"
        if self.health.verdict is Verdict.OUT:
            return "out"
        if self.is_wedged:
            return "wedged"
        if not self.breaker.is_closed:
            return self.breaker.state
        if self.ejected_until_s > now:
            return "ejected"
        if self.blocked_until_s > now:
            return "blocked"
        return "degraded" if self.health.verdict is Verdict.DEGRADED else "ready"


NODE_STATES = ("ready", "degraded", "blocked", "ejected", "open", "half-open", "wedged", "out", "down", "drained")
