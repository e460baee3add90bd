"""The one reader of time in this package."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What the fake node needs of time: seconds, monotonic, and a way to wait."""

    def now(self) -> float:
        """Monotonic seconds."""

    def unix_s(self) -> int:
        """Whole seconds since 1970, for the `created` fields of answers."""

    async def sleep(self, delay_s: float) -> None:
        """Wait `delay_s`; a delay of 0 still lets the others run."""


class SystemClock:
    """The machine's own time."""

    def now(self) -> float:
        return time.monotonic()

    def unix_s(self) -> int:
        return int(time.time())

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
