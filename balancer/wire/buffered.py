"""What this process holds of bodies and answers, counted in one integer, and what it lets go of under pressure."""

from __future__ import annotations

from typing import Protocol


class Droppable(Protocol):
    """A buffer that a request can do without."""

    def drop(self) -> None:
        """Let go of it, and take its bytes off the count."""


class Buffered:
    """Bytes held now over all connections: request bodies, answers not yet handed on, and copies of answers.

    Whoever adds bytes takes them off again. Beyond `limit` the copies for the cache go first, then the copies that
    streams are resumed from; what is left over the limit after that keeps new large bodies out.
    """

    __slots__ = ("bytes", "collections", "limit", "resume_copies")

    def __init__(self, limit: int) -> None:
        self.bytes = 0
        self.limit = limit
        self.collections: dict[Droppable, None] = {}  # oldest first
        self.resume_copies: dict[Droppable, None] = {}

    def relieve(self) -> None:
        """Come back below the limit, as far as dropping copies can do that."""
        for kept in (self.collections, self.resume_copies):
            while kept and self.bytes > self.limit:
                kept.popitem()[0].drop()
