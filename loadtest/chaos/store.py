"""A Redis to be killed, frozen, filled and soiled."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from loadtest.children import CannotRun
from loadtest.clock import SystemClock

START_WITHIN_S = 10.0
ASK_EVERY_S = 0.02


class StoreServer:
    """A `redis-server` without persistence on a port of its own."""

    def __init__(self, port: int, folder: Path, *words: str) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self.client = Redis(
            host="127.0.0.1", port=port, socket_timeout=2.0, socket_connect_timeout=2.0, retry=Retry(NoBackoff(), 0)
        )
        self._words = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder), *words)
        self._process: asyncio.subprocess.Process | None = None

    @staticmethod
    def missing() -> str | None:
        """Why there can be none here, or None."""
        return None if shutil.which("redis-server") else "redis-server is not on PATH"

    async def start(self) -> None:
        """Start it, empty, and wait until it answers. Raises CannotRun."""
        if reason := self.missing():
            raise CannotRun(reason)
        quiet = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec("redis-server", *self._words, stdout=quiet, stderr=quiet)
        clock = SystemClock()
        last_s = clock.now() + START_WITHIN_S
        while True:
            with contextlib.suppress(RedisError, OSError):
                await self.client.ping()
                return
            if clock.now() > last_s:
                raise CannotRun("redis-server did not answer")
            await clock.sleep(ASK_EVERY_S)

    def stop(self) -> None:
        """SIGSTOP: connections stand, nothing answers."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL; harmless when it is down."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def end(self) -> None:
        """Kill it and close the client."""
        await self.kill()
        await self.client.aclose()
