"""What balancers tell each other of a flight that one of them makes (`store.flights`)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

# How soon a holder sees that somebody else waits, and how often the others say so.
RENEW_S = 0.25

BEGIN, DATA, END = b"begin", b"data", b"end"
GOOD, BAD = b"good", b"bad"


class Entry(NamedTuple):
    """One entry of a flight's stream."""

    number: int  # from 1, without a gap
    kind: bytes  # BEGIN, DATA or END
    data: bytes


class Source(Protocol):
    """A flight that holds a lease."""

    def so_far(self) -> tuple[bytes, bytes] | None:
        """How its answer begins, for a stream's first entry, and what there is of it; None while it is not shared."""

    def wanted_until(self, deadline_s: float | None) -> None:
        """Other balancers want it until then; None: none does any more."""
