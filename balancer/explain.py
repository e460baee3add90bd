"""Why a request went where it went: one record per request, kept in a ring."""

from __future__ import annotations

from typing import Any

from balancer.errors import BalancerError

# Records kept; about 1 KiB each.
RING = 2000


class Call:
    """What became of one request, written as it goes. One `request.finished` line and every metric come from it."""

    __slots__ = (
        "attempts",
        "attempts_begun",
        "cache",
        "cache_reason",
        "code",
        "completion_tokens",
        "endpoint",
        "finished_s",
        "first_token_s",
        "id",
        "model",
        "node",
        "overhead_s",
        "panic",
        "prompt_tokens",
        "queue_s",
        "received_s",
        "resume",
        "sent_s",
        "status",
        "store_s",
        "stream",
        "tenant",
    )

    def __init__(self, id_: str, endpoint: str, received_s: float) -> None:
        self.id = id_
        self.endpoint = endpoint
        self.received_s = received_s
        self.model = ""
        self.tenant = ""
        self.stream = False
        self.cache = "bypass"
        self.cache_reason = ""
        self.node = ""
        self.attempts: list[tuple[str, str, float]] = []  # node, outcome, seconds
        self.attempts_begun = 0
        self.panic = False
        self.resume = ""  # of a stream that a node broke: `ok`, or why it was not continued elsewhere
        self.queue_s = 0.0
        self.store_s = 0.0  # waited for the shared store to look an answer up
        self.overhead_s = 0.0  # from accept to then, without waiting in the queue
        self.sent_s = 0.0  # when the first attempt's request was written
        self.first_token_s = 0.0
        self.finished_s = 0.0
        self.status = 0
        self.code = ""
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None

    def failed(self, error: BalancerError) -> None:
        """It ended with an error; the status stays what was sent when a head is already out."""
        self.code = error.code
        if self.status == 0:
            self.status = error.status

    def as_dict(self) -> dict[str, Any]:
        """For people and for the admin API."""
        begun = self.received_s
        return {
            "request_id": self.id,
            "endpoint": self.endpoint,
            "tenant": self.tenant,
            "model": self.model,
            "stream": self.stream,
            "status": self.status,
            "code": self.code,
            "cache": {"result": self.cache, "reason": self.cache_reason},
            "node": self.node,
            "panic": self.panic,
            "attempts": [
                {"node": node, "outcome": outcome, "seconds": round(seconds, 6)}
                for node, outcome, seconds in self.attempts
            ],
            "resume": self.resume,
            "waits": {
                "queue_s": round(self.queue_s, 6),
                "to_first_attempt_s": round(self.sent_s - begun, 6) if self.sent_s else None,
                "to_first_token_s": round(self.first_token_s - begun, 6) if self.first_token_s else None,
                "whole_s": round(self.finished_s - begun, 6) if self.finished_s else None,
            },
            "tokens": {"prompt": self.prompt_tokens, "completion": self.completion_tokens},
        }


class Ring:
    """The last requests by id; the oldest goes first."""

    def __init__(self, size: int = RING) -> None:
        self._slots: list[Call | None] = [None] * size
        self._next = 0
        self._by_id: dict[str, Call] = {}

    def add(self, call: Call) -> None:
        """Keep a record; a request id used twice keeps the newer."""
        at = self._next
        old = self._slots[at]
        if old is not None and self._by_id.get(old.id) is old:
            del self._by_id[old.id]
        self._slots[at] = self._by_id[call.id] = call
        self._next = at + 1 if at + 1 < len(self._slots) else 0

    def get(self, id_: str) -> Call | None:
        """The record of a request, while it is kept."""
        return self._by_id.get(id_)
