"""Our programs as processes of a test's own: their lines as they come, their signals, their exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
# A program that is there in 0.5 s may take far longer on a machine that is busy with other tests.
WITHIN_S = 30.0
LINE_BYTES = 1 << 20


class Process:
    """`python -m MODULE ARGUMENTS…` with our environment but for BALANCER_ variables, and what it said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._said = asyncio.Condition()
        self.out: list[str] = []
        self.err: list[str] = []
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self.out)),
            asyncio.create_task(self._read(process.stderr, self.err)),
        ]

    @classmethod
    async def start(cls, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Process:
        """Start it; it is not ready yet."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *arguments,
            cwd=ROOT,
            env={**inherited, **(environment or {})},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        return cls(process)

    def __repr__(self) -> str:
        status = self._process.returncode
        return f"<Process {self.pid} {'up' if status is None else status} out={self.out[-5:]} err={self.err[-20:]}>"

    async def __aenter__(self) -> Process:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        await self.ended()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_up(self) -> bool:
        return self._process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """SIGSTOP, until it has stopped; the kernel goes on taking connections and bytes for it."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def kill(self) -> None:
        """SIGKILL; harmless when it has ended."""
        if self.is_up:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def until(self, condition: Callable[[], bool], within_s: float = WITHIN_S) -> None:
        """Until what it said makes `condition` true; raises AssertionError with its last lines."""
        try:
            async with asyncio.timeout(within_s), self._said:
                await self._said.wait_for(lambda: condition() or self._is_silent)
        except TimeoutError:
            raise AssertionError(f"waited in vain: {self!r}") from None
        assert condition(), f"it ended before: {self!r}"

    async def ended(self, within_s: float = WITHIN_S) -> int:
        """Its exit status, once it has ended and all that it said is here."""
        async with asyncio.timeout(within_s):
            status = await self._process.wait()
            await asyncio.gather(*self._readers)
        return status

    @property
    def _is_silent(self) -> bool:
        return all(reader.done() for reader in self._readers)

    async def _read(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in stream:
            await self._heard(lines, line.decode().rstrip("\n"))
        await self._heard(lines, None)

    async def _heard(self, lines: list[str], line: str | None) -> None:
        async with self._said:
            if line is not None:
                lines.append(line)
            self._said.notify_all()


class BalancerProcess:
    """`python -m balancer serve` on free ports, with a settings file that may be written anew."""

    def __init__(self, process: Process, file: Path) -> None:
        self.process = process
        self.file = file

    def __repr__(self) -> str:
        return f"<BalancerProcess {self.process!r}>"

    @property
    def url(self) -> str:
        """The data port."""
        return f"http://{self.events('data.listening')[0]['address']}"

    @property
    def ops_url(self) -> str:
        """The operations port."""
        return f"http://{self.events('ops.listening')[0]['address']}"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the data port."""
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log lines with this event, oldest first."""
        lines = [json.loads(line) for line in self.process.err if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    async def logged(self, name: str, count: int = 1) -> dict[str, Any]:
        """Until this event was logged `count` times; the last of them."""
        await self.process.until(lambda: len(self.events(name)) >= count)
        return self.events(name)[count - 1]

    def write_settings(self, settings: Mapping[str, Any] | str) -> None:
        """What it reads at its start and on SIGHUP; a text goes into the file as it is."""
        settings_file(str(self.file.parent), settings)

    async def reload(self, settings: Mapping[str, Any]) -> None:
        """SIGHUP with new settings; returns when they are in force."""
        before = len(self.events("settings.reloaded"))
        self.write_settings(settings)
        self.process.send(signal.SIGHUP)
        await self.logged("settings.reloaded", before + 1)


def settings_file(folder: str, settings: Mapping[str, Any] | str) -> Path:
    """A settings file in this folder; a text goes into it as it is."""
    file = Path(folder, "settings.yaml")
    file.write_text(settings if isinstance(settings, str) else yaml.safe_dump(dict(settings)), encoding="utf-8")
    return file


@asynccontextmanager
async def serving(settings: Mapping[str, Any]) -> AsyncIterator[BalancerProcess]:
    """A balancer process that listens on both ports."""
    with tempfile.TemporaryDirectory(prefix="balancer-test-") as folder:
        file = settings_file(folder, {"listen": "127.0.0.1:0", "ops_listen": "127.0.0.1:0", **settings})
        async with await Process.start("balancer", "serve", "--config", str(file)) as process:
            balancer = BalancerProcess(process, file)
            await balancer.logged("ops.listening")
            yield balancer


@asynccontextmanager
async def node_process(*arguments: str) -> AsyncIterator[tuple[Process, str]]:
    """A fake node as a process, and its URL."""
    async with await Process.start("loadtest.fake_node", *arguments) as process:
        await process.until(lambda: bool(process.out))
        yield process, process.out[0]
