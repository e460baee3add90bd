"""Steady traffic with a memory: what was asked, what came, and whether that was the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import orjson

from loadtest.chaos.stage import MODEL, Stage
from loadtest.clock import SystemClock
from loadtest.fake_node import FakeNode

CHAT = "/v1/chat/completions"
RATE_PER_S = 40.0
# A client that waits longer than this has been forgotten.
GIVE_UP_S = 30.0


def chat(text: str, **fields: Any) -> dict[str, Any]:
    """A chat request to which every healthy node has the same answer."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 24, "temperature": 0}
    return body | fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One request and what became of it. Times in seconds; `status` 0: no answer, or one that broke off."""

    body: Mapping[str, Any]
    sent_s: float
    seconds: float
    first_s: float | None  # from its sending to the first content
    status: int
    headers: Mapping[str, str]
    whole: bool  # a good answer that reached its end
    code: str  # of its error, in whatever form it came
    text: str

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def node(self) -> str:
        return self.headers.get("X-Balancer-Node", "")

    @property
    def began(self) -> bool:
        """Whether something of the answer itself had come before it failed."""
        return bool(self.text)


async def ask(
    stage: Stage, body: Mapping[str, Any], *, path: str = CHAT, headers: Mapping[str, str] | None = None
) -> Reply:
    """Send one request and see what comes. Never raises for what the balancer does."""
    clock = SystemClock()
    sent_s = clock.now()
    first_s: float | None = None
    status, data, broke = 0, b"", False
    told: Mapping[str, str] = {}
    timeout = aiohttp.ClientTimeout(total=GIVE_UP_S)
    sent = {"Content-Type": "application/json", **(headers or {})}
    try:
        async with stage.session.post(
            stage.data_url + path, data=orjson.dumps(body), headers=sent, timeout=timeout
        ) as response:
            status, told = response.status, response.headers
            async for chunk in response.content.iter_any():
                data += chunk
                if first_s is None and b'"content":"' in chunk.replace(b'"content":""', b"").replace(b": ", b":"):
                    first_s = clock.now() - sent_s
    except (aiohttp.ClientError, TimeoutError, OSError):
        broke = True
    text, code, ended = _read(data, told.get("Content-Type", ""))
    return Reply(
        body=body,
        sent_s=sent_s,
        seconds=clock.now() - sent_s,
        first_s=first_s,
        status=0 if broke else status,
        headers=told,
        whole=not broke and status == 200 and ended and not code,
        code=code,
        text=text,
    )


def _read(data: bytes, kind: str) -> tuple[str, str, bool]:
    """Text, error code, and whether the good end was there."""
    if not kind.startswith("text/event-stream"):
        try:
            value = orjson.loads(data)
        except orjson.JSONDecodeError:
            return "", "", False
        if "error" in value:
            return "", str(value["error"].get("code")), False
        choices = value.get("choices") or []
        return (choices[0]["message"]["content"] if choices else ""), "", bool(choices)
    text, code, ended = "", "", False
    for line in data.decode("utf-8", "replace").splitlines():
        if not line.startswith("data:"):
            continue
        said = line[5:].strip()
        if said == "[DONE]":
            ended = True
            continue
        try:
            value = orjson.loads(said)
        except orjson.JSONDecodeError:
            code = code or "broken_event"
            continue
        if "error" in value:
            code = str(value["error"].get("code"))
        elif value.get("choices"):
            text += value["choices"][0]["delta"].get("content") or ""
    return text, code, ended


class Load:
    """Requests at a steady rate, every other a stream, each with a prompt of its own. Used as a context."""

    def __init__(
        self,
        stage: Stage,
        *,
        rate_per_s: float = RATE_PER_S,
        body: Callable[[int], Mapping[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._stage = stage
        self._rate_per_s = rate_per_s
        self._body = body or (lambda number: chat(f"question {number}", stream=number % 2 == 1))
        self._headers = headers
        self._clock = SystemClock()
        self._truth = FakeNode()
        self._asking: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self.replies: list[Reply] = []
        self.sent = 0

    async def __aenter__(self) -> Self:
        self._sender = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        """Send nothing more, and see everything answered."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
            self._sender = None
        await asyncio.gather(*self._asking)

    async def run(self, seconds: float) -> None:
        """Let it go on for so long."""
        await self._clock.sleep(seconds)

    def now(self) -> float:
        """The time that `Reply.sent_s` is in."""
        return self._clock.now()

    async def _send(self) -> None:
        begun_s = self._clock.now()
        while True:
            task = asyncio.create_task(self._ask(self.sent))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
            self.sent += 1
            await self._clock.sleep(max(0.0, begun_s + self.sent / self._rate_per_s - self._clock.now()))

    async def _ask(self, number: int) -> None:
        self.replies.append(await ask(self._stage, self._body(number), headers=self._headers))

    # -- what came of it

    def failed(self, *, stream: bool | None = None, since_s: float = float("-inf")) -> int:
        """Requests sent since then that got no whole answer."""
        return sum(
            not reply.whole
            for reply in self.replies
            if reply.sent_s >= since_s and (stream is None or reply.stream is stream)
        )

    def good_share(self) -> float:
        """The share of whole answers."""
        return sum(reply.whole for reply in self.replies) / max(1, len(self.replies))

    def lies(self) -> int:
        """Answers that look whole and are not what was to be said, and broken ones that say something else."""
        return sum(self._is_lie(reply) for reply in self.replies)

    def _is_lie(self, reply: Reply) -> bool:
        if not reply.text:
            return False
        truth = self._truth.expected_text(reply.body)
        return reply.text != truth if reply.whole else not truth.startswith(reply.text)

    def share(self, node: str, *, since_s: float = float("-inf")) -> float:
        """The share of answers that came from a node."""
        answered = [reply.node for reply in self.replies if reply.sent_s >= since_s and reply.node]
        return answered.count(node) / max(1, len(answered))
