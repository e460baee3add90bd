"""The table: what happened to an attempt -> whose fault it is, whether another node may be asked, what it counts for.

`docs/architecture.md` shows it; `tests/core/test_outcome.py` holds every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """On whose account an attempt failed."""

    NODE = "node"
    REQUEST = "request"
    CLIENT = "client"
    NOBODY = "nobody"


class Again(Enum):
    """Whether the request may be tried on another node, before anything of the answer reached the client."""

    FREE = "free"  # nothing was burnt: no wait, no budget, no attempt counted
    ELSEWHERE = "elsewhere"  # the node did no work for it: at once, within the retry budget, no attempt counted
    BUDGET = "budget"  # within `max_attempts`, the retry budget and the back-off
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """What an outcome means. `breaker`: True success, False failure, None says nothing about the node."""

    fault: Fault
    again: Again
    breaker: bool | None
    failure_price: bool = False
    cut_weight: bool = False


class Outcome(Enum):
    """How an attempt ended. `label` is its name in metrics and logs, `ruling` its row of the table.

    Both are plain attributes: `Enum.value` and hashing a member cost half a microsecond together, on every request.
    """

    label: str
    ruling: Ruling

    def __init__(self, label: str) -> None:
        self.label = label

    OK = "ok"
    REFUSED = "refused"
    CONNECT_TIMEOUT = "connect_timeout"
    STALE_CONNECTION = "stale_connection"
    RESET_BEFORE_HEAD = "reset_before_head"
    RESET_AFTER_HEAD = "reset_after_head"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    UNARY_TIMEOUT = "unary_timeout"
    WEDGED = "wedged"
    DEADLINE = "deadline"
    REQUEST_ERROR = "request_error"
    MISCONFIGURED = "misconfigured"
    UNKNOWN_MODEL = "unknown_model"
    BACK_PRESSURE = "back_pressure"
    SERVER_ERROR = "server_error"
    BAD_FRAMING = "bad_framing"
    BAD_ENCODING = "bad_encoding"
    BAD_BODY = "bad_body"
    ERROR_OBJECT = "error_object"
    EMPTY_BODY = "empty_body"
    TRUNCATED = "truncated"
    NO_FINISH_REASON = "no_finish_reason"
    NO_GOOD_END = "no_good_end"
    STREAM_ERROR = "stream_error"
    CLIENT_GONE = "client_gone"
    HEDGE_LOST = "hedge_lost"


_NODE = Ruling(fault=Fault.NODE, again=Again.BUDGET, breaker=False, failure_price=True)
_NOBODY_FREE = Ruling(fault=Fault.NOBODY, again=Again.FREE, breaker=None)

RULINGS: Mapping[Outcome, Ruling] = {
    Outcome.OK: Ruling(fault=Fault.NOBODY, again=Again.NEVER, breaker=True),
    Outcome.REFUSED: Ruling(fault=Fault.NODE, again=Again.FREE, breaker=False, failure_price=True),
    Outcome.CONNECT_TIMEOUT: Ruling(fault=Fault.NODE, again=Again.FREE, breaker=False, failure_price=True),
    # A kept-alive connection that the node closed as we wrote: ordinary life of HTTP/1.1, the node never saw it.
    Outcome.STALE_CONNECTION: _NOBODY_FREE,
    Outcome.RESET_BEFORE_HEAD: _NODE,
    Outcome.RESET_AFTER_HEAD: _NODE,
    Outcome.FIRST_BYTE_TIMEOUT: _NODE,
    Outcome.IDLE_TIMEOUT: _NODE,
    Outcome.UNARY_TIMEOUT: _NODE,
    # Taken from a node that stopped moving with everything else there: whatever did it, this request pays nothing.
    Outcome.WEDGED: Ruling(fault=Fault.NODE, again=Again.FREE, breaker=False, failure_price=True),
    # The caller's time ran out. A slow node is seen by its load and its latency, not by a caller in a hurry.
    Outcome.DEADLINE: Ruling(fault=Fault.NOBODY, again=Again.NEVER, breaker=None),
    Outcome.REQUEST_ERROR: Ruling(fault=Fault.REQUEST, again=Again.NEVER, breaker=True),
    Outcome.MISCONFIGURED: Ruling(fault=Fault.NODE, again=Again.ELSEWHERE, breaker=False, failure_price=True),
    # A 404 for a model that nobody lists and no node has answered for: made-up names must not open breakers.
    Outcome.UNKNOWN_MODEL: Ruling(fault=Fault.REQUEST, again=Again.ELSEWHERE, breaker=None),
    Outcome.BACK_PRESSURE: Ruling(fault=Fault.NOBODY, again=Again.ELSEWHERE, breaker=None, cut_weight=True),
    Outcome.SERVER_ERROR: _NODE,
    Outcome.BAD_FRAMING: _NODE,
    Outcome.BAD_ENCODING: _NODE,
    Outcome.BAD_BODY: _NODE,
    Outcome.ERROR_OBJECT: _NODE,
    Outcome.EMPTY_BODY: _NODE,
    Outcome.TRUNCATED: _NODE,
    Outcome.NO_FINISH_REASON: _NODE,
    Outcome.NO_GOOD_END: _NODE,
    Outcome.STREAM_ERROR: _NODE,
    Outcome.CLIENT_GONE: Ruling(fault=Fault.CLIENT, again=Again.NEVER, breaker=None),
    # Another attempt of the same request was quicker.
    Outcome.HEDGE_LOST: Ruling(fault=Fault.NOBODY, again=Again.NEVER, breaker=None),
}

for _outcome, _ruling in RULINGS.items():
    _outcome.ruling = _ruling

# A node's 4xx that speak of its configuration, not of the request (contract, "Errors").
MISCONFIGURED_STATUS = frozenset({401, 403, 404, 405, 407, 421, 426})
BACK_PRESSURE_STATUS = frozenset({408, 425, 429, 503})


def of_status(status: int) -> Outcome:
    """What a node's status line says; 2xx is OK as far as the status goes, a redirect is a misconfigured node."""
    if 200 <= status < 300:
        return Outcome.OK
    if status in BACK_PRESSURE_STATUS:
        return Outcome.BACK_PRESSURE
    if status in MISCONFIGURED_STATUS or 300 <= status < 400:
        return Outcome.MISCONFIGURED
    if 400 <= status < 500:
        return Outcome.REQUEST_ERROR
    return Outcome.SERVER_ERROR
