"""Who chooses: the balancer's own policies, unchanged from `balancer.core`, and a few to compare them with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import cast

from balancer.core.books import Books
from balancer.core.breaker import Breaker, BreakerPolicy
from balancer.core.health import NodeReport
from balancer.core.node import Node, NodeConfig
from balancer.core.prefix_index import PrefixIndex
from balancer.core.request import InferenceRequest, NodeId
from balancer.core.selection import FULL_SCAN, SAMPLE, Choose, policy_named, prefix_first
from loadtest.sim.arrival import Arrival

# The core's simple policies never look at the request.
_NO_REQUEST = cast(InferenceRequest, None)


class Target:
    """One node as one balancer knows it."""

    __slots__ = ("at", "books", "id", "node", "weight")

    def __init__(self, at: int, slots: float, kv_tokens: float, rng: Random) -> None:
        self.at = at
        self.id = NodeId(f"n{at}")
        self.weight = 1.0
        self.books = Books(slots=slots, kv_tokens=kv_tokens)
        config = NodeConfig(url=f"http://{self.id}")
        self.node = Node(config=config, id=self.id, breaker=Breaker(BreakerPolicy(), rng))

    def __repr__(self) -> str:
        return f"<Target {self.id} {self.books}>"


class Attempt:
    """One request at one node."""

    __slots__ = ("arrival", "held_blocks", "sent_s", "target", "token")

    def __init__(self, arrival: Arrival, target: Target, held_blocks: int, now: float) -> None:
        self.arrival = arrival
        self.target = target
        self.held_blocks = held_blocks
        self.sent_s = now
        self.token: object = None


class Policy:
    """What a balancer does: choose, and be told what became of it. This one chooses at random."""

    def __init__(self, name: str, targets: Sequence[Target], rng: Random) -> None:
        self.name = name
        self.targets = tuple(targets)
        self.rng = rng

    def choose(self, arrival: Arrival, among: Sequence[Target], now: float) -> tuple[Target, int]:
        """A node of `among` (never empty), and the leading blocks of the prompt it is believed to hold."""
        return self.rng.choice(among), 0

    def dispatched(self, attempt: Attempt, now: float) -> None:
        """It goes there; part of the choice."""
        attempt.target.node.load.begin()

    def first_token(self, attempt: Attempt, now: float) -> None:
        """The first token came."""
        attempt.target.node.load.first_token(now - attempt.sent_s, now)

    def finished(self, attempt: Attempt, now: float) -> None:
        """A good end."""
        attempt.target.node.load.end()
        attempt.target.node.load.succeeded(now)

    def failed(self, attempt: Attempt, now: float) -> None:
        """An end by the node's fault."""
        attempt.target.node.load.end()
        attempt.target.node.load.failed(now)

    def cancelled(self, attempt: Attempt, now: float) -> None:
        """The client's deadline."""
        attempt.target.node.load.end()

    def reported(self, target: Target, report: NodeReport, now: float) -> None:
        """An agent's report."""
        target.node.report = report
        target.node.report_at_s = now
        target.node.load.picks_since_report = 0

    def predicted_s(self, attempt: Attempt) -> tuple[float, float]:
        """(seconds expected to the first token, seconds of them for its own prompt); for the watchdog."""
        return 0.0, 0.0


class FromCore(Policy):
    """A policy of `balancer.core.selection`."""

    def __init__(self, name: str, choose: Choose, targets: Sequence[Target], rng: Random) -> None:
        super().__init__(name, targets, rng)
        self._choose = choose
        self._nodes: list[Node] = []
        self._among: Sequence[Target] = ()
        self._by_id = {target.id: target for target in targets}

    def choose(self, arrival: Arrival, among: Sequence[Target], now: float) -> tuple[Target, int]:
        if among is not self._among:
            self._among, self._nodes = among, [target.node for target in among]
        nodes = self._nodes if len(among) <= FULL_SCAN else self.rng.sample(self._nodes, SAMPLE)
        if len(nodes) == 1:
            return among[0], 0
        return self._by_id[self._choose(nodes, _NO_REQUEST, now, self.rng).id], 0


class WeightedBlind(FromCore):
    """`weighted` as it is often written: a polled score that knows nothing of what was sent since."""

    def dispatched(self, attempt: Attempt, now: float) -> None:
        super().dispatched(attempt, now)
        attempt.target.node.load.picks_since_report = 0


class _Prefixed(Policy):
    """What two policies share: an index of who holds what."""

    def __init__(self, name: str, targets: Sequence[Target], rng: Random) -> None:
        super().__init__(name, targets, rng)
        self.index = PrefixIndex()

    def resize(self, block_tokens: int) -> None:
        """How many blocks each node's cache holds."""
        for target in self.targets:
            self.index.resize(target.id, target.books.kv_tokens / block_tokens)

    def dispatched(self, attempt: Attempt, now: float) -> None:
        super().dispatched(attempt, now)
        self.index.placed(attempt.target.id, attempt.arrival.blocks, now)

    def _least(self, nodes: Sequence[Target], key: Callable[[Target], float]) -> Target:
        costs = [key(target) for target in nodes]
        least = min(costs)
        return self.rng.choice([target for target, cost in zip(nodes, costs, strict=True) if cost == least])


class PrefixFirst(_Prefixed):
    """Affinity as a rule: `balancer.core.selection.prefix_first`."""

    def choose(self, arrival: Arrival, among: Sequence[Target], now: float) -> tuple[Target, int]:
        held = self.index.held(arrival.blocks)
        nodes = [target.node for target in among]
        node = prefix_first(nodes, held, len(arrival.blocks), now, self.rng)
        target = next(target for target in among if target.node is node)
        return target, held.get(target.id, 0)


class TokenCount(_Prefixed):
    """The fewest uncached prompt tokens without a first token yet, this request's own included; no speeds."""

    def __init__(self, name: str, targets: Sequence[Target], rng: Random) -> None:
        super().__init__(name, targets, rng)
        self._queued = [0.0] * len(targets)

    def _uncached(self, arrival: Arrival, held_blocks: int) -> float:
        return max(1.0, arrival.prompt_tokens - 512 * held_blocks)

    def choose(self, arrival: Arrival, among: Sequence[Target], now: float) -> tuple[Target, int]:
        held = self.index.held(arrival.blocks)
        target = self._least(among, lambda t: self._queued[t.at] + self._uncached(arrival, held.get(t.id, 0)))
        return target, held.get(target.id, 0)

    def dispatched(self, attempt: Attempt, now: float) -> None:
        super().dispatched(attempt, now)
        attempt.token = self._uncached(attempt.arrival, attempt.held_blocks)
        self._queued[attempt.target.at] += attempt.token

    def _off(self, attempt: Attempt) -> None:
        if isinstance(attempt.token, float):
            self._queued[attempt.target.at] -= attempt.token
            attempt.token = None

    def first_token(self, attempt: Attempt, now: float) -> None:
        super().first_token(attempt, now)
        self._off(attempt)

    def failed(self, attempt: Attempt, now: float) -> None:
        super().failed(attempt, now)
        self._off(attempt)

    def cancelled(self, attempt: Attempt, now: float) -> None:
        super().cancelled(attempt, now)
        self._off(attempt)


def simple(name: str, targets: Sequence[Target], rng: Random) -> Policy:
    """One of the policies of this module by its name; raises KeyError."""
    if name == "random":
        return Policy(name, targets, rng)
    if name == "prefix":
        return PrefixFirst(name, targets, rng)
    if name == "token_count":
        return TokenCount(name, targets, rng)
    if name == "weighted_blind":
        return WeightedBlind(name, policy_named("weighted"), targets, rng)
    if name == "weighted":
        return FromCore(name, policy_named("weighted"), targets, rng)
    if name == "least_outstanding":
        return FromCore(name, policy_named("least_outstanding"), targets, rng)
    if name == "power_of_two":
        return FromCore(name, policy_named("power_of_two"), targets, rng)
    if name == "round_robin":
        return FromCore(name, policy_named("round_robin"), targets, rng)
    raise KeyError(name)
