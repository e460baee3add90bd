"""A Redis of the bench's own, empty and without persistence."""

import contextlib
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from loadtest.bench import processes

START_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisServer:
    """A running server; `hits()` says how many reads found their key so far."""

    port: int
    pid: int

    def hits(self) -> int:
        for line in self.ask("INFO stats").splitlines():
            if line.startswith("keyspace_hits:"):
                return int(line.partition(":")[2])
        return 0

    def ask(self, command: str) -> str:
        """The first 64 KiB of the answer to an inline command."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            connection.sendall(command.encode() + b"\r\n")
            return connection.recv(65536).decode(errors="replace")


def missing() -> str | None:
    """Why there can be no Redis here, or None."""
    return None if shutil.which("redis-server") else "redis-server is not on PATH"


@contextlib.contextmanager
def started(folder: str) -> Iterator[RedisServer]:
    """A server on a free port, answering; raises OSError when it does not come up."""
    port = processes.free_port()
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with processes.running([*words, "--dir", folder]) as process:
        server = RedisServer(port=port, pid=process.pid)
        deadline = time.perf_counter() + START_WITHIN_S
        while True:
            with contextlib.suppress(OSError):
                if server.ask("PING").startswith("+PONG"):
                    break
            if time.perf_counter() > deadline or process.poll() is not None:
                raise OSError("redis-server did not start")
            time.sleep(0.02)
        yield server
