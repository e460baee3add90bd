"""Chats sent to a balancer at a steady rate, and what became of each of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from random import Random
from statistics import median
from typing import Any

import aiohttp
import orjson

from loadtest.clock import Clock
from loadtest.traffic import ChatMix, chat_requests, poisson_arrivals

PATH = "/v1/chat/completions"
# Chats as people ask them, kept short so that two cores can simulate all of it. With one length for all answers, a
# question that is asked again is the same request, which the cache may answer.
MIX = ChatMix(
    model="sim-model",
    system_words=60,
    short_words=(8, 40),
    long_words=(150, 400),
    repeat_share=0.4,
    frequent_questions=12,
    answer_tokens=(96, 96),
)
# Far longer than any answer of a simulated node takes.
TIMEOUT_S = 60.0
# What "now" means in the figures of a node.
WINDOW_S = 10.0


class End(Enum):
    """How a request ended for its client."""

    WHOLE = "whole"
    FAILED = "failed"  # before the first byte of an answer
    CUT = "cut"  # in the middle, with an error event
    BROKEN = "broken"  # in the middle, without one


@dataclass(slots=True, eq=False)
class Sent:
    """One request, from its sending on. Times are in seconds; `node` and `cache` are what the balancer said."""

    sent_s: float
    first_byte_s: float | None = None
    ended_s: float | None = None
    end: End | None = None
    streams: bool = False
    node: str | None = None
    cache: str = ""
    attempts: int = 0
    reason: str = ""
    may_be_cut: bool = False  # it was under way when a node was killed

    @property
    def from_cache(self) -> bool:
        """Whether no node worked for it alone."""
        return self.cache in ("hit", "coalesced")


@dataclass(slots=True, kw_only=True)
class Totals:
    """Counts of requests that ended."""

    requests: int = 0
    failed: int = 0
    cut: int = 0
    broken: int = 0
    retried: int = 0
    cache_hits: int = 0

    @property
    def whole(self) -> int:
        """Those that were answered to the end."""
        return self.requests - self.failed - self.cut - self.broken

    def since(self, before: Totals) -> Totals:
        """What was counted after `before`."""
        return Totals(**{name: count - getattr(before, name) for name, count in asdict(self).items()})

    def count(self, sent: Sent) -> None:
        """Count one that has ended."""
        self.requests += 1
        self.failed += sent.end is End.FAILED
        self.cut += sent.end is End.CUT
        self.broken += sent.end is End.BROKEN
        self.retried += sent.attempts > 1
        self.cache_hits += sent.from_cache


class Traffic:
    """Sends chats and reads the answers to their ends.

    `under_way` has not ended yet. `lost` is what nobody may lose: what failed before its first byte, what broke off
    without an error event, and what was cut although no node was killed under it.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, *, rate_per_s: float, clock: Clock, rng: Random):
        self.totals = Totals()
        self.under_way: set[Sent] = set()
        self.lost: list[Sent] = []
        self._recent: deque[Sent] = deque()
        self._url = url + PATH
        self._session = session
        self._clock = clock
        self._bodies: Iterator[Mapping[str, Any]] = (chat.body for chat in chat_requests(MIX, rng))
        self._arrivals = poisson_arrivals(rate_per_s, rng)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Send at the rate, whatever comes back."""
        self._sending = asyncio.create_task(self._send())

    def check(self) -> None:
        """Raises what ended the sending, if anything did."""
        if self._sending is not None and self._sending.done():
            self._sending.result()

    async def finish(self) -> None:
        """Send no more, and wait for the answers under way."""
        await _cancelled(self._sending)
        await asyncio.gather(*self._tasks)

    async def give_up(self) -> None:
        """Send no more, and leave the answers under way; they are not counted."""
        await _cancelled(self._sending, *self._tasks)

    def node_is_killed(self) -> set[Sent]:
        """What is under way just now, streams of which may be cut."""
        for sent in self.under_way:
            sent.may_be_cut = True
        return set(self.under_way)

    def ttft_s(self, node: str) -> float | None:
        """Median time to the first token of a node's streams, lately; None without one."""
        times_s = [
            sent.first_byte_s - sent.sent_s
            for sent in self._lately()
            if sent.node == node and sent.streams and not sent.from_cache and sent.first_byte_s is not None
        ]
        return median(times_s) if times_s else None

    def shares(self) -> Mapping[str, float]:
        """Each node's share of the answers that came from nodes lately."""
        nodes = [sent.node for sent in self._lately() if sent.node is not None and not sent.from_cache]
        return {node: nodes.count(node) / len(nodes) for node in set(nodes)}

    def answered_by(self, node: str, since_s: float) -> bool:
        """Whether a node has answered a request sent since then."""
        return any(s.node == node and s.end is End.WHOLE and s.sent_s >= since_s for s in self._lately())

    def _lately(self) -> list[Sent]:
        oldest_s = self._clock.now() - WINDOW_S
        while self._recent and (self._recent[0].ended_s or 0.0) < oldest_s:
            self._recent.popleft()
        return list(self._recent)

    async def _send(self) -> None:
        began_s = self._clock.now()
        for arrival_s in self._arrivals:
            await self._clock.sleep(began_s + arrival_s - self._clock.now())
            task = asyncio.create_task(self._one(next(self._bodies)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _one(self, body: Mapping[str, Any]) -> None:
        sent = Sent(self._clock.now(), streams=bool(body.get("stream")))
        self.under_way.add(sent)
        try:
            await self._exchange(sent, body)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError) as error:
            sent.end = End.FAILED if sent.first_byte_s is None else End.BROKEN
            sent.reason = sent.reason or str(error) or type(error).__name__
        finally:
            self.under_way.discard(sent)
        sent.ended_s = self._clock.now()
        self.totals.count(sent)
        self._recent.append(sent)
        if sent.end is not End.WHOLE and not (sent.end is End.CUT and sent.may_be_cut):
            self.lost.append(sent)

    async def _exchange(self, sent: Sent, body: Mapping[str, Any]) -> None:
        async with self._session.post(self._url, json=body, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as response:
            sent.node = response.headers.get("X-Balancer-Node")
            sent.cache = response.headers.get("X-Balancer-Cache", "")
            sent.attempts = int(response.headers.get("X-Balancer-Attempts", "0"))
            if response.status != 200:
                sent.end, sent.reason = End.FAILED, f"{response.status} {await response.text()}"
            elif sent.streams:
                await self._read_stream(sent, response)
            else:
                sent.first_byte_s = self._clock.now()
                orjson.loads(await response.read())["choices"][0]["message"]["content"]
                sent.end = End.WHOLE

    async def _read_stream(self, sent: Sent, response: aiohttp.ClientResponse) -> None:
        """A stream is whole when it says [DONE]; one that just ends is broken."""
        async for line in response.content:
            if sent.first_byte_s is None:
                sent.first_byte_s = self._clock.now()
            if line.rstrip() == b"data: [DONE]":
                sent.end = sent.end or End.WHOLE
            elif line.startswith(b'data: {"error"'):
                sent.end, sent.reason = End.CUT, line.decode(errors="replace").strip()
        if sent.end is None:
            raise ValueError("the stream ended without [DONE]")


async def _cancelled(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks and see them ended."""
    there = [task for task in tasks if task is not None]
    for task in there:
        task.cancel()
    await asyncio.gather(*there, return_exceptions=True)
