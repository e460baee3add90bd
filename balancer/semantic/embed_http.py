"""The embedder behind `/v1/embeddings`: any server's, or this balancer's own data port in front of embedding nodes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import orjson

from balancer.ask import open_session
from balancer.clock import Clock
from balancer.log import get_logger
from balancer.semantic import Unavailable, Vector

if TYPE_CHECKING:
    import aiohttp

# A vector of 4096 numbers is 90 kB of JSON.
MAX_BYTES = 1024 * 1024
# After so many failures in a row nothing is asked for a while: a lookup must not pay for a server that is away.
FAILURES, PAUSE_S = 3, 2.0

log = get_logger()


class HttpEmbedder:
    """Asks with the OpenAI body. Credentials in the URL, or a key, go along."""

    def __init__(self, url: str, *, model: str | None, api_key: str | None, clock: Clock) -> None:
        parts = urlsplit(url)
        path = parts.path.rstrip("/")
        self._url = urlunsplit(parts._replace(path=path if path.endswith("/embeddings") else f"{path}/embeddings"))
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._clock = clock
        self._session: aiohttp.ClientSession | None = None
        self._failures = 0
        self._paused_until_s = -math.inf
        self.name = f"http:{parts.hostname}:{parts.port}{path}:{model}"

    async def embed(self, text: str) -> Vector | None:
        """Its vector, at length 1."""
        import aiohttp

        if self._clock.now() < self._paused_until_s:
            raise Unavailable("paused")
        if self._session is None:
            self._session = open_session()
        body: dict[str, Any] = {"input": text, "encoding_format": "float"}
        if self._model is not None:
            body["model"] = self._model
        try:
            vector = await self._ask(orjson.dumps(body))
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
            self.failed(type(error).__name__)
            raise Unavailable("embedder") from error
        self._failures = 0
        return vector

    def failed(self, reason: str) -> None:
        """Count a failure, a deadline passed included."""
        self._failures += 1
        if self._failures >= FAILURES:
            self._paused_until_s = self._clock.now() + PAUSE_S
            if self._failures == FAILURES:
                log.warning("semantic.embedder_unreachable", reason=reason, for_s=PAUSE_S)

    async def close(self) -> None:
        """Let go of the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask(self, body: bytes) -> Vector:
        assert self._session is not None
        async with self._session.post(self._url, data=body, headers=self._headers, allow_redirects=False) as response:
            said = await response.content.read(MAX_BYTES)
            while not response.content.at_eof():
                said += await response.content.read(MAX_BYTES)
                if len(said) > MAX_BYTES:
                    raise ValueError("too long")
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        vector = np.array(orjson.loads(said)["data"][0]["embedding"], np.float32)
        length = float(np.linalg.norm(vector)) if vector.ndim == 1 else 0.0
        if not length > 0.0 or not math.isfinite(length):
            raise ValueError("no vector")
        return vector / np.float32(length)
