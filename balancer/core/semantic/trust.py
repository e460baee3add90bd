"""How far would-be hits can be trusted: what was seen when the node was asked as well, and what follows from it.

After the idea of verified semantic caching (vCache, 2025): an answer is given to another wording only where evidence
says that the error stays under the operator's bound. Evidence is a comparison of the stored answer with the node's
own. It is counted by *kind* of would-be hit (the model, how the guards see the pair, how near it is), and by entry;
an entry without much history borrows its kind's.

The test is an e-process: for each kind the likelihood of what was seen under smaller error rates, over that under
the bound, mixed. If the true rate is at or above the bound, it ever reaches 1 / 0.05 with a probability of at most
0.05 (Ville's inequality), however often one looks. The kinds of one relation lie within each other (0.95 and nearer,
0.90 and nearer, ...), so each has to reach as many times more as there are of them (Bonferroni).
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

from balancer.core.semantic.guards import Verdict

CONFIDENCE = 0.95
# A kind takes in every pair at least as near as one of these.
BANDS = (0.95, 0.90, 0.80)
_ONCE = 1.0 / (1.0 - CONFIDENCE)
_ENOUGH = _ONCE * len(BANDS)
# The smaller error rates that are tried against the bound, as shares of it: none at all grows fastest, the others
# survive an error.
_SHARES = (0.0, 0.1, 0.3)
# What is known beforehand of pairs that the guards do not tell apart and that are as near as `PRIOR_BAND`: so many
# right hits on the development data, none of them plainly wrong (docs/caching.md).
PRIOR_RIGHT, PRIOR_BAND = 150, 0.90
# An entry with as many errors has to be trusted by its own history.
MAX_WRONG = 2
# Old evidence fades, so that a change of traffic is seen: beyond this many observations all counts are halved.
MEMORY = 4000
# Entries whose own history is kept, samples kept for the report.
MAX_ENTRIES, MAX_SAMPLES = 20_000, 50


@dataclass(frozen=True, slots=True)
class Pair:
    """A would-be hit: an entry and a question near it that the guards do not tell apart for certain."""

    entry: str
    model: str
    verdict: Verdict
    similarity: float

    @property
    def relation(self) -> str:
        """`agree`: the guards see no difference; `added`: one has words more; `replaced`: each has words of its own."""
        if self.verdict.agree:
            return "agree"
        return "replaced" if self.verdict.lacking else "added" if self.verdict.extra == 1 else "added several"

    @property
    def rank(self) -> tuple[int, float]:
        """The pair with the least is the one to serve or to learn about: least difference, then nearest."""
        return (2 if self.verdict.lacking else min(self.verdict.extra, 1)), -self.similarity


@dataclass(frozen=True, slots=True)
class Kind:
    """Pairs that are judged together."""

    model: str
    relation: str
    band: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.relation} >= {self.band:.2f}"


def kinds_of(pair: Pair) -> list[Kind]:
    """The kinds that a pair belongs to, the narrowest first."""
    return [Kind(pair.model, pair.relation, band) for band in BANDS if pair.similarity >= band]


@dataclass(slots=True)
class History:
    """What was observed of one kind or entry."""

    right: float = 0.0
    wrong: float = 0.0
    floor: float = 0.0  # of an entry: only what is nearer than this is a would-be hit

    def add(self, right: bool) -> None:
        """One more comparison."""
        if right:
            self.right += 1
        else:
            self.wrong += 1
        if self.right + self.wrong > MEMORY:
            self.right /= 2
            self.wrong /= 2

    def evidence(self, bound: float) -> float:
        """The e-process against "the error rate is `bound` or more"."""
        if bound <= 0.0:
            return 0.0
        if bound >= 1.0:
            return math.inf
        total = 0.0
        for share in _SHARES:
            rate = share * bound
            if rate == 0.0 and self.wrong:
                continue
            exponent = self.right * math.log((1 - rate) / (1 - bound))
            if self.wrong:
                exponent += self.wrong * math.log(rate / bound)
            total += math.exp(min(exponent, 700.0))
        return total / len(_SHARES)

    @property
    def rate(self) -> float | None:
        """The share of comparisons that were wrong."""
        seen = self.right + self.wrong
        return self.wrong / seen if seen else None

    def upper_rate(self) -> float:
        """The least error rate that the evidence speaks against with 95 % confidence; 1.0 for none."""
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            if self.evidence(middle) >= _ONCE:
                high = middle
            else:
                low = middle
        return high


@dataclass(frozen=True, slots=True)
class Serve:
    """The stored answer may be given."""


@dataclass(frozen=True, slots=True)
class Ask:
    """The node is asked, and what it says is compared; `reason`: `learning`, `observing` or `entry`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One comparison, for the report."""

    pair: Pair
    request_id: str
    right: bool
    at_s: float  # wall clock


@dataclass(slots=True)
class Trust:
    """Every kind's and entry's history in this process."""

    max_error_rate: float
    observe_share: float
    rng: Random
    kinds: dict[Kind, History] = field(default_factory=dict)
    entries: OrderedDict[str, History] = field(default_factory=OrderedDict)
    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=MAX_SAMPLES))

    def decide(self, pair: Pair) -> Serve | Ask:
        """Whether a would-be hit may be served now."""
        own = self.entries.get(pair.entry)
        if own is not None and (pair.similarity <= own.floor or (own.wrong >= MAX_WRONG and not self._is_trusted(own))):
            return Ask("entry")
        share = 1.0 if self._is_trusted(own) else self._share(pair)
        if share == 0.0:
            return Ask("learning")
        return Serve() if self.rng.random() < share * (1.0 - self.observe_share) else Ask("observing")

    def _share(self, pair: Pair) -> float:
        """The share of such pairs that may be served.

        All, where a kind of theirs is trusted. Pairs that guards and nearness both vouch for are not strangers: of
        them so many are served that the wrong answers among all their lookups stay under the bound, whatever their
        error rate is up to its upper bound; the others teach what it is.
        """
        kinds = kinds_of(pair)
        if any(self._is_trusted(self.kinds.get(kind)) for kind in kinds):
            return 1.0
        if pair.relation != "agree" or pair.similarity < PRIOR_BAND or self.max_error_rate <= 0.0:
            return 0.0
        seen = self.kinds.get(Kind(pair.model, pair.relation, PRIOR_BAND)) or History()
        upper = History(seen.right + PRIOR_RIGHT, seen.wrong).upper_rate()
        return min(1.0, self.max_error_rate / upper)

    def observe(self, sample: Sample) -> None:
        """What the node said was compared with the entry's answer."""
        for kind in kinds_of(sample.pair):
            self.kinds.setdefault(kind, History()).add(sample.right)
        own = self._entry(sample.pair.entry)
        own.add(sample.right)
        if not sample.right:
            own.floor = max(own.floor, sample.pair.similarity)
        self.samples.append(sample)

    def kill(self, entry: str, neighbours: dict[str, float]) -> None:
        """An operator found an answer wrong: each neighbour (by its cosine to it) has to be nearer than that."""
        self.entries.pop(entry, None)
        for neighbour, similarity in neighbours.items():
            own = self._entry(neighbour)
            own.floor = max(own.floor, similarity)
            own.wrong += 1

    def report(self) -> list[dict[str, Any]]:
        """Each kind: what was seen, the estimated error and its upper bound."""
        return [
            {
                "model": kind.model,
                "kind": kind.name,
                "observed": round(history.right + history.wrong),
                "wrong": round(history.wrong),
                "error_rate": history.rate,
                "error_rate_upper_95": round(history.upper_rate(), 5),
                "trusted": self._is_trusted(history),
            }
            for kind, history in sorted(self.kinds.items(), key=lambda item: (item[0].model, item[0].name))
        ]

    def _is_trusted(self, history: History | None) -> bool:
        return history is not None and history.evidence(self.max_error_rate) >= _ENOUGH

    def _entry(self, entry: str) -> History:
        own = self.entries.get(entry)
        if own is None:
            own = self.entries[entry] = History()
            if len(self.entries) > MAX_ENTRIES:
                self.entries.popitem(last=False)
        else:
            self.entries.move_to_end(entry)
        return own
