"""The default policy in the simulator: `balancer.core.cost` as it is, with estimates as uncertain as in life."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from balancer.core.books import Books, Outstanding, Sent, Work
from balancer.core.cost import CostPolicy, PredictedCost
from balancer.core.expectations import Expectations
from balancer.core.health import NodeReport
from balancer.core.prefix_index import PrefixIndex
from balancer.core.request import NodeId
from loadtest.sim.arrival import Arrival
from loadtest.sim.policies import Attempt, Policy, Target

MODEL = "simulated"
# Bytes per token of English with current vocabularies, and how far single prompts are from it (sigma, log-normal).
BYTES_PER_TOKEN = 4.4
BYTES_SPREAD = 0.1


class Predicted(Policy):
    """Least predicted cost. It is told bytes, never tokens, and learns both ratios from usage."""

    def __init__(
        self, name: str, targets: Sequence[Target], rng: Random, block_tokens: int, cost: CostPolicy | None = None
    ) -> None:
        super().__init__(name, targets, rng)
        self.index = PrefixIndex()
        for target in targets:
            self.index.resize(target.id, target.books.kv_tokens / block_tokens)
        self.block_tokens = block_tokens
        self.expectations = Expectations()
        self.placements: list[tuple[NodeId, tuple[int, ...]]] = []  # since balancers last shared
        self.shares = False
        self._policy: PredictedCost[Target] = PredictedCost(self.index, cost)
        self._work = Work(prompt_tokens=1.0)
        self._size_bytes = 0.0

    def choose(self, arrival: Arrival, among: Sequence[Target], now: float) -> tuple[Target, int]:
        # One prompt's ratio is its own: drawn from what it is, so that every policy meets the same one.
        own = Random(arrival.prompt_tokens * 1_000_003 + arrival.output_tokens)
        self._size_bytes = arrival.prompt_tokens * BYTES_PER_TOKEN * own.lognormvariate(0.0, BYTES_SPREAD)
        self._work = Work(
            prompt_tokens=self.expectations.prompt_tokens(MODEL, self._size_bytes),
            blocks=arrival.blocks,
            block_tokens=float(self.block_tokens),
            expected_output=self.expectations.output_tokens(MODEL, None),
        )
        choice = self._policy.choose(among, self._work, now, self.rng)
        assert choice is not None
        return choice.node, choice.held_blocks

    def dispatched(self, attempt: Attempt, now: float) -> None:
        books: Books = attempt.target.books
        attempt.token = (books.dispatched(self._work, attempt.held_blocks, now), self._size_bytes)
        self.index.placed(attempt.target.id, attempt.arrival.blocks, now)
        if self.shares and attempt.arrival.blocks:
            self.placements.append((attempt.target.id, attempt.arrival.blocks))

    def first_token(self, attempt: Attempt, now: float) -> None:
        attempt.target.books.first_token(_sent(attempt), now)

    def finished(self, attempt: Attempt, now: float) -> None:
        arrival = attempt.arrival
        attempt.target.books.finished(_sent(attempt), now, arrival.output_tokens, arrival.prompt_tokens)
        assert isinstance(attempt.token, tuple)
        self.expectations.learned(MODEL, attempt.token[1], arrival.prompt_tokens, arrival.output_tokens)

    def failed(self, attempt: Attempt, now: float) -> None:
        attempt.target.books.failed(_sent(attempt), now)

    def cancelled(self, attempt: Attempt, now: float) -> None:
        attempt.target.books.cancelled(_sent(attempt), now)

    def reported(self, target: Target, report: NodeReport, now: float) -> None:
        if target.books.reported(report, now, now):
            self.index.forget(target.id)

    def predicted_s(self, attempt: Attempt) -> tuple[float, float]:
        sent = _sent(attempt)
        return sent.expected_s, attempt.target.books.s_per_token * sent.tokens


def _sent(attempt: Attempt) -> Sent:
    assert isinstance(attempt.token, tuple)
    sent = attempt.token[0]
    assert isinstance(sent, Sent)
    return sent


def share(balancers: Sequence[Predicted], now: float) -> None:
    """All balancers tell each other what they have at each node, and what they placed where since the last time."""
    placements = [balancer.placements for balancer in balancers]
    own: list[Mapping[int, Outstanding]] = [
        {target.at: target.books.outstanding(now) for target in balancer.targets} for balancer in balancers
    ]
    for mine, balancer in enumerate(balancers):
        for target in balancer.targets:
            others = [own[at][target.at] for at in range(len(balancers)) if at != mine]
            together = Outstanding(
                tokens=sum(other.tokens for other in others),
                context=sum(other.context for other in others),
                requests=sum(other.requests for other in others),
                read=sum(other.read for other in others),
            )
            target.books.shared(together, now)
        for at, placed in enumerate(placements):
            if at != mine:
                for node, blocks in placed:
                    balancer.index.placed(node, blocks, now)
    for balancer in balancers:
        balancer.placements = []
