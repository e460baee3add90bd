"""How a node is chosen, and what the choice learns from: one face for the scored policies and for predicted cost."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Protocol

from balancer.core import prompt_blocks
from balancer.core.books import Outstanding, Sent, Work
from balancer.core.cost import CostPolicy, PredictedCost, caution_s
from balancer.core.expectations import Expectations
from balancer.core.health import NodeReport
from balancer.core.node import Node
from balancer.core.outcome import Fault, Outcome
from balancer.core.prefix_index import PrefixIndex
from balancer.core.prompt_blocks import Prompt
from balancer.core.request import InferenceRequest, NodeId
from balancer.core.selection import Candidates, Choose, RoutingPolicy, pick, policy_named
from balancer.core.sharing import MAX_PLACEMENTS, Placement

# Prompt and generated tokens, where a node counted them.
Used = tuple[int, int] | None


class Routing(Protocol):
    """Picks nodes, and is told what became of the picks. Every `dispatched` is followed by exactly one `ended`."""

    def pick(self, candidates: Candidates, request: InferenceRequest, now: float, rng: Random) -> Node | None:
        """A candidate that has room and was not tried; None when there is none."""

    def dispatched(self, node: Node, request: InferenceRequest, now: float) -> Sent | None:
        """The request goes to the node, in the same step as the pick."""

    def first_token(self, node: Node, sent: Sent | None, now: float) -> None:
        """The first token of a stream came."""

    def ended(
        self,
        node: Node,
        sent: Sent | None,
        request: InferenceRequest,
        outcome: Outcome,
        used: tuple[int, int] | None,
        now: float,
    ) -> None:
        """The attempt is over."""

    def reported(self, node: Node, report: NodeReport, at_s: float, now: float) -> None:
        """An agent's report, true at `at_s`."""

    def forget(self, id_: NodeId) -> None:
        """The node is gone."""

    def take_placements(self) -> Sequence[Placement] | None:
        """The prompts placed since this was last asked, oldest first; None: this routing has nothing to share."""

    def placed(self, node: Node, blocks: Sequence[int], now: float) -> None:
        """Another balancer sent a prompt with these blocks to the node."""

    def others(self, node: Node, outstanding: Outstanding, now: float) -> None:
        """What the other balancers together have at the node."""


class ScoredRouting:
    """The policies that compare scores and learn nothing of their own."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose

    def pick(self, candidates: Candidates, request: InferenceRequest, now: float, rng: Random) -> Node | None:
        return pick(candidates, request, self._choose, request.tried, now, rng)

    def dispatched(self, node: Node, request: InferenceRequest, now: float) -> Sent | None:
        return None

    def first_token(self, node: Node, sent: Sent | None, now: float) -> None:
        pass

    def ended(
        self,
        node: Node,
        sent: Sent | None,
        request: InferenceRequest,
        outcome: Outcome,
        used: tuple[int, int] | None,
        now: float,
    ) -> None:
        pass

    def reported(self, node: Node, report: NodeReport, at_s: float, now: float) -> None:
        pass

    def forget(self, id_: NodeId) -> None:
        pass

    def take_placements(self) -> Sequence[Placement] | None:
        return None

    def placed(self, node: Node, blocks: Sequence[int], now: float) -> None:
        pass

    def others(self, node: Node, outstanding: Outstanding, now: float) -> None:
        pass


class PredictedRouting:
    """Least predicted cost: what the books, the prefix index and the expectations say together."""

    def __init__(self, policy: CostPolicy | None = None) -> None:
        self._policy = policy or CostPolicy()
        self._index = PrefixIndex()
        self._cost: PredictedCost[Node] = PredictedCost(self._index, self._policy)
        self._expectations = Expectations()
        self._placements: deque[Placement] | None = None  # since they were last asked for; None: never yet

    def pick(self, candidates: Candidates, request: InferenceRequest, now: float, rng: Random) -> Node | None:
        tried = request.tried
        usable = (lambda node: node.has_room() and node.id not in tried) if tried or candidates.bounded else None
        further = {"slow_start": lambda node: self._caution_s(node, now)} if candidates.cautious else None
        choice = self._cost.choose(candidates.nodes, self._work(request), now, rng, usable, further)
        if choice is None:
            return None
        request.held_blocks = choice.held_blocks
        return choice.node

    def dispatched(self, node: Node, request: InferenceRequest, now: float) -> Sent | None:
        work = self._work(request)
        self._index.placed(node.id, work.blocks, now)
        if self._placements is not None and work.blocks:
            self._placements.append((node.id, work.blocks))
        return node.books.dispatched(work, request.held_blocks, now)

    def first_token(self, node: Node, sent: Sent | None, now: float) -> None:
        if sent is not None:
            node.books.first_token(sent, now)

    def ended(
        self,
        node: Node,
        sent: Sent | None,
        request: InferenceRequest,
        outcome: Outcome,
        used: tuple[int, int] | None,
        now: float,
    ) -> None:
        if sent is None:
            return
        if outcome is Outcome.OK:
            prompt_tokens, output_tokens = used or (None, None)
            node.books.finished(sent, now, output_tokens, prompt_tokens)
            if used is not None:
                self._expectations.learned(request.model, _measure(request.prompt), prompt_tokens, output_tokens)
        elif outcome.ruling.fault is Fault.NODE:
            node.books.failed(sent, now)
        else:
            node.books.cancelled(sent, now)

    def reported(self, node: Node, report: NodeReport, at_s: float, now: float) -> None:
        if node.books.reported(report, at_s, now):
            self._index.forget(node.id)
        capacity = report.kv_capacity_tokens
        if capacity is not None and math.isfinite(capacity):
            ratio = self._expectations.bytes_per_token(report.models[0] if report.models else "")
            self._index.resize(node.id, capacity * ratio / prompt_blocks.BLOCK_BYTES)

    def forget(self, id_: NodeId) -> None:
        self._index.forget(id_)

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

    def _work(self, request: InferenceRequest) -> Work:
        work = request.work
        if work is None:
            prompt = request.prompt = prompt_blocks.read(request.parsed, len(request.body), request.model)
            work = request.work = self._expectations.work(
                request.model,
                prompt,
                request.asked_tokens(),
                generates=request.endpoint.samples,
                streams=request.stream,
            )
        return work

    def _caution_s(self, node: Node, now: float) -> float:
        return caution_s(node.share(now) / node.weight, node.load.rif, self._policy)


def _measure(prompt: Prompt | None) -> float | None:
    """The bytes of a prompt whose tokens are text alone; of another they say nothing about bytes per token."""
    if prompt is None or prompt.attachments or prompt.token_ids is not None:
        return None
    return prompt.size_bytes


def routing_of(policy: RoutingPolicy) -> Routing:
    """The routing that the settings ask for, with its own fresh state."""
    if policy.policy == "predicted_cost":
        return PredictedRouting()
    return ScoredRouting(policy_named(policy.policy))
