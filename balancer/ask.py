"""Short questions to nodes and agents beside the data path: bounded in time and size, never following a redirect."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp

# A connection lying idle is not used after this: uvicorn, under most engines, closes it after 5 s.
IDLE_S = 4.0
# Names are looked up again after this long.
RESOLVE_S = 30
CHUNK_BYTES = 64 * 1024

OpenSession = Callable[[], "aiohttp.ClientSession"]


class NoAnswer(Exception):
    """There was no HTTP answer, or too large a one; `reason` is a word for logs and for the admin API."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, whatever its status."""

    status: int
    body: bytes

    @property
    def is_good(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def is_missing(self) -> bool:
        """Whether somebody is there and has no such path (404, 405, 501)."""
        return self.status in (404, 405, 501)


def open_session() -> aiohttp.ClientSession:
    """A session for questions: as many connections as are asked for, no cookies, no proxy, no decompression."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=RESOLVE_S, keepalive_timeout=IDLE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),  # ours is around the whole question
        headers={"User-Agent": "gpu-balancer", "Accept": "*/*", "Accept-Encoding": "identity"},
        auto_decompress=False,
    )


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    *,
    timeout_s: float,
    max_bytes: int = 0,
    api_key: str | None = None,
    body: bytes | None = None,
) -> Answer:
    """GET `url`, or POST `body` as JSON; with `max_bytes` 0 the answer's body is not waited for. Raises NoAnswer."""
    import aiohttp

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        async with (
            asyncio.timeout(timeout_s),
            session.request(
                "GET" if body is None else "POST", url, data=body, headers=headers, allow_redirects=False
            ) as response,
        ):
            return Answer(response.status, await _body(response, max_bytes) if max_bytes else b"")
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise NoAnswer(_reason(error)) from error


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise NoAnswer("too_large")
    return bytes(body)


def _reason(error: Exception) -> str:
    import aiohttp

    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "no_address"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "refused" if error.errno == errno.ECONNREFUSED else "unreachable"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | OSError):
        return "connection_broken"
    if isinstance(error, aiohttp.InvalidURL):
        return "bad_url"
    return "bad_answer"
