"""The one place of the agent that reads a clock."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds, and a way to let them pass; safe to read from any thread."""

    def now(self) -> float: ...

    async def sleep(self, for_s: float) -> None: ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, for_s: float) -> None:
        await asyncio.sleep(max(0.0, for_s))
