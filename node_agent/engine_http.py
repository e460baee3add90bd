"""Short questions to an engine over HTTP: bounded in time and size, never following a redirect."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from node_agent.failure import plain

# A vLLM page with eight data-parallel ranks is about 1 MB; more than this is no metrics page.
MAX_BYTES = 16 * 1024 * 1024
_ACCEPT = {"Accept": "text/plain;version=0.0.4, application/json;q=0.9, */*;q=0.1"}


class Refused(Exception):
    """No connection, or one that broke, or an answer that is no HTTP."""


class Silent(Exception):
    """No answer within the time-out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300

    def text(self) -> str:
        return self.body.decode("utf-8", errors="replace")

    def json(self) -> Any:
        """Return the parsed body, or None if it is not JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None


class EngineHttp:
    """Asks one engine; `base_url` has no trailing slash."""

    def __init__(
        self, session: aiohttp.ClientSession, base_url: str, *, timeout_s: float, api_key: str | None = None
    ) -> None:
        self._session, self._base_url, self._timeout_s = session, base_url, timeout_s
        self._key = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def fetch(self, path_or_url: str, *, method: str = "GET") -> Answer:
        """Return the answer, whatever its status; raises Refused or Silent."""
        own = path_or_url.startswith("/")
        url = self._base_url + path_or_url if own else path_or_url
        headers = {**_ACCEPT, **self._key} if own else _ACCEPT  # the key is for the engine's own port
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.request(method, url, headers=headers, allow_redirects=False) as response,
            ):
                return Answer(status=response.status, body=await _read(response), headers=response.headers)
        except TimeoutError as error:
            raise Silent(f"no answer from {url} within {self._timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Refused(f"{url}: {plain(error)}") from error

    async def ask(self, path: str, *, method: str = "GET") -> Any:
        """Return the JSON of a good answer, else None; raises Silent, so that a series of questions ends there."""
        try:
            answer = await self.fetch(path, method=method)
        except Refused:
            return None
        return answer.json() if answer.is_good else None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)
