"""Prompts that kill nodes: on whose account a failure stands, and when a request is refused instead of sent again.

A node that dies takes everything with it that ran there, and one request of all of these may be what killed it. So a
request whose node died is a *suspect*, and suspects are kept apart: one node holds one suspect at a time, for as long
as it takes to read its prompt. Then the next death has one name: a good request is charged with one death at most,
and the one that kills is found with the second and goes to no third node.

Hangs are found seconds after they happened, when everybody who waited there has waited long enough: the first move is
made at once, apart from other suspects where there is room. Where two nodes hung under a request, it has the next one
to itself for as long as a hang takes to be found. It is to blame for a hang as the only suspect that waited there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from balancer.core.breaker import Permit
from balancer.core.outcome import Outcome
from balancer.core.request import NodeId

# A request on whose account this many nodes died or hung goes to no further one.
DEATHS = 2
# Nor does one that was there when so many died, though it was never the only suspect: it may kill while it decodes.
PRESENT = 3
# A suspect has a node to itself until its first byte, or for this many times the predicted seconds of reading its
# prompt, within these bounds: a prompt that kills does it while it is read.
HOLD_READINGS, LEAST_HOLD_S, MOST_HOLD_S = 2.0, 0.1, 0.5
# A suspect waits this long after its last death: what else died in that moment is known by then.
SETTLE_S = 0.02
# However many suspects there are, the last of them waits about this long for its turn.
MOST_DELAY_S = 2.0
# What else breaks at a node within this time of a death there has broken of the same cause.
SAME_CAUSE_S = 1.0
# A failure is the request's and not the node's when the node answered another request within this time of it.
ANSWERED_S = 5.0
# A verdict stands only if the nodes' own faults would do the same to fewer of their recent requests than this.
EXPECTED_BY_CHANCE = 0.05
# Believed of a node before it is counted: one failure in two requests, one death in a hundred (Laplace's rule of
# succession, with prior requests of its own for deaths: a process dies far less often than it answers 500).
PRIOR_REQUESTS, PRIOR_REQUESTS_PER_DEATH = 2, 100
# How long an equal request is refused, and how long a death without a verdict is remembered.
VERDICT_S = 60.0
# Fingerprints that are remembered at once: the oldest goes. About 200 bytes each.
MOST_REMEMBERED = 10_000

_DEATHS = frozenset(
    outcome.label
    for outcome in (
        Outcome.RESET_BEFORE_HEAD,
        Outcome.RESET_AFTER_HEAD,
        Outcome.TRUNCATED,
        Outcome.FIRST_BYTE_TIMEOUT,
        Outcome.UNARY_TIMEOUT,
        Outcome.IDLE_TIMEOUT,
    )
)
_REFUSALS = frozenset({Outcome.REFUSED.label, Outcome.CONNECT_TIMEOUT.label})


def fingerprint(tenant: str, path: str, model: str, body: bytes) -> str:
    """What equal requests of one tenant have in common: SHA-256 (hex) over the parts, each with its length."""
    digest = hashlib.sha256()
    for part in (tenant.encode(), path.encode(), model.encode(), body):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


def is_death(outcome: Outcome, *, stale_before: bool) -> bool:
    """Whether an attempt ended with the node gone or hung after the request had been sent there.

    `stale_before`: the attempt just before broke on a kept-alive connection to the same node. Refused by then, the
    node did not merely close that connection.
    """
    return outcome.label in _DEATHS or (stale_before and outcome.label in _REFUSALS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One attempt that failed by a node's fault."""

    node: NodeId
    permit: Permit | None  # None: nothing was counted against the node
    at_s: float
    present: bool  # a death, with this request there
    charged: bool  # and on its account
    requests: int  # that the node had answered or failed lately, without this one
    failed: int  # of these
    hung: bool = False  # the node stopped moving while this request waited there

    @property
    def chance(self) -> float:
        """The probability that the node fails a request like this one by its own fault."""
        return (self.failed + 1) / (
            self.requests + (PRIOR_REQUESTS_PER_DEATH if self.present or self.hung else PRIOR_REQUESTS)
        )


@dataclass(slots=True, eq=False)
class Account:
    """What one request has met so far. `inherited` nodes died under equal requests before it, others hung."""

    inherited: frozenset[NodeId] = frozenset()
    inherited_hung: frozenset[NodeId] = frozenset()
    failures: list[Failure] = field(default_factory=list)
    cleared: int = 0  # of the failures: a node has read its prompt since then, and lived
    blamed: bool = False  # a further node hung, and it was the only suspect that waited there

    @property
    def deaths(self) -> int:
        """Nodes that died on its account alone."""
        return sum(failure.charged for failure in self.failures[self.cleared :])

    @property
    def present(self) -> frozenset[NodeId]:
        """Nodes that died while it, or an equal request, was there."""
        return self.inherited.union(failure.node for failure in self.failures if failure.present)

    @property
    def hung(self) -> frozenset[NodeId]:
        """Nodes that stopped moving while it, or an equal request, waited there."""
        return self.inherited_hung.union(failure.node for failure in self.failures if failure.hung)

    @property
    def is_suspect(self) -> bool:
        """Whether a node may have died or hung of it, so that it is kept from other suspects."""
        return bool(self.present or self.hung)

    @property
    def waits_its_turn(self) -> bool:
        """Whether it must have the next node to itself, however long that takes."""
        return bool(self.present) or len(self.hung) >= DEATHS

    @property
    def is_spent(self) -> bool:
        """Whether it goes to no further node."""
        return self.blamed or self.deaths >= DEATHS or len(self.present) >= PRESENT

    @property
    def settled_s(self) -> float:
        """From when on it may be sent again."""
        return self.failures[-1].at_s + SETTLE_S if self.failures else -math.inf

    def read(self) -> None:
        """A node has read its prompt and lived: no death so far was that prompt's reading."""
        self.cleared = len(self.failures)

    def condemns(self, answered_s: Iterable[float]) -> bool:
        """Whether the request is to blame. `answered_s`: when the node of each failure last answered another well.

        Never where the nodes fail so often that some request had to meet this. Deaths speak for themselves; other
        failures only where each of the nodes answered others in that time: else they stay on the nodes' books.
        """
        before = self.inherited | self.inherited_hung
        if len(before.union(failure.node for failure in self.failures)) < DEATHS:
            return False
        seen = max(1, sum(failure.requests for failure in self.failures))
        if seen * math.prod(failure.chance for failure in self.failures) > EXPECTED_BY_CHANCE:
            return False
        if self.is_spent:
            return True
        if any(failure.hung for failure in self.failures):
            return False  # several waited there, and it was not found which
        return all(at_s >= failure.at_s - ANSWERED_S for failure, at_s in zip(self.failures, answered_s, strict=True))


def blame(waited: Iterable[Account]) -> None:
    """A node hung under these: the only one under which another had died or hung before is to blame, if it is one."""
    known = [account for account in waited if account.is_suspect]
    if len(known) == 1:
        known[0].blamed = True


@dataclass(frozen=True, slots=True)
class _Cause:
    """Why a node died at `at_s`, as far as is known: the one suspect that was there, or anybody."""

    at_s: float
    blamed: Account | None
    anybody: bool


class Quarantine:
    """Where suspects are whose prompt may not have been read yet; whose account a death goes to."""

    def __init__(self) -> None:
        self._held: dict[NodeId, dict[Account, float]] = {}  # suspects on a node, each with the end of its hold
        self._causes: dict[NodeId, _Cause] = {}  # of each node's last death
        self.waiting = 0  # suspects that wait for a node

    def __len__(self) -> int:
        """Suspects on nodes."""
        return sum(map(len, self._held.values()))

    def free_from_s(self, node: NodeId, now: float) -> float:
        """When the node takes the next suspect; -inf: at once."""
        latest_s = max(self._held.get(node, _NOBODY).values(), default=-math.inf)
        return latest_s if latest_s > now else -math.inf

    def enter(
        self, node: NodeId, account: Account, reading_s: float, nodes: int, now: float, *, hang_s: float = 0.0
    ) -> None:
        """A suspect was sent to a node that reads its prompt in `reading_s`; `nodes` are there for all that wait.

        `hang_s` is how long a hang takes to be found: for so long the node is its own where two hung under it.
        """
        hold_s = min(MOST_HOLD_S, max(LEAST_HOLD_S, HOLD_READINGS * reading_s))
        if self.waiting:
            hold_s = min(hold_s, MOST_DELAY_S * max(1, nodes) / self.waiting)
        if len(account.hung) >= DEATHS:
            hold_s = max(hold_s, hang_s)
        self._held.setdefault(node, {})[account] = now + hold_s

    def leave(self, node: NodeId, account: Account, *, alive: bool) -> bool:
        """It showed its first byte, or is over; True when it was there. `alive`: the node did not die of it."""
        held = self._held.get(node)
        if held is None or held.pop(account, None) is None:
            return False
        if alive:
            account.read()
        if not held:
            del self._held[node]
        return True

    def charge(self, node: NodeId, account: Account, sent_s: float, now: float) -> bool:
        """The node died under this request, sent there at `sent_s`: whether that goes to its account.

        To the one suspect's whose prompt it may have been reading. With none, to everybody's that was there. With
        several it is not clear, and goes to nobody's.
        """
        cause = self._causes.get(node)
        if cause is None or now - cause.at_s >= SAME_CAUSE_S or sent_s > cause.at_s:
            cause = self._causes[node] = self._cause(node, now)
            return cause.anybody or cause.blamed is account
        return cause.anybody or cause.blamed is account

    def _cause(self, node: NodeId, now: float) -> _Cause:
        held = self._held.get(node, _NOBODY)
        for account in [account for account, until_s in held.items() if until_s <= now]:
            account.read()  # it outlived its hold
            del held[account]
        blamed = next(iter(held)) if len(held) == 1 else None
        return _Cause(now, blamed, anybody=not held)

    def forget(self, node: NodeId) -> None:
        """The node is gone."""
        self._held.pop(node, None)
        self._causes.pop(node, None)


_NOBODY: dict[Account, float] = {}


@dataclass(slots=True)
class _Mark:
    """What is remembered of one fingerprint."""

    present: frozenset[NodeId]  # nodes that died while it was there
    hung: frozenset[NodeId]
    is_verdict: bool
    until_s: float


class Ledger:
    """Fingerprints of requests that nodes died of, or that no node could answer. Bounded, and everything in it ends."""

    def __init__(self, keep_s: float = VERDICT_S) -> None:
        self.keep_s = keep_s
        self._marks: dict[str, _Mark] = {}

    def __len__(self) -> int:
        return len(self._marks)

    def verdict_for_s(self, mark: str, now: float) -> float:
        """Seconds for which an equal request is still refused; 0.0: it is not."""
        kept = self._kept(mark, now)
        return kept.until_s - now if kept is not None and kept.is_verdict else 0.0

    def present(self, mark: str, now: float) -> frozenset[NodeId]:
        """Nodes that died while an equal request was there."""
        kept = self._kept(mark, now)
        return kept.present if kept is not None else frozenset()

    def hung(self, mark: str, now: float) -> frozenset[NodeId]:
        """Nodes that hung while an equal request waited there."""
        kept = self._kept(mark, now)
        return kept.hung if kept is not None else frozenset()

    def died(self, mark: str, present: frozenset[NodeId], now: float, *, hung: frozenset[NodeId] = frozenset()) -> None:
        """These nodes died or hung with this request there by now. Requests at the same time do not add up."""
        kept = self._kept(mark, now)
        if kept is None or not kept.is_verdict:
            if kept is not None:
                present, hung = max(present, kept.present, key=len), max(hung, kept.hung, key=len)
            self._keep(mark, _Mark(present, hung, False, now + self.keep_s))

    def condemn(self, mark: str, now: float, for_s: float | None = None) -> None:
        """Equal requests are refused from now on, for a while."""
        self._keep(mark, _Mark(frozenset(), frozenset(), True, now + (self.keep_s if for_s is None else for_s)))

    def answered(self, mark: str) -> None:
        """An equal request was answered well: it kills nobody."""
        self._marks.pop(mark, None)

    def sweep(self, now: float) -> None:
        """Let go of what is over; what was marked first ends first, or nearly."""
        for mark in [mark for mark, kept in self._marks.items() if kept.until_s <= now]:
            del self._marks[mark]

    def _kept(self, mark: str, now: float) -> _Mark | None:
        kept = self._marks.get(mark)
        return kept if kept is not None and kept.until_s > now else None

    def _keep(self, mark: str, kept: _Mark) -> None:
        self._marks.pop(mark, None)
        self._marks[mark] = kept
        if len(self._marks) > MOST_REMEMBERED:
            del self._marks[next(iter(self._marks))]
