"""Programs of ours as processes that end with this one: on Linux even when this one is killed."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from loadtest.clock import Clock

# prctl(2): the signal that the kernel sends to a process when its parent dies.
PR_SET_PDEATHSIG = 1
# Our programs stop at once when nothing is in flight; what takes longer is killed.
END_WITHIN_S = 5.0
# How often a child that starts is asked whether it is ready.
ASK_EVERY_S = 0.05


class CannotRun(Exception):
    """A child did not start, or ended by itself; the text says which and what it said last."""


class Ports:
    """Ports of 127.0.0.1 to give to children, each once; looked for up to `reach` above the one preferred."""

    def __init__(self, reach: int = 500) -> None:
        self._reach = reach
        self._given: set[int] = set()

    def take(self, preferred: int) -> int:
        """The preferred port if it is free, else the next free one above. Raises CannotRun."""
        last = min(preferred + self._reach, 65535)
        for port in range(preferred, last + 1):
            if port not in self._given and _is_free(port):
                self._given.add(port)
                return port
        raise CannotRun(f"no port of 127.0.0.1 from {preferred} to {last} is free")


class Child:
    """`python -m MODULE ARGUMENTS…`; what it says goes to the file `log`. May be started again after its end.

    It has a session of its own, so that Ctrl-C on the terminal reaches this process alone, which then ends it in order.
    """

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        # The very code that runs here, whatever the working directory holds.
        path = os.pathsep.join((str(Path(__file__).parents[1]), *filter(None, (environment.get("PYTHONPATH"),))))
        self._words = ("-P", "-m", module, *arguments)
        self._environment = {**environment, "PYTHONPATH": path}
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<Child {self.name} {'up' if self.is_up else 'down'}>"

    @property
    def pid(self) -> int:
        """Its process id, or that of its last run."""
        assert self._process is not None, "it was never started"
        return self._process.pid

    @property
    def is_up(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process; it is not ready yet."""
        assert not self.is_up, "it runs already"
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_tie_to_parent(),
            )

    async def until(self, ready: Callable[[], Awaitable[bool]], clock: Clock, within_s: float) -> None:
        """Ask `ready` until it says yes. Raises CannotRun when the process ends before that, or takes longer."""
        last_s = clock.now() + within_s
        while not await ready():
            self.check()
            if clock.now() > last_s:
                raise CannotRun(f"{self.name} was not ready within {within_s:g} s{self._last_words()}")
            await clock.sleep(ASK_EVERY_S)

    def check(self) -> None:
        """Raises CannotRun if the process has ended."""
        if not self.is_up:
            raise CannotRun(f"{self.name} has ended by itself{self._last_words()}")

    async def kill(self) -> None:
        """SIGKILL, and see it gone."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def end(self) -> None:
        """SIGTERM, and SIGKILL after END_WITHIN_S or when this is cancelled; harmless when it is down."""
        if self._process is None:
            return
        try:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), END_WITHIN_S)
        finally:
            if self.is_up:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()

    def _last_words(self) -> str:
        """The end of its log, on lines of their own."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
        return "".join(f"\n  {line}" for line in lines)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _tie_to_parent() -> Callable[[], None] | None:
    """What a child does before it becomes its program, so that the kernel kills it when this process dies."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return tie
