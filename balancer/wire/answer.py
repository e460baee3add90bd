"""One node's answer to one attempt: held until it may be committed, then handed on as it comes.

Before the commit point a failure is an ordinary retry and the client has seen nothing; that is why a JSON answer
is held whole and checked, and why a stream's head waits for its first content event.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, Protocol

import orjson

from balancer.core.outcome import Outcome
from balancer.wire.buffered import Buffered
from balancer.wire.heads import AnswerHead
from balancer.wire.sse import MESSAGE_CHARS, StreamScanner, Usage, usage_of
from balancer.wire.timers import TimerWheel, Watched

# Beyond this a JSON answer is not parsed; framing and its closing bracket have to do.
PARSE_BYTES = 256 * 1024
# A node's error body is passed on, up to this much of it.
ERROR_BYTES = 64 * 1024

# A stream whose commit has to wait is asked about again this often.
HOLD_S = 0.1
# After its good end a stream's framing has this long to end as well.
END_S = 1.0


# How a body is treated.
_NONE, _SSE, _JSON, _RAW, _ERROR = 0, 1, 2, 3, 4


class Sink(Protocol):
    """Where an answer goes once it is committed."""

    def write(self, data: bytes) -> None:
        """More of the body."""


class Connection(Protocol):
    """The node connection underneath, as far as an answer needs it."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def drop(self) -> None: ...


class AnswerLimits:
    """What bounds one answer, in seconds and bytes; and where what it holds is counted."""

    __slots__ = (
        "buffered",
        "check_bytes",
        "commit_s",
        "first_byte_s",
        "idle_s",
        "return_headers",
        "stall_s",
        "unary_s",
    )

    def __init__(
        self,
        *,
        first_byte_s: float,
        idle_s: float,
        unary_s: float | None,
        commit_s: float,
        check_bytes: int,
        buffered: Buffered,
        stall_s: float = 3.0,
        return_headers: frozenset[bytes] = frozenset(),
    ) -> None:
        self.first_byte_s = first_byte_s
        self.idle_s = idle_s
        self.unary_s = unary_s
        self.commit_s = commit_s
        self.stall_s = stall_s
        self.check_bytes = check_bytes
        self.buffered = buffered
        self.return_headers = return_headers


class Answer:
    """Collects, checks and then relays what a node says. Driven by its connection, awaited by one task.

    It is `committed` or `ended` when `wait` returns the first time, and `ended` the second.
    """

    __slots__ = (
        "_clock",
        "_connection",
        "_deadline_s",
        "_held",
        "_held_bytes",
        "_json_only",
        "_kind",
        "_limits",
        "_object_only",
        "_scanner",
        "_sink",
        "_streaming",
        "_waiter",
        "_wheel",
        "bucket",
        "committed",
        "due_s",
        "ended",
        "first_byte_s",
        "first_token_s",
        "head",
        "last_byte_s",
        "length",
        "may_commit",
        "message",
        "on_first_token",
        "outcome",
        "paused",
        "resumed_s",
        "sent_s",
        "usage",
    )

    def __init__(
        self,
        clock: Any,
        wheel: TimerWheel,
        limits: AnswerLimits,
        scanner: StreamScanner | None,
        *,
        streaming: bool,
        object_only: bool,
        json_only: bool,
        deadline_s: float,
    ) -> None:
        self._clock = clock
        self._wheel = wheel
        self._limits = limits
        self._scanner = scanner
        self._streaming = streaming
        self._object_only = object_only
        self._json_only = json_only
        self._deadline_s = deadline_s
        self._connection: Connection | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._kind = _NONE
        self.paused = False
        self.head: AnswerHead | None = None
        self.length: int | None = None
        self.usage: Usage | None = None  # tokens as the node counted them, once it said so
        self.outcome: Outcome | None = None  # set when the answer is over, well or badly
        self.message: str | None = None
        self.on_first_token: Callable[[float], None] | None = None
        self.may_commit: Callable[[float], bool] | None = None  # asked where `commit_s` passed without content
        self.committed = False
        self.ended = False
        self.sent_s = 0.0
        self.first_byte_s = 0.0
        self.first_token_s = 0.0
        self.last_byte_s = 0.0
        self.resumed_s = float("-inf")  # when it was last read again after a pause
        self.due_s = deadline_s
        self.bucket: set[Watched] | None = None

    # -- what the waiting task asks for

    @property
    def good(self) -> bool:
        """Whether it may be handed to the client, as far as is known."""
        return self.outcome is None or self.outcome is Outcome.OK

    @property
    def is_stream(self) -> bool:
        """Server-sent events."""
        return self._kind is _SSE

    @property
    def events(self) -> int:
        """Content events so far, near enough generated tokens."""
        return self._scanner.events if self._scanner is not None and self.is_stream else 0

    @property
    def status(self) -> int:
        """The node's status; 0 before its head came."""
        return self.head.status if self.head is not None else 0

    @property
    def return_headers(self) -> frozenset[bytes]:
        """Further headers that go to clients."""
        return self._limits.return_headers

    @property
    def limits(self) -> AnswerLimits:
        """What bounds it."""
        return self._limits

    @property
    def mid_event(self) -> bool:
        """Whether the client's stream stands inside an event that will not end."""
        return self.is_stream and self._scanner is not None and self._scanner.mid_event

    @property
    def withheld(self) -> list[bytes]:
        """Events that the client did not ask for."""
        return (self._scanner.withheld or []) if self._scanner is not None else []

    async def wait(self) -> None:
        """Until the commit point, or, once committed, until the answer is over. Not for one that is over already."""
        waiter = self._waiter = self._wheel.loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def take_held(self) -> bytes:
        """What was held back until the commit point; the caller hands it on first."""
        held = self.peek()
        self._held = []
        self._release()
        return held

    def peek(self) -> bytes:
        """What is held back, without taking it."""
        return self._held[0] if len(self._held) == 1 else b"".join(self._held)

    def relay_to(self, sink: Sink) -> None:
        """From now on hand every read to `sink` at once."""
        self._sink = sink

    def cancel(self, outcome: Outcome = Outcome.CLIENT_GONE) -> None:
        """Nobody wants it any more: the node is told by closing its connection."""
        if self._held_bytes:
            self._release()
        if not self.ended:
            self._over(outcome)
            if self._connection is not None:
                self._connection.drop()
                self._connection = None

    def extend(self, deadline_s: float) -> None:
        """Somebody waits for it until `deadline_s`, which is later than what was known."""
        self._deadline_s = deadline_s
        self.due_s = min(self._limit_s, deadline_s)

    def give_up(self, outcome: Outcome) -> None:
        """End it from outside, by the node's fault."""
        self._fail(outcome)

    def pause(self) -> None:
        """The client reads too slowly: stop reading from the node."""
        self.paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """The client has caught up."""
        self.paused = False
        self.resumed_s = self._clock.now()
        self.due_s = self._next_due(self.resumed_s)
        if self._connection is not None:
            self._connection.resume()

    # -- what the connection says

    def begin(self, connection: Connection, now: float) -> None:
        """The request has been written to `connection`."""
        self._connection = connection
        self.sent_s = now
        limits = self._limits
        wait_s = limits.first_byte_s if self._streaming else limits.unary_s
        self.due_s = self._deadline_s if wait_s is None else min(now + wait_s, self._deadline_s)
        self._wheel.watch(self)

    def on_head(self, head: AnswerHead, length: int | None) -> None:
        """The final head (1xx are dropped below). Decides how the body is treated."""
        self.first_byte_s = self.last_byte_s = self._clock.now()
        self.head = head
        self.length = length
        kind = head.media_type
        if head.encoded:
            self._fail(Outcome.BAD_ENCODING)
        elif head.verdict is not Outcome.OK:
            self._kind = _ERROR
        elif kind == b"text/event-stream" and self._scanner is not None:
            self._kind = _SSE
            self._due_sooner(self.first_byte_s + self._limits.commit_s)
        elif self._json_only or kind == b"application/json" or kind.endswith(b"+json"):
            self._kind = _JSON  # whatever it calls itself: it has to parse
        else:
            self._kind = _RAW

    def on_data(self, data: bytes) -> None:
        """One read's worth of body."""
        now = self.last_byte_s = self._clock.now()
        if self._sink is not None:  # committed: the hot path of every stream
            if self._kind is _SSE:
                self._relay_events(data, now)
            else:
                self._sink.write(data)
            self.due_s = now + self._limits.idle_s
            if self.due_s > self._deadline_s:
                self.due_s = self._deadline_s
            return
        if self._kind is _SSE:
            self._hold_events(data, now)
            return
        self._hold(data)
        if self._kind is _RAW or (self._kind is _JSON and self._held_bytes > self._limits.check_bytes):
            self._commit(now)
        elif self._kind is _ERROR and self._held_bytes > ERROR_BYTES:
            self._fail(self._verdict)

    def on_end(self) -> None:
        """The body is complete, as far as its framing says."""
        self._connection = None  # it belongs to its pool again
        if self._kind is _ERROR:
            self._over(self._verdict)
        elif self._kind is _SSE:
            assert self._scanner is not None
            self._over(self._scanner.closed())
            self.usage = self._scanner.usage
            self.message = self.message or self._scanner.message
        elif self._kind is _JSON and not self.committed:
            self._over(self._check_json())
        else:
            self._over(Outcome.OK)

    def on_broken(self, outcome: Outcome) -> None:
        """The connection failed under it."""
        self._connection = None
        if not self.ended:
            self._over(Outcome.OK if self._at_good_end else outcome)

    def on_due(self, now: float) -> None:
        """A time limit passed: which one depends on how far the answer has come."""
        if now >= self._deadline_s:
            self._fail(Outcome.DEADLINE)
        elif self.paused:
            self.due_s = min(now + self._limits.idle_s, self._deadline_s)
            self._wheel.watch(self)
        elif self._kind is _SSE and not self.committed:
            if self.may_commit is None or self.may_commit(now):
                self._commit(now)
            else:
                self.due_s = min(now + HOLD_S, self._deadline_s)
                self._wheel.watch(self)
        elif self.first_byte_s == 0.0:
            self._fail(Outcome.FIRST_BYTE_TIMEOUT if self._streaming else Outcome.UNARY_TIMEOUT)
        elif self._streaming or self.committed:
            self._fail(Outcome.IDLE_TIMEOUT)
        else:
            self._fail(Outcome.UNARY_TIMEOUT)

    # -- inside

    def _hold(self, data: bytes) -> None:
        size = len(data)
        self._held.append(data)
        self._held_bytes += size
        buffered = self._limits.buffered
        buffered.bytes += size
        if buffered.bytes > buffered.limit:
            buffered.relieve()

    def _release(self) -> None:
        self._limits.buffered.bytes -= self._held_bytes
        self._held_bytes = 0

    def _hold_events(self, data: bytes, now: float) -> None:
        scanner = self._scanner
        assert scanner is not None
        events = scanner.feed(data)
        if events:
            self._hold(events)
        if scanner.outcome is not None:
            self.message = scanner.message
            self._fail(scanner.outcome)
        elif scanner.content:
            self._first_token(now)
            self._commit(now)
        elif self._held_bytes > self._limits.check_bytes:
            self._commit(now)

    def _relay_events(self, data: bytes, now: float) -> None:
        scanner = self._scanner
        assert scanner is not None
        assert self._sink is not None
        events = scanner.feed(data)
        if self.first_token_s == 0.0 and scanner.content:
            self._first_token(now)
        if events:
            self._sink.write(events)
        if scanner.outcome is not None:
            self.message = scanner.message
            self._fail(scanner.outcome)
        elif scanner.good_end:
            self._due_sooner(now + END_S)

    def _first_token(self, now: float) -> None:
        self.first_token_s = now
        if self.on_first_token is not None:
            self.on_first_token(now)

    def _check_json(self) -> Outcome:
        """A good unary answer is a JSON object (or, where the endpoint allows, an array) without an error in it."""
        if len(self._held) > 1:
            self._held = [b"".join(self._held)]
        body = self._held[0] if self._held else b""
        if not body:
            return Outcome.EMPTY_BODY
        if len(body) > PARSE_BYTES:
            return Outcome.OK if body.rstrip()[-1:] in (b"}", b"]") else Outcome.BAD_BODY
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError:
            return Outcome.BAD_BODY
        if isinstance(parsed, dict):
            error = parsed.get("error")
            kind = parsed.get("object")
            if kind == "response" or (error is None and kind != "error"):  # a failed response is an answer
                self.usage = usage_of(parsed)
                return Outcome.OK
            message = error.get("message") if isinstance(error, dict) else error
            self.message = message[:MESSAGE_CHARS] if isinstance(message, str) else None
            return Outcome.ERROR_OBJECT
        return Outcome.OK if isinstance(parsed, list) and not self._object_only else Outcome.BAD_BODY

    def _commit(self, now: float) -> None:
        self.committed = True
        self._due_sooner(now + self._limits.idle_s)
        self._wake()

    @property
    def _verdict(self) -> Outcome:
        assert self.head is not None
        return self.head.verdict

    @property
    def _at_good_end(self) -> bool:
        return self._kind is _SSE and self._scanner is not None and self._scanner.good_end

    def _due_sooner(self, due_s: float) -> None:
        self.due_s = min(due_s, self._deadline_s)
        self._wheel.sooner(self)

    @property
    def _limit_s(self) -> float:
        """When the phase that it is in is over, whatever the deadline."""
        limits = self._limits
        if self.committed:
            return self.last_byte_s + limits.idle_s
        if self._kind is _SSE:
            return self.first_byte_s + limits.commit_s
        wait_s = limits.first_byte_s if self._streaming else limits.unary_s
        return math.inf if wait_s is None else self.sent_s + wait_s

    def _next_due(self, now: float) -> float:
        return min(now + self._limits.idle_s, self._deadline_s)

    def _fail(self, outcome: Outcome) -> None:
        """Our own verdict: the node's connection cannot be used again."""
        if self.ended:
            return
        self._over(Outcome.OK if self._at_good_end else outcome)
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    def _over(self, outcome: Outcome) -> None:
        self.ended = True
        self.outcome = outcome
        if self._held_bytes and outcome is not Outcome.OK:
            self._release()  # at most an error's body is read after this
        self._wheel.forget(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
