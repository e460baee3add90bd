"""How a node is chosen, and what the choice learns from: one face for the scored policies and for predicted cost."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import NamedTuple

from balancer.core import prompt_blocks
from balancer.core.books import OTHERS_DECAY_S, Outstanding, Sent, Work
from balancer.core.cost import Choice, CostPolicy, Explanation, PredictedCost, caution_s
from balancer.core.expectations import Expectations
from balancer.core.health import NodeReport
from balancer.core.node import Node
from balancer.core.outcome import Fault, Outcome
from balancer.core.prefix_index import PrefixIndex
from balancer.core.prompt_blocks import Prompt
from balancer.core.request import BYTES_PER_TOKEN, EXPECTED_OUTPUT_TOKENS, Dialect, InferenceRequest, NodeId, TenantId
from balancer.core.selection import (
    FULL_SCAN,
    Candidates,
    Choose,
    PolicyName,
    RoutingPolicy,
    pick,
    policy_named,
    prefix_first,
    usable,
)
from balancer.core.sharing import MAX_PLACEMENTS, Placement

# Prompt and generated tokens where a node counted them, and of the prompt those that it held, where it says.
Used = tuple[int, int, int | None] | None

# Sessions remembered, the last used; about 300 bytes each.
SESSIONS = 16384
# What others have at nodes that nobody tells of is looked at again this often.
ASSUME_EVERY_S = 1.0
# The request that `prices` are shown for: a page of text, an answer of the usual length.
NOMINAL_PROMPT_TOKENS = 1000.0
# An engine held what was believed of a prompt when it counts at least this share of that as cached: our blocks are
# coarser than its own. Where less than the second share of the prompt was believed to be held, it says nothing.
FOUND_SHARE = 0.5
CHECKED_SHARE = 0.05
# The blocks of a longer prompt are not kept with its record: what was held of it stands there in numbers.
KEPT_BLOCKS = 32


class Pick(NamedTuple):
    """What one pick had before it: kept with the request, so that it can be explained later at no cost now."""

    at_s: float
    policy: PolicyName
    candidates: Candidates
    tried: Collection[NodeId]
    node: NodeId | None  # who got it; None: nobody could
    choice: Choice[Node] | None = None  # predicted cost: all that was looked at
    compared: Sequence[Node] = ()  # other policies: who was looked at, and
    outstanding: Sequence[int] = ()  # our requests in flight at each


class Routing:
    """Picks nodes, and is told what became of the picks. Every `dispatched` is followed by exactly one `ended`.

    One that learns nothing from what it is told has nothing but `pick`.
    """

    def configure(self, policy: RoutingPolicy) -> None:
        """New settings of the same policy; what was learned stays."""

    def pick(self, candidates: Candidates, request: InferenceRequest, now: float, rng: Random) -> Node | None:
        """A candidate that has room and was not tried; None when there is none. `request.picked` says why."""
        raise NotImplementedError

    def dispatched(self, node: Node, request: InferenceRequest, now: float) -> Sent | None:
        """The request goes to the node, in the same step as the pick; None: nothing is kept of it."""
        return None

    def first_token(self, node: Node, sent: Sent | None, now: float) -> None:
        """The first token of a stream came."""

    def ended(
        self, node: Node, sent: Sent | None, request: InferenceRequest, outcome: Outcome, used: Used, now: float
    ) -> None:
        """The attempt is over."""

    def reported(self, node: Node, report: NodeReport, at_s: float, now: float) -> None:
        """An agent's report, true at `at_s`."""

    def forget(self, id_: NodeId) -> None:
        """The node is gone."""

    def take_placements(self) -> Sequence[Placement] | None:
        """The prompts placed since this was last asked, oldest first; None: this routing has nothing to share."""
        return None

    def placed(self, node: Node, blocks: Sequence[int], now: float) -> None:
        """Another balancer sent a prompt with these blocks to the node."""

    def others(self, node: Node, outstanding: Outstanding, now: float) -> None:
        """What the other balancers together have at the node."""

    def prices(self, nodes: Sequence[Node], now: float) -> list[Explanation]:
        """What a nominal request would cost at each node now; empty for a policy that has no prices."""
        return []


class ScoredRouting(Routing):
    """The policies that compare scores and learn nothing of their own."""

    def __init__(self, name: PolicyName, choose: Choose) -> None:
        self._name = name
        self._choose = choose

    def pick(self, candidates: Candidates, request: InferenceRequest, now: float, rng: Random) -> Node | None:
        tried = request.tried
        node, compared = pick(candidates, request, self._choose, tried, now, rng)
        request.picked = _pick_of(self._name, candidates, tried, node, compared, now)
        return node


class PrefixRouting(Routing):
    """Affinity as a rule (`prefix_first`), beside an index of who was sent what."""

    def __init__(self) -> None:
        self._index = PrefixIndex()

    def pick(self, candidates: Candidates, request: InferenceRequest, now: float, rng: Random) -> Node | None:
        tried = request.tried
        blocks = self._blocks(request)
        held = self._index.held(blocks)
        nodes = usable(candidates, tried, rng)
        if held and len(candidates.nodes) > FULL_SCAN:
            holders = [node for node in usable(candidates, tried, rng, sampled=False) if node.id in held]
            nodes = [*holders, *(node for node in nodes if node.id not in held)]
        node = None
        if nodes:
            node = nodes[0] if len(nodes) == 1 else prefix_first(nodes, held, len(blocks), now, rng)
        request.picked = _pick_of("prefix", candidates, tried, node, nodes, now)
        return node

    def dispatched(self, node: Node, request: InferenceRequest, now: float) -> Sent | None:
        self._index.placed(node.id, self._blocks(request), now)
        return None

    def reported(self, node: Node, report: NodeReport, at_s: float, now: float) -> None:
        capacity = report.kv_capacity_tokens
        if capacity is not None and math.isfinite(capacity):
            self._index.resize(node.id, capacity * BYTES_PER_TOKEN / prompt_blocks.BLOCK_BYTES)

    def forget(self, id_: NodeId) -> None:
        self._index.forget(id_)

    @staticmethod
    def _blocks(request: InferenceRequest) -> tuple[int, ...]:
        if request.prompt is None:
            request.prompt = prompt_blocks.read(request.parsed, len(request.body), request.model)
        return request.prompt.blocks


def _pick_of(
    name: PolicyName,
    candidates: Candidates,
    tried: Collection[NodeId],
    node: Node | None,
    compared: Sequence[Node],
    now: float,
) -> Pick:
    return Pick(
        now,
        name,
        candidates,
        tuple(tried),
        node.id if node is not None else None,
        None,
        compared,
        [each.load.rif for each in compared],
    )


class Sessions:
    """Which node served a tenant's session last; the least recently used are forgotten."""

    def __init__(self, limit: int = SESSIONS) -> None:
        self._limit = limit
        self._nodes: OrderedDict[tuple[TenantId, str], NodeId] = OrderedDict()

    def __len__(self) -> int:
        """Sessions remembered."""
        return len(self._nodes)

    def last(self, tenant: TenantId, session: str) -> NodeId | None:
        """The node of its last request."""
        return self._nodes.get((tenant, session))

    def went(self, tenant: TenantId, session: str, node: NodeId) -> None:
        """Its newest request goes there."""
        key = (tenant, session)
        self._nodes[key] = node
        self._nodes.move_to_end(key)
        if len(self._nodes) > self._limit:
            self._nodes.popitem(last=False)


class PredictedRouting(Routing):
    """Least predicted cost: what the books, the prefix index and the expectations say together."""

    def __init__(self, policy: CostPolicy | None = None) -> None:
        self._policy = policy or CostPolicy()
        self._index = PrefixIndex()
        self._cost: PredictedCost[Node] = PredictedCost(self._index, self._policy)
        self._expectations = Expectations()
        self._placements: deque[Placement] | None = None  # since they were last asked for; None: never yet
        self._sessions = Sessions()
        self._fleet: dict[NodeId, Node] = {}  # nodes that something was sent to, or heard of
        self._assumed_s = -math.inf

    def configure(self, policy: RoutingPolicy) -> None:
        self._policy = self._cost.policy = policy.cost

    def pick(self, candidates: Candidates, request: InferenceRequest, now: float, rng: Random) -> Node | None:
        tried = request.tried
        usable = (lambda node: node.has_room() and node.id not in tried) if tried or candidates.bounded else None
        work = request.work or self._work(request, alone=candidates.serving == 1)
        special = candidates.cautious or request.wishes.session is not None or request.tenant.prefer
        further = self._further(candidates, request, now) if special else None
        choice = self._cost.choose(candidates.nodes, work, now, rng, usable, further, weighted=candidates.uneven)
        if choice is None:
            request.picked = Pick(now, "predicted_cost", candidates, tuple(tried), None)
            return None
        if len(work.blocks) > KEPT_BLOCKS:
            choice = choice._replace(work=work._replace(blocks=()))
        node = choice.node
        request.held_blocks = choice.held_blocks
        request.picked = Pick(now, "predicted_cost", candidates, tuple(tried) if tried else (), node.id, choice)
        return node

    def dispatched(self, node: Node, request: InferenceRequest, now: float) -> Sent | None:
        work = request.work or self._work(request)
        if work.blocks:
            self._index.placed(node.id, work.blocks, now)
            if self._placements is not None:
                self._placements.append((node.id, work.blocks))
        if request.wishes.session is not None:
            self._sessions.went(request.tenant.id, request.wishes.session, node.id)
        self._fleet[node.id] = node
        return node.books.dispatched(work, request.held_blocks, now)

    def first_token(self, node: Node, sent: Sent | None, now: float) -> None:
        if sent is not None:
            node.books.first_token(sent, now)

    def ended(
        self, node: Node, sent: Sent | None, request: InferenceRequest, outcome: Outcome, used: Used, now: float
    ) -> None:
        if sent is None:
            return
        if outcome is Outcome.OK:
            prompt_tokens, output_tokens, cached_tokens = used or (None, None, None)
            if request.endpoint.dialect is Dialect.ANTHROPIC:
                cached_tokens = None  # its `input_tokens` leave out what was cached, its imitators' do not
            if cached_tokens is not None and prompt_tokens:
                cached_tokens = min(max(0, cached_tokens), prompt_tokens)
                self._check_held(node.id, sent, cached_tokens / prompt_tokens)
            node.books.finished(sent, now, output_tokens, prompt_tokens, cached_tokens)
            if used is not None:
                self._expectations.learned(request.model, _measure(request.prompt), prompt_tokens, output_tokens)
        elif outcome.ruling.fault is Fault.NODE:
            node.books.failed(sent, now)
        else:
            node.books.cancelled(sent, now)

    def reported(self, node: Node, report: NodeReport, at_s: float, now: float) -> None:
        self._fleet[node.id] = node
        if node.books.reported(report, at_s, now):
            self._index.forget(node.id)
        capacity = report.kv_capacity_tokens
        if capacity is not None and math.isfinite(capacity):
            ratio = self._expectations.bytes_per_token(report.models[0] if report.models else "")
            self._index.resize(node.id, capacity * ratio / prompt_blocks.BLOCK_BYTES)
        if now - self._assumed_s >= ASSUME_EVERY_S:
            self._assumed_s = now
            self._assume_others(now)

    def forget(self, id_: NodeId) -> None:
        self._index.forget(id_)
        self._fleet.pop(id_, None)

    def take_placements(self) -> Sequence[Placement] | None:
        placements, self._placements = self._placements, deque(maxlen=MAX_PLACEMENTS)
        return placements or ()

    def placed(self, node: Node, blocks: Sequence[int], now: float) -> None:
        self._index.placed(node.id, blocks, now)

    def others(self, node: Node, outstanding: Outstanding, now: float) -> None:
        node.books.shared(outstanding, now)

    def blocks_at(self, id_: NodeId) -> int:
        """How many blocks of prompts a node is believed to hold."""
        return self._index.blocks_of(id_)

    def prices(self, nodes: Sequence[Node], now: float) -> list[Explanation]:
        work = Work(prompt_tokens=NOMINAL_PROMPT_TOKENS, expected_output=float(EXPECTED_OUTPUT_TOKENS))
        return self._cost.explain(nodes, work, now, {"slow_start": lambda node: self._caution_s(node, now)})

    def _work(self, request: InferenceRequest, *, alone: bool = False) -> Work:
        """What the request asks of a node. Where only one node serves its model nobody needs to know what is in it."""
        if alone:
            prompt = Prompt(size_bytes=len(request.body))
        else:
            prompt = request.prompt = prompt_blocks.read(request.parsed, len(request.body), request.model)
        work = request.work = self._expectations.work(
            request.model,
            prompt,
            request.asked_tokens(),
            generates=request.endpoint.samples,
            streams=request.stream,
        )
        return work

    def _further(
        self, candidates: Candidates, request: InferenceRequest, now: float
    ) -> dict[str, Callable[[Node], float]]:
        """Prices that only some requests or moments have."""
        prices: dict[str, Callable[[Node], float]] = {}
        if candidates.cautious:
            prices["slow_start"] = lambda node: self._caution_s(node, now)
        if request.wishes.session is not None:
            last = self._sessions.last(request.tenant.id, request.wishes.session)
            if last is not None:
                price_s = self._policy.session
                prices["session"] = lambda node: 0.0 if node.id == last else price_s
        if request.tenant.prefer:
            prices["labels"] = lambda node: self._labels_s(node, request)
        return prices

    def _caution_s(self, node: Node, now: float) -> float:
        return caution_s(node.share(now) / node.weight, node.load.rif, self._policy)

    def _labels_s(self, node: Node, request: InferenceRequest) -> float:
        labels = node.config.labels
        return self._policy.label * sum(labels.get(name) != value for name, value in request.tenant.prefer)

    def _check_held(self, id_: NodeId, sent: Sent, cached_ratio: float) -> None:
        """What the engine says it held of a prompt, beside what was believed."""
        believed = 1.0 - sent.uncached_ratio
        if believed >= CHECKED_SHARE:
            self._index.checked(id_, found=cached_ratio >= FOUND_SHARE * believed)

    def _assume_others(self, now: float) -> None:
        """Nodes that nobody tells of are taken to carry as much of others as those that somebody does tell of."""
        everywhere = [node.books for node in self._fleet.values()]
        told = [books for books in everywhere if books.others_age_s(now) <= OTHERS_DECAY_S]
        silent = [books for books in everywhere if books.others_age_s(now) > OTHERS_DECAY_S]
        if not told or not silent:
            return
        known = [books.others_now(now) for books in told]
        typical = Outstanding(
            tokens=sum(each.tokens for each in known) / len(known),
            context=sum(each.context for each in known) / len(known),
            requests=sum(each.requests for each in known) / len(known),
        )
        for books in silent:
            books.assumed(typical, now)


def _measure(prompt: Prompt | None) -> float | None:
    """The bytes of a prompt whose tokens are text alone; of another they say nothing about bytes per token."""
    if prompt is None or prompt.attachments or prompt.token_ids is not None:
        return None
    return prompt.size_bytes


def routing_of(policy: RoutingPolicy) -> Routing:
    """The routing that the settings ask for, with its own fresh state."""
    if policy.policy == "predicted_cost":
        return PredictedRouting(policy.cost)
    if policy.policy == "prefix":
        return PrefixRouting()
    return ScoredRouting(policy.policy, policy_named(policy.policy))
