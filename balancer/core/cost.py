"""The default policy: least predicted cost. INTERFACE STAGE: names and signatures are final; bodies follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, NamedTuple, Protocol, TypeVar

from balancer.core.books import Books, Work
from balancer.core.prefix_index import PrefixIndex
from balancer.core.request import NodeId


class Priced(Protocol):
    """What the policy has to know of a node (core/node.py's Node is one, so may be a simulated one)."""

    @property
    def id(self) -> NodeId: ...
    @property
    def books(self) -> Books: ...


N = TypeVar("N", bound=Priced)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostPolicy:
    """The weights, all defaults as in the routing notes."""


class Choice(NamedTuple, Generic[N]):
    """The node taken, what it was predicted to cost, and the leading prompt blocks it holds already."""

    node: N
    cost_s: float
    held_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """All that a price looks at: one node's books, the work, what it holds of the prompt and what the best holds."""

    books: Books
    work: Work
    held_blocks: int
    most_held: int
    now: float
    policy: CostPolicy


Price = Callable[[Offer], float]
PRICES: Mapping[str, Price] = {}


class PredictedCost:
    """Chooses the node of least predicted cost."""

    def __init__(self, index: PrefixIndex, policy: CostPolicy | None = None) -> None: ...

    def choose(
        self,
        nodes: Sequence[N],
        work: Work,
        now: float,
        rng: Random,
        usable: Callable[[N], bool] | None = None,
    ) -> Choice[N] | None:
        """Best node; None when there is none usable. Give the same tuple again while the candidates stay the same:
        what is worked out per large sequence is kept by identity. After it, in the same step:
        `sent = choice.node.books.dispatched(work, choice.held_blocks, now); index.placed(id, work.blocks, now)`."""
        raise NotImplementedError
