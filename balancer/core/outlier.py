"""Nodes that are merely worse than the others: found by comparison with the fleet, and left alone for a while.

A breaker looks at one node and needs a threshold that holds everywhere. A node that breaks every fourth stream, or is
ten times slower than its peers, stays below any such threshold; beside the others it stands out. Nodes are compared
with nodes that serve the same models, each with all the others (leave-one-out, so that one bad node does not hide
another, and two nodes are enough).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, pstdev
from typing import Annotated

from pydantic import Field

# A share is significant when it is so many standard errors beyond what the others make likely: 1 in 15,000 by chance,
# and every node is looked at every second.
SIGNIFICANT = 4.0
# Failures below which a share says nothing, whatever it is.
LEAST_FAILURES = 2.0
# A node that came back needs this share of the volume to be sent away again: it has a record.
PROBATION = 0.25
# Slowness below this, in seconds a request, hurts nobody.
LEAST_SLOW_S = 0.1
# A node that has been well for so many times its last ejection begins anew.
FORGIVEN = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierPolicy:
    """When a node is worse than its peers, and for how long it is left alone."""

    enabled: bool = True
    window_s: Annotated[float, Field(gt=0)] = 10.0  # mean lifetime of what is compared
    min_requests: Annotated[int, Field(ge=1)] = 10  # fewer of a node's say nothing
    deviations: Annotated[float, Field(ge=0)] = 1.9  # standard deviations of the others (Envoy's factor)
    margin: Annotated[float, Field(ge=0, le=1)] = 0.1  # of failures, beyond the others' median
    slow_factor: Annotated[float, Field(gt=1)] | None = 5.0  # times slower than the others' median; None: never
    eject_s: Annotated[float, Field(gt=0)] = 10.0  # doubles each time
    max_eject_s: Annotated[float, Field(gt=0)] = 300.0
    max_ejected_ratio: Annotated[float, Field(ge=0, le=1)] = 0.3  # one node at least; and half stay eligible


class Tally:
    """What requests met at one node lately. Counts are added on the data path and fade with the window."""

    __slots__ = ("actual_s", "bad", "begun", "broken", "expected_s", "good", "timed")

    def __init__(self) -> None:
        self.clear()

    def __repr__(self) -> str:
        return f"<Tally good={self.good:.1f} bad={self.bad:.1f} broken={self.broken:.1f}/{self.begun:.1f}>"

    def clear(self) -> None:
        """Forget everything."""
        self.good = self.bad = 0.0  # attempts, by what they count for the breaker
        self.begun = self.broken = 0.0  # streams that were committed; those that broke after that
        self.timed = self.actual_s = self.expected_s = 0.0  # answers with a time; its sum; what was to be expected

    def took(self, actual_s: float, expected_s: float) -> None:
        """One answer took so long; `expected_s` is by the request alone and the same for every node."""
        self.timed += 1.0
        self.actual_s += actual_s
        self.expected_s += expected_s

    def fade(self, share: float) -> None:
        """Keep this share of everything."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) * share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One node as its group sees it."""

    tally: Tally
    eligible: bool  # by all evidence there is
    ejected: bool = False
    ejections: int = 0  # in a row


@dataclass(frozen=True, slots=True)
class Ejection:
    """The member at index `at` is to be left alone for `for_s` seconds."""

    at: int
    reason: str  # `failures`, `broken_streams` or `slow`
    value: float  # a share, or times slower than its size lets expect
    others: float  # the others' median of the same
    for_s: float


def eject_s(policy: OutlierPolicy, ejections: int) -> float:
    """How long the next ejection lasts, after so many in a row."""
    return min(policy.max_eject_s, policy.eject_s * 2.0 ** min(ejections, 30))


def most_ejected(policy: OutlierPolicy, size: int) -> int:
    """How many of a group may be ejected at once: the ratio's worth, one at least, never more than half."""
    return min(size // 2, max(1, math.floor(policy.max_ejected_ratio * size)))


def judge(group: Sequence[Member], policy: OutlierPolicy) -> list[Ejection]:
    """Who of a group of equal nodes is to be ejected now, the worst first, within the caps."""
    found: dict[int, tuple[float, Ejection]] = {}
    for reason, volume, value in _MEASURES:
        if reason != "slow":
            _compare(group, policy, reason, volume, value, _failing(policy), found)
        elif policy.slow_factor is not None:
            _compare(group, policy, reason, volume, value, _slow(policy.slow_factor), found)
    room = most_ejected(policy, len(group)) - sum(member.ejected for member in group)
    eligible = sum(member.eligible for member in group)
    least = max(1, math.ceil(len(group) / 2))
    ejections: list[Ejection] = []
    for _, ejection in sorted(found.values(), key=lambda one: one[0], reverse=True):
        left = eligible - group[ejection.at].eligible
        if len(ejections) >= room or left < least:
            break
        eligible = left
        ejections.append(ejection)
    return ejections


# How far beyond the others a member is, in units that compare; None: not far enough.
_Excess = Callable[[Tally, float, float, float, float], float | None]
_Of = Callable[[Tally], float]


def _compare(
    group: Sequence[Member],
    policy: OutlierPolicy,
    reason: str,
    volume: _Of,
    value: _Of,
    excess: _Excess,
    found: dict[int, tuple[float, Ejection]],
) -> None:
    values = {at: value(one.tally) for at, one in enumerate(group) if volume(one.tally) >= policy.min_requests}
    for at, member in enumerate(group):
        needed = policy.min_requests * (PROBATION if member.ejections else 1.0)
        if member.ejected or volume(member.tally) < needed:
            continue
        others = [known for other, known in values.items() if other != at]
        if not others:
            continue
        middle, spread = median(others), policy.deviations * pstdev(others)
        own = value(member.tally)
        by = excess(member.tally, volume(member.tally), own, middle, spread)
        if by is not None and (at not in found or found[at][0] < by):
            found[at] = (by, Ejection(at, reason, own, middle, eject_s(policy, member.ejections)))


def _failing(policy: OutlierPolicy) -> _Excess:
    def excess(tally: Tally, count: float, own: float, middle: float, spread: float) -> float | None:
        likely = (middle * count + 1.0) / (count + 2.0)  # not 0 for having seen none
        error = SIGNIFICANT * math.sqrt(likely * (1.0 - likely) / count)
        enough = own * count >= LEAST_FAILURES
        return own - middle if enough and own - middle > max(policy.margin, spread, error) else None

    return excess


def _slow(factor: float) -> _Excess:
    def excess(tally: Tally, count: float, own: float, middle: float, spread: float) -> float | None:
        lost_s = (own - middle) * tally.expected_s / count
        is_slow = own > factor * middle and own - middle > spread and lost_s > LEAST_SLOW_S
        return 1.0 - middle / own if is_slow else None

    return excess


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else 0.0


_MEASURES: tuple[tuple[str, _Of, _Of], ...] = (
    ("failures", lambda tally: tally.good + tally.bad, lambda tally: _share(tally.bad, tally.good + tally.bad)),
    ("broken_streams", lambda tally: tally.begun, lambda tally: _share(tally.broken, tally.begun)),
    ("slow", lambda tally: tally.timed, lambda tally: _share(tally.actual_s, tally.expected_s)),
)
