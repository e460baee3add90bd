"""Messages between balancers over Redis: publish and forget, subscribe and hear.

Never on a request's way. What cannot be said at once is dropped, and so is what comes while Redis is away; who
uses this has to bear that a message is lost. Connections are redis-py's and the channel's own, apart from the store's.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from balancer.clock import Clock
from balancer.log import get_logger
from balancer.store.address import parse

# Redis channels are named PREFIX + topic. They belong to a server, not to one of its databases.
PREFIX = "balancer:v1:"
# A larger message is neither sent nor taken.
MAX_BYTES = 128 * 1024
# Messages that wait to be sent: what a second brings while Redis is slow. The oldest make room.
MAX_WAITING = 64
# Connecting, subscribing and each send may take this long; it only tells a slow Redis from a dead one.
LIMIT_S = 1.0
# After this much silence a PING asks whether the subscription still lives; twice as much ends it.
SILENCE_S = 1.0
# How long `close` waits for what is not sent yet.
CLOSE_S = 0.25
# Between tries, doubled from the one to the other: Redis has to be in use again 5 s after it is back.
LEAST_BACK_OFF_S, MOST_BACK_OFF_S = 0.25, 2.0

# "1 <id of the balancer> " and the payload.
_ENVELOPE = re.compile(rb"1 ([0-9a-f]{16}) ", re.ASCII)

# What may become of a message, as `on_event` is told.
SENT, RECEIVED, IGNORED, DROPPED = "sent", "received", "ignored", "dropped"

# Is told who said it and what; returns False when it is not what this topic carries.
Hear = Callable[[str, bytes], bool]

log = get_logger()


def client_of(url: str) -> Redis:
    """A redis-py client for one channel: one connection that hears and one that says, no retries of its own."""
    return parse(url).client(LIMIT_S, connections=2)


class Channel:
    """Publish and subscribe. `open_` makes a new client for each try; `on_event(topic, what)` is told of each message.

    Subscribe before `start`. Handlers are called on the event loop and must be quick. A balancer does not hear itself.
    """

    def __init__(
        self,
        open_: Callable[[], Redis],
        *,
        clock: Clock,
        rng: Random,
        on_event: Callable[[str, str], None],
    ) -> None:
        self._open = open_
        self._clock = clock
        self._rng = rng
        self._on_event = on_event
        self.balancer_id = secrets.token_hex(8)  # not from `rng`: two processes may share a seed
        self._envelope = f"1 {self.balancer_id} ".encode()
        self._handlers: dict[str, Hear] = {}
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._to_send = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    def __repr__(self) -> str:
        return f"<Channel {self.balancer_id} {'up' if self.connected else 'away'} waiting={len(self._waiting)}>"

    def subscribe(self, topic: str, hear: Hear) -> None:
        """Have `hear(balancer_id, payload)` called for every message of others on this topic."""
        self._handlers[topic] = hear

    def publish(self, topic: str, payload: bytes) -> bool:
        """Say something to all others, soon. Returns at once; False: dropped, because nobody could hear it now."""
        if not self.connected or len(payload) > MAX_BYTES:
            self._on_event(topic, DROPPED)
            return False
        if len(self._waiting) >= MAX_WAITING:
            oldest, _ = self._waiting.popleft()
            self._on_event(oldest, DROPPED)
        self._waiting.append((topic, self._envelope + payload))
        self._all_sent.clear()
        self._to_send.set()
        return True

    def start(self) -> None:
        """Connect in the background, for as long as it takes. Harmless when it was done before."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="channel")

    async def close(self) -> None:
        """Let go of the connections; what waits to be sent gets a moment."""
        if self._task is None:
            return
        if self.connected and self._waiting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._all_sent.wait()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    # -- the connection

    async def _run(self) -> None:
        back_off_s, was_lost = LEAST_BACK_OFF_S, False
        while True:
            reason = "lost"
            try:
                await self._session()
            except* (RedisError, OSError, TimeoutError, UnicodeError) as errors:
                reason = type(_first(errors)).__name__
            except* Exception:
                log.exception("channel.failed")
                reason = "bug"
            if self.connected:
                back_off_s, was_lost = LEAST_BACK_OFF_S, False
            self._lost()
            if not was_lost:
                was_lost = True
                log.warning("channel.lost", reason=reason)
            await self._clock.sleep(back_off_s * self._rng.uniform(0.5, 1.0))
            back_off_s = min(MOST_BACK_OFF_S, 2.0 * back_off_s)

    def _lost(self) -> None:
        self.connected = False
        for topic, _ in self._waiting:
            self._on_event(topic, DROPPED)
        self._waiting.clear()
        self._all_sent.set()

    async def _session(self) -> None:
        """One connection's life; it ends by an error."""
        client = self._open()
        hearing: Any = client.pubsub()
        try:
            async with asyncio.timeout(LIMIT_S):
                await client.ping()
                await hearing.subscribe(*(PREFIX + topic for topic in self._handlers))
            self.connected = True
            log.info("channel.connected", balancer=self.balancer_id)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._listen(hearing))
                both.create_task(self._speak(client))
        finally:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(LIMIT_S):
                    await hearing.aclose()
                    await client.aclose()

    async def _listen(self, hearing: Any) -> None:
        asked = False
        while True:
            message = await hearing.get_message(timeout=SILENCE_S)
            if message is not None:
                asked = False
                self._heard(message)
            elif asked:
                raise TimeoutError
            else:
                asked = True
                await hearing.ping()

    def _heard(self, message: dict[str, Any]) -> None:
        if message.get("type") != "message":
            return
        topic = cast(bytes, message["channel"]).decode("utf-8", "replace").removeprefix(PREFIX)
        data = cast(bytes, message["data"])
        envelope = _ENVELOPE.match(data)
        handler = self._handlers.get(topic)
        if envelope is not None and envelope[0] == self._envelope:
            return
        good = False
        if handler is not None and envelope is not None and len(data) <= MAX_BYTES + len(self._envelope):
            try:
                good = handler(envelope[1].decode(), data[envelope.end() :])
            except Exception:
                log.exception("channel.handler_failed", topic=topic)
        if handler is not None:
            self._on_event(topic, RECEIVED if good else IGNORED)

    async def _speak(self, client: Redis) -> None:
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            while self._waiting:
                topic, data = self._waiting[0]
                async with asyncio.timeout(LIMIT_S):
                    await client.publish(PREFIX + topic, data)
                if self._waiting and self._waiting[0][1] is data:
                    self._waiting.popleft()
                self._on_event(topic, SENT)
            self._all_sent.set()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
