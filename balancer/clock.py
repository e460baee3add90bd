"""The one reader of time and the one place that waits; tests pass a manual one instead."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Where the shell takes its time from."""

    def now(self) -> float:
        """Monotonic seconds; the zero means nothing."""

    def wall(self) -> float:
        """Seconds since the epoch, for `created` fields, `Age` and log lines."""

    async def sleep(self, delay_s: float) -> None:
        """Return after `delay_s` seconds."""


class SystemClock:
    """The machine's clocks."""

    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    async def sleep(self, delay_s: float) -> None:
        """Return after `delay_s` seconds."""
        await asyncio.sleep(delay_s)
