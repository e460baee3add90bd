"""Bytes to the client: heads, whole answers, streams as they flow, and errors in the right form at the right time."""

from __future__ import annotations

from balancer.cache import Hit
from balancer.clock import Clock
from balancer.core.outcome import Outcome
from balancer.core.request import InferenceRequest
from balancer.errors import BalancerError
from balancer.explain import Call
from balancer.wire.answer import Answer
from balancer.wire.framing import DateHeader, status_line
from balancer.wire.inbound import InboundRequest
from balancer.wire.refusal import error_body, error_event, retry_after


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

    def follow(self, answer: Answer) -> None:
        """Another answer goes on with the stream that has begun."""
        self._inbound.follow(answer)

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

    def replay(self, hit: Hit) -> None:
        """A stored answer."""
        self.call.status = 200
        lines = b"content-type: %b\r\nage: %d\r\n" % (hit.content_type, int(hit.age_s))
        if hit.stream:
            lines += b"cache-control: no-cache\r\n"
        self._inbound.send(self._head(200, lines, b"content-length: %d\r\n" % len(hit.body)), hit.body)

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
