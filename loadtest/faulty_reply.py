"""An answer with a fault in it: how each kind of `Fault` looks on the wire."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from typing import NoReturn

import orjson

from loadtest.clock import Clock
from loadtest.connection import Connection, Request
from loadtest.faults import Fault, Faults
from loadtest.reply import SSE, Headers, Reply, Stopped

ENGINE_ERROR = {
    "message": "EngineCore encountered an issue.",
    "type": "InternalServerError",
    "param": None,
    "code": 500,
}
_SECOND_ANSWER = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
_NO_HTTP = b"\x00\xff\x16\x03\x01 220 mail.example ESMTP\r\n" * 8
_HALF_AN_OBJECT = b'{"id": "x", "choices": [{"ind'
_EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n"
_LARGE_BYTES = 1 << 20
_ERROR_EVENTS = {
    "/v1/messages": b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"engine died"}}\n\n',
    "/v1/responses": b'event: error\ndata: {"type":"error","code":"server_error","message":"engine died"}\n\n',
    "/generate_stream": b'data: {"error":"engine died","error_type":"generation"}\n\n',
}


class FaultyReply(Reply):
    """A Reply that a fault may hold up, change or end; in the last case it raises Stopped."""

    def __init__(
        self,
        connection: Connection,
        request: Request,
        fault: Fault,
        *,
        faults: Faults,
        clock: Clock,
        changed: Callable[[], None],
        crash: Callable[[Fault], None],
        headers: Headers = (),
    ) -> None:
        super().__init__(connection, request, changed=changed, headers=headers)
        self.fault = fault
        self.slow_factor = fault.factor if fault.kind == "slow" else 1.0
        self._faults = faults
        self._clock = clock
        self._crash = crash
        self._gzip = zlib.compressobj(wbits=31) if fault.kind == "gzip" else None

    async def before_work(self) -> None:
        """What the fault does before the request reaches the engine."""
        fault = self.fault
        await self._point(None)
        if fault.kind == "delay":
            await self._clock.sleep(fault.delay_s)
        elif fault.kind == "status":
            error = orjson.dumps({"error": {**ENGINE_ERROR, "code": fault.status}})
            payload = error if fault.body is None else fault.body.encode()
            retry_after = () if fault.retry_after_s is None else (("retry-after", str(fault.retry_after_s)),)
            await self._instead(payload, fault.status, retry_after)
        elif fault.kind == "bad_json":
            await self._instead(_HALF_AN_OBJECT)
        elif fault.kind == "error_body":
            await self._instead(orjson.dumps({"error": ENGINE_ERROR}))
        elif fault.kind == "empty_body":
            await self._instead(b"")
        elif fault.kind == "endless_head":
            await self._endless_head()

    async def whole(
        self, payload: bytes, *, status: int = 200, content_type: str = "application/json", headers: Headers = ()
    ) -> None:
        fault = self.fault
        if fault.kind == "huge" and payload[:1] == b"{":
            payload = b'{"filler":"%b",%b' % (b"x" * (fault.size_bytes or _LARGE_BYTES), payload[1:])
        if self._gzip is not None:
            payload = self._gzip.compress(payload) + self._gzip.flush()
        missing_bytes = (fault.size_bytes or 100) if fault.kind == "truncated" else 0
        length = ("content-length", str(len(payload) + missing_bytes))
        await self.write(self.head(status, content_type, (*headers, length)))
        await self._point(0)
        half = len(payload) // 2
        await self.write(payload[:half])
        await self._point(fault.after_events or -1)
        await self.write(payload[half:])
        await self._behind()

    async def begin(self, content_type: str = SSE) -> None:
        if self.fault.kind == "truncated":
            self.streaming = True
            length = ("content-length", str(self.fault.size_bytes or 1 << 30))
            await self.write(self.head(200, content_type, (length,)))
        else:
            await super().begin(content_type)
        await self._point(0)

    async def event(self, data: bytes) -> None:
        fault = self.fault
        if fault.kind == "delay" and fault.each_event:
            await self._clock.sleep(fault.delay_s)
        if fault.kind == "huge" and self.request.events_sent == 0:
            data = b": %b\n\n%b" % (b"x" * (fault.size_bytes or _LARGE_BYTES), data)
        await super().event(data)
        await self._point(self.request.events_sent)

    async def last(self, data: bytes) -> None:
        if self.fault.kind != "no_done":
            await self.event(data)

    async def finish(self) -> None:
        if self._gzip is not None:
            await super().chunk(self._gzip.flush())
        if self.chunked:
            await self.write(b"0\r\n\r\n")
        await self._behind()
        if not self.chunked:
            self.connection.close()

    def finish_reason(self, reason: str | None) -> str | None:
        return None if self.fault.kind == "no_finish" else reason

    def head(self, status: int, content_type: str, headers: Headers) -> bytes:
        if self.fault.kind == "content_type":
            content_type = self.fault.content_type or "text/html"
        if self._gzip is not None:
            headers = (*headers, ("content-encoding", "gzip"))
        early = _EARLY_HINTS if self.fault.kind == "informational" else b""
        return early + super().head(status, content_type, headers)

    async def chunk(self, data: bytes) -> None:
        if self._gzip is not None:
            data = self._gzip.compress(data) + self._gzip.flush(zlib.Z_SYNC_FLUSH)
        await super().chunk(data)

    async def _instead(self, payload: bytes, status: int = 200, headers: Headers = ()) -> NoReturn:
        await self.whole(payload, status=status, headers=headers)
        raise Stopped

    async def _endless_head(self) -> NoReturn:
        await self.write(b"HTTP/1.1 200 OK\r\n")
        sent = 0
        line = b"x-filler: " + b"y" * 1012 + b"\r\n"
        while self.fault.size_bytes is None or sent < self.fault.size_bytes:
            await self.write(line)
            sent += len(line)
            await asyncio.sleep(0)
        self._close()

    async def _behind(self) -> None:
        """What comes behind an answer that is whole."""
        if self.fault.kind == "extra_bytes":
            await self.write((self.fault.body or _SECOND_ANSWER).encode())
        elif self.fault.kind in ("truncated", "hang_up"):
            self._close()

    async def _point(self, after_events: int | None) -> None:
        """Do what the fault has for this point of the answer, if it is the one."""
        fault = self.fault
        if fault.after_events != after_events:
            return
        match fault.kind:
            case "hang":
                self._changed()
                await self._faults.until_released()
            case "reset":
                await self.connection.flush()
                self.connection.reset()
                raise Stopped
            case "close":
                self._close()
            case "cut":
                await self._cut()
            case "garbage":
                await self.write(_NO_HTTP)
                self._close()
            case "bad_chunk":
                await self._bad_chunk()
            case "bad_event" if self.streaming:
                await self.chunk(b'data: {"id": "x", "choi\n\n')
            case "error_event":
                await self._error_event(before_head=after_events is None)
            case "die":
                await self.connection.flush()
                self._crash(fault)
                raise Stopped
            case "refuse" | "freeze":
                self._crash(fault)

    async def _bad_chunk(self) -> NoReturn:
        if not self.request.status:
            await self.begin()
        await self.write(b"zz\r\nnot a chunk\r\n")
        self._close()

    async def _error_event(self, *, before_head: bool) -> NoReturn:
        """The dialect's error event as the end of a stream; a whole answer under way can only break off."""
        if before_head:
            await super().begin()
        if self.streaming:
            error = b"data: %b\n\n" % orjson.dumps({"error": ENGINE_ERROR})
            await self.chunk(_ERROR_EVENTS.get(self.request.path, error))
        await self._cut()

    async def _cut(self) -> NoReturn:
        """End without the good end, as cleanly as the framing allows."""
        if not self.chunked:
            self._close()
        await self.write(b"0\r\n\r\n")
        raise Stopped

    def _close(self) -> NoReturn:
        self.connection.close()
        raise Stopped
