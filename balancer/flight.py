"""An upstream call, owned by itself: clients subscribe to it, and the last one to leave cancels it.

Equal cacheable requests share one. It runs in the task of the client that began it, until a second one joins: then
that task is the flight's own, and each client waits in another (`passenger.Passenger`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from balancer.across import Followed, first_entry
from balancer.attempts import Attempt, Attempts
from balancer.cache import Plan, ResponseCache
from balancer.clock import Clock
from balancer.collection import collection_of
from balancer.core.outcome import Fault, Outcome
from balancer.core.request import InferenceRequest
from balancer.errors import BalancerError, ClientError, RateLimited
from balancer.failures import failure_of
from balancer.passenger import Passenger
from balancer.relay import ClientStream, Delivered, note_tokens
from balancer.resume import COMMENT, Kept, Rest, Resumes
from balancer.store.entries import BEGIN, DATA, Entry
from balancer.wire.answer import Answer
from balancer.wire.buffered import Buffered
from balancer.wire.sse import all_parse

if TYPE_CHECKING:
    from balancer.store.flights import Lease

# Who joins late is sent what came so far in one piece, at most this much (see `passenger.BEHIND_BYTES`). A flight
# that has gone further is joined by nobody.
JOIN_BYTES = 768 * 1024


class Flight:
    """One call on behalf of its subscribers."""

    __slots__ = (
        "_answer",
        "_attempts",
        "_cache",
        "_clock",
        "_collected",
        "_is_stopped",
        "_kept",
        "_lease",
        "_plan",
        "_resumes",
        "_subscribers",
        "_task",
        "call",
        "client",
        "is_good",
        "is_shared",
        "is_wanted",
        "request",
        "tokens",
    )

    def __init__(
        self,
        attempts: Attempts,
        cache: ResponseCache,
        resumes: Resumes,
        clock: Clock,
        buffered: Buffered,
        request: InferenceRequest,
        plan: Plan,
        client: ClientStream,
    ) -> None:
        self._attempts = attempts
        self._cache = cache
        self._resumes = resumes
        self._clock = clock
        self._plan = plan
        self._answer: Delivered | None = None  # once it is handed on as it comes
        self._subscribers: list[ClientStream | Passenger] = [client]
        self._collected = collection_of(plan, cache.max_entry_bytes, buffered)
        self._kept: Kept | None = None  # for a resume
        self._is_stopped = False  # no passenger reads
        self._task: asyncio.Task[None] | None = None  # that it runs in, once it is shared
        self._lease: Lease | None = None  # where other balancers may share it
        self.is_wanted = False  # and do
        self.is_good = False  # it came to a good end
        self.is_shared = False
        self.request = request  # of the client in whose name it is made, and
        self.client = client
        self.call = client.call
        self.tokens: tuple[int, int] | None = None  # prompt and completion, as the node counted them

    def __len__(self) -> int:
        return len(self._subscribers)

    def write(self, data: bytes) -> None:
        """More of the committed answer (`wire.answer.Sink`)."""
        if self._collected.is_open:
            self._collected.add(data, self._answer.last_byte_s if isinstance(self._answer, Answer) else 0.0)
        if self._kept is not None:
            self._kept.add(data)
        for client in self._subscribers:
            client.write(data)
        if self._lease is not None:
            self._lease.write(data)

    async def run(self) -> Outcome:
        """Carry the call to its end, good or bad. Raises BalancerError while nothing was handed to anyone."""
        attempt = await self._attempts.first_byte(self.request, self.call)
        with attempt:
            answer = attempt.answer
            self.call.node = attempt.node.id
            if self.is_shared:
                self._name_node()
                answer.extend(self.request.deadline_s)
            if answer.ended:
                self._deliver_whole(attempt)
                outcome = attempt.outcome
            else:
                outcome = await self._relay(attempt)
            self._note_tokens(answer)
            return outcome

    def _deliver_whole(self, attempt: Attempt) -> None:
        answer = attempt.answer
        attempt.settle()
        body = answer.take_held()
        if answer.outcome is Outcome.OK:
            self.is_good = True
            self._store(attempt, body, answer.withheld, b"", answer.last_byte_s - answer.sent_s)
            self._count_saved(answer)
        elif answer.outcome is Outcome.REQUEST_ERROR and answer.head is not None:
            kind = answer.head.content_type or b"application/json"
            self._cache.store_refusal(self._plan, self.request, status=answer.status, kind=kind, body=body)
        for client in self._subscribers:
            client.whole(answer, body)

    async def _relay(self, attempt: Attempt) -> Outcome:
        self._answer = answer = attempt.answer
        try:
            held = answer.take_held()
            self._kept = self._resumes.keep(self.request, attempt)
            if self._collected.is_open:
                self._collected.add(held, answer.last_byte_s)
            if self._kept is not None:
                self._kept.add(held)
            for client in self._subscribers:
                client.begin(answer, held)
            if self.is_shared:
                self.pace()
            if self._lease is not None:
                self._lease.begun()
            answer.relay_to(self)
            self._attempts.forget_body(self.request)
            if not answer.ended:
                await answer.wait()
            attempt.settle()
            outcome, withheld, took_s = attempt.outcome, answer.withheld, answer.last_byte_s - answer.sent_s
            if outcome.ruling.fault is Fault.NODE and self._kept is not None:
                rest = await self._resumes.rest(self._kept, self.request, attempt)
                if rest is not None:
                    outcome, attempt, withheld = await self._go_on(rest), rest.attempt, rest.withheld
                    took_s += rest.answer.last_byte_s - rest.answer.sent_s
            self._finish(attempt, outcome, withheld, took_s)
            return outcome
        finally:
            self._collected.drop()
            if self._kept is not None:
                self._kept.drop()

    async def _go_on(self, rest: Rest) -> Outcome:
        """Relay the rest of a broken stream, from another node; how it ended."""
        kept, self._kept = self._kept, None  # there is no third part
        if kept is not None:
            kept.drop()
            if not kept.is_greedy:
                self._collected.drop()  # another try could have said something else
        with rest.attempt:
            self._answer = answer = rest.answer
            answer.extend(self.request.deadline_s)
            if self._is_stopped:
                answer.pause()
            for client in self._subscribers:
                client.go_on(answer)
                client.write(COMMENT)
            rest.relay_to(self)
            if not answer.ended:
                await answer.wait()
            rest.attempt.settle()
            outcome = self._resumes.ended(rest, self.call)
            if outcome is Outcome.OK:
                self.tokens = rest.used
            return outcome

    def _finish(self, attempt: Attempt, outcome: Outcome, withheld: list[bytes], took_s: float) -> None:
        answer = attempt.answer
        if outcome is Outcome.OK:
            self.is_good = True
            self._count_saved(answer)
            for client in self._subscribers:
                client.end()
            if self._collected.is_open:
                self._store(attempt, self._collected.body, withheld, self._collected.pace, took_s)
        else:
            error = failure_of(outcome, answer.message)
            for client in self._subscribers:
                if answer.mid_event:
                    client.write(b"\n\n")
                client.fail(error)

    # -- sharing

    def may_be_joined(self, request: InferenceRequest) -> bool:
        """Whether an equal request gets the whole answer here, no later than if it was asked for alone."""
        return (
            self._collected.is_open
            and self._collected.size <= JOIN_BYTES
            and (self._answer is None or self._answer.good)
            and (bool(self._subscribers) or self.is_wanted if self.is_shared else not self.client.gone)
            and self.request.wishes.priority.value <= request.wishes.priority.value
        )

    def join(self, request: InferenceRequest, client: ClientStream) -> Passenger:
        """Take a client along: it gets what came so far, and then what comes."""
        self.share()
        client.call.cache = "coalesced"
        passenger = Passenger(self, client, request, self._clock)
        self._subscribers.append(passenger)
        self._last_until(request.deadline_s)
        if self._answer is not None:
            client.call.node = self.call.node
            passenger.begin(self._answer, self._collected.body)
            self.pace()
        return passenger

    def share(self) -> None:
        """From now on its task is its own: the client that began it gets another."""
        if self.is_shared:
            return
        self.is_shared = True
        passenger = Passenger(self, self.client, self.request, self._clock)
        self._subscribers[0] = passenger
        self._is_stopped = passenger.is_behind
        plan, request = self._plan, self.request
        self._task = self.client.hand_over(passenger.ride_on(lambda: self._cache.stale(plan, request)))

    def _last_until(self, deadline_s: float) -> None:
        if deadline_s > self.request.deadline_s:
            self.request.deadline_s = deadline_s
            if isinstance(self._answer, Answer):
                self._answer.extend(deadline_s)
            elif self.request.extend is not None:
                self.request.extend(deadline_s)

    def leave(self, passenger: Passenger) -> None:
        """A passenger wants nothing more; the last to leave cancels the call."""
        self._subscribers = [other for other in self._subscribers if other is not passenger]
        if not self._subscribers and self._task is not None and not self.is_wanted:
            self._task.cancel()
        else:
            self.pace()

    def pace(self) -> None:
        """The node is read from while any passenger reads; those that fall behind are no reason to wait."""
        if self._answer is None:
            return
        is_stopped = not self.is_wanted and all(passenger.is_behind for passenger in self._passengers)
        if is_stopped != self._is_stopped:
            self._is_stopped = is_stopped
            if is_stopped:
                self._answer.pause()
            else:
                self._answer.resume()

    def lead_again(self, error: BalancerError) -> bool:
        """Put another passenger in the place of the one whose call came to nothing, which gets the error.

        False where nobody else waits, or nobody should try: the request itself is at fault, or kills nodes.
        """
        if isinstance(error, ClientError) and not isinstance(error, RateLimited):
            return False
        if self._attempts.is_condemned(self.request):
            return False
        waiting = [passenger for passenger in self._passengers if passenger.client is not self.client]
        if not waiting:
            return False
        for passenger in self._passengers:
            if passenger.client is self.client:
                passenger.fail(error)
        self._subscribers = [*waiting]
        heir = waiting[0]
        heir.request.account = self.request.account  # deaths on its account go on counting
        self.request, self.client, self.call = heir.request, heir.client, heir.client.call
        self.call.cache = "miss"
        for passenger in waiting:
            self._last_until(passenger.deadline_s)
        return True

    def fail(self, error: BalancerError) -> None:
        """A shared flight came to nothing: all that still wait are told."""
        for passenger in self._passengers:
            passenger.fail(error)
        self.disband()

    def disband(self) -> None:
        """It is over."""
        self._subscribers = []
        self._collected.drop()  # of another balancer's answer: `_relay` sees to its own

    @property
    def _passengers(self) -> list[Passenger]:
        return [client for client in self._subscribers if isinstance(client, Passenger)]

    def _name_node(self) -> None:
        for passenger in self._passengers:
            passenger.client.call.node = self.call.node

    def _count_saved(self, answer: Answer) -> None:
        if self.is_shared:
            others = sum([passenger.client is not self.client for passenger in self._passengers])
            self._cache.saved("process", others, answer.last_byte_s - answer.sent_s)

    def _note_tokens(self, answer: Answer) -> None:
        """What the answer teaches goes into one record, so that no token counts twice."""
        if not self.is_shared:
            note_tokens(self.call, answer)
        else:
            passengers = self._passengers
            for passenger in passengers:
                if answer.first_token_s:
                    passenger.client.call.first_token_s = max(answer.first_token_s, passenger.joined_s)
            calls = [passenger.client.call for passenger in passengers]
            note_tokens(self.call if self.call in calls or not calls else calls[0], answer)
        usage = answer.usage
        if usage is not None and answer.outcome is Outcome.OK:
            self.tokens = (usage.prompt, usage.completion)

    # -- a call that another balancer makes

    def follow(self, answer: Followed) -> None:
        """Hand on what another balancer's flight gives; through `write` what follows."""
        self._answer = answer
        self.call.node = answer.node
        self._name_node()
        for client in self._subscribers:
            client.begin(answer, b"")
        self.pace()

    def follow_whole(self, answer: Followed, body: bytes) -> None:
        """Hand on the whole answer of another balancer's flight."""
        self._count_followed()
        for client in self._subscribers:
            client.whole(answer, body)

    def follow_to_end(self, error: BalancerError | None) -> None:
        """The answer that another balancer's flight gave is over."""
        assert isinstance(self._answer, Followed)
        for passenger in self._passengers:
            if self._answer.is_stream:
                passenger.client.call.first_token_s = max(self._answer.began_s, passenger.joined_s)
        if error is not None:
            self.fail(error)
            return
        self._count_followed()
        for client in self._subscribers:
            client.end()

    def _count_followed(self) -> None:
        if self._subscribers:
            self._cache.saved("replicas", 1, 0.0)
            self._cache.saved("process", len(self._subscribers) - 1, 0.0)

    def take(self, entry: Entry, now: float) -> bool:
        """Hand on one entry of another's stream; False for its last, and for what should not be there."""
        if entry.kind == BEGIN and self._answer is None:
            answer = Followed.decode(entry.data, now)
            if answer is not None:
                self.follow(answer)
            return answer is not None
        if entry.kind == DATA and self._answer is not None:
            self.write(entry.data)
            return True
        return False

    async def is_read(self) -> None:
        """Until a client here reads what comes from another balancer."""
        if isinstance(self._answer, Followed):
            await self._answer.readable.wait()

    @property
    def has_begun(self) -> bool:
        """Whether something was handed on."""
        return self._answer is not None

    # -- a call that other balancers may share (`store.flights.Source`)

    def hold(self, lease: Lease | None) -> None:
        """What is made from now on is to be had by other balancers."""
        self._lease = lease

    def cancel(self) -> None:
        """The balancer is shut down."""
        if self._task is not None:
            self._task.cancel()

    def so_far(self) -> tuple[bytes, bytes] | None:
        """How the answer begins, for other balancers, and what there is of it; None where it is not to be had."""
        if self._answer is None or not self._collected.is_open or self._collected.size > JOIN_BYTES:
            return None
        assert isinstance(self._answer, Answer)
        head = self._answer.head
        if head is None or head.status != 200:
            return None
        kind = head.content_type or b"application/json"
        return first_entry(self._answer, kind, self.call.node), self._collected.body

    def wanted_until(self, deadline_s: float | None) -> None:
        """Other balancers want it until then, or no longer."""
        self.is_wanted = deadline_s is not None
        if deadline_s is not None:
            if not self.is_shared and self.client.gone:
                return
            self.share()
            self._last_until(deadline_s)
            self.pace()
        elif not self._subscribers and self._task is not None:
            self._task.cancel()

    # -- for the cache

    def _store(self, attempt: Attempt, body: bytes, withheld: list[bytes], pace: bytes, took_s: float) -> None:
        answer = attempt.answer
        if not self._collected.is_open or answer.head is None or answer.head.status != 200:
            return
        if answer.is_stream and not all_parse(body):
            return  # what passed by unread was no JSON
        self.call.cache_reason = self._cache.store(
            self._plan,
            self.request,
            stream=answer.is_stream,
            kind=answer.head.content_type or b"application/json",
            body=_with_withheld(body, withheld) if answer.is_stream else body,
            # An engine works on a batch at once: without the sharing a batch of 50 would count for 50 nodes.
            node_seconds=took_s / (1 + attempt.node.load.rif),
            pace=pace,
        )


def _with_withheld(body: bytes, withheld: list[bytes]) -> bytes:
    """The stream with its usage event where the node had it: before `[DONE]`."""
    if not withheld:
        return body
    end = body.rfind(b"data: [DONE]")
    return body + b"".join(withheld) if end < 0 else body[:end] + b"".join(withheld) + body[end:]
