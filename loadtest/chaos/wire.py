"""Bytes on a socket: what no HTTP client would send, and how much of an answer a reader takes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from loadtest.chaos.stage import Stage

# How long an answer may take that is to come at once.
ANSWER_WITHIN_S = 15.0


class Wire:
    """One connection to the data port."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Write it all; a peer that closed meanwhile is no error."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def status(self) -> int:
        """The status of the next answer; 0 when the connection ends without one."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError, asyncio.LimitOverrunError):
            head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), ANSWER_WITHIN_S)
            return int(head.split(b" ", 2)[1])
        return 0

    async def rest(self) -> bytes:
        """Everything until the connection is closed."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            return await asyncio.wait_for(self.reader.read(), ANSWER_WITHIN_S)
        return b""


@asynccontextmanager
async def wire(stage: Stage, *, limit: int = 1 << 16) -> AsyncIterator[Wire]:
    """A connection of one's own; with a small `limit` little is read ahead."""
    address = urlsplit(stage.data_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=limit)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/chat/completions") -> bytes:
    """A request as bytes, with its Content-Length."""
    lines = [b"POST %b HTTP/1.1" % path, b"Host: x", b"Content-Type: application/json", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])
