"""Bytes to the client: heads, whole answers, streams as they flow, and errors in the right form at the right time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import orjson

from balancer.cache import Hit
from balancer.clock import Clock
from balancer.core.outcome import Outcome
from balancer.core.pace import schedule
from balancer.core.request import Dialect, InferenceRequest
from balancer.errors import BadAnswer, BalancerError, ClientError, DeadlineExceeded, Draining
from balancer.explain import Call
from balancer.wire.answer import Answer
from balancer.wire.framing import DateHeader, status_line
from balancer.wire.inbound_request import Flow, InboundRequest
from balancer.wire.refusal import error_body, error_event, retry_after
from balancer.wire.sse import MESSAGE_CHARS

# What a waiting stream is sent: an event stream's comment, which every client passes over.
COMMENT = b": waiting\n\n"

_C = TypeVar("_C", bound="ClientStream")


class Head(Protocol):
    """The part of a node's head that goes to clients."""

    @property
    def lines(self) -> bytes: ...


class Delivered(Flow, Protocol):
    """An answer as far as its delivery goes: a node's (`wire.answer.Answer`), or one that another balancer has."""

    @property
    def status(self) -> int: ...
    @property
    def head(self) -> Head | None: ...
    @property
    def length(self) -> int | None: ...
    @property
    def is_stream(self) -> bool: ...
    @property
    def good(self) -> bool: ...


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

    __slots__ = ("_begun", "_chunked", "_clock", "_comments", "_date", "_inbound", "_request", "_sse", "call", "lines")

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
        self._comments: asyncio.TimerHandle | None = None
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

    def beside(self, kind: type[_C]) -> _C:
        """Another kind of client for the same request and record."""
        return kind(self._inbound, self._request, self.call, self._clock, self._date)

    def hand_over(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Let `work` see this client to its end; the task that did so until now, which goes on by itself."""
        return self._inbound.connection.hand_over(self._inbound, self.call, work)

    def follow(self, flow: Flow, on_left: Callable[[], None]) -> bool:
        """Tell `flow` from now on how this client reads, and `on_left` that it left; whether it is behind already."""
        self._inbound.flow = flow
        self._inbound.on_left = on_left
        return self._inbound.connection.is_write_paused

    def unfollow(self) -> None:
        """It is served: what its connection does next is nobody's business here."""
        self._inbound.flow = self._inbound.on_left = None

    def whole(self, answer: Delivered, body: bytes) -> None:
        """A complete answer, in one write."""
        if self._comments is not None:
            self.stop_comments()
        if self._begun:
            self._whole_after_comments(answer, body)
            return
        self.call.status = answer.status
        head = self._head(answer.status, _lines(answer), b"content-length: %d\r\n" % len(body))
        self._inbound.send(head, body)

    def begin(self, answer: Delivered, held: bytes) -> None:
        """Commit: the head and what there is so far, in one write; later reads follow through `write`.

        Raises BadAnswer where comments have promised a stream, and this is none.
        """
        if self._comments is not None:
            self.stop_comments()
        if self._begun:
            if not answer.is_stream:
                raise _no_stream()
            self._inbound.flow = answer
            self._inbound.forget_body()
            if held:
                self.write(held)
            return
        self.call.status = answer.status
        self._sse = answer.is_stream
        self._begun = True
        self._inbound.flow = answer
        self._inbound.forget_body()
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

    def go_on(self, answer: Delivered) -> None:
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
        self.stop_comments()
        if not self._inbound.responded:
            body = error_body(error, self._request.endpoint.dialect)
            lines = b"content-type: application/json\r\n" + retry_after(error) + error.lines
            self._inbound.send(self._head(error.status, lines, b"content-length: %d\r\n" % len(body)), body)
        elif self._sse:
            self.write(error_event(error, self._request.endpoint.dialect))
            self.end()
        else:
            self._inbound.cut()

    def cut_short(self) -> None:
        """The balancer is shut down before the answer is complete; nothing for a client that has left."""
        if not self.gone:
            self.fail(Draining("this balancer was shut down before the answer was complete"))

    def replay(self, hit: Hit) -> Coroutine[Any, Any, None] | None:
        """Deliver a stored answer at once (None), or return what is left to do where it is sent as it once came."""
        self.stop_comments()
        self.call.status = hit.status
        if self._begun:  # comments came first
            self.call.status = 200
            if hit.status == 200 and hit.stream:
                self.write(hit.body)
                self.end()
            else:
                self.fail(ClientError(_message(hit.body) or f"the node answered {hit.status}", status=hit.status))
            return None
        lines = b"content-type: %b\r\nage: %d\r\n" % (hit.content_type, int(hit.age_s))
        if hit.stream:
            lines += b"cache-control: no-cache\r\n"
        if hit.pace:
            return self._replay_paced(hit, lines)
        self._inbound.send(self._head(hit.status, lines, b"content-length: %d\r\n" % len(hit.body)), hit.body)
        return None

    async def stand_in(self, hit: Hit) -> None:
        """Deliver a stored answer in place of one that was to come from a node."""
        self.call.cache = hit.verdict
        self.call.node = ""
        if (replay := self.replay(hit)) is not None:
            await replay

    async def _replay_paced(self, hit: Hit, lines: bytes) -> None:
        """Send a stored stream in its own time; a client that reads slowly is waited for, one that leaves ends it.

        What is left at its deadline is sent at once to a client that reads; another one is given up.
        """
        size = len(hit.body)
        steps = [
            step for step in schedule(hit.pace, size) if step[1] == size or hit.body.endswith(_EVENT_ENDS, 0, step[1])
        ]
        flow = self._inbound.flow = _Throttle()
        begun_s, sent = self._clock.now(), steps[0][1]
        self._sse = self._begun = True
        head = self._head(hit.status, lines, b"transfer-encoding: chunked\r\n")
        self._inbound.begin_and_chunk(head, hit.body[:sent])
        try:
            async with asyncio.timeout(self._request.deadline_s - begun_s):
                for at_s, end in steps[1:]:
                    wait_s = begun_s + at_s - self._clock.now()
                    if wait_s > 0:
                        await self._clock.sleep(wait_s)
                    await flow.going.wait()
                    self.write(hit.body[sent:end])
                    sent = end
        except TimeoutError:
            if not flow.going.is_set():
                self.fail(DeadlineExceeded("the deadline passed before the answer was read"))
                return
            self.write(hit.body[sent:])
        self.end()

    # -- comments to a stream that waits

    def comment_every(self, seconds: float) -> None:
        """Tell a stream that waits so, as often, until its answer begins. Not one that asked for silence."""
        request = self._request
        if request.stream and request.endpoint.dialect is not Dialect.PLAIN and request.wishes.comments:
            loop = asyncio.get_running_loop()
            self._comments = loop.call_later(seconds, self._comment, seconds, loop)

    def stop_comments(self) -> None:
        """The answer begins, or there will be none."""
        if self._comments is not None:
            self._comments.cancel()
            self._comments = None

    def _comment(self, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        """A comment; with the first one goes the head, of which nobody knows yet what would stand in it."""
        self._comments = loop.call_later(seconds, self._comment, seconds, loop)
        if self._begun:
            self.write(COMMENT)
            return
        self._begun = self._sse = True
        call = self.call
        call.status = 200
        head = b"%b%b%btransfer-encoding: chunked\r\n%bx-request-id: %b\r\n%b\r\n" % (
            status_line(200),
            self._date.line(self._clock.wall()),
            b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n",
            self.lines,
            call.id.encode(),
            b"" if self._inbound.keep_alive else b"connection: close\r\n",
        )
        self._inbound.begin_and_chunk(head, COMMENT)

    def _whole_after_comments(self, answer: Delivered, body: bytes) -> None:
        """The stream's head is out, so the node's 4xx becomes an error event, and anything else but a stream too."""
        if answer.is_stream and answer.good:
            self.write(body)
            self.end()
        elif answer.good:
            self.fail(_no_stream())
        else:
            self.fail(ClientError(_message(body) or f"the node answered {answer.status}", status=answer.status))

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


def _no_stream() -> BalancerError:
    return BadAnswer("the node did not answer with a stream")


def _message(body: bytes) -> str | None:
    """What a node's error body says, in any of the usual forms."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message[:MESSAGE_CHARS] if isinstance(message, str) else None


def _lines(answer: Delivered) -> bytes:
    return answer.head.lines if answer.head is not None else b""


def note_tokens(call: Call, answer: Answer) -> None:
    """What the answer teaches about the request: first token, usage."""
    if answer.first_token_s:
        call.first_token_s = answer.first_token_s
    usage = answer.usage
    if usage is not None and answer.outcome is Outcome.OK:
        call.prompt_tokens, call.completion_tokens = usage.prompt, usage.completion
