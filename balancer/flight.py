"""An upstream call, owned by itself: clients subscribe to it, and the last one to leave cancels it.

One client subscribes today; sharing between equal requests will add more. A client's leaving, a retry and the
cache write each have their one place here already.
"""

from __future__ import annotations

from balancer.admission import Admission
from balancer.attempts import Attempt, Attempts, failure_of
from balancer.cache import Plan, ResponseCache
from balancer.core.outcome import Outcome
from balancer.core.pace import record
from balancer.core.request import InferenceRequest
from balancer.explain import Call
from balancer.relay import ClientStream, note_tokens
from balancer.wire.answer import Answer
from balancer.wire.sse import all_parse


class Flight:
    """One call on behalf of its subscribers. Runs in the task of the client that began it."""

    __slots__ = (
        "_answer",
        "_attempts",
        "_cache",
        "_collected",
        "_collected_bytes",
        "_plan",
        "_reads",
        "_request",
        "_subscribers",
        "call",
    )

    def __init__(
        self, attempts: Attempts, cache: ResponseCache, request: InferenceRequest, plan: Plan, call: Call
    ) -> None:
        self._attempts = attempts
        self._cache = cache
        self._request = request
        self._plan = plan
        self._subscribers: list[ClientStream] = []
        self._collected: list[bytes] | None = [] if plan.write and plan.name else None
        self._collected_bytes = 0
        self._reads: list[tuple[float, int]] | None = [] if plan.paced else None  # when, bytes
        self._answer: Answer | None = None  # while it is relayed
        self.call = call

    def subscribe(self, client: ClientStream) -> None:
        """From now on this client gets what the call gives."""
        self._subscribers.append(client)

    def write(self, data: bytes) -> None:
        """More of the committed answer (`wire.answer.Sink`)."""
        if self._collected is not None:
            self._collect(data)
        for client in self._subscribers:
            client.write(data)

    async def run(self) -> Outcome:
        """Carry the call to its end, good or bad. Raises BalancerError while nothing was handed to anyone."""
        attempt = await self._attempts.first_byte(self._request, self.call)
        with attempt:
            answer = attempt.answer
            self.call.node = attempt.node.id
            if answer.ended:
                self._deliver_whole(attempt)
            else:
                await self._relay(attempt)
            note_tokens(self.call, answer)
            return attempt.outcome

    def _deliver_whole(self, attempt: Attempt) -> None:
        answer = attempt.answer
        attempt.settle()
        body = answer.peek()
        if answer.outcome is Outcome.OK:
            self._store(attempt, body)
        elif answer.outcome is Outcome.REQUEST_ERROR and answer.head is not None:
            kind = answer.head.content_type or b"application/json"
            self._cache.store_refusal(self._plan, self._request, status=answer.status, kind=kind, body=body)
        for client in self._subscribers:
            client.whole(answer)

    async def _relay(self, attempt: Attempt) -> None:
        answer = self._answer = attempt.answer
        if self._collected is not None:
            self._collect(answer.peek())
        for client in self._subscribers:
            client.begin(answer)
        answer.relay_to(self)
        self._attempts.forget_body(self._request)
        if not answer.ended:
            await answer.wait()
        attempt.settle()
        outcome = attempt.outcome
        if outcome is Outcome.OK:
            for client in self._subscribers:
                client.end()
            if self._collected is not None:
                self._store(attempt, b"".join(self._collected))
        else:
            error = failure_of(outcome, answer.message)
            for client in self._subscribers:
                if answer.mid_event:
                    client.write(b"\n\n")
                client.fail(error)

    def _collect(self, data: bytes) -> None:
        assert self._collected is not None
        self._collected_bytes += len(data)
        if self._collected_bytes > self._cache.max_entry_bytes:
            self._collected = None
        else:
            self._collected.append(data)
            if self._reads is not None and self._answer is not None:
                self._reads.append((self._answer.last_byte_s, len(data)))

    def _store(self, attempt: Attempt, body: bytes) -> None:
        answer = attempt.answer
        if self._collected is None or answer.head is None or answer.head.status != 200:
            return
        if answer.is_stream and not all_parse(body):
            return  # what passed by unread was no JSON
        self.call.cache_reason = self._cache.store(
            self._plan,
            self._request,
            stream=answer.is_stream,
            kind=answer.head.content_type or b"application/json",
            body=_with_withheld(body, answer.withheld) if answer.is_stream else body,
            node_seconds=_share_s(attempt),
            pace=record(self._reads) if self._reads else b"",
        )


def _share_s(attempt: Attempt) -> float:
    """What a node spent on an answer: its wall time, shared with our other requests there when it ended.

    An engine works on a batch at once, so without the sharing a batch of 50 would count for 50 nodes.
    """
    return (attempt.answer.last_byte_s - attempt.answer.sent_s) / (1 + attempt.node.load.rif)


def _with_withheld(body: bytes, withheld: list[bytes]) -> bytes:
    """The stream with its usage event where the node had it: before `[DONE]`."""
    if not withheld:
        return body
    end = body.rfind(b"data: [DONE]")
    return body + b"".join(withheld) if end < 0 else body[:end] + b"".join(withheld) + body[end:]


class Flights:
    """Begins flights, each with its admission; where equal requests will meet."""

    __slots__ = ("_admission", "_attempts", "_cache")

    def __init__(self, admission: Admission, attempts: Attempts, cache: ResponseCache) -> None:
        self._admission = admission
        self._attempts = attempts
        self._cache = cache

    async def fly(self, request: InferenceRequest, plan: Plan, client: ClientStream) -> None:
        """Admit the request, make the call, deliver it. Raises BalancerError while nothing is out."""
        call = client.call
        admitted = await self._admission.admit(request, call)
        client.lines += admitted.lines
        try:
            flight = Flight(self._attempts, self._cache, request, plan, call)
            flight.subscribe(client)
            if await flight.run() is Outcome.OK:
                self._attempts.succeeded(request)
        finally:
            admitted.leave()
            if call.prompt_tokens is not None:
                self._admission.used(request, admitted, call.prompt_tokens, call.completion_tokens or 0)
            elif not call.node:
                self._admission.used(request, admitted, 0, 0)  # no node worked for it: the estimate goes back
