"""When a second attempt may start beside a first one that is slow to show its first token."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from balancer.core.node import Node
from balancer.core.request import NodeId

# First tokens of like prompts that are looked at: a P95 of fewer than 40 is a guess, and 200 span minutes.
LEAST_SEEN, MOST_SEEN = 40, 200
# The quantile is worked out anew after so many more.
ANEW_EVERY = 20
# Models and prompt lengths remembered together.
CLASSES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgePolicy:
    """Hedging of first tokens: off unless asked for, since every hedge is a prompt read twice."""

    enabled: bool = False
    quantile: Annotated[float, Field(gt=0.5, lt=1)] = 0.95  # of the times to first token of like prompts


class _Class:
    """Times to first token of one model's prompts of one length."""

    __slots__ = ("at", "delay_s", "seen", "times_s")

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.at = 0
        self.seen = 0
        self.delay_s: float | None = None


class FirstTokenTimes:
    """How long first tokens take, for each model and prompt length (in powers of two of its bytes)."""

    def __init__(self, quantile: float) -> None:
        self.quantile = quantile
        self._classes: OrderedDict[tuple[str, int], _Class] = OrderedDict()

    def learned(self, model: str, size_bytes: int, seconds: float) -> None:
        """A first token came `seconds` after its request was sent."""
        key = (model, size_bytes.bit_length())
        seen = self._classes.get(key)
        if seen is None:
            seen = self._classes[key] = _Class()
            if len(self._classes) > CLASSES:
                self._classes.popitem(last=False)
        self._classes.move_to_end(key)
        if len(seen.times_s) < MOST_SEEN:
            seen.times_s.append(seconds)
        else:
            seen.times_s[seen.at] = seconds
            seen.at = (seen.at + 1) % MOST_SEEN
        seen.seen += 1
        if seen.seen >= LEAST_SEEN and (seen.delay_s is None or seen.seen % ANEW_EVERY == 0):
            ordered = sorted(seen.times_s)
            seen.delay_s = ordered[min(len(ordered) - 1, int(self.quantile * len(ordered)))]

    def delay_s(self, model: str, size_bytes: int) -> float | None:
        """After this long a first token is late; None until enough like prompts were seen."""
        seen = self._classes.get((model, size_bytes.bit_length()))
        return seen.delay_s if seen is not None else None


def has_room(nodes: Iterable[Node], tried: Collection[NodeId], delay_s: float, now: float) -> bool:
    """Whether some other node would read the prompt at once: nothing queued there that we or its agent know of."""
    return any(
        node.id not in tried
        and node.has_room()
        and node.breaker.is_closed
        and not (node.report is not None and node.report.queue_depth)
        and node.books.backlog_s(now) < delay_s
        for node in nodes
    )
