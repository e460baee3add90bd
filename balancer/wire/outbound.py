"""Connections to nodes: pools, and one exchange with one node at a time on each."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools

from balancer.core.outcome import Outcome
from balancer.wire.answer import Answer
from balancer.wire.heads import AnswerHead, split

# A node's head may be this large (promise 4).
HEAD_BYTES = 64 * 1024
# Kept-alive connections are not used after lying idle this long: uvicorn, under most engines, closes them after 5 s.
IDLE_S = 4.0
# Names are looked up again after this long, and whenever connecting failed.
RESOLVE_S = 30.0
# A kept-alive connection that breaks this soon after a request was written had been closed before the node saw it.
STALE_S = 0.05
# Heads remembered per node; a node has a handful, each with a Date that changes every second.
KNOWN_HEADS = 16
# Bodies over this are written apart from their head instead of being copied behind it.
JOIN_BYTES = 64 * 1024


class ConnectFailed(Exception):
    """No connection to a node; `outcome` says how."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


class NodeConnection(asyncio.Protocol):
    """One connection to a node. Any byte out of turn closes it: it would be read as somebody's answer."""

    __slots__ = (
        "_answer",
        "_body_begun",
        "_delimited",
        "_head_bytes",
        "_headers",
        "_memo_key",
        "_parser",
        "_pool",
        "_received",
        "_status",
        "_transport",
        "closed",
        "idle_since_s",
        "reused",
    )

    def __init__(self, pool: NodePool) -> None:
        self._pool = pool
        self._parser: Any = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._memo_key: bytes | None = None  # of the head being parsed
        self._received = 0  # bytes before the final head was complete
        self._head_bytes = 0  # of header lines
        self._status = 0
        self._body_begun = False
        self._delimited = False
        self.closed = False
        self.reused = False
        self.idle_since_s = 0.0

    def exchange(self, head: bytes, body: bytes, answer: Answer, now: float) -> None:
        """Send one request; `answer` hears everything that follows."""
        assert self._transport is not None
        self._answer = answer
        self._headers = []
        self._received = self._head_bytes = 0
        self._body_begun = False
        answer.begin(self, now)
        if len(body) <= JOIN_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def pause(self) -> None:
        """Stop reading; the kernel's window closes and the node waits."""
        if self._transport is not None and not self.closed:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._transport is not None and not self.closed:
            self._transport.resume_reading()

    def drop(self) -> None:
        """Close at once; the node sees its client leave."""
        self._answer = None
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            self.drop()  # nobody asked
            return
        if not self._body_begun:
            if self._received == 0 and self._is_known(data, answer):
                return
            self._received += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._break(Outcome.BAD_FRAMING)
        else:
            if not self._body_begun and self._answer is not None and self._received > HEAD_BYTES:
                self._break(Outcome.BAD_FRAMING)

    def _is_known(self, data: bytes, answer: Answer) -> bool:
        """Take a whole answer whose head this node has sent before; False where it has to be parsed."""
        message = split(data)
        if message is None:
            return False
        key, begin, size = message
        head = self._pool.known_heads.get(key)
        if head is None:
            self._memo_key = key
            return False
        self._received = len(data)
        answer.on_head(head, size)
        if self._answer is not None:
            if size:
                answer.on_data(data[begin:])
            self._complete(answer, keep_alive=head.keep_alive)
        return True

    def eof_received(self) -> bool:
        return False  # close our side as well; connection_lost follows

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._transport = self._parser = None  # llhttp's wrapper holds our methods: a cycle
        self._pool.lost(self)
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if self._body_begun and exc is None and not self._delimited:
            answer.on_end()  # a body without a length ends with its connection
        elif self._body_begun:
            answer.on_broken(Outcome.TRUNCATED if exc is None else Outcome.RESET_AFTER_HEAD)
        elif self.reused and self._received == 0 and self._pool.now() - answer.sent_s < STALE_S:
            answer.on_broken(Outcome.STALE_CONNECTION)
        else:
            answer.on_broken(Outcome.RESET_BEFORE_HEAD)

    # -- httptools

    def on_message_begin(self) -> None:
        if self._answer is None:
            self.drop()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._body_begun:  # trailers are dropped
            return
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > HEAD_BYTES:
            self._break(Outcome.BAD_FRAMING)
            return
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        answer = self._answer
        self._status = status = self._parser.get_status_code()
        if answer is None or status < 200:
            self._memo_key = None  # it was the key of this head, not of the final one
            return
        self._body_begun = True
        length: int | None = None
        chunked = False
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                chunked = True
                if value.strip().lower() != b"chunked":
                    self._break(Outcome.BAD_FRAMING)
                    return
        self._delimited = chunked or length is not None or status in (204, 304)
        head = AnswerHead(status, self._headers, answer.return_headers, keep_alive=self._parser.should_keep_alive())
        if self._memo_key is not None:
            self._pool.remember(self._memo_key, head)
            self._memo_key = None
        self._headers = []
        answer.on_head(head, length)

    def on_body(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.on_data(data)

    def on_message_complete(self) -> None:
        answer = self._answer
        if answer is None:
            return
        if self._status < 200:
            if self._status == 101:
                self._break(Outcome.BAD_FRAMING)
            self._headers = []
            return
        if not self.closed:
            self._complete(answer, keep_alive=self._parser.should_keep_alive())

    def _complete(self, answer: Answer, *, keep_alive: bool) -> None:
        self._answer = None
        # An answer that came before the request was out in full leaves the rest of it in the way of the next.
        if keep_alive and self._transport is not None and self._transport.get_write_buffer_size() == 0:
            self.reused = True
            self._pool.release(self)
        else:
            self.drop()
        answer.on_end()

    def _break(self, outcome: Outcome) -> None:
        answer = self._answer
        self.drop()
        if answer is not None:
            answer.on_broken(outcome)


class NodePool:
    """Connections to one node: idle ones are reused last in first out, names are resolved off the loop."""

    __slots__ = (
        "_addresses",
        "_idle",
        "_loop",
        "_max",
        "_open",
        "_resolved_s",
        "_resolving",
        "_tls",
        "host",
        "host_line",
        "known_heads",
        "now",
        "port",
        "prefix",
    )

    def __init__(
        self,
        url: str,
        *,
        max_connections: int,
        now: Callable[[], float],
    ) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.prefix = parts.path.rstrip("/").encode()
        self.host_line = b"host: %b\r\n" % parts.netloc.rpartition("@")[2].encode()
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._max = max_connections
        self.now = now
        self._loop = asyncio.get_running_loop()
        self.known_heads: dict[bytes, AnswerHead] = {}
        self._idle: deque[NodeConnection] = deque()
        self._open: set[NodeConnection] = set()
        self._addresses: list[str] = []
        self._resolved_s = float("-inf")
        self._resolving: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<NodePool {self.host}:{self.port} open={len(self._open)} idle={len(self._idle)}>"

    def idle(self, now: float) -> NodeConnection | None:
        """A kept-alive connection, or None. Old ones are closed instead of trusted."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.closed:
                continue
            if now - connection.idle_since_s > IDLE_S:
                connection.drop()
                continue
            return connection
        return None

    async def connect(self, connect_s: float) -> NodeConnection:
        """A fresh connection; every address of the node's name is tried, `connect_s` each. Raises ConnectFailed."""
        if len(self._open) >= self._max:
            raise ConnectFailed(Outcome.BACK_PRESSURE, "max_connections_per_node reached")
        addresses = await self._resolve()
        failure = ConnectFailed(Outcome.REFUSED, f"{self.host} has no address")
        for address in addresses:
            try:
                async with asyncio.timeout(connect_s):
                    _, connection = await self._loop.create_connection(
                        lambda: NodeConnection(self),
                        address,
                        self.port,
                        ssl=self._tls,
                        server_hostname=self.host if self._tls else None,
                    )
                self._open.add(connection)
                return connection
            except TimeoutError:
                failure = ConnectFailed(Outcome.CONNECT_TIMEOUT, f"{address}: no connection in {connect_s} s")
            except (OSError, ssl.SSLError) as error:
                failure = ConnectFailed(Outcome.REFUSED, f"{address}: {error}")
        self._resolved_s = float("-inf")
        raise failure

    def release(self, connection: NodeConnection) -> None:
        """Its exchange is over and it may serve another."""
        connection.idle_since_s = self.now()
        self._idle.append(connection)

    def remember(self, key: bytes, head: AnswerHead) -> None:
        """A head this node sent; with a Date in it, it serves for a second."""
        if len(self.known_heads) >= KNOWN_HEADS:
            self.known_heads.clear()
        self.known_heads[key] = head

    def lost(self, connection: NodeConnection) -> None:
        """The connection is gone."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def close(self) -> None:
        """Close what lies idle; running exchanges end by themselves."""
        while self._idle:
            self._idle.pop().drop()

    def sweep(self, now: float) -> None:
        """Close connections that have been idle too long."""
        while self._idle and now - self._idle[0].idle_since_s > IDLE_S:
            self._idle.popleft().drop()

    async def _resolve(self) -> list[str]:
        if not self._addresses or self._resolved_s == float("-inf"):
            await self._look_up()
        elif self.now() - self._resolved_s > RESOLVE_S and (self._resolving is None or self._resolving.done()):
            self._resolving = self._loop.create_task(self._look_up())
        return self._addresses

    async def _look_up(self) -> None:
        self._resolved_s = self.now()
        try:
            found = await self._loop.getaddrinfo(self.host, self.port, type=1)
        except OSError:
            return  # what was known before still stands
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if addresses:
            self._addresses = addresses
