"""Which stored answers are asked for most: a bounded table of hits, by the names of the answers.

When the table is full, the half that was hit least goes, and the counts of the others are halved: what was popular
long ago makes room for what is popular now.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

# Names counted; about 300 bytes each.
NAMES = 2048
# All request bodies that are kept for export, together; where the operator wants any.
REQUEST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as far as it is needed to ask it again."""

    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(slots=True)
class Popular:
    """One answer and how often it was asked for."""

    name: str
    hits: int = 0
    size_bytes: int = 0  # of the answer as it was last served
    saved_s: float = 0.0  # of nodes, over all hits
    request: Asked | None = None  # where it is kept


class Popularity:
    """Counts hits by name."""

    def __init__(self, names: int = NAMES) -> None:
        self._names = names
        self._table: dict[str, Popular] = {}
        self._request_bytes = 0

    def __len__(self) -> int:
        return len(self._table)

    def hit(self, name: str, size_bytes: int, saved_s: float) -> Popular:
        """Count one hit; the record, for who wants to keep the request with it."""
        popular = self._table.get(name)
        if popular is None:
            if len(self._table) >= self._names:
                self._halve()
            popular = self._table[name] = Popular(name)
        popular.hits += 1
        popular.size_bytes = size_bytes
        popular.saved_s += saved_s
        return popular

    def keep_request(self, popular: Popular, asked: Asked) -> None:
        """Keep what was asked, if there is room for it."""
        if popular.request is None and self._request_bytes + len(asked.body) <= REQUEST_BYTES:
            self._request_bytes += len(asked.body)
            popular.request = asked

    def forget_requests(self) -> None:
        """Keep counts only."""
        self._request_bytes = 0
        for popular in self._table.values():
            popular.request = None

    def top(self, count: int) -> list[Popular]:
        """The most popular, in order."""
        return heapq.nlargest(count, self._table.values(), key=lambda popular: popular.hits)

    def _halve(self) -> None:
        self._table = {popular.name: popular for popular in self.top(self._names // 2)}
        for popular in self._table.values():
            popular.hits = max(1, popular.hits // 2)
            popular.saved_s /= 2
        self._request_bytes = sum(len(kept.request.body) for kept in self._table.values() if kept.request is not None)
