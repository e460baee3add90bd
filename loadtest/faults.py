"""What a fake node can do wrong, and to which requests.

A `Fault` is one rule: a kind, its figures, and the requests it is for. `Faults` holds the rules in force; the first
that matches a request is applied to it. How each kind looks on the wire is in `faulty_reply.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from random import Random
from typing import Any, Literal, get_args

from loadtest.connection import Request

Kind = Literal[
    # These happen at a point: before the head (`after_events` None), after the head (0), after k events of a stream;
    # with k > 0 in the middle of the body of an answer that is no stream.
    "hang",  # say nothing more, until released
    "freeze",  # the whole engine stops for good, with the health check green: a prompt that hangs it
    "reset",  # RST
    "close",  # FIN; within a stream without the final chunk
    "cut",  # end the stream with clean framing and without its good end; before the head as `close`
    "garbage",  # bytes that are no HTTP, then FIN
    "bad_chunk",  # a chunk size that is none, then FIN
    "bad_event",  # an SSE event whose JSON is broken; the stream goes on
    "error_event",  # the dialect's error event, then clean framing
    "die",  # the listener closes and every connection is reset: a poisoned prompt, or a crash
    "refuse",  # the listener closes; this request and others under way are served
    # These take the place of the answer.
    "status",  # `status` with `retry_after_s` and `body`
    "bad_json",  # 200 with half an object
    "error_body",  # 200 with {"error": …}
    "empty_body",  # 200 with Content-Length 0
    "endless_head",  # header lines for ever (up to `size_bytes`, when given)
    # These change an answer that is otherwise good.
    "slow",  # every engine step with this request takes `factor` times longer
    "delay",  # `delay_s` before the head, and before each event where `each_event`
    "truncated",  # Content-Length `size_bytes` larger than the body, then FIN
    "content_type",  # says `content_type`
    "gzip",  # Content-Encoding: gzip, and so it is
    "informational",  # 103 Early Hints before the answer
    "extra_bytes",  # unasked bytes behind the answer: `body`, or a whole second answer
    "hang_up",  # FIN behind a good answer that promised keep-alive
    "huge",  # a filler of `size_bytes` in the JSON, or in the first event
    "no_done",  # a stream without its last event ([DONE], message_stop, response.completed)
    "no_finish",  # a stream of which no choice says why it finished
]
# Kinds that `after_events` applies to.
AT_A_POINT = frozenset(
    ("hang", "freeze", "reset", "close", "cut", "garbage", "bad_chunk", "bad_event", "error_event", "die", "refuse")
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One rule. Without `path` it is for every POST but those of /sim; `path` may hold * and then covers GET too."""

    kind: Kind
    after_events: int | None = None
    status: int = 500
    retry_after_s: int | None = None
    body: str | None = None
    content_type: str | None = None
    factor: float = 10.0
    delay_s: float = 0.0
    each_event: bool = False
    size_bytes: int | None = None
    back_after_s: float | None = None  # for die and refuse: when the node listens again; None: on command
    path: str | None = None
    body_has: str | None = None
    skip: int = 0  # matching requests that pass unharmed first
    first: int | None = None  # how many matching requests are hit; None: all
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown fault {self.kind!r}")
        if self.after_events is not None and self.kind not in AT_A_POINT:
            raise ValueError(f"{self.kind} does not happen at a point of the answer")

    def concerns(self, request: Request) -> bool:
        """Whether the rule is about this request; `skip`, `first` and `probability` aside."""
        if self.path is None:
            if request.method != "POST":
                return False
        elif not fnmatchcase(request.path, self.path):
            return False
        return self.body_has is None or self.body_has.encode() in request.body


@dataclass(slots=True, eq=False)
class Rule:
    """A fault in force, and how often it was asked for and applied."""

    fault: Fault
    matched: int = 0
    hits: int = 0

    def applies(self, request: Request, rng: Random) -> bool:
        """Decide for one request, and count it."""
        fault = self.fault
        if (fault.first is not None and self.hits >= fault.first) or not fault.concerns(request):
            return False
        self.matched += 1
        if self.matched <= fault.skip or (fault.probability < 1.0 and rng.random() >= fault.probability):
            return False
        self.hits += 1
        return True


@dataclass(slots=True, eq=False)
class Faults:
    """The rules in force, in order. `release` lets everything that hangs go on as if nothing had been."""

    rng: Random
    rules: list[Rule] = field(default_factory=list)
    _released: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def add(self, fault: Fault) -> Rule:
        """Put one more rule behind those in force."""
        rule = Rule(fault)
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Drop all rules; what hangs already goes on hanging."""
        self.rules.clear()

    def release(self) -> None:
        """Let all requests that hang now go on; later ones hang again."""
        self._released.set()
        self._released = asyncio.Event()

    async def until_released(self) -> None:
        await self._released.wait()

    def choose(self, request: Request) -> Fault | None:
        """The fault for this request, by the first rule that applies."""
        return next((rule.fault for rule in self.rules if rule.applies(request, self.rng)), None)


def fault_from_json(value: Mapping[str, Any]) -> Fault:
    """A fault as `POST /sim/faults` takes it; raises ValueError with the name that is wrong."""
    known = {entry.name for entry in fields(Fault)}
    if unknown := set(value) - known:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    if "kind" not in value:
        raise ValueError("kind is missing")
    return Fault(**value)
