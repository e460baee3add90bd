"""Bytes to the client: heads, whole answers, streams as they flow, and errors in the right form at the right time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from balancer.cache import Hit
from balancer.clock import Clock
from balancer.core.outcome import Outcome
from balancer.core.pace import schedule
from balancer.core.request import InferenceRequest
from balancer.errors import BalancerError
from balancer.explain import Call
from balancer.wire.answer import Answer
from balancer.wire.framing import DateHeader, status_line
from balancer.wire.inbound import InboundRequest
from balancer.wire.refusal import error_body, error_event, retry_after

# Only whole events are sent: what cuts a replay short may have to say so in one of its own.
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


class _Throttle:
    """Stops a replay while its client does not read (`wire.inbound.Flow`)."""

    __slots__ = ("going",)

    def __init__(self) -> None:
        self.going = asyncio.Event()
        self.going.set()

    def pause(self) -> None:
        """The client reads too slowly."""
        self.going.clear()

    def resume(self) -> None:
        """It has caught up."""
        self.going.set()


class ClientStream:
    """One client's view of a flight: subscribes to an answer, and is told how it ended."""

    __slots__ = ("_begun", "_chunked", "_clock", "_date", "_inbound", "_request", "_sse", "call", "lines")

    def __init__(
        self, inbound: InboundRequest, request: InferenceRequest, call: Call, clock: Clock, date: DateHeader
    ) -> None:
        self._inbound = inbound
        self._request = request
        self._clock = clock
        self._date = date
        self._chunked = True
        self._sse = False
        self._begun = False
        self.call = call
        self.lines: bytes = inbound.context.cors  # further headers: CORS, X-RateLimit

    @property
    def gone(self) -> bool:
        """Whether the client has left."""
        return self._inbound.left

    @property
    def begun(self) -> bool:
        """Whether the head of an answer is out."""
        return self._inbound.responded

    def whole(self, answer: Answer) -> None:
        """A complete answer, in one write."""
        body = answer.take_held()
        self.call.status = answer.status
        head = self._head(answer.status, _lines(answer), b"content-length: %d\r\n" % len(body))
        self._inbound.send(head, body)

    def begin(self, answer: Answer) -> None:
        """Commit: the head and what was held back, in one write; later reads follow through `write`."""
        held = answer.take_held()
        self.call.status = answer.status
        self._sse = answer.is_stream
        self._begun = True
        self._inbound.flow = answer
        self._inbound.body = b""
        if not self._sse and answer.length is not None:
            self._chunked = False
            head = self._head(answer.status, _lines(answer), b"content-length: %d\r\n" % answer.length)
            self._inbound.send(head, held)
            return
        if self._request.http10:
            self._chunked = False
            self._inbound.keep_alive = False
            self._inbound.send(self._head(answer.status, _lines(answer), b""), held)
            return
        head = self._head(answer.status, _lines(answer), b"transfer-encoding: chunked\r\n")
        if held:
            self._inbound.begin_and_chunk(head, held)
        else:
            self._inbound.begin(head)

    def write(self, data: bytes) -> None:
        """One read of the node's, written on at once."""
        if self._chunked:
            self._inbound.connection.write(b"%x\r\n%b\r\n" % (len(data), data))  # a chunk, in one call
        else:
            self._inbound.write(data)

    def end(self) -> None:
        """The good end."""
        if self._begun and self._chunked:
            self._inbound.end_chunks()

    def fail(self, error: BalancerError) -> None:
        """A bad end: an error answer while nothing is out, an error event in a stream, a cut in anything else."""
        self.call.failed(error)
        if not self._inbound.responded:
            body = error_body(error, self._request.endpoint.dialect)
            lines = b"content-type: application/json\r\n" + retry_after(error) + error.lines
            self._inbound.send(self._head(error.status, lines, b"content-length: %d\r\n" % len(body)), body)
        elif self._sse:
            self.write(error_event(error, self._request.endpoint.dialect))
            self.end()
        else:
            self._inbound.cut()

    def replay(self, hit: Hit) -> Coroutine[Any, Any, None] | None:
        """Deliver a stored answer at once (None), or return what is left to do where it is sent as it once came."""
        self.call.status = hit.status
        lines = b"content-type: %b\r\nage: %d\r\n" % (hit.content_type, int(hit.age_s))
        if hit.stream:
            lines += b"cache-control: no-cache\r\n"
        if hit.pace:
            return self._replay_paced(hit, lines)
        self._inbound.send(self._head(hit.status, lines, b"content-length: %d\r\n" % len(hit.body)), hit.body)
        return None

    async def _replay_paced(self, hit: Hit, lines: bytes) -> None:
        """Send a stored stream in its own time; a client that reads slowly is waited for, one that leaves ends it."""
        size = len(hit.body)
        steps = [
            step for step in schedule(hit.pace, size) if step[1] == size or hit.body.endswith(_EVENT_ENDS, 0, step[1])
        ]
        flow = self._inbound.flow = _Throttle()
        begun_s, sent = self._clock.now(), steps[0][1]
        self._sse = self._begun = True
        head = self._head(hit.status, lines, b"transfer-encoding: chunked\r\n")
        self._inbound.begin_and_chunk(head, hit.body[:sent])
        for at_s, end in steps[1:]:
            wait_s = begun_s + at_s - self._clock.now()
            if wait_s > 0:
                await self._clock.sleep(wait_s)
            await flow.going.wait()
            self.write(hit.body[sent:end])
            sent = end
        self.end()

    def _head(self, status: int, lines: bytes, framing: bytes) -> bytes:
        call = self.call
        node = b"x-balancer-node: %b\r\n" % call.node.encode() if call.node else b""
        keep = b"" if self._inbound.keep_alive else b"connection: close\r\n"
        return b"%b%b%b%b%b%bx-request-id: %b\r\nx-balancer-attempts: %d\r\nx-balancer-cache: %b\r\n%b\r\n" % (
            status_line(status),
            self._date.line(self._clock.wall()),
            lines,
            framing,
            node,
            self.lines,
            call.id.encode(),
            call.attempts_begun,
            call.cache.encode(),
            keep,
        )


def _lines(answer: Answer) -> bytes:
    return answer.head.lines if answer.head is not None else b""


def note_tokens(call: Call, answer: Answer) -> None:
    """What the answer teaches about the request: first token, usage."""
    if answer.first_token_s:
        call.first_token_s = answer.first_token_s
    usage = answer.usage
    if usage is not None and answer.outcome is Outcome.OK:
        call.prompt_tokens, call.completion_tokens = usage.prompt, usage.completion
