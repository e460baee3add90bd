"""Poisonous prompts: keeps what `core.poison` decided, tells other balancers through the store, and refuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from balancer.clock import Clock
from balancer.core.breaker import Permit
from balancer.core.cache_key import verdict_name
from balancer.core.node import Node
from balancer.core.outcome import Again, Fault, Outcome
from balancer.core.poison import Account, Failure, Ledger, Quarantine, blame, fingerprint, is_death
from balancer.core.request import InferenceRequest, NodeId
from balancer.core.selection import Candidates
from balancer.core.wedge import JUDGED_S, may_have_hung_it
from balancer.errors import BadAnswer
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.store import Store

# Larger bodies are not remembered once they are let go of: hashing a megabyte takes a millisecond.
MARKED_BYTES = 1024 * 1024
_TIMEOUTS = frozenset({Outcome.FIRST_BYTE_TIMEOUT, Outcome.UNARY_TIMEOUT, Outcome.IDLE_TIMEOUT})
# What another balancer says is believed for so long at most.
MOST_VERDICT_S = 3600.0
# What stands in the store: that there is a verdict. All else is in the name.
_VERDICT = b"1"

log = get_logger()


class Verdicts:
    """Whose account a failure stands on, for all requests. Costs nothing while nodes do not fail."""

    def __init__(
        self, *, registry: Registry, store: Store, metrics: Metrics, clock: Clock, verdict_s: float, stall_s: float
    ) -> None:
        self._registry = registry
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._ledger = Ledger(verdict_s)
        self._stall_s = stall_s
        self._quarantine = Quarantine()
        self._released = asyncio.Event()
        self.on_condemned: Callable[[str, float], None] | None = None  # to be told to other balancers

    def configure(self, verdict_s: float, stall_s: float) -> None:
        """New settings, for verdicts from now on."""
        self._ledger.keep_s = verdict_s
        self._stall_s = stall_s

    def __bool__(self) -> bool:
        """Whether any fingerprint is remembered: without one, requests need none."""
        return bool(self._ledger)

    @property
    def suspects(self) -> int:
        """Suspects that wait, or whose prompt a node may still be reading."""
        return self._quarantine.waiting + len(self._quarantine)

    # -- before the first attempt

    def check(self, request: InferenceRequest) -> None:
        """Refuse what an equal request was condemned for. Raises BadAnswer."""
        now = self._clock.now()
        mark = self._mark(request)
        if self._ledger.verdict_for_s(mark, now) > 0.0:
            raise self._refused()
        present, hung = self._ledger.present(mark, now), self._ledger.hung(mark, now)
        if present or hung:
            request.account = Account(present, hung)

    def _refused(self) -> BadAnswer:
        self._metrics.poison_refused.inc()
        return BadAnswer("no node could answer an equal request; it is not tried again for a while")

    def heard(self, mark: str, for_s: float) -> None:
        """Another balancer condemned it."""
        self._ledger.condemn(mark, self._clock.now(), min(for_s, MOST_VERDICT_S))

    def remember(self, request: InferenceRequest) -> None:
        """The body is about to be let go of: keep its fingerprint."""
        if len(request.body) <= MARKED_BYTES:
            self._mark(request)

    # -- where a suspect may go

    async def turn(self, request: InferenceRequest) -> None:
        """Wait until a node that is left for this suspect holds no other; returns at once for any other request.

        Raises BadAnswer where another balancer has condemned an equal one.
        """
        account, quarantine = request.account, self._quarantine
        if account is None or not account.waits_its_turn:
            return
        quarantine.waiting += 1
        try:
            await self._clock.sleep(max(0.0, account.settled_s - self._clock.now()))
            if await self._is_condemned_elsewhere(request):
                raise self._refused()
            while (wait_s := self._wait_s(request)) > 0.0:
                with contextlib.suppress(TimeoutError):  # `wait_for` may swallow a cancellation
                    async with asyncio.timeout(wait_s):
                        await self._released.wait()
        finally:
            quarantine.waiting -= 1

    async def _is_condemned_elsewhere(self, request: InferenceRequest) -> bool:
        """Whether the store has a verdict that this balancer has not heard of."""
        if not (request.mark or request.body):
            return False
        mark = self._mark(request)
        if await self._store.get(verdict_name(request.tenant.id, mark)) is None:
            return False
        self._ledger.condemn(mark, self._clock.now())
        return True

    def _wait_s(self, request: InferenceRequest) -> float:
        now = self._clock.now()
        nodes = self._registry.candidates(request.model, now).nodes
        left = [self._quarantine.free_from_s(node.id, now) for node in nodes if node.id not in request.tried]
        return min(min(left), request.deadline_s) - now if left else 0.0

    def apart(self, candidates: Candidates, request: InferenceRequest, now: float) -> Candidates:
        """The candidates that hold no suspect, for a request that is one; all of them where none is free."""
        account, quarantine = request.account, self._quarantine
        if account is None or not account.is_suspect or not quarantine:
            return candidates
        free = tuple(node for node in candidates.nodes if quarantine.free_from_s(node.id, now) <= now)
        usable = any(node.id not in request.tried for node in free)
        return replace(candidates, nodes=free) if usable else candidates

    def sent(self, request: InferenceRequest, node: Node, now: float) -> None:
        """The request goes to the node."""
        account = request.account
        if account is not None and account.is_suspect:
            reading_s = request.prompt_tokens() * node.books.s_per_token
            hang_s = self._stall_s + 2.0 * reading_s + JUDGED_S
            self._quarantine.enter(node.id, account, reading_s, len(self._registry.nodes), now, hang_s=hang_s)

    def left(self, request: InferenceRequest, node: Node, *, alive: bool = False) -> None:
        """It showed its first byte there, or is over: the node may take the next suspect."""
        account = request.account
        if account is not None and self._quarantine.leave(node.id, account, alive=alive):
            self._released.set()
            self._released = asyncio.Event()

    def forget(self, id_: NodeId) -> None:
        """The node is gone."""
        self._quarantine.forget(id_)

    # -- what became of an attempt

    def failed(
        self,
        request: InferenceRequest,
        node: Node,
        permit: Permit,
        outcome: Outcome,
        *,
        sent_s: float,
        stale_before: bool,
    ) -> None:
        """An attempt ended in a way that may be the node's fault; to be told before `left`."""
        ruling = outcome.ruling
        died = is_death(outcome, stale_before=stale_before)
        if not died and not (ruling.fault is Fault.NODE and ruling.again is Again.BUDGET):
            return
        now = self._clock.now()
        account = request.account
        if account is None:
            account = request.account = Account()
        hung_alone = outcome in _TIMEOUTS and node.answered_s > sent_s
        charged = hung_alone or (died and self._quarantine.charge(node.id, account, sent_s, now))
        requests, failed = node.breaker.recently(now, whole_seconds=died)
        if not died:
            requests, failed = max(0, requests - 1), max(0, failed - 1)  # this very failure
        account.failures.append(
            Failure(
                node=node.id,
                permit=permit,
                at_s=now,
                present=died,
                charged=charged,
                requests=requests,
                failed=failed,
            )
        )
        if died and (request.mark or request.body):
            self._ledger.died(self._mark(request), account.present, now)
        if account.is_spent:
            self.judge(request)

    def wedged(self, node: Node, now: float) -> None:
        """The node stopped moving: what waits there is remembered, and moved by others without being charged."""
        waiting = [(attempt, seen) for attempt in node.live if (seen := attempt.seen()) is not None]
        every = [seen for _, seen in waiting]
        suspects: dict[Account, InferenceRequest] = {}
        for attempt, seen in waiting:
            if may_have_hung_it(seen, every, heard_s=node.heard_s, stall_s=self._stall_s):
                request = attempt.request
                account = request.account
                if account is None:
                    account = request.account = Account()
                suspects[account] = request
        blame(suspects)
        requests, failed = node.breaker.recently(now, whole_seconds=True)
        for account, request in suspects.items():
            account.failures.append(
                Failure(
                    node=node.id,
                    permit=None,
                    at_s=now,
                    present=False,
                    charged=False,
                    requests=requests,
                    failed=failed,
                    hung=True,
                )
            )
            if request.mark or request.body:
                self._ledger.died(self._mark(request), account.present, now, hung=account.hung)

    def is_condemned(self, request: InferenceRequest) -> bool:
        """Whether it goes to no further node: two died on its account, or an equal request was condemned."""
        account = request.account
        if account is not None and account.is_spent:
            return True
        mark = request.mark
        return bool(mark) and self._ledger.verdict_for_s(mark, self._clock.now()) > 0.0

    def judge(self, request: InferenceRequest) -> None:
        """It failed for good. Where that is its own doing: keep the verdict, and clear the nodes' books of it."""
        account = request.account
        if account is None or not account.failures or not (request.mark or request.body):
            return
        now = self._clock.now()
        mark = self._mark(request)
        if self._ledger.verdict_for_s(mark, now) > 0.0:
            return
        nodes = [self._registry.nodes.get(failure.node) for failure in account.failures]
        answered_s = [node.answered_s if node is not None else float("-inf") for node in nodes]
        if not account.condemns(answered_s) or self._ledger.keep_s <= 0.0:
            return
        for node, failure in zip(nodes, account.failures, strict=True):
            if node is not None and failure.permit is not None:
                self._registry.forgive(node, failure.permit, failure.at_s)
        self._ledger.sweep(now)
        self._ledger.condemn(mark, now)
        self._store.put(verdict_name(request.tenant.id, mark), _VERDICT, self._ledger.keep_s)
        self._metrics.poison_verdicts.inc()
        if self.on_condemned is not None:
            self.on_condemned(mark, self._ledger.keep_s)
        log.warning(
            "request.condemned",
            request_id=request.id,
            tenant=request.tenant.id,
            model=request.model,
            deaths=len(account.present | account.hung),
            nodes=[failure.node for failure in account.failures],
            for_s=self._ledger.keep_s,
        )

    def answered(self, request: InferenceRequest) -> None:
        """It was answered well, so no node dies of it."""
        if self._ledger and (request.mark or request.body):
            self._ledger.answered(self._mark(request))

    @staticmethod
    def _mark(request: InferenceRequest) -> str:
        if not request.mark:
            request.mark = fingerprint(request.tenant.id, request.endpoint.path, request.model, request.body)
        return request.mark
