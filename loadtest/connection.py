"""One client connection: HTTP/1.1 requests in, any bytes out, and the moment the client leaves."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

HEAD_LIMIT_BYTES = 1 << 20
# struct linger {on, 0 s}: closing then sends RST instead of FIN.
_NO_LINGER = struct.pack("ii", 1, 0)


class BadRequest(Exception):
    """The bytes on the connection are no HTTP/1.1 request."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A request as it came, and what became of it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = field(repr=False)
    version: str = "HTTP/1.1"
    keep_alive: bool = True
    index: int = 0  # order of arrival at the node, over all connections
    connection: int = 0  # number of the connection it came on
    state: str = "open"  # open, done, left (by the client), broken (by a fault), aborted (the node ended)
    status: int = 0
    events_sent: int = 0

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str | None:
        """The first header of that name, in any case."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    def json(self) -> Any:
        """The body's JSON; raises ValueError when it is none."""
        return orjson.loads(self.body)


class Connection(asyncio.Protocol):
    """Runs `serve(connection)` as its task, which ends when the client leaves. Sets no limits to what it is sent."""

    def __init__(self, number: int, serve: Callable[[Connection], Coroutine[Any, Any, None]]) -> None:
        self.number = number
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self.ended_by_us = False
        self.task: asyncio.Task[None] | None = None
        self._serve = serve
        self._buffer = bytearray()
        self._missing_bytes = 0
        self._arrived: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class, only by their methods.
        self.transport = cast("asyncio.Transport", transport)
        if self.ended_by_us:
            self.reset()
            return
        self.task = asyncio.get_running_loop().create_task(self._serve(self))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._arrived is not None and len(self._buffer) >= self._missing_bytes:
            _wake(self._arrived)

    def eof_received(self) -> None:
        """A half-close counts as leaving."""
        self._made.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.task is not None:
            self.task.cancel()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        _wake(self._writable)

    async def read_request(self) -> Request:
        """The next request with its whole body. Waits for ever on an idle connection; raises BadRequest."""
        head = await self._read_head()
        method, target, version, headers = _parse_head(head)
        lower = {key.lower(): value for key, value in headers}
        if lower.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" in lower.get("transfer-encoding", "").lower():
            body = await self._read_chunks()
        else:
            body = await self._take(int(lower.get("content-length") or 0))
        wish = lower.get("connection", "").lower()
        keep_alive = wish != "close" if version == "HTTP/1.1" else wish == "keep-alive"
        return Request(method=method, target=target, headers=headers, body=body, version=version, keep_alive=keep_alive)

    async def ignore(self) -> None:
        """Read nothing more, for ever."""
        self._made.pause_reading()
        await asyncio.get_running_loop().create_future()

    async def ended(self) -> None:
        """Wait until the connection's task is over, after `reset` or `close`."""
        if self.task is not None:
            await asyncio.wait([self.task])

    def write(self, data: bytes) -> None:
        self._made.write(data)

    async def drain(self) -> None:
        """Wait while the client reads more slowly than we write."""
        if self._paused and not self.lost:
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable

    async def flush(self) -> None:
        """Wait until all that was written has been handed to the kernel."""
        self._made.set_write_buffer_limits(high=0)
        await self.drain()
        self._made.set_write_buffer_limits()

    def close(self) -> None:
        """End with FIN, after what was written."""
        self.ended_by_us = True
        self._made.close()

    def reset(self) -> None:
        """End with RST, now; a connection that is still being made as soon as it is."""
        self.ended_by_us = True
        if self.transport is None:
            return
        sock = self.transport.get_extra_info("socket")
        if sock is not None and not self.transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    @property
    def _made(self) -> asyncio.Transport:
        assert self.transport is not None
        return self.transport

    async def _read_head(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\r\n\r\n", searched)) < 0:
            if len(self._buffer) > HEAD_LIMIT_BYTES:
                raise BadRequest("head too long")
            searched = max(0, len(self._buffer) - 3)
            await self._more(len(self._buffer) + 1)
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]
        return head

    async def _read_chunks(self) -> bytes:
        parts = []
        while size := int((await self._read_line()).partition(b";")[0], 16):
            parts.append(await self._take(size))
            await self._read_line()
        while await self._read_line():
            pass
        return b"".join(parts)

    async def _read_line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            await self._more(len(self._buffer) + 1)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    async def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            await self._more(size)
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    async def _more(self, missing_bytes: int) -> None:
        """Wait until the buffer holds so many bytes."""
        self._missing_bytes = missing_bytes
        self._arrived = asyncio.get_running_loop().create_future()
        await self._arrived


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def _parse_head(head: bytes) -> tuple[str, str, str, list[tuple[str, str]]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    try:
        method, target, version = first.split(" ")
        pairs = [line.split(":", 1) for line in lines]
        return method, target, version, [(key, value.strip(" \t")) for key, value in pairs]
    except ValueError as error:
        raise BadRequest(first) from error
