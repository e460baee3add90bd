"""Waiting for something to become true, without looking again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watch:
    """`changed` is called after each change of state; `wait_for` looks only then."""

    def __init__(self) -> None:
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def changed(self) -> None:
        """Wake those whose condition holds now."""
        for condition, waiter in self._waiters:
            if waiter.done():
                continue
            try:
                if condition():
                    waiter.set_result(None)
            except Exception as error:  # noqa: BLE001  # it is the waiting test's, not that of whoever changed something
                waiter.set_exception(error)

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait until a change makes `condition` true; raises TimeoutError."""
        if condition():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (condition, waiter)
        self._waiters.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        finally:
            self._waiters.remove(entry)
