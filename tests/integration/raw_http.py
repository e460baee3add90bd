"""HTTP/1.1 by hand: requests as bytes, and answers taken apart without mercy."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

# What is waited for comes in milliseconds; a test that waits this long has failed.
WITHIN_S = 10.0
CHAT = "/v1/chat/completions"
MODEL = "sim-model"

_STATUS_LINE = re.compile(r"HTTP/1\.1 ([1-5]\d\d) [\x20-\x7e]*")
_HEADER_LINE = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+): ([\x21-\x7e\x80-\xff](?:[\x20-\x7e\x80-\xff\t]*))?")
_CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")


class Listening(Protocol):
    """Whatever a client connects to."""

    @property
    def address(self) -> tuple[str, int]: ...


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A chat request that leaves nothing to chance."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 6, **fields}


def post(body: Any, path: str = CHAT, *lines: str, method: str = "POST", version: str = "HTTP/1.1") -> bytes:
    """A request. `body` is bytes, or becomes JSON; its length is told unless `lines` tell the framing."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = any(line.lower().startswith(("content-length:", "transfer-encoding:")) for line in lines)
    length = (
        [] if told or (method in ("GET", "HEAD", "OPTIONS") and not payload) else [f"content-length: {len(payload)}"]
    )
    kind = [] if any(line.lower().startswith("content-type:") for line in lines) else ["content-type: application/json"]
    head = "\r\n".join([f"{method} {path} {version}", "host: balancer", *kind, *length, *lines, "", ""])
    return head.encode("latin-1") + payload


def get(path: str, *lines: str, method: str = "GET") -> bytes:
    return post(b"", path, *lines, method=method)


def chunked(*parts: bytes) -> bytes:
    """A chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@dataclass
class Answer:
    """One answer as it came. Its framing was checked when it was read."""

    status: int
    headers: list[tuple[str, str]]  # lower-case names
    body: bytes = b""
    chunks: list[bytes] | None = None  # of a chunked body
    interim: list[int] = field(default_factory=list)  # 1xx before it

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def header(self, name: str) -> str | None:
        """The one value, or None; twice is a failure."""
        values = self.all(name)
        assert len(values) <= 1, (name, values)
        return values[0] if values else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The error code of an OpenAI error body, whose form is checked; None for an answer that is no error."""
        data = self.json
        if not isinstance(data, dict) or "error" not in data:
            return None
        assert set(data) == {"error"}, data
        error = data["error"]
        assert set(error) == {"message", "type", "param", "code"}, data
        assert isinstance(error["message"], str), data
        assert error["message"], data
        assert isinstance(error["type"], str), data
        return str(error["code"])

    @property
    def cache(self) -> str | None:
        return self.header("x-balancer-cache")

    @property
    def events(self) -> list[Any]:
        """The payloads of an event stream: JSON, or the text [DONE]."""
        return payloads(self.body)


def payloads(stream: bytes) -> list[Any]:
    """The data of each event, each of which has to be whole."""
    assert stream == b"" or stream.endswith(b"\n\n"), stream[-200:]
    lines = [line[5:].strip() for line in stream.split(b"\n") if line.startswith(b"data:")]
    return ["[DONE]" if line == b"[DONE]" else json.loads(line) for line in lines]


def text_of(events: Iterable[Any]) -> str:
    """What a chat stream says, all choices together."""
    choices = [choice for event in events if isinstance(event, dict) for choice in event.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


class Wire:
    """One client connection."""

    made: ClassVar[list[Wire]] = []  # cut by a fixture after each test

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, server: Listening, *, limit: int = 1 << 26) -> Wire:
        """Connect. Twice `limit` bytes at most are taken from the kernel before they are read."""
        wire = cls(*await asyncio.open_connection(*server.address, limit=limit))
        cls.made.append(wire)
        return wire

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def ask(self, data: bytes) -> Answer:
        """Send a request and read its answer."""
        self.send(data)
        return await self.answer(to_head=data.startswith(b"HEAD "))

    async def head(self) -> Answer:
        """The head of the next answer; a body may follow."""
        interim: list[int] = []
        while True:
            async with asyncio.timeout(WITHIN_S):
                lines = (await self._reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
            status = _STATUS_LINE.fullmatch(lines[0])
            assert status is not None, lines[0]
            pairs = [_HEADER_LINE.fullmatch(line) for line in lines[1:]]
            assert None not in pairs, lines
            headers = [(pair[1].lower(), pair[2] or "") for pair in pairs if pair is not None]
            if int(status[1]) >= 200:
                return Answer(int(status[1]), headers, interim=interim)
            assert headers == []
            interim.append(int(status[1]))

    async def interim(self) -> int:
        """The status of an answer before the answer."""
        async with asyncio.timeout(WITHIN_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
        assert re.fullmatch(rb"HTTP/1\.1 1\d\d [\x20-\x7e]*\r\n\r\n", head), head
        return int(head[9:12])

    async def answer(self, *, to_head: bool = False) -> Answer:
        """The next answer, whole; its framing has to be beyond doubt."""
        answer = await self.head()
        length, coding = answer.header("content-length"), answer.header("transfer-encoding")
        assert (length is None) != (coding is None) or answer.status == 204, answer
        if to_head or answer.status == 204:
            return answer
        if length is not None:
            assert length.isascii(), length
            assert length.isdigit(), length
            async with asyncio.timeout(WITHIN_S):
                answer.body = await self._reader.readexactly(int(length))
            return answer
        assert coding == "chunked"
        answer.chunks = []
        async for part in self.chunks():
            answer.chunks.append(part)
        answer.body = b"".join(answer.chunks)
        return answer

    async def chunk(self) -> bytes:
        """The next chunk; empty at the clean end of the body."""
        async with asyncio.timeout(WITHIN_S):
            line = _CHUNK_LINE.fullmatch(await self._reader.readuntil(b"\r\n"))
            assert line is not None
            size = int(line[1], 16)
            data = await self._reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    async def chunks(self) -> AsyncIterator[bytes]:
        """All chunks up to the clean end of the body."""
        while part := await self.chunk():
            yield part

    async def ends(self) -> bytes:
        """Everything up to the end of the connection, which has to be a FIN."""
        async with asyncio.timeout(WITHIN_S):
            return await self._reader.read(-1)

    async def breaks(self) -> bytes:
        """Everything up to the end of the connection, whatever that is."""
        got = b""
        async with asyncio.timeout(WITHIN_S):
            try:
                while data := await self._reader.read(1 << 16):
                    got += data
            except ConnectionResetError:
                pass
        return got

    @property
    def pending(self) -> bytes:
        """What has come and was not read."""
        return bytes(self._reader._buffer)  # type: ignore[attr-defined]

    def half_close(self) -> None:
        self.writer.write_eof()

    def leave(self) -> None:
        """Cut the connection."""
        self.writer.transport.abort()

    @classmethod
    async def cut_all(cls) -> None:
        """Cut every connection that was made."""
        for wire in cls.made:
            wire.leave()
            try:
                await wire.writer.wait_closed()
            except OSError:
                pass
        cls.made.clear()


async def ask(server: Listening, body: Any, path: str = CHAT, *lines: str, **request: Any) -> Answer:
    """One request on a connection of its own."""
    wire = await Wire.to(server)
    answer = await wire.ask(post(body, path, *lines, **request))
    wire.leave()
    return answer
