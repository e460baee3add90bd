"""Client connections: requests in, bytes out, disconnects felt at once.

llhttp refuses what RFC 9112 does not allow; this file adds the limits. A connection works at one request at a
time: what is pipelined behind it waits, up to `PIPELINE_BYTES`, and is answered in order.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import httptools
from pydantic import Field

from balancer.errors import BadRequest, BalancerError, ClientError, QueueFull, TooLarge
from balancer.wire.buffered import Buffered
from balancer.wire.framing import CONTINUE, connection_tokens, header_lines
from balancer.wire.heads import split
from balancer.wire.inbound_request import InboundRequest
from balancer.wire.timers import TimerWheel, Watched

PIPELINE_BYTES = 64 * 1024
URI_BYTES = 8 * 1024
# A client that stops reading holds at most this much of an answer here before its node is paused.
WRITE_HIGH_BYTES = 256 * 1024
# An idle kept-alive connection is closed after this long.
KEEP_ALIVE_S = 75.0
# Having refused a request whose body is still coming, read and discard for this long, so that the answer arrives.
LINGER_S = 2.0
# When `buffered_bytes` are used up, bodies over this are refused.
SMALL_BODY_BYTES = 64 * 1024
# After `body_idle_s` a body must have averaged this many bytes per second.
BODY_BYTES_PER_S = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundLimits:
    """What one client connection may ask of us."""

    head_bytes: Annotated[int, Field(ge=1024)] = 65536
    body_bytes: Annotated[int, Field(ge=1)] = 33554432
    head_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    body_idle_s: Annotated[float, Field(gt=0)] = 10.0


class Service(Protocol):
    """What the data port does with requests."""

    def accept_head(self, request: InboundRequest) -> None:
        """Judge a request by its head, before its body is read. Raises BalancerError."""

    def begin(self, request: InboundRequest) -> Coroutine[Any, Any, None] | None:
        """Answer a whole request at once (None), or return what is left to do, which ends with `finished`."""

    def finish(self, request: InboundRequest, call: Any, work: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
        """Carry a request to its end by `work`; `call` is the record that it was begun with."""

    def refuse(self, request: InboundRequest, error: BalancerError) -> bytes:
        """The whole answer to a request that ends before `begin`."""

    @property
    def revision(self) -> int:
        """Changes whenever `accept_head` might judge the same head differently."""


class _Known:
    """What a connection's last head said."""

    __slots__ = ("context", "headers", "keep_alive", "method", "revision", "target")

    def __init__(self, request: InboundRequest, revision: int) -> None:
        self.method = request.method
        self.target = request.target
        self.headers = request.headers
        self.context = request.context
        self.keep_alive = request.keep_alive
        self.revision = revision


class InboundConnection(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "_accepted",
        "_backlog",
        "_body",
        "_body_last_s",
        "_buffered",
        "_closing",
        "_connections",
        "_expects",
        "_head_bytes",
        "_is_fresh",
        "_known",
        "_limits",
        "_loop",
        "_memo_key",
        "_now",
        "_parser",
        "_paused_reading",
        "_raw_head_bytes",
        "_ready",
        "_receiving",
        "_refused",
        "_service",
        "_target",
        "_task",
        "_transport",
        "_unsent_bytes",
        "_upgrading",
        "_wheel",
        "_working",
        "_write_paused",
        "bucket",
        "due_s",
    )

    def __init__(
        self,
        service: Service,
        limits: InboundLimits,
        wheel: TimerWheel,
        now: Callable[[], float],
        connections: set[InboundConnection],
        buffered: Buffered,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._service = service
        self._limits = limits
        self._wheel = wheel
        self._now = now
        self._connections = connections
        self._buffered = buffered
        self._loop = loop
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._receiving: InboundRequest | None = None  # being read
        self._working: InboundRequest | None = None  # being answered
        self._task: asyncio.Task[None] | None = None
        self._ready: list[InboundRequest | tuple[InboundRequest, BalancerError]] = []  # an empty deque takes 600 bytes
        self._is_fresh = True  # no request has come yet
        self._memo_key: bytes | None = None  # of the head that came last
        self._known: _Known | None = None  # what it said
        self._backlog = b""
        self._paused_reading = False
        self._write_paused = False  # the client does not read
        self._body: list[bytes] = []
        self._body_last_s = 0.0
        self._head_bytes = 0  # of complete header lines
        self._raw_head_bytes = 0  # read while no head was complete
        self._target = b""
        self._accepted = False  # the head being read has passed
        self._expects = False
        self._refused = False  # nothing more is read from here
        self._upgrading = False  # the head being read asks for an upgrade
        self._closing = False
        self._unsent_bytes = sys.maxsize  # when an idle connection was looked at last
        self.due_s = 0.0
        self.bucket: set[Watched] | None = None

    def __repr__(self) -> str:
        return f"<InboundConnection working={self._working is not None} ready={len(self._ready)}>"

    # -- used by the request being answered

    def write(self, data: bytes) -> None:
        """Hand bytes to the kernel at once; nothing when the client has gone."""
        if self._transport is not None:
            self._transport.write(data)

    def abort(self) -> None:
        """Close without a good end."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def finished(self, request: InboundRequest) -> None:
        """The answer to `request`, made by a task, is complete; go on with what waits."""
        if request is self._working and self._done(request):
            self._go_on()

    def hand_over(
        self, request: InboundRequest, call: Any, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None] | None:
        """Answer `request` by `work` from now on; the task that did so goes on by itself, and is returned."""
        task = self._task
        request.work = work
        self._task = self._loop.create_task(self._service.finish(request, call, work))
        return task

    @property
    def is_write_paused(self) -> bool:
        """Whether the client reads more slowly than it is written to."""
        return self._write_paused

    def _go_on(self) -> None:
        """Take up what waits, unless the client has to read first what it was sent."""
        if self._ready and self._is_free:
            self._start(self._ready.pop(0))
        if self._backlog and not self._ready and self._is_free:
            data, self._backlog = self._backlog, b""
            self._feed(data)
        if self._paused_reading and not self._backlog and self._transport is not None:
            self._paused_reading = False
            self._transport.resume_reading()
        receiving = self._receiving
        if receiving is not None and self._is_free:
            if self._accepted and self._expects and not receiving.buffered_bytes:
                self.write(CONTINUE)
            self._watch_receiving(receiving, 0)  # its time counts again

    @property
    def _is_free(self) -> bool:
        return self._working is None and not self._write_paused and not self._closing

    def _done(self, request: InboundRequest) -> bool:
        """Put a finished request away; False where the connection ends with it."""
        self._working = None
        self._task = None
        request.flow = None
        self.release(request)
        if not request.keep_alive:
            self._close_gently()
            return False
        self.due_s = self._now() + KEEP_ALIVE_S
        self._unsent_bytes = sys.maxsize
        return True

    def close(self) -> None:
        """Shut down: close whatever the connection is doing, once what was written is out."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def close_after(self, request: InboundRequest) -> None:
        """Tell the client that this answer is the connection's last; too late once its head is out, or more is here.

        A connection is never closed without having said so: its client might be sending the next request already.
        """
        if not (request.responded or self._has_more):
            request.keep_alive = False

    @property
    def _has_more(self) -> bool:
        return bool(self._ready or self._backlog)

    def cut_work(self) -> asyncio.Task[None] | None:
        """Shutting down for good: cancel what is being answered, which then says so; its task."""
        if self._task is not None:
            self._task.cancel()
        return self._task

    @property
    def working(self) -> InboundRequest | None:
        """The request being answered."""
        return self._working

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)  # type: ignore[attr-defined]
        self._connections.add(self)
        self.due_s = self._now() + self._limits.head_timeout_s
        self._wheel.watch(self)

    def data_received(self, data: bytes) -> None:
        if self._refused or self._closing:
            return
        if self._working is not None or self._write_paused:
            self._backlog += data
            if len(self._backlog) >= PIPELINE_BYTES and self._transport is not None:
                self._paused_reading = True
                self._transport.pause_reading()
            return
        if self._receiving is None and self._take_known(data):
            return
        self._feed(data)

    def eof_received(self) -> bool:
        return False  # a half-close counts as leaving

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._parser = self._known = None  # llhttp's wrapper holds our methods: a cycle
        self._closing = True
        self._connections.discard(self)
        TimerWheel.forget(self)
        self._abandon_unstarted()
        request = self._working
        if request is not None:
            request.left = True
            if request.on_left is not None:
                request.on_left()
            elif self._task is not None:
                self._task.cancel()

    def pause_writing(self) -> None:
        self._write_paused = True
        if self._working is not None and self._working.flow is not None:
            self._working.flow.pause()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._working is None:
            self._go_on()
        elif self._working.flow is not None:
            self._working.flow.resume()

    def _take_known(self, data: bytes) -> bool:
        """Take a whole request whose head equals the connection's last one; False where it has to be parsed."""
        message = split(data)
        if message is None:
            self._memo_key = None
            return False
        key, begin, size = message
        known = self._known
        if key != self._memo_key or known is None or known.revision != self._service.revision:
            self._memo_key, self._known = key, None
            return False
        if size > SMALL_BODY_BYTES and not self._may_take(size):
            return False
        request = InboundRequest(self, self._now())
        request.method = known.method
        request.target = known.target
        request.headers = known.headers
        request.context = known.context
        request.keep_alive = known.keep_alive
        request.body = data[begin:]
        request.buffered_bytes = size
        self._buffered.bytes += size
        self._start(request)
        return True

    def _may_take(self, size: int) -> bool:
        return size <= self._limits.body_bytes and self._buffered.bytes + size <= self._buffered.limit

    def _has_room(self) -> bool:
        """Whether a large body may go on: copies of answers give way to it."""
        buffered = self._buffered
        if buffered.bytes > buffered.limit:
            buffered.relieve()
        return buffered.bytes <= buffered.limit

    def _remember(self, request: InboundRequest) -> None:
        """A whole request came in one read: the next one's head may equal its."""
        if request.version == "1.1" and request.keep_alive:
            self._known = _Known(request, self._service.revision)

    # -- httptools

    def on_message_begin(self) -> None:
        self._receiving = InboundRequest(self, self._now(), is_first=self._is_fresh)
        self._is_fresh = False
        self._accepted = False
        self._expects = False
        self._target = b""
        self._head_bytes = self._raw_head_bytes = 0
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._target += url
        if len(self._target) > URI_BYTES:
            self._refuse(BalancerError("the request target is too long", status=414, code="uri_too_long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        request = self._receiving
        if request is None or self._accepted:  # refused, or a trailer
            return
        self._head_bytes += len(name) + len(value) + 4
        name = name.lower()
        headers = request.headers
        if name in headers:
            value = headers[name] + b", " + value
        headers[name] = value

    def on_headers_complete(self) -> None:
        request = self._receiving
        if request is None or self._refused:
            return
        parser = self._parser
        request.method = parser.get_method()
        request.target = self._target
        if parser.should_upgrade() and request.method != b"CONNECT":
            self._upgrading = True  # llhttp would take the body for another protocol's bytes: see _feed
            return
        request.version = parser.get_http_version()
        request.keep_alive = parser.should_keep_alive()
        if self._head_bytes + len(self._target) > self._limits.head_bytes:
            self._refuse(_head_too_large())
            return
        try:
            self._check_framing(request)
            self._service.accept_head(request)
        except BalancerError as error:
            self._refuse(error)
            return
        self._accepted = True
        if self._expects and not self._ready and self._working is None:
            self.write(CONTINUE)

    def on_body(self, data: bytes) -> None:
        request = self._receiving
        if request is None or self._refused:
            return
        size = len(data)
        request.buffered_bytes += size
        self._buffered.bytes += size
        if request.buffered_bytes > self._limits.body_bytes:
            self._refuse(_body_too_large(self._limits.body_bytes))
        elif request.buffered_bytes > SMALL_BODY_BYTES and not self._has_room():
            self._refuse(QueueFull("too much is buffered for a large body just now", retry_after_s=1.0))
        else:
            self._body.append(data)

    def on_message_complete(self) -> None:
        request = self._receiving
        if request is None or self._refused or self._upgrading:
            return
        self._receiving = None
        body = self._body
        if body:
            request.body = body[0] if len(body) == 1 else b"".join(body)
            self._body = []
        if self._working is None and not self._ready and not self._write_paused:
            if self._memo_key is not None and self._known is None:
                self._remember(request)
            self._start(request)
        else:
            self._ready.append(request)

    # -- limits

    def on_due(self, now: float) -> None:
        """A time limit passed: which one depends on what the connection is doing."""
        if self._closing or self._refused:
            self.abort()
        elif self._working is not None:
            self.due_s = now + KEEP_ALIVE_S  # answers have limits of their own
            self._wheel.watch(self)
        elif self._receiving is None:
            self._close_idle(now)
        elif self._accepted and self._body_pace_holds(self._receiving, now):
            self.due_s = now + 1.0
            self._wheel.watch(self)
        else:
            self._refuse(ClientError("the request took too long to arrive", status=408, code="request_timeout"))

    # -- inside

    def _close_idle(self, now: float) -> None:
        """Close a connection that nothing comes from; what it was sent has to be read, however slowly, until then."""
        unsent_bytes = self._transport.get_write_buffer_size() if self._transport is not None else 0
        if not unsent_bytes:
            self._close_gently()
        elif unsent_bytes < self._unsent_bytes:
            self._unsent_bytes = unsent_bytes
            self.due_s = now + KEEP_ALIVE_S
            self._wheel.watch(self)
        else:
            self.abort()

    def _body_pace_holds(self, request: InboundRequest, now: float) -> bool:
        """A body may pause for `body_idle_s`, and must average BODY_BYTES_PER_S after that."""
        if now - self._body_last_s >= self._limits.body_idle_s:
            return False
        since_s = now - request.received_s
        return since_s < self._limits.body_idle_s or request.buffered_bytes >= BODY_BYTES_PER_S * since_s

    def _check_framing(self, request: InboundRequest) -> None:
        headers = request.headers
        if request.version not in ("1.1", "1.0"):
            raise BadRequest("HTTP/1.1 or HTTP/1.0, please")
        if request.version == "1.1" and b"host" not in headers:
            raise BadRequest("a Host header is required")
        if b", " in headers.get(b"host", b""):
            raise BadRequest("one Host header, please")
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (coding.lower() != b"chunked" or request.version == "1.0"):
            raise BadRequest("the only Transfer-Encoding taken here is chunked, over HTTP/1.1")
        length = int(headers.get(b"content-length", b"0"))
        expect = headers.get(b"expect")
        if expect is not None and request.version == "1.1":
            if expect.lower() != b"100-continue":
                raise ClientError("only 100-continue can be expected", status=417, code="expectation_failed")
            self._expects = length > 0 or coding is not None
        if length > self._limits.body_bytes:
            raise _body_too_large(self._limits.body_bytes)

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._upgrading and self._receiving is not None:
                self._parse_without_upgrade(self._receiving, data[upgrade.args[0] :])
            return
        except httptools.HttpParserInvalidMethodError:
            self._refuse(ClientError("no such method", status=405, code="method_not_allowed"))
        except httptools.HttpParserError as error:
            if not self._closing_after_work():
                self._refuse(BadRequest(f"not HTTP as RFC 9112 has it: {error}"))
        if self._working is None and not self._refused and self._receiving is not None:
            self._watch_receiving(self._receiving, len(data))

    def _parse_without_upgrade(self, request: InboundRequest, rest: bytes) -> None:
        """Upgrade is ignored: the same head is parsed once more without it, then what follows is a body again."""
        self._upgrading = False
        self._receiving = None
        self._parser = httptools.HttpRequestParser(self)
        headers = dict(request.headers)
        headers.pop(b"upgrade", None)
        headers[b"connection"] = b", ".join(connection_tokens(headers[b"connection"]) - {b"upgrade", b""})
        lines = header_lines(pair for pair in headers.items() if pair[1] or pair[0] != b"connection")
        self._feed(b"%b %b HTTP/1.1\r\n%b\r\n" % (request.method, request.target, lines) + rest)

    def _closing_after_work(self) -> bool:
        """Bytes behind a request with `Connection: close` are nobody's."""
        last = self._ready[-1] if self._ready else self._working
        return isinstance(last, InboundRequest) and not last.keep_alive

    def _watch_receiving(self, request: InboundRequest, fed_bytes: int) -> None:
        """A request is partly here: its head has `head_timeout_s` from its first byte, its body must keep coming."""
        if self._accepted:
            now = self._body_last_s = self._now()
            due_s = now + 1.0
        else:
            self._raw_head_bytes += fed_bytes
            if self._raw_head_bytes > self._limits.head_bytes:
                self._refuse(_head_too_large())
                return
            due_s = request.received_s + self._limits.head_timeout_s
        if due_s < self.due_s:
            self.due_s = due_s
            self._wheel.sooner(self)

    def _start(self, item: InboundRequest | tuple[InboundRequest, BalancerError]) -> None:
        """Answer what is ready, in order, up to the first that needs a task."""
        while True:
            if isinstance(item, tuple):
                self._answer_refusal(*item)
                return
            self._working = item
            work = self._service.begin(item)
            if work is not None:
                self._task = self._loop.create_task(work)
                return
            if not self._done(item) or self._write_paused or not self._ready:
                return
            item = self._ready.pop(0)

    def _refuse(self, error: BalancerError) -> None:
        """Answer with an error in its turn, then close: what follows on this connection cannot be trusted."""
        if self._refused:
            return  # once is enough: llhttp goes on with the rest of the same read
        request = self._receiving or InboundRequest(self, self._now(), is_first=self._is_fresh)
        self._receiving = None
        self._refused = True
        self._body = []
        self.release(request)
        request.keep_alive = False
        if self._working is None and not self._ready:
            self._answer_refusal(request, error)
        else:
            self._ready.append((request, error))

    def release(self, request: InboundRequest) -> None:
        """The body of `request` is held no longer."""
        self._buffered.bytes -= request.buffered_bytes
        request.buffered_bytes = 0

    def _abandon_unstarted(self) -> None:
        for item in (self._receiving, *self._ready):
            if isinstance(item, InboundRequest):
                self.release(item)
        self._receiving = None
        self._body = []
        self._backlog = b""
        self._ready.clear()

    def _answer_refusal(self, request: InboundRequest, error: BalancerError) -> None:
        self.write(self._service.refuse(request, error))
        self._close_gently()

    def _close_gently(self) -> None:
        """Say that we are done and let the client's last bytes run out, so that no reset eats the answer."""
        self._closing = True
        if self._transport is None or self._transport.is_closing():
            return
        if self._refused and self._transport.can_write_eof():
            self._transport.write_eof()
            self.due_s = self._now() + LINGER_S
            self._wheel.sooner(self)
        else:
            self._transport.close()


def _head_too_large() -> BalancerError:
    return ClientError("the request head is too large", status=431, code="headers_too_large")


def _body_too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request body is larger than {limit} bytes")
