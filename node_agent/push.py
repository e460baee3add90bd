"""Pushes each report to a balancer that cannot, or need not, poll this host."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import aiohttp
import structlog
from pydantic import ConfigDict, Field

from node_agent.clock import Clock
from node_agent.failure import plain
from node_agent.sampler import Sampler

log = structlog.get_logger()

PATH = "/agent/v1/report"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPolicy:
    """How reports are pushed."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    timeout_s: Annotated[float, Field(gt=0, le=30)] = 2.0
    max_pause_s: Annotated[float, Field(gt=0)] = 5.0  # between tries while a balancer does not take reports


def pause_s(failures: int, policy: PushPolicy, rng: random.Random) -> float:
    """Return how long to wait after so many failures in a row: twice as long each time, spread over a half."""
    if failures == 0:
        return 0.0
    return min(policy.max_pause_s, 0.25 * 2.0 ** min(failures, 20)) * rng.uniform(0.75, 1.25)


class Pusher:
    """Sends every new report to one balancer; while it fails, reports in between are dropped, not queued."""

    def __init__(
        self,
        url: str,
        sampler: Sampler,
        session: aiohttp.ClientSession,
        clock: Clock,
        policy: PushPolicy,
        rng: random.Random,
        token: str | None = None,
    ) -> None:
        self.url = url
        self.pushes = {"ok": 0, "failed": 0}
        self._sampler, self._session, self._clock, self._policy, self._rng = sampler, session, clock, policy, rng
        self._headers: Mapping[str, str] = {"Authorization": f"Bearer {token}"} if token else {}

    async def run(self) -> None:
        seq = failures = 0
        while True:
            report = await self._sampler.newer_than(seq)
            seq = report.seq
            reason = await self._push(report.to_json())
            self.pushes["failed" if reason else "ok"] += 1
            if reason and failures == 0:
                log.warning("push.failed", balancer=self.url, reason=reason)
            if not reason and failures:
                log.info("push.recovered", balancer=self.url, failures=failures)
            failures = failures + 1 if reason else 0
            if failures:
                await self._clock.sleep(pause_s(failures, self._policy, self._rng))

    async def _push(self, body: bytes) -> str | None:
        """Return None if the balancer took the report, else why not."""
        headers = {"Content-Type": "application/json", **self._headers}
        try:
            async with (
                asyncio.timeout(self._policy.timeout_s),
                self._session.post(self.url + PATH, data=body, headers=headers, allow_redirects=False) as response,
            ):
                return None if 200 <= response.status < 300 else f"answered {response.status}"
        except TimeoutError:
            return f"no answer within {self._policy.timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return plain(error)
