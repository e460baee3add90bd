"""Real HTTP servers that answer what a test sets, and a registry to watch: for the shells beside the data path."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import orjson
from aiohttp import web

from balancer.clock import SystemClock
from balancer.core.breaker import BreakerPolicy
from balancer.core.health import HealthPolicy
from balancer.core.node import NodeConfig
from balancer.core.selection import RoutingPolicy
from balancer.metrics import Metrics
from balancer.registry import Registry

# What is waited for comes in milliseconds; a test that waits this long has failed.
WITHIN_S = 10.0
SILENT = "silent"


@dataclass(frozen=True)
class Asked:
    path: str
    headers: dict[str, str]


class Answering:
    """A server on 127.0.0.1. `answers`: path -> status, (status, body), or SILENT; what is not there is 404."""

    def __init__(self, answers: dict[str, Any] | None = None) -> None:
        self.answers: dict[str, Any] = answers or {}
        self.asked: list[Asked] = []
        self.port = 0
        self._told = asyncio.Condition()
        self._runner: web.ServerRunner | None = None

    async def __aenter__(self) -> Answering:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._told:
            self.asked.append(Asked(request.path, dict(request.headers)))
            self._told.notify_all()
        answer = self.answers.get(request.path, 404)
        if answer is SILENT:
            await asyncio.Event().wait()
        status, body = answer if isinstance(answer, tuple) else (answer, b"")
        if callable(body):
            body = body()
        return web.Response(
            status=status,
            body=body if isinstance(body, bytes) else orjson.dumps(body),
            headers={"Location": "/elsewhere"} if 300 <= status < 400 else None,
        )

    def count(self, path: str) -> int:
        return sum(1 for asked in self.asked if asked.path == path)

    async def asked_for(self, path: str, more: int = 1) -> None:
        """Until `path` was asked for so many more times: then all but the last of these were answered and judged."""
        wanted = self.count(path) + more
        async with asyncio.timeout(WITHIN_S), self._told:
            await self._told.wait_for(lambda: self.count(path) >= wanted)


def dead_url() -> str:
    """Where nobody listens: a port bound and closed."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def full_url() -> Iterator[str]:
    """Where connections are neither made nor refused: the kernel drops who comes, for the listener's queue is full."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"


class Fleet:
    """A registry on the real clock, and a way to wait for what it comes to know."""

    def __init__(self, *, now: Callable[[], float] = SystemClock.now, stale_s: float = 5.0, **health: Any) -> None:
        self.metrics = Metrics()
        self.registry = Registry(
            routing=RoutingPolicy(),
            breaker=BreakerPolicy(),
            health=HealthPolicy(**health),
            stale_s=stale_s,
            metrics=self.metrics,
            now=now,
            rng=Random(3),
        )
        self._changed = asyncio.Event()
        self.registry.on_change(self._changed.set)

    def put(self, url: str, **config: Any) -> Any:
        return self.registry.put(NodeConfig(url=url, **config))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds, looked at whenever evidence changed."""
        async with asyncio.timeout(WITHIN_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()
