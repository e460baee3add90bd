"""Warm-up: sends requests from a file through the ordinary data port, so that the cache has their answers.

A line of the file is `{"path": …, "headers": {…}, "body": {…}}`, as `gpu-balancer cache top --export` writes it, or a
bare chat body. Headers that go on to nodes are part of an answer's key, so a warm-up has to send those of its clients.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

CHAT = "/v1/chat/completions"
# What OpenAI's own clients send, of what goes on to nodes; for lines that say nothing.
USUAL = {"content-type": "application/json", "accept": "application/json"}
# A request that is told to come later does so this often, and waits no longer than this.
TRIES, MAX_PAUSE_S = 3, 10.0
# An answer that takes longer is given up.
ANSWER_S = 600.0
READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a file."""

    path: str
    headers: Mapping[str, str]
    body: bytes


class BadLine(ValueError):
    """A line that holds no request; the text names it."""


@dataclass(slots=True)
class Summary:
    """What became of the requests."""

    total: int
    results: Counter[str] = field(default_factory=Counter)  # by X-Balancer-Cache, or `failed`
    first_failure: str = ""

    @property
    def done(self) -> int:
        """Requests that are over."""
        return self.results.total()

    @property
    def failed(self) -> int:
        """Requests without a good answer."""
        return self.results["failed"]

    def __str__(self) -> str:
        told = ", ".join(f"{count} {result}" for result, count in sorted(self.results.items()))
        return f"{self.done} of {self.total} requests: {told or 'none'}"


def requests(path: str) -> Iterator[Line]:
    """The requests in a file. Raises BadLine, OSError."""
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _request(line, f"{path}:{number}")


def _request(line: bytes, where: str) -> Line:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise BadLine(f"{where}: not JSON: {error}") from None
    if not (isinstance(found, dict) and "body" in found):
        found = {"body": found}
    path, headers, body = found.get("path", CHAT), found.get("headers", USUAL), found["body"]
    if not isinstance(body, dict) or not isinstance(path, str) or not path.startswith("/"):
        raise BadLine(f"{where}: is neither a chat body nor an object with a path and a body")
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise BadLine(f"{where}: its headers are not names with texts")
    return Line(path, headers, json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"))


async def warm_up(
    path: str,
    *,
    url: str,
    concurrency: int,
    key: str | None = None,
    on_progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Send every request of a file to a data port, at most so many at once. Raises BadLine and OSError before any."""
    summary = Summary(total=sum(1 for _ in requests(path)))
    rest = requests(path)

    async def work(session: aiohttp.ClientSession) -> None:
        for line in rest:  # shared: each takes the next
            result = await _send(session, url.rstrip("/"), line)
            if result.startswith("failed"):
                summary.first_failure = summary.first_failure or result.removeprefix("failed: ")
                result = "failed"
            summary.results[result] += 1
            if on_progress is not None:
                on_progress(summary)

    async with _session(key) as session:
        await asyncio.gather(*(work(session) for _ in range(concurrency)))
    return summary


def _session(key: str | None) -> aiohttp.ClientSession:
    """Sends no header of its own that would go on to a node. Warm-up waits in the queue behind everybody else."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # ours is around each request
        headers={"X-Balancer-Priority": "low", **({"Authorization": f"Bearer {key}"} if key else {})},
        skip_auto_headers=("Accept", "User-Agent", "Content-Type"),
    )


async def _send(session: aiohttp.ClientSession, url: str, line: Line) -> str:
    """What the cache made of one request, or `failed: ` and why."""
    import aiohttp

    for last in range(TRIES - 1, -1, -1):
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                session.post(url + line.path, data=line.body, headers=line.headers, allow_redirects=False) as response,
            ):
                whole = bytearray()
                async for chunk in response.content.iter_chunked(READ_BYTES):
                    whole[:] = chunk if response.status != 200 else b""  # only an error is of interest
                if response.status == 200:
                    return response.headers.get("X-Balancer-Cache", "unknown")
                pause_s = _pause_s(response.headers.get("Retry-After"))
                if pause_s is None or not last:
                    return f"failed: {response.status} {bytes(whole[:200]).decode('utf-8', 'replace')}"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return f"failed: {type(error).__name__} {error}"
        await asyncio.sleep(pause_s)
    raise AssertionError("the last try returns")


def _pause_s(retry_after: str | None) -> float | None:
    return min(float(retry_after), MAX_PAUSE_S) if retry_after is not None and retry_after.isdigit() else None


def own_url(address: str) -> str:
    """How this machine reaches a data port that listens on `address`."""
    host, _, port = address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "": "127.0.0.1"}.get(host, host)
    return f"http://{host}:{port}"


def bar(summary: Summary, width: int = 30) -> str:
    """One line of progress."""
    filled = width * summary.done // max(1, summary.total)
    return f"[{'#' * filled}{'.' * (width - filled)}] {summary}"


def export_line(told: Mapping[str, Any]) -> str:
    """A request that `GET /admin/cache/top` told of, as `requests` reads it."""
    return json.dumps({name: told[name] for name in ("path", "headers", "body")}, ensure_ascii=False)
