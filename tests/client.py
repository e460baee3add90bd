"""A client of the data port for tests: whole answers, streams event by event, and many requests at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from loadtest.fake_node import FakeNode

CHAT = "/v1/chat/completions"
MODEL = "sim-model"
# What is waited for comes in milliseconds; a test that waits this long has failed.
WITHIN_S = 15.0
# On an idle fleet the first of `fleet` is picked first, then the second, and so on.
WEIGHTS = (64.0, 16.0, 4.0, 1.0)


def chat(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A chat request that leaves nothing to chance: every healthy node gives the same answer to it."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
    return body | fields


def fleet(*nodes: FakeNode | str, **fields: Any) -> list[dict[str, Any]]:
    """Node settings `a`, `b`, `c`, `d`, tried in this order while idle; what they serve is known from the start."""
    urls = [node if isinstance(node, str) else node.url for node in nodes]
    common = {"models": [MODEL], **fields}
    return [
        {"url": url, "id": id_, "weight": weight, **common}
        for url, id_, weight in zip(urls, "abcd", WEIGHTS, strict=False)
    ]


def paced_node(**spec: Any) -> FakeNode:
    """A node that sends event after event: an instant one's whole answer comes in one read."""
    return FakeNode(ttft_s_per_token=0.0, itl_s=0.002, **spec)


@asynccontextmanager
async def instant_nodes(count: int) -> AsyncIterator[list[FakeNode]]:
    """Nodes that take no time."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeNode(instant=True, seed=seed)) for seed in range(count)]


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; of a stream, everything up to its clean end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_stream(self) -> bool:
        return self.headers.get("Content-Type", "").startswith("text/event-stream")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The data of each event: JSON, or the text [DONE]."""
        lines = [line[5:].strip() for line in self.body.decode().splitlines() if line.startswith("data:")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The error object of the answer, or of each error event in the stream."""
        said = self.events if self.is_stream else [self.json]
        return [one["error"] for one in said if isinstance(one, dict) and "error" in one]

    @property
    def code(self) -> str | None:
        """The code of its one error; None for an answer without any."""
        codes = [error["code"] for error in self.errors]
        assert len(codes) <= 1, f"several errors in one answer: {codes}"
        return codes[0] if codes else None

    @property
    def is_whole(self) -> bool:
        """Whether it is a good answer that reached its end."""
        if self.status != 200 or self.errors:
            return False
        return self.events[-1:] == ["[DONE]"] if self.is_stream else bool(self.json["choices"])

    @property
    def text(self) -> str:
        """What the model said, as far as it came."""
        if not self.is_stream:
            return str(self.json["choices"][0]["message"]["content"])
        chunks = [event for event in self.events if event != "[DONE]" and event.get("choices")]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)

    @property
    def node(self) -> str | None:
        return self.headers.get("X-Balancer-Node")

    @property
    def attempts(self) -> int:
        return int(self.headers["X-Balancer-Attempts"])

    @property
    def retry_after_s(self) -> int:
        return int(self.headers["Retry-After"])


class Stream:
    """An answer that is still coming."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._read = bytearray()
        self.status = response.status
        self.headers = response.headers

    async def event(self) -> bytes:
        """The next event, as it came."""
        event = await self._response.content.readuntil(b"\n\n")
        self._read += event
        return event

    async def rest(self) -> Reply:
        """The whole answer, with what was read before; raises aiohttp.ClientError when its framing breaks."""
        self._read += await self._response.read()
        return Reply(self.status, self.headers, bytes(self._read))

    def leave(self) -> None:
        """Close the connection in the middle of the answer."""
        self._response.close()


class Client:
    """Speaks to one data port. Retries nothing: what breaks raises aiohttp.ClientError."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url
        self._session = session

    async def post(self, body: Any, path: str = CHAT, headers: Mapping[str, str] | None = None) -> Reply:
        """Send one request and wait for its whole answer."""
        return await (await self.open(body, path, headers)).rest()

    def begin(self, body: Any, path: str = CHAT, headers: Mapping[str, str] | None = None) -> asyncio.Task[Reply]:
        """Send one request; its answer is the task's result."""
        return asyncio.get_running_loop().create_task(self.post(body, path, headers))

    async def open(self, body: Any, path: str = CHAT, headers: Mapping[str, str] | None = None) -> Stream:
        """Send one request, to a URL or to a path of the data port, and wait for the head of its answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(headers or {})}
        return Stream(await self._session.post(self._url_of(path), data=data, headers=sent))

    async def get(self, url: str) -> Reply:
        """Ask for a URL, or for a path of the data port."""
        async with self._session.get(self._url_of(url)) as response:
            return Reply(response.status, response.headers, await response.read())

    def _url_of(self, path: str) -> str:
        return path if "://" in path else self._url + path

    async def many(
        self, count: int, body: Callable[[int], Any] = lambda number: chat(f"request {number}"), *, at_once: int = 8
    ) -> list[Reply]:
        """The answers to `count` requests, `at_once` under way at any time, in the order of their numbers."""
        replies: dict[int, Reply] = {}
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                replies[number] = await self.post(body(number))

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        return [replies[number] for number in range(count)]


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Client]:
    """A client with connections of its own, as many as it needs."""
    timeout = aiohttp.ClientTimeout(total=WITHIN_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield Client(url, session)
