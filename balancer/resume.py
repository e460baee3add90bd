"""What is kept of a running stream so that another node may go on with it, and the going on."""

from __future__ import annotations

from dataclasses import replace

import orjson

from balancer.attempts import Attempt, Attempts
from balancer.core import json_splice
from balancer.core.outcome import Outcome
from balancer.core.request import InferenceRequest
from balancer.core.resume import COPY_BYTES, NotExact, Said, Stitcher, is_greedy, read, rest_of, why_not
from balancer.explain import Call
from balancer.metrics import Metrics
from balancer.wire.answer import Answer, Sink
from balancer.wire.buffered import Buffered

# What the client sees of it, before the first event of the rest.
COMMENT = b": resumed\n\n"


class Kept:
    """One stream that may be continued: its request's body, and the events that the client got."""

    __slots__ = ("_asks_usage", "_body", "_buffered", "_chat", "_events", "_size", "engine", "is_greedy", "reason")

    def __init__(self, request: InferenceRequest, engine: str | None, buffered: Buffered) -> None:
        self._buffered = buffered
        self._size = 0
        self.reason = why_not(request, engine)  # why it may not be continued, after all
        self.engine = engine or ""
        self._events: list[bytes] = []
        if self.reason is None:
            assert request.parsed is not None
            self.is_greedy = is_greedy(request.parsed)
            self._chat = request.endpoint.name == "chat"
            self._body = request.body
            self._asks_usage = request.usage_body is not None
            buffered.resume_copies[self] = None
            self._count(len(self._body))

    def add(self, events: bytes) -> None:
        """More of what the client gets."""
        if self.reason is None:
            self._events.append(events)
            self._count(len(events))
            if self._size - len(self._body) > COPY_BYTES:
                self.drop("answer_size")

    def _count(self, size: int) -> None:
        self._size += size
        self._buffered.bytes += size
        if self._buffered.bytes > self._buffered.limit:
            self._buffered.relieve()

    def drop(self, reason: str = "memory") -> None:
        """Let go of all that is kept: this stream will not be continued (`wire.buffered.Droppable`)."""
        self.reason = self.reason or reason
        self._events, self._body = [], b""
        self._buffered.resume_copies.pop(self, None)
        self._buffered.bytes -= self._size
        self._size = 0

    def rest(self, request: InferenceRequest) -> tuple[InferenceRequest, Stitcher]:
        """The request for what is missing, and what joins it on. Raises NotExact."""
        if self.reason is not None:
            raise NotExact(self.reason)
        said: Said = read(b"".join(self._events), chat=self._chat)
        body = rest_of(self._body, said, chat=self._chat, engine=self.engine)
        parsed = orjson.loads(body)
        rest = replace(
            request,
            body=body,
            usage_body=json_splice.ask_usage(body, parsed) if self._asks_usage else None,
            parsed=parsed,
            tried=set(request.tried),
            prompt=None,
            work=None,
            held_blocks=0,
        )
        return rest, Stitcher(said, chat=self._chat)


class Rest:
    """A second node's answer on its way to the clients of the first, as one stream with it."""

    __slots__ = ("_sink", "_stitcher", "attempt", "is_exact")

    def __init__(self, attempt: Attempt, stitcher: Stitcher) -> None:
        self._sink: Sink | None = None
        self._stitcher = stitcher
        self.attempt = attempt
        self.is_exact = True  # as far as it came

    @property
    def answer(self) -> Answer:
        """The second node's."""
        return self.attempt.answer

    @property
    def withheld(self) -> list[bytes]:
        """Its events that the client did not ask for."""
        return [joined for event in self.answer.withheld if (joined := self._stitcher.join(event))]

    @property
    def used(self) -> tuple[int, int] | None:
        """Prompt and generated tokens of both parts together, where they are known."""
        usage = self.answer.usage
        return self._stitcher.add_up(usage.prompt, usage.completion) if usage is not None else None

    def relay_to(self, sink: Sink) -> None:
        """Hand on what came, and then every read."""
        self._sink = sink
        held = self.answer.take_held()
        self.answer.relay_to(self)
        if held:
            self.write(held)

    def write(self, data: bytes) -> None:
        """More of the second node's stream (`wire.answer.Sink`); nothing that does not belong is handed on."""
        assert self._sink is not None
        if not self.is_exact:
            return
        try:
            events = self._stitcher.feed(data)
        except NotExact:
            self.is_exact = False
            self.answer.cancel()
            return
        if events:
            self._sink.write(events)


class Resumes:
    """Finds another node for the rest of a stream, at most once for each."""

    __slots__ = ("_attempts", "_buffered", "_metrics", "enabled")

    def __init__(self, attempts: Attempts, metrics: Metrics, buffered: Buffered, *, enabled: bool) -> None:
        self._attempts = attempts
        self._buffered = buffered
        self._metrics = metrics
        self.enabled = enabled

    def keep(self, request: InferenceRequest, attempt: Attempt) -> Kept | None:
        """What is kept of a stream that begins now; before its request forgets its body."""
        if not self.enabled or not attempt.answer.is_stream:
            return None
        return Kept(request, attempt.node.engine, self._buffered)

    async def rest(self, kept: Kept, request: InferenceRequest, broken: Attempt) -> Rest | None:
        """The rest of a stream that a node broke, where it may be had exactly. The caller owns its attempt."""
        call = broken.call
        try:
            if broken.answer.mid_event:
                raise NotExact("event_size")
            asked, stitcher = kept.rest(request)
        except NotExact as why:
            self._count(call, "not_eligible" if why.reason == kept.reason else "not_exact", why.reason)
            return None
        attempt = await self._attempts.continuation(asked, call, broken)
        if attempt is None:
            self._count(call, "no_node", "no_node")
            return None
        return Rest(attempt, stitcher)

    def ended(self, rest: Rest, call: Call) -> Outcome:
        """The rest is over: how the client's stream ended."""
        outcome = rest.attempt.outcome if rest.is_exact else Outcome.BAD_BODY
        if outcome is Outcome.OK and rest.used is not None:
            call.prompt_tokens, call.completion_tokens = rest.used
        word = "ok" if outcome is Outcome.OK else "broken"
        self._count(call, word, word)
        return outcome

    def _count(self, call: Call, outcome: str, reason: str) -> None:
        call.resume = reason
        self._metrics.resumes.of(outcome).inc()
