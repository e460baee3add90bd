"""Answers shared between wordings of one question: embedding, index, guards, trust. Loaded only where it is on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from balancer.core.semantic.guards import Features

Vector = npt.NDArray[np.float32]


class Unavailable(Exception):
    """No vector now, through no fault of the text; the argument says why, in a word."""


class Embedder(Protocol):
    """Turns text into a direction."""

    name: str  # of the model: vectors of two are never compared

    async def embed(self, text: str) -> Vector | None:
        """A vector of length 1; None for text that the model cannot read. Raises Unavailable."""

    def failed(self, reason: str) -> None:
        """It was too late, and nobody waits for it any more."""

    async def close(self) -> None:
        """Let go of threads and connections."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A question whose answer is stored."""

    id: str  # the digest of the stored answer's key
    features: Features  # hashed
    expires_wall_s: float


class Index(Protocol):
    """The vectors of each partition, by nearness. `key` is a `core.cache_key.semantic_name`.

    Raises Unavailable where the store is away.
    """

    async def start(self) -> None:
        """Find out what the store can do."""

    async def nearest(self, key: str, vector: Vector, count: int) -> list[tuple[float, Entry]]:
        """The nearest entries with their cosines, the nearest first; none that has expired."""

    async def add(self, key: str, vector: Vector, entry: Entry) -> None:
        """Keep an entry until it expires; one with the same id is replaced."""

    async def remove(self, key: str, id_: str) -> bool:
        """Forget an entry; whether it was there."""

    async def find(self, id_: str) -> list[tuple[str, Vector]]:
        """Where an entry is: the keys and its vector there. Looks through everything: for operators."""

    async def close(self) -> None:
        """Let go of connections."""
