"""The default policy: least predicted cost, in seconds.

What a node would cost a request is a sum of named terms (`PRICES`), each of which can be read, tested and shown
alone. A pick adds up the same sum in one loop over figures that the books keep ready (`_costs`); a test holds the
two equal. Affinity to a node that holds the prompt's prefix is such a price, never a rule: seconds saved, and seconds
wasted by reading elsewhere what one node holds. That keeps nine hits of ten of a strict rule and balances at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Annotated, Generic, NamedTuple, Protocol, TypeVar

from pydantic import Field

from balancer.core.books import FAILURE_DECAY_S, OVERDUE_RATIO, OVERDUE_S, Books, Figures, Work
from balancer.core.prefix_index import PrefixIndex
from balancer.core.request import NodeId

# Up to this many candidates all are priced. Of more: so many at random, the best holders of the prefix, the last
# winners. With 16 random ones the result on 100 nodes was within 1 % of pricing all.
FULL_SCAN = 16
RANDOM_CANDIDATES = 12
HOLDER_CANDIDATES = 4
LAST_WINNERS = 2
# Large sets of candidates (one a model) whose look-up by id is kept between picks.
ROSTERS = 8

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPolicy:
    """How the predicted cost is put together. None of the weights is sensitive: each may halve or double."""

    # Share of the decode time that counts. Without it a slow GPU with an empty queue looks attractive: the P99 of the
    # whole time goes from 17 s to 39 s on a mixed fleet. 0.4 was too much in the simulator: a node's seen time per
    # token grows with its context partly because prefill runs between, which is priced already (docs/routing.md).
    decode: NonNegative = 0.1
    # Seconds each second of prefill costs the streams decoding there: an eager share, and so much for each of them.
    interference: NonNegative = 2.0
    interference_base: NonNegative = 0.3
    interference_per_request: NonNegative = 0.02
    interference_most_requests: NonNegative = 50.0
    # Seconds charged for each second of recomputing what another node holds: it also drops something else there.
    waste: NonNegative = 2.0
    # Each second of a first token's wait beyond so many counts so much more. Prefix hits and undisturbed streams are
    # worth waiting for, but not in the tail: without it the P99 of the first token near saturation is 1.26 times the
    # oracle's, with it 1.09. 2 s are what an interactive caller takes for slow.
    late: NonNegative = 4.0
    late_from_s: NonNegative = 2.0
    # Share of the KV capacity beyond which the engine preempts, and seconds for all of the capacity above it.
    kv_share: NonNegative = 0.85
    kv_pressure: NonNegative = 20.0
    # Seconds for a node that always fails. One that fails in 5 ms has the shortest queue: without this price a black
    # hole draws everything, with it about 1 % of the attempts. Near load 20 s was too little: an empty queue is worth
    # more than that to a fleet whose queues are long.
    failure: NonNegative = 40.0
    # Nodes within this factor of the least cost, or so many seconds of it, are equal, and the one with the fewest
    # requests gets it: predictions are no better than that, and an even count hedges against them. 10 ms are one
    # engine step; without them an idle fleet would send all it gets to the node that once was a millisecond faster.
    tie_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.03
    tie_s: NonNegative = 0.01
    # Seconds for each request in flight at a node whose share is cut to 1/2 (slow start, back-pressure, degraded).
    caution: NonNegative = 0.25
    # Seconds for a node other than the one that served a session's last request: the time to read some 2,500 tokens
    # (an adapter, an image, a beginning that the prefix index does not see). A node that is busier by more is left.
    session: NonNegative = 0.5
    # Seconds for each label that a tenant prefers and the node does not carry: a second of waiting is worth it.
    label: NonNegative = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """All that a price looks at."""

    figures: Figures  # of the node that is priced
    work: Work
    held_blocks: int  # leading blocks of the prompt that the node holds
    most_held: int  # the most that any candidate holds
    now: float
    policy: CostPolicy = CostPolicy()

    @property
    def uncached_tokens(self) -> float:
        """Prompt tokens the node would have to read: at least the last one."""
        return max(1.0, self.work.prompt_tokens - self.work.block_tokens * self.held_blocks)

    @property
    def requests(self) -> float:
        """Requests in flight there, the other balancers' too."""
        return self.figures.n + self.figures.others_now(self.now).requests

    @property
    def context_tokens(self) -> float:
        """Context in flight there with this request."""
        return self.figures.context_tokens + self.figures.others_now(self.now).context + self.work.prompt_tokens

    @property
    def decode_s(self) -> float:
        """Expected seconds of generation."""
        expected = self.work.expected_output if self.work.generates else 0.0
        return expected * self.figures.tpot_s(self.context_tokens)


Price = Callable[[Offer], float]


def backlog_s(offer: Offer) -> float:
    """Seconds until the node has read the prompts sent before."""
    return offer.figures.backlog_s(offer.now)


def prefill_s(offer: Offer) -> float:
    """Seconds it needs for what it does not hold of this prompt. With the backlog: the time to the first token."""
    return offer.figures.s_per_token * offer.uncached_tokens


def late_s(offer: Offer) -> float:
    """Seconds of the first token's wait beyond what callers take for slow, which count more than the first ones."""
    return offer.policy.late * max(0.0, backlog_s(offer) + prefill_s(offer) - offer.policy.late_from_s)


def decode_s(offer: Offer) -> float:
    """Seconds of generation at the pace that its context allows, weighted."""
    return offer.policy.decode * offer.decode_s


def interference_s(offer: Offer) -> float:
    """Seconds that reading this prompt takes from the streams already decoding there."""
    policy = offer.policy
    streams = min(offer.requests, policy.interference_most_requests)
    delayed = policy.interference_base + policy.interference_per_request * streams
    return policy.interference * prefill_s(offer) * delayed


def waste_s(offer: Offer) -> float:
    """Seconds of reading again what another node holds."""
    missing = offer.work.block_tokens * (offer.most_held - offer.held_blocks)
    return offer.policy.waste * offer.figures.s_per_token * missing


def slots_s(offer: Offer) -> float:
    """Seconds until a sequence slot is free, once all are taken."""
    over = max(0.0, offer.requests - offer.figures.slots + 1.0)
    return over * offer.decode_s / offer.figures.slots


def kv_pressure_s(offer: Offer) -> float:
    """Seconds of preemption ahead: none up to 85 % of the KV capacity, 0.2 s for each percent above."""
    return offer.policy.kv_pressure * max(0.0, offer.context_tokens / offer.figures.kv_tokens - offer.policy.kv_share)


def failure_s(offer: Offer) -> float:
    """Seconds for having failed lately. It fades, so that a node that mended is tried again."""
    return offer.policy.failure * offer.figures.failure_now(offer.now)


PRICES: Mapping[str, Price] = MappingProxyType(
    {
        "backlog": backlog_s,
        "prefill": prefill_s,
        "late": late_s,
        "decode": decode_s,
        "interference": interference_s,
        "waste": waste_s,
        "slots": slots_s,
        "kv_pressure": kv_pressure_s,
        "failure": failure_s,
    }
)


def cost_s(offer: Offer) -> float:
    """The sum of all named terms: what a pick minimises."""
    return sum(price(offer) for price in PRICES.values())


def caution_s(share: float, requests: float, policy: CostPolicy) -> float:
    """Seconds for a node that should take only a share (0..1] of its weight: a price on growing fast, not on being new.

    Nothing for the first request, so that a newcomer is tried at once.
    """
    return policy.caution * requests * (1.0 / share - 1.0) if share < 1.0 else 0.0


class Priced(Protocol):
    """What the policy has to know of a node."""

    @property
    def id(self) -> NodeId:
        """Its name, as in the prefix index."""
        ...

    @property
    def books(self) -> Books:
        """Its accounts."""
        ...

    @property
    def weight(self) -> float:
        """Its share beside the others; 1 for all where nobody says otherwise."""
        ...


N = TypeVar("N", bound=Priced)
NOTHING: Mapping[str, Sequence[float]] = MappingProxyType({})
Further = Mapping[str, Callable[[N], float]]  # more prices of one request: stickiness, tenant labels, slow start


class Choice(NamedTuple, Generic[N]):
    """The node taken, and all that the pick looked at: figures do not change, so it can be explained later."""

    node: N
    held_blocks: int  # leading blocks of the prompt that the node holds already
    nodes: Sequence[N]  # that were priced
    figures: Sequence[Figures]  # of each
    held: Sequence[int] | None  # leading blocks held by each; None: nobody holds any
    further_s: Mapping[str, Sequence[float]]  # more prices of each
    work: Work
    now: float
    policy: CostPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What one node would have cost, term by term, and how old the evidence is (seconds; None: never any)."""

    node: NodeId
    cost_s: float
    terms_s: Mapping[str, float]
    held_blocks: int
    uncached_tokens: float
    requests: float
    s_per_token: float
    tpot_s: float
    is_prior: bool  # `s_per_token` is what the rest of the fleet does
    pace_age_s: float | None
    tpot_age_s: float | None
    failure_age_s: float | None
    report_age_s: float | None
    others_age_s: float | None
    others_assumed: bool  # the mean of the fleet stands for what nobody said of this node


class _Roster(Generic[N]):
    """A large set of candidates, by id, and who won there lately."""

    __slots__ = ("by_id", "nodes", "winners")

    def __init__(self, nodes: Sequence[N]) -> None:
        self.nodes = nodes
        self.by_id = {node.id: node for node in nodes}
        self.winners: list[N] = []


class PredictedCost(Generic[N]):
    """Chooses the node of least predicted cost."""

    def __init__(self, index: PrefixIndex, policy: CostPolicy | None = None) -> None:
        self.index = index
        self.policy = policy or CostPolicy()
        self._rosters: list[_Roster[N]] = []

    def choose(
        self,
        nodes: Sequence[N],
        work: Work,
        now: float,
        rng: Random,
        usable: Callable[[N], bool] | None = None,
        further: Further[N] | None = None,
        *,
        weighted: bool = False,
    ) -> Choice[N] | None:
        """The node for this work, or None when none is usable (has room, was not tried, …).

        Hand in the same tuple again while the candidates stay the same: what is worked out for a large one is kept
        by its identity. `further` are more prices in seconds, for this request. `weighted`: some node's weight is not
        1; one of weight 2 is taken while it costs up to twice as much as one of weight 1.

        The pick counts nothing: in the same step the caller does `node.books.dispatched(work, held_blocks, now)`
        and `index.placed(node.id, blocks, now)`.
        """
        levels = self.index.levels(work.blocks) if work.blocks else ()
        scan: Sequence[N] = nodes
        roster = None
        if len(nodes) > FULL_SCAN:
            roster = self._roster(nodes)
            scan = self._sampled(roster, levels, rng)
        if usable is not None:
            scan = [node for node in scan if usable(node)]
            if not scan and roster is not None:
                scan = [node for node in nodes if usable(node)]
        if not scan:
            return None
        policy = self.policy
        held = self._held(scan, levels) if levels else None
        figures = _figures(scan, now)
        further_s = {name: [price(node) for node in scan] for name, price in further.items()} if further else NOTHING
        best = 0
        if len(scan) > 1:
            costs = _costs(figures, work, held, now, policy)
            for prices in further_s.values():
                costs = [cost + price for cost, price in zip(costs, prices, strict=True)]
            limit = max(policy.tie_ratio * (least := min(costs)), least + policy.tie_s)
            if weighted:
                costs = [cost / node.weight for cost, node in zip(costs, scan, strict=True)]
                limit = policy.tie_ratio * min(costs)  # seconds over a weight are no seconds
            best = _fewest_within(limit, figures, costs, now, rng)
        node = scan[best]
        if roster is not None and node not in roster.winners:
            roster.winners = [node, *roster.winners[: LAST_WINNERS - 1]]
        return Choice(node, held[best] if held else 0, scan, figures, held, further_s, work, now, policy)

    def explain(
        self, nodes: Sequence[N], work: Work, now: float, further: Further[N] | None = None
    ) -> list[Explanation]:
        """What each node would cost this work now, by named terms, least first."""
        further_s = {name: [price(node) for node in nodes] for name, price in (further or {}).items()}
        held = self._held(nodes, self.index.levels(work.blocks))
        figures = _figures(nodes, now)
        return explained(Choice(nodes[0], 0, nodes, figures, held, further_s, work, now, self.policy)) if nodes else []

    # -- who is looked at

    def _roster(self, nodes: Sequence[N]) -> _Roster[N]:
        rosters = self._rosters
        for roster in rosters:
            if roster.nodes is nodes:
                return roster
        roster = _Roster(nodes)
        self._rosters = [roster, *rosters[: ROSTERS - 1]]
        return roster

    def _sampled(self, roster: _Roster[N], levels: Sequence[tuple[int, int]], rng: Random) -> list[N]:
        """Some at random, the best holders, the last winners."""
        nodes = roster.nodes
        count = len(nodes)
        at = int(rng.random() * count)
        # Equal strides of a random length: as fair to each node as single draws, all different, a fifth of the time.
        stride = 1 + int(rng.random() * (count // RANDOM_CANDIDATES))
        scan = [nodes[(at + step) % count] for step in range(0, RANDOM_CANDIDATES * stride, stride)]
        scan += [node for node in roster.winners if node not in scan]
        if levels:
            holders = 0
            for name in self.index.deepest(levels, 4 * HOLDER_CANDIDATES, rng.random()):
                node = roster.by_id.get(name)
                if node is not None:
                    holders += 1
                    if node not in scan:
                        scan.append(node)
                    if holders == HOLDER_CANDIDATES:
                        break
        return scan

    def _held(self, nodes: Sequence[N], levels: Sequence[tuple[int, int]]) -> list[int]:
        """Leading blocks held by each node."""
        bits = self.index.bits.get
        if len(levels) == 1:
            lanes, depth = levels[0]
            return [depth if bits(node.id, 0) & lanes else 0 for node in nodes]
        found = []
        for node in nodes:
            bit = bits(node.id, 0)
            held = 0
            for lanes, depth in levels:  # each level's holders are among those of the one before
                if not lanes & bit:
                    break
                held = depth
            found.append(held)
        return found


def _fewest_within(limit: float, figures: Sequence[Figures], costs: list[float], now: float, rng: Random) -> int:
    near = [at for at, cost in enumerate(costs) if cost <= limit]
    if len(near) == 1:
        return near[0]
    counts = []
    for at in near:
        own = figures[at]
        counts.append(own.n if own.others is None else own.n + own.others_share(now) * own.others.requests)
    fewest = min(counts)
    equal = [at for at, count in zip(near, counts, strict=True) if count == fewest]
    return equal[0] if len(equal) == 1 else equal[int(rng.random() * len(equal))]


def _figures(nodes: Sequence[Priced], now: float) -> list[Figures]:
    """What the books of each node say now."""
    found = []
    new = tpot_new = 0
    for node in nodes:
        figures = node.books.kept
        if figures is None or figures.head_paced:
            figures = node.books.figures(now)
        new += figures.is_new
        tpot_new += figures.tpot_is_new
        found.append(figures)
    if 0 < new < len(nodes) or 0 < tpot_new < len(nodes):
        _expect(nodes, found, now)
    return found


def _expect(nodes: Sequence[Priced], found: list[Figures], now: float) -> None:
    """Newcomers are taken to be as fast as the median of the others."""
    read = [figures for figures in found if not figures.is_new]
    decoded = [figures for figures in found if not figures.tpot_is_new]
    s_per_token = _middle([figures.s_per_token for figures in read]) if read else None
    tpot = None
    if decoded:
        tpot = (_middle([each.tpot_base_s for each in decoded]), _middle([each.tpot_slope_s for each in decoded]))
    for at, node in enumerate(nodes):
        if found[at].is_new or found[at].tpot_is_new:
            node.books.expect(s_per_token, tpot)
            found[at] = node.books.figures(now)


def _middle(values: list[float]) -> float:
    """The median; `statistics.median` takes three times as long."""
    values.sort()
    return (values[len(values) // 2] + values[(len(values) - 1) // 2]) / 2.0


def _costs(
    figures: Sequence[Figures], work: Work, held: Sequence[int] | None, now: float, policy: CostPolicy
) -> list[float]:
    """The sum of PRICES for each node, in one loop."""
    decode, kv_share, kv_pressure, failure = policy.decode, policy.kv_share, policy.kv_pressure, policy.failure
    most_requests = policy.interference_most_requests
    alone = 1.0 + policy.interference * policy.interference_base
    per_request = policy.interference * policy.interference_per_request
    prompt = work.prompt_tokens
    output = work.expected_output if work.generates else 0.0
    uncached = prompt if prompt > 1.0 else 1.0
    most = max(held) if held else 0
    missing = 0.0
    costs = []
    at = 0
    late_price, late_from_s = policy.late, policy.late_from_s
    for node in figures:
        (
            s,
            queued,
            head_tokens,
            head_from_s,
            n,
            context,
            slots,
            over,
            kv_tokens,
            tpot_base_s,
            tpot_slope_s,
            failed,
            failed_at_s,
            others,
            *_,
        ) = node
        if held:
            blocks = held[at]
            at += 1
            uncached = prompt - work.block_tokens * blocks
            if uncached < 1.0:
                uncached = 1.0
            missing = policy.waste * work.block_tokens * (most - blocks)
        requests: float = n
        in_context = context + prompt
        if others is None:
            cost = s * queued
            if cost:
                head = s * head_tokens
                elapsed = now - head_from_s
                if elapsed > head:
                    cost -= head
                    if elapsed > OVERDUE_RATIO * head + OVERDUE_S:
                        cost += elapsed - head
                elif elapsed > 0.0:
                    cost -= elapsed
        else:
            share = node.others_share(now)
            requests += share * others.requests
            in_context += share * others.context
            over = max(0.0, requests - slots + 1.0) / slots
            cost = node.backlog_s(now)
        late = cost + s * uncached - late_from_s
        if late > 0.0:
            cost += late_price * late
        streams = requests if requests < most_requests else most_requests
        cost += s * (uncached * (alone + per_request * streams) + missing)
        cost += output * (tpot_base_s + tpot_slope_s * in_context) * (decode + over)
        pressure = in_context / kv_tokens - kv_share
        if pressure > 0.0:
            cost += kv_pressure * pressure
        if failed:
            cost += failure * failed * math.exp((failed_at_s - now) / FAILURE_DECAY_S)
        costs.append(cost)
    return costs


def explained(choice: Choice[N]) -> list[Explanation]:
    """What each node that a pick looked at would have cost, by named terms, least first."""
    held = choice.held or [0] * len(choice.nodes)
    found = []
    for at, node in enumerate(choice.nodes):
        offer = Offer(
            figures=choice.figures[at],
            work=choice.work,
            held_blocks=held[at],
            most_held=max(held),
            now=choice.now,
            policy=choice.policy,
        )
        terms = {name: price(offer) for name, price in PRICES.items()}
        terms |= {name: prices[at] for name, prices in choice.further_s.items()}
        if node.weight != 1.0:
            terms["weight"] = sum(terms.values()) * (1.0 / node.weight - 1.0)
        found.append(_explanation(node.id, offer, terms))
    return sorted(found, key=lambda explanation: explanation.cost_s)


def _explanation(node: NodeId, offer: Offer, terms: Mapping[str, float]) -> Explanation:
    figures, now = offer.figures, offer.now

    def age(at_s: float | None) -> float | None:
        return None if at_s is None else now - at_s

    return Explanation(
        node=node,
        cost_s=sum(terms.values()),
        terms_s=terms,
        held_blocks=offer.held_blocks,
        uncached_tokens=offer.uncached_tokens,
        requests=offer.requests,
        s_per_token=figures.s_per_token,
        tpot_s=figures.tpot_s(offer.context_tokens),
        is_prior=figures.is_new,
        pace_age_s=age(figures.pace_at_s),
        tpot_age_s=age(figures.tpot_at_s),
        failure_age_s=age(figures.failure_at_s) if figures.failure else None,
        report_age_s=age(figures.reported_at_s),
        others_age_s=age(figures.others_at_s) if figures.others is not None and not figures.others_assumed else None,
        others_assumed=figures.others_assumed,
    )
