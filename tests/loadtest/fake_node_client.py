"""A client of fake nodes that sees the bytes."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any, ClassVar

from loadtest.fake_node import FakeNode

CHAT = "/v1/chat/completions"


class RawClient:
    """One connection to a node; sends requests and gives back the bytes as they came."""

    made: ClassVar[list[RawClient]] = []  # closed by a fixture after each test

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, node: FakeNode) -> RawClient:
        client = cls(*await asyncio.open_connection("127.0.0.1", node.port, limit=1 << 24))
        cls.made.append(client)
        return client

    def send(self, body: Any, path: str = CHAT, *headers: str, method: str = "POST", version: str = "HTTP/1.1") -> None:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = () if "transfer-encoding: chunked" in headers else (f"content-length: {len(payload)}",)
        head = "\r\n".join((f"{method} {path} {version}", "host: node", *length, *headers, "", ""))
        self.writer.write(head.encode() + payload)

    def get(self, path: str) -> None:
        self.send(b"", path, method="GET")

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> tuple[bytes, bytes]:
        """Head and body of a well-framed answer; chunks are put together."""
        head = await self.head()
        if b"transfer-encoding: chunked" not in head:
            return head, await self.reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        body = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        assert await self.reader.readuntil(b"\r\n") == b"\r\n"
        return head, body

    async def rest(self) -> tuple[bytes, str]:
        """Everything up to the end of the connection, and how it ended: FIN or RST."""
        got = b""
        try:
            while data := await self.reader.read(1 << 16):
                got += data
        except ConnectionResetError:
            return got, "RST"
        return got, "FIN"

    @classmethod
    async def close_all(cls) -> None:
        """Close every connection that was made, and see it closed."""
        for client in cls.made:
            client.leave()
            with suppress(OSError):
                await client.writer.wait_closed()
        cls.made.clear()

    def leave(self) -> None:
        self.writer.transport.abort()


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A chat request with one message."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def sse(body: bytes) -> list[Any]:
    """The data of each event: JSON, or the text [DONE]."""
    lines = [line.removeprefix("data:").strip() for line in body.decode().splitlines() if line.startswith("data:")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
