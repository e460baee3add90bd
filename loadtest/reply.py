"""One answer on its way to the client.

A dialect says what it has to say: `whole` once, or `begin`, `event`…, `finish`.
`FaultyReply` is the same with a fault in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http import HTTPStatus

import orjson

from loadtest.connection import Connection, Request

SSE = "text/event-stream; charset=utf-8"
# Large answers are written in pieces, so that a slow reader holds up little memory.
WRITE_BYTES = 65_536

Headers = Iterable[tuple[str, str]]


class Stopped(Exception):
    """A fault has ended this answer; the connection is closed, or clean."""


class Reply:
    """Sends one answer. `changed` is called whenever something a test may wait for has happened."""

    slow_factor = 1.0  # how many times longer the engine takes over this request

    def __init__(
        self, connection: Connection, request: Request, *, changed: Callable[[], None], headers: Headers = ()
    ) -> None:
        self.connection = connection
        self.request = request
        self.streaming = False
        self.chunked = False
        self._changed = changed
        self._headers = tuple(headers)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} to {self.request!r}>"

    async def json(self, value: object, status: int = 200, headers: Headers = ()) -> None:
        """A whole JSON answer."""
        await self.whole(orjson.dumps(value), status=status, headers=headers)

    async def whole(
        self, payload: bytes, *, status: int = 200, content_type: str = "application/json", headers: Headers = ()
    ) -> None:
        """A whole answer with its length in the head."""
        length = ("content-length", str(len(payload)))
        await self.write(self.head(status, content_type, (*headers, length)) + payload)

    async def begin(self, content_type: str = SSE) -> None:
        """The head of a stream: chunked, or up to the end of the connection for HTTP/1.0."""
        self.streaming = True
        self.chunked = self.request.version == "HTTP/1.1"
        framing = ("transfer-encoding", "chunked") if self.chunked else ("connection", "close")
        await self.write(self.head(200, content_type, (("cache-control", "no-cache"), framing)))
        self._changed()

    async def event(self, data: bytes) -> None:
        """One event, whole, as one chunk in one write."""
        await self.chunk(data)
        self.request.events_sent += 1
        self._changed()

    async def data(self, value: object) -> None:
        """One SSE event with JSON."""
        await self.event(b"data: %b\n\n" % orjson.dumps(value))

    async def named(self, name: str, value: object) -> None:
        """One SSE event with a name and JSON."""
        await self.event(b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(value)))

    async def last(self, data: bytes) -> None:
        """The event that says a stream is whole."""
        await self.event(data)

    async def finish(self) -> None:
        """The clean end of a stream's framing."""
        if self.chunked:
            await self.write(b"0\r\n\r\n")
        else:
            self.connection.close()

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason as this answer tells it."""
        return reason

    def head(self, status: int, content_type: str, headers: Headers) -> bytes:
        """Status line and headers, as uvicorn writes them; no Content-Type when it is empty."""
        self.request.status = status
        lines = [f"HTTP/1.1 {status} {_phrase(status)}", "server: uvicorn"]
        if content_type:
            lines.append(f"content-type: {content_type}")
        if not self.request.keep_alive and (self.chunked or not self.streaming):
            lines.append("connection: close")
        lines += [f"{name}: {value}" for name, value in (*self._headers, *headers)]
        return "\r\n".join((*lines, "", "")).encode("latin-1")

    async def chunk(self, data: bytes) -> None:
        """Bytes of a stream in its framing."""
        await self.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    async def write(self, data: bytes) -> None:
        """Bytes as they are; waits while the client is slow to read them."""
        if len(data) <= WRITE_BYTES:
            self.connection.write(data)
            await self.connection.drain()
            return
        for start in range(0, len(data), WRITE_BYTES):
            self.connection.write(data[start : start + WRITE_BYTES])
            await self.connection.drain()


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
