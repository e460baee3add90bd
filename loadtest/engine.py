"""The engine model in real time: one task that walks its steps, and sequences that wait for their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress

from loadtest.clock import Clock
from loadtest.engine_model import EngineModel, Sequence

# How far behind its own time table the engine may catch up: covers a late timer, not a suspended machine.
CATCH_UP_S = 0.2


class Engine:
    """Runs an EngineModel. `freeze` stops it as a wedged GPU would: it takes requests and gives no token."""

    def __init__(self, model: EngineModel, clock: Clock, changed: Callable[[], None] = lambda: None) -> None:
        self.model = model
        self._changed = changed
        self._clock = clock
        self._work = asyncio.Event()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._waiters: dict[Sequence, tuple[int, asyncio.Future[None]]] = {}
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Engine {'running' if self._thawed.is_set() else 'frozen'} {self.model!r}>"

    def start(self) -> None:
        """Begin to walk; an instant engine needs no steps."""
        if not self.model.spec.instant:
            self._task = asyncio.create_task(self._walk(), name="engine")

    async def stop(self) -> None:
        """End the walk; sequences still waiting get nothing more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    @property
    def frozen(self) -> bool:
        return not self._thawed.is_set()

    @contextmanager
    def running(self, sequence: Sequence) -> Iterator[Ending]:
        """Keep a sequence in the engine; however the block is left, its slot and blocks are free afterwards."""
        ending = Ending()
        self.model.submit(sequence, self._clock.now())
        self._work.set()
        self._changed()
        try:
            yield ending
        finally:
            self.model.leave(sequence, ending.reason, self._clock.now(), ending.keys)
            self._changed()

    async def progress(self, sequence: Sequence, taken: int) -> None:
        """Wait until more than `taken` tokens are produced, or the sequence is done."""
        if self.model.spec.instant:
            if not self._thawed.is_set():
                await self._thawed.wait()
            while sequence.produced <= taken and not sequence.done:
                self.model.produce(sequence, self._clock.now())
            return
        while sequence.produced <= taken and not sequence.done:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters[sequence] = (taken, waiter)
            try:
                await waiter
            finally:
                self._waiters.pop(sequence, None)

    async def _walk(self) -> None:
        due = self._clock.now()
        while True:
            await self._thawed.wait()
            now = self._clock.now()
            duration_s = self.model.begin_step(now)
            if duration_s is None:
                self._work.clear()
                await self._work.wait()
                due = self._clock.now()
                continue
            due = max(due, now - CATCH_UP_S) + duration_s
            await self._clock.sleep(max(0.0, due - now))
            await self._thawed.wait()
            for sequence in self.model.end_step(self._clock.now()):
                self._wake(sequence)

    def _wake(self, sequence: Sequence) -> None:
        taken, waiter = self._waiters.get(sequence, (0, None))
        if waiter is not None and not waiter.done() and (sequence.produced > taken or sequence.done):
            waiter.set_result(None)


class Ending:
    """How a sequence left the engine: vLLM's finished reason, and the blocks of its text for the prefix cache."""

    def __init__(self) -> None:
        self.reason = "abort"
        self.keys: Seq[int] = ()
