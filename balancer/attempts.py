"""Select -> permit -> try -> classify -> retry, until an answer may be handed to the client."""

from __future__ import annotations

import asyncio
from random import Random
from types import TracebackType
from typing import Self

from tenacity import AsyncRetrying, RetryCallState

from balancer.admission import Admission
from balancer.clock import Clock
from balancer.core.hedge import has_room
from balancer.core.node import Node
from balancer.core.outcome import Again, Fault, Outcome
from balancer.core.poison import DEATHS
from balancer.core.request import BYTES_PER_TOKEN, InferenceRequest, NodeId
from balancer.core.retry import GiveUp, Retry, RetryPlan, RetryPolicy
from balancer.core.retry_budget import RetryBudget
from balancer.core.routing import Routing
from balancer.core.selection import Candidates
from balancer.errors import BalancerError
from balancer.explain import Call
from balancer.failures import after_all, is_shown, no_node
from balancer.hedging import LOST, Hedging
from balancer.live import LiveAttempt, Slot
from balancer.metrics import Metrics
from balancer.pools import Pools
from balancer.registry import Registry
from balancer.verdicts import Verdicts
from balancer.wire.answer import Answer, AnswerLimits
from balancer.wire.framing import retry_after_s
from balancer.wire.outbound import ConnectFailed, NodeConnection, NodePool
from balancer.wire.sse import StreamScanner, scanner_for
from balancer.wire.timers import TimerWheel

# What counts against `RetryPolicy.max_attempts`.
_COUNTED = frozenset(outcome.label for outcome in Outcome if outcome.ruling.again is Again.BUDGET)


class Attempt(LiveAttempt):
    """One try on one node. Used as a context: leaving it settles the node's books exactly once."""

    __slots__ = ("_attempts", "_settled", "call", "connect_outcome", "started_s")

    def __init__(
        self, attempts: Attempts, slot: Slot, answer: Answer, request: InferenceRequest, call: Call, now: float
    ) -> None:
        super().__init__(slot, answer, request)
        self._attempts = attempts
        self._settled = False
        self.call = call
        self.started_s = now
        self.connect_outcome: Outcome | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.answer.cancel()
        self.settle()

    @property
    def outcome(self) -> Outcome:
        """How it ended, or OK as far as is known."""
        return self.connect_outcome or self.answer.outcome or Outcome.OK

    def settle(self) -> None:
        """The attempt is over: count it for the node."""
        if not self._settled:
            self._settled = True
            self.answer.on_first_token = self.answer.may_commit = None
            self._attempts.settled(self)

    def lose(self) -> None:
        """Another attempt of the same request was quicker."""
        self.answer.cancel(Outcome.HEDGE_LOST)
        self.settle()

    def has_another(self) -> bool:
        """Whether another node may have the request."""
        return self._attempts.has_another(self.request)

    def first_token(self, now: float) -> None:
        """The first token of a stream came."""
        self._attempts.first_token(self, now)


class _NobodyLeft(BalancerError):
    """No node to try; `candidates` says what there was. Never leaves this file."""

    def __init__(self, candidates: Candidates) -> None:
        super().__init__("no node is left")
        self.candidates = candidates


class Attempts:
    """Makes attempts until one may be handed to the client, each on another node."""

    def __init__(
        self,
        *,
        registry: Registry,
        admission: Admission,
        routing: Routing,
        verdicts: Verdicts,
        hedging: Hedging,
        retry: RetryPolicy,
        limits: AnswerLimits,
        pools: Pools,
        connect_s: float,
        metrics: Metrics,
        clock: Clock,
        wheel: TimerWheel,
        rng: Random,
    ) -> None:
        self._registry = registry
        self._admission = admission
        self.routing = routing
        self._verdicts = verdicts
        self._hedging = hedging
        self._policy = retry
        self._limits = limits
        self._pools = pools
        self._connect_s = connect_s
        self._metrics = metrics
        self._clock = clock
        self._wheel = wheel
        self._rng = rng
        self._budget = RetryBudget(retry.budget_ratio, retry.min_retries_per_s)
        self._no_usage: set[NodeId] = set()  # nodes that refused `stream_options`

    def configure(self, routing: Routing, retry: RetryPolicy, limits: AnswerLimits, connect_s: float) -> None:
        """New settings, for attempts that begin from now on."""
        self.routing = routing
        self._policy = retry
        self._limits = limits
        self._connect_s = connect_s
        self._budget.ratio = retry.budget_ratio
        self._budget.min_per_s = retry.min_retries_per_s

    async def first_byte(self, request: InferenceRequest, call: Call) -> Attempt:
        """An attempt whose answer may be handed on: committed, whole, or a node's own word about the request.

        The caller owns the attempt and leaves it as a context. Raises BalancerError when all that was tried failed.
        """
        try:
            if self._hedging.is_on and self._hedging.covers(request):
                attempt = await self._hedged(request, call)
            else:
                attempt = await self._try(request, call)
        except _NobodyLeft as nobody:
            raise no_node(nobody.candidates, request.model, self._registry, self._clock.now()) from None
        if attempt.outcome is Outcome.OK or attempt.outcome is Outcome.REQUEST_ERROR:
            return attempt
        return await self._again(request, call, attempt)

    def is_condemned(self, request: InferenceRequest) -> bool:
        """Whether it goes to no further node, in whose name whatsoever: nodes died of it."""
        return self._verdicts.is_condemned(request)

    def forget_body(self, request: InferenceRequest) -> None:
        """The request will not be sent again."""
        self._verdicts.remember(request)
        request.forget_body()

    async def continuation(self, request: InferenceRequest, call: Call, broken: Attempt) -> Attempt | None:
        """An attempt at the rest of an answer that broke off after its commit point; None where there can be none.

        It is a retry like any other, on a node with the same engine, and not where two nodes have died under the
        request. The caller owns the attempt.
        """
        account = request.account
        if account is not None and len(account.present) >= DEATHS:
            return None  # half of an answer is not worth a third node, whosever fault it was
        engine = broken.node.engine
        request.tried.update(node.id for node in self._registry.nodes.values() if node.engine != engine)
        try:
            counted = sum(label in _COUNTED for _, label, _ in call.attempts[:-1])  # before the one that broke
            attempt = await self._again(request, call, broken, counted=counted)
        except BalancerError:
            return None
        if attempt.node.engine == engine and attempt.outcome is Outcome.OK and attempt.answer.is_stream:
            return attempt
        with attempt:
            return None

    def succeeded(self, request: InferenceRequest) -> None:
        """A request was answered well: it earns its share of a retry."""
        self._budget.succeeded(self._clock.now())
        if self._verdicts:
            self._verdicts.answered(request)

    async def _hedged(self, request: InferenceRequest, call: Call) -> Attempt:
        """A first attempt, and another beside it once its first token is late for a prompt of this length."""
        delay_s = self._hedging.delay_s(request)
        if delay_s is None:
            attempt = await self._try(request, call)
        else:

            def may_hedge() -> bool:
                now = self._clock.now()
                nodes = self._registry.candidates(request.model, now).nodes
                if self._admission.is_contended or not has_room(nodes, request.tried, delay_s, now):
                    return False
                return self._budget.try_spend(now)

            attempt = await self._hedging.race(lambda: self._try(request, call), delay_s, may_hedge)
        if attempt.answer.first_token_s:
            self._hedging.learned(request, attempt.answer.first_token_s - attempt.answer.sent_s)
        return attempt

    async def _again(self, request: InferenceRequest, call: Call, failed: Attempt, *, counted: int = 0) -> Attempt:
        plan = RetryPlan(self._policy, self._budget, self._rng, request.deadline_s)
        plan.counted = counted
        last = failed
        decision = self._decide(plan, failed, request)

        def again(state: RetryCallState) -> bool:
            nonlocal decision, last
            assert state.outcome is not None
            if state.outcome.failed:
                return False
            last = state.outcome.result()
            decision = self._decide(plan, last, request)
            return isinstance(decision, Retry)

        def wait_s(state: RetryCallState | None) -> float:
            return decision.after_s if isinstance(decision, Retry) else 0.0

        if isinstance(decision, Retry):
            try:
                if decision.after_s > 0.0:
                    await self._clock.sleep(decision.after_s)
                retrying = AsyncRetrying(
                    retry=again, wait=wait_s, sleep=self._clock.sleep, retry_error_callback=lambda state: last
                )
                last = await retrying(self._try, request, call)
            except _NobodyLeft:
                pass  # the last failure stands
        if last.outcome is Outcome.OK or last.outcome is Outcome.REQUEST_ERROR:
            return last
        self._verdicts.judge(request)
        return self._passed_on(last, request, call)

    def _decide(self, plan: RetryPlan, attempt: Attempt, request: InferenceRequest) -> Retry | GiveUp:
        outcome = attempt.outcome
        if outcome.ruling.again is not Again.NEVER and not self.has_another(request):
            return GiveUp("no_node_left")
        if self._verdicts.is_condemned(request):
            return GiveUp("poison")
        sent = attempt.connect_outcome is None
        decision = plan.next(outcome, self._clock.now(), replayable=request.replayable or not sent)
        if isinstance(decision, Retry):
            self._metrics.retries.of(outcome.label).inc()
        elif decision.reason == "budget":
            self._metrics.retry_budget_exhausted.inc()
        return decision

    def _passed_on(self, last: Attempt, request: InferenceRequest, call: Call) -> Attempt:
        """The last failure as the client sees it: a node's own 4xx where all nodes say it, else an error."""
        outcome, answer = last.outcome, last.answer
        met = {label for _, label, _ in call.attempts}
        if met == {outcome.label} and is_shown(outcome, answer.status) and not self.has_another(request):
            return last
        raise after_all(outcome, answer.message, met, request.model, self._registry, self._clock.now())

    def has_another(self, request: InferenceRequest) -> bool:
        """Whether some node is left to be tried: without one a retry is neither waited for nor paid."""
        candidates = self._registry.candidates(request.model, self._clock.now())
        return any(node.id not in request.tried and not node.is_wedged for node in candidates.nodes)

    async def _try(self, request: InferenceRequest, call: Call, again_at: Node | None = None) -> Attempt:
        """One attempt, up to its commit point or its failure; `again_at` is the node to take if it may be had."""
        slot = await self._slot(request, call, again_at)
        node = slot.node
        now = self._clock.now()
        endpoint = request.endpoint
        answer = Answer(
            self._clock,
            self._wheel,
            self._limits,
            self._scanner(request) if request.stream else None,
            streaming=request.stream,
            object_only=endpoint.object_only,
            json_only=not endpoint.binary,
            deadline_s=request.deadline_s,
        )
        request.extend = answer.extend
        attempt = Attempt(self, slot, answer, request, call, now)
        if request.stream:
            answer.on_first_token = attempt.first_token
            answer.may_commit = attempt.may_commit
        try:
            pool, credentials = self._pools.of(node)
            connection = pool.idle(now) or await self._connect(pool, attempt, request.deadline_s - now)
            if connection is not None:
                self._send(attempt, request, connection, pool, credentials)
                if not (answer.committed or answer.ended):
                    await answer.wait()
                if answer.outcome is Outcome.MISCONFIGURED:
                    self._excuse_unknown_model(answer, request)
                if self._may_ask_again(attempt, request, pool):
                    request.tried.discard(node.id)
                    attempt.settle()
                    return await self._try(request, call, again_at=node)
        except BaseException as error:
            answer.cancel(Outcome.HEDGE_LOST if error.args == (LOST,) else Outcome.CLIENT_GONE)
            attempt.settle()
            raise
        if attempt.outcome is not Outcome.OK:
            attempt.settle()
        return attempt

    async def _slot(self, request: InferenceRequest, call: Call, again_at: Node | None) -> Slot:
        """A node and the right to one attempt there; waits in the queue while every node left is full."""
        if request.account is not None:
            await self._verdicts.turn(request)
        taken = self._take(again_at, request, call, panic=False) if again_at is not None else None
        if taken is None and not (self._registry.is_bounded and self._admission.must_wait(request)):
            taken = self._select(request, call)
        if taken is None:
            taken = await self._admission.wait_for(
                request,
                call,
                self._admission.lane(request),
                lambda: self._select(request, call),
                lambda unused: self._unselect(request, unused),
            )
        call.attempts_begun += 1
        return taken

    def _select(self, request: InferenceRequest, call: Call) -> Slot | None:
        """Pick, permit and in-flight + 1 in one step; None while every node left is full. Raises _NobodyLeft."""
        now = self._clock.now()
        while True:
            candidates = self._registry.candidates(request.model, now)
            if request.account is not None:
                candidates = self._verdicts.apart(candidates, request, now)
            node = self.routing.pick(candidates, request, now, self._rng)
            if node is None:
                if any(node.id not in request.tried for node in candidates.nodes):
                    return None
                call.note_pick(request)
                raise _NobodyLeft(candidates)
            if (slot := self._take(node, request, call, panic=candidates.panic)) is not None:
                call.note_pick(request)
                return slot

    def _take(self, node: Node, request: InferenceRequest, call: Call, *, panic: bool) -> Slot | None:
        now = self._clock.now()
        request.tried.add(node.id)
        permit = self._registry.acquire(node, panic=panic, now=now)
        if permit is None:
            return None
        call.panic = call.panic or panic
        if request.account is not None:
            self._verdicts.sent(request, node, now)
        return Slot(node, permit, self.routing.dispatched(node, request, now))

    def _unselect(self, request: InferenceRequest, slot: Slot) -> None:
        request.tried.discard(slot.node.id)
        self._verdicts.left(request, slot.node)
        self.routing.ended(slot.node, slot.sent, request, Outcome.CLIENT_GONE, None, self._clock.now())
        self._registry.give_back(slot.node, slot.permit)

    async def _connect(self, pool: NodePool, attempt: Attempt, left_s: float) -> NodeConnection | None:
        try:
            async with asyncio.timeout(left_s):
                return await pool.connect(self._connect_s)
        except ConnectFailed as failed:
            attempt.connect_outcome = failed.outcome
        except TimeoutError:
            attempt.connect_outcome = Outcome.DEADLINE
        return None

    def _send(
        self,
        attempt: Attempt,
        request: InferenceRequest,
        connection: NodeConnection,
        pool: NodePool,
        credentials: bytes,
    ) -> None:
        now = self._clock.now()
        call = attempt.call
        if call.sent_s == 0.0:
            call.sent_s = now
            call.overhead_s = now - call.received_s - call.queue_s
        body = request.body
        if request.usage_body is not None and attempt.node.id not in self._no_usage:
            body = request.usage_body
        head = b"POST %b%b HTTP/1.1\r\n%b%b%bcontent-length: %d\r\n\r\n" % (
            pool.prefix,
            request.target,
            pool.host_line,
            credentials,
            request.head_lines,
            len(body),
        )
        attempt.tokens = len(body) / BYTES_PER_TOKEN
        connection.exchange(head, body, attempt.answer, now)

    def _excuse_unknown_model(self, answer: Answer, request: InferenceRequest) -> None:
        if answer.status == 404 and not self._registry.vouches_for(request.model):
            answer.outcome = Outcome.UNKNOWN_MODEL

    @staticmethod
    def _scanner(request: InferenceRequest) -> StreamScanner | None:
        return scanner_for(request.endpoint.dialect, request.choices, withhold_usage=request.usage_body is not None)

    def _may_ask_again(self, attempt: Attempt, request: InferenceRequest, pool: NodePool) -> bool:
        """Whether the failure was between us and the node, so that the same node may be asked again at once."""
        answer = attempt.answer
        if answer.outcome is Outcome.STALE_CONNECTION:
            pool.close()  # what else lies idle is as old; the next try connects anew
            return request.replayable
        if (
            answer.outcome is Outcome.REQUEST_ERROR
            and request.usage_body is not None
            and answer.status in (400, 422)
            and attempt.node.id not in self._no_usage
            and b"stream_options" in answer.peek()
        ):
            self._no_usage.add(attempt.node.id)  # from now on it gets the clients' own bodies
            return True
        return False

    def first_token(self, attempt: Attempt, now: float) -> None:
        """The first token of a stream came."""
        attempt.began(now, self._registry.slow_factor)
        self.routing.first_token(attempt.node, attempt.slot.sent, now)
        if attempt.request.account is not None:
            self._verdicts.left(attempt.request, attempt.node, alive=True)
        if attempt.request.body:  # else it was committed without content, and is late by what nobody can tell any more
            ttft_s = now - attempt.answer.sent_s
            self._registry.first_token(attempt.node, ttft_s, attempt.request.prompt_tokens(), now)

    def settled(self, attempt: Attempt) -> None:
        """Count one attempt's end, for its node and for the metrics."""
        now = self._clock.now()
        outcome, node, answer, request = attempt.outcome, attempt.node, attempt.answer, attempt.request
        attempt.over()
        self._registry.settle(node, attempt.slot.permit, outcome, now, request.model, slow=attempt.slow)
        if outcome.ruling.fault is Fault.NODE:
            permit, sent_s = attempt.slot.permit, attempt.started_s
            before, label, seconds = attempt.call.attempts[-1] if attempt.call.attempts else ("", "", 0.0)
            stale_before = before == node.id and label == Outcome.STALE_CONNECTION.label
            if stale_before:
                sent_s -= seconds  # it was there since then
            self._verdicts.failed(request, node, permit, outcome, sent_s=sent_s, stale_before=stale_before)
        if request.account is not None:
            self._verdicts.left(request, node, alive=answer.first_byte_s > 0.0)
        if attempt.slot.sent is not None:
            usage = answer.usage
            used = (usage.prompt, usage.completion, usage.cached) if usage is not None else None
            self.routing.ended(node, attempt.slot.sent, request, outcome, used, now)
        if answer.first_token_s:
            node.load.tokens(answer.events - 1, answer.last_byte_s - answer.first_token_s)
        elif outcome.ruling.cut_weight and attempt.connect_outcome is None:
            rest_s = retry_after_s(answer.head.retry_after if answer.head else None, self._clock.wall())
            self._registry.blocked(node, rest_s, answer.status, now)
        self._metrics.attempts.of(node.id, outcome.label).value += 1
        attempt.call.attempts.append((node.id, outcome.label, now - attempt.started_s))
