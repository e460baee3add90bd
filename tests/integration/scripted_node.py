"""A node that says exactly the bytes it is told to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.integration.raw_http import WITHIN_S, chunked


@dataclass
class Received:
    """A request as it came to the node."""

    target: str
    headers: list[tuple[str, str]]  # names as they were sent
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]

    @property
    def names(self) -> list[str]:
        return sorted(key.lower() for key, _ in self.headers)


Script = Callable[["ScriptedNode", asyncio.StreamWriter], Awaitable[None]]


def ok(body: Any, *lines: str, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """A whole answer."""
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = [f"content-type: {kind}", f"content-length: {len(payload)}", *lines]
    return "\r\n".join([f"HTTP/1.1 {status}", *told, "", ""]).encode("latin-1") + payload


def stream_head(*lines: str, kind: str = "text/event-stream") -> bytes:
    told = [f"content-type: {kind}", "transfer-encoding: chunked", *lines]
    return "\r\n".join(["HTTP/1.1 200 OK", *told, "", ""]).encode("latin-1")


def streamed(*events: bytes) -> bytes:
    """A whole stream, a chunk to each event."""
    return stream_head() + chunked(*events)


class ScriptedNode:
    """Answers each POST with the next of `answers`, the last of them for ever: bytes, or a function that writes them.

    GET is health and the like: 200 and an empty object.
    """

    def __init__(self, *answers: bytes | Script) -> None:
        self.answers = list(answers)
        self.requests: list[Received] = []
        self.left = 0  # answers whose client left before their script was over
        self.connections = 0  # that carried a POST
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ScriptedNode:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 26)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds, looked at whenever a request came or ended."""
        async with asyncio.timeout(WITHIN_S), self._changed:
            await self._changed.wait_for(condition)

    async def tell(self) -> None:
        """Something changed that a test may wait for."""
        async with self._changed:
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        used = False
        try:
            while not writer.is_closing():
                method, request = await self._read(reader)
                if method != "POST":
                    writer.write(ok({}))
                    continue
                self.connections += not used
                used = True
                self.requests.append(request)
                await self.tell()
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if isinstance(answer, bytes):
                    writer.write(answer)
                else:
                    await self._perform(answer, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _perform(self, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Run a script until it is over, or its client has left."""
        acting = asyncio.ensure_future(script(self, writer))
        leaving = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait([acting, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (acting, leaving):
                task.cancel()
            await asyncio.gather(acting, leaving, return_exceptions=True)
        if acting.cancelled() or isinstance(acting.exception(), ConnectionError):
            self.left += 1
            writer.close()
        else:
            acting.result()
        await self.tell()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, Received]:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in head[1:])]
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        assert not any(name.lower() == "transfer-encoding" for name, _ in headers)
        body = await reader.readexactly(int(lengths[0])) if lengths else b""
        return method, Received(target, headers, body)


class Steps:
    """A script that says its parts one by one, each when `go` is called; then does what `then` says."""

    def __init__(self, *parts: bytes, then: Callable[[asyncio.StreamWriter], object] | None = None) -> None:
        self._parts = parts
        self._then = then
        self._permits = asyncio.Semaphore(0)

    def go(self, steps: int = 1) -> None:
        for _ in range(steps):
            self._permits.release()

    async def __call__(self, node: ScriptedNode, writer: asyncio.StreamWriter) -> None:
        for part in self._parts:
            await self._permits.acquire()
            writer.write(part)
        await self._permits.acquire()
        if self._then is not None:
            self._then(writer)
        else:
            await asyncio.Event().wait()


class Flood:
    """A script that says `parts` as fast as they are taken."""

    def __init__(self, head: bytes, parts: list[bytes]) -> None:
        self.sent = 0
        self.body = b"".join(parts)
        self._head = head
        self._parts = parts

    async def __call__(self, node: ScriptedNode, writer: asyncio.StreamWriter) -> None:
        writer.write(self._head)
        for part in self._parts:
            writer.write(chunked(part)[:-5])
            await writer.drain()
            self.sent += len(part)
        writer.write(b"0\r\n\r\n")
