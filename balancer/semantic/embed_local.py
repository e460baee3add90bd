"""The embedder in this process: weights in a folder, a NumPy forward pass in a thread."""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from balancer.semantic import Unavailable, Vector
from balancer.semantic.bert import Bert

# Texts in the thread and before it; at some milliseconds each no more can be ready in time.
MAX_WAITING = 8


class LocalEmbedder:
    """One thread: NumPy's matrix products use what cores they want. Raises ValueError for a folder that is none."""

    def __init__(self, model_dir: str) -> None:
        folder = Path(model_dir)
        self._bert = Bert(folder)
        about = (folder / "config.json").read_bytes() + (folder / "vocab.txt").read_bytes()
        self.name = f"local:{hashlib.sha256(about).hexdigest()[:16]}"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")
        self._waiting = 0

    async def embed(self, text: str) -> Vector | None:
        """Its vector; None for text in a script that the vocabulary does not spell."""
        if self._waiting >= MAX_WAITING:
            raise Unavailable("busy")
        self._waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._thread, self._bert.embed, text)
        future.add_done_callback(self._done)
        return await asyncio.shield(future)  # who stops waiting does not stop the thread

    def failed(self, reason: str) -> None:
        """What is too late is worked off all the same."""

    def _done(self, future: asyncio.Future[Vector | None]) -> None:
        self._waiting -= 1

    async def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)
