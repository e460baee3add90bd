"""Nodes that stopped moving: work is in flight there and no byte comes, whatever their health check says.

A time limit per attempt cannot find them: long prompts take long, and killing them makes it worse. A node is judged as
a whole instead. It is wedged when no byte of an answer has come from it, on any connection, for `stall_s`, and

- a stream there has already produced a token, or
- a first token is overdue by more than `stall_s` and twice its predicted prefill.

A unary request never accuses, for its silence is how it looks while all is well; nor does an overdue first token of a
node whose pace nobody knows. They raise a suspicion, which one real request of one token settles. A suspicion against
streams is raised at half of `stall_s` already, so that the probe's answer, a byte like any other, can clear the node in
time: engines may hold back what they generate, arguments of a tool call for example.

What counts as a byte is a body's: a head, or an error, comes from the engine's front end, which answers for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from balancer.core.request import InferenceRequest

# Share of `stall_s` after which silence raises a suspicion against streams.
EARLY = 0.5
# A stream may pause so many of its own mean gaps beyond `stall_s`: a node that is slow is not wedged.
GAPS = 4.0
# A node hangs of a request only if it was alive within this time before the request came.
ALIVE_S = 5.0
# Between streams' last bytes and the step that hangs lies at least so much uncertainty, in seconds.
ARRIVAL_S = 0.1
# Seconds after which the judgement of the watchdog has to be there: it looks four times a second.
JUDGED_S = 0.5
# From this share of `stall_s` of silence a stream without content is not committed, or from `commit_s`, if less.
HOLD = 1.0 / 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One attempt under way at a node, as the watchdog looks at it."""

    sent_s: float
    streams: bool
    begun: bool = False  # a token has come
    paused: bool = False  # its client reads too slowly, so nothing is read from the node
    resumed_s: float = float("-inf")  # when it last went on after a pause
    expected_s: float = 0.0  # predicted time to its first token, what waits before it included
    prefill_s: float = 0.0  # predicted time to read its own prompt
    known_pace: bool = True  # whether the predictions rest on what the node has shown
    gap_s: float = 0.0  # mean time between its tokens


class UnderWay(Protocol):
    """An attempt that has not ended."""

    request: InferenceRequest

    @property
    def heard_s(self) -> float:
        """When the last byte of its answer's body came; 0.0 before the first."""

    def seen(self) -> Seen | None:
        """How it stands; None before it was sent, and where no engine has to work for it."""

    def probe(self) -> Probe | None:
        """The smallest request of its kind; None where there is none that costs next to nothing."""

    def give_up(self) -> bool:
        """Take it from a node that is wedged, if another one may have it; whether that was so."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A real request of one token, by path and body."""

    path: str
    body: dict[str, Any]


class Finding(Enum):
    """What the silence of a node means. The value of an accusation is its reason."""

    FINE = "fine"
    SUSPECT = "suspect"  # by what may accuse later: a probe has to be answered before
    UNPROVEN = "unproven"  # by what never accuses: only a probe that fails does
    STREAM_SILENT = "stream_silent"
    FIRST_TOKEN_OVERDUE = "first_token_overdue"
    PROBE_FAILED = "probe_failed"

    @property
    def is_wedged(self) -> bool:
        """Whether the node is to be left."""
        return self in _WEDGED


_WEDGED = frozenset({Finding.STREAM_SILENT, Finding.FIRST_TOKEN_OVERDUE, Finding.PROBE_FAILED})


def judge(under_way: Iterable[Seen], *, heard_s: float, probe_failed: bool, stall_s: float, now: float) -> Finding:
    """Judge one node by what is under way there.

    `heard_s` is when the node last showed life: a byte, a token counter that moved, a probe it answered.
    `probe_failed`: one that was sent since then got no answer.
    """
    silent_s = now - heard_s
    if silent_s < EARLY * stall_s:
        return Finding.FINE
    every = [seen for seen in under_way if not seen.paused]
    # Without chunked prefill running streams stand still while a prompt is read.
    reading_s = max((seen.prefill_s for seen in every if not seen.begun), default=0.0)
    suspicion = Finding.FINE
    for seen in every:
        if not seen.streams:
            if min(silent_s, now - seen.sent_s) >= stall_s:
                suspicion = _graver(suspicion, Finding.UNPROVEN)
            continue
        if seen.begun:
            late_s = min(silent_s, now - seen.resumed_s) - reading_s - GAPS * seen.gap_s
            accusation = Finding.STREAM_SILENT
        else:
            late_s = now - seen.sent_s - seen.expected_s - 2.0 * seen.prefill_s
            accusation = Finding.FIRST_TOKEN_OVERDUE
        if late_s >= stall_s and silent_s >= stall_s:
            if seen.known_pace or seen.begun:
                return accusation
            suspicion = _graver(suspicion, Finding.UNPROVEN)
        elif late_s >= EARLY * stall_s and (seen.known_pace or seen.begun):
            suspicion = Finding.SUSPECT
    if suspicion is not Finding.FINE and probe_failed and silent_s >= stall_s:
        return Finding.PROBE_FAILED
    return suspicion


def _graver(one: Finding, other: Finding) -> Finding:
    return one if one is Finding.SUSPECT else other


def may_have_hung_it(seen: Seen, under_way: Iterable[Seen], *, heard_s: float, stall_s: float) -> bool:
    """Whether a node that was last heard at `heard_s` may have hung of this request: it waits, and came in time.

    A node that showed no life around its coming hangs by itself. What came when streams should have moved again, or
    when the node had been silent for long with work in flight, found it hanging.
    """
    if seen.begun or heard_s < seen.sent_s - ALIVE_S:
        return False
    every = list(under_way)
    gaps = [other.gap_s for other in every if other.begun and not other.paused]
    if gaps:
        reading_s = max((other.prefill_s for other in every if not other.begun), default=0.0)
        return seen.sent_s <= heard_s + max(ARRIVAL_S, reading_s + GAPS * max(gaps))
    silent_from_s = max(heard_s, min((other.sent_s for other in every), default=heard_s))
    return seen.sent_s - silent_from_s < EARLY * stall_s


def holds_commit(seen: Seen, *, heard_s: float, commit_s: float, stall_s: float, now: float) -> bool:
    """Whether a stream without content is kept from its client a little longer, because its node may be wedged.

    Once its head is out it cannot go to another node. So while its first token is late and the node is silent, it
    waits until the watchdog has judged, and no longer.
    """
    waited_s = now - seen.sent_s
    if now - heard_s < min(commit_s, HOLD * stall_s) or waited_s < seen.expected_s:
        return False
    judged_s = seen.expected_s + 2.0 * seen.prefill_s + stall_s * (1.0 if seen.known_pace else 2.0) + JUDGED_S
    return waited_s < judged_s


def probe_for(path: str, model: str) -> Probe | None:
    """The smallest request to an endpoint that makes the engine work; None where there is none that is cheap."""
    ask = _SMALLEST.get(path)
    return None if ask is None else Probe(path, {"model": model, **ask})


_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "ping"}], "max_tokens": 1}
_TGI: dict[str, Any] = {"inputs": "ping", "parameters": {"max_new_tokens": 1}}
_SMALLEST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**_CHAT, "temperature": 0},
    "/v1/completions": {"prompt": "ping", "max_tokens": 1, "temperature": 0},
    "/v1/messages": _CHAT,
    # 16 is the least that the API lets a caller ask for.
    "/v1/responses": {"input": "ping", "max_output_tokens": 16, "store": False},
    "/v1/embeddings": {"input": "ping"},
    "/v1/rerank": {"query": "ping", "documents": ["ping"]},
    "/rerank": {"query": "ping", "documents": ["ping"]},
    "/v1/score": {"text_1": "ping", "text_2": "ping"},
    "/score": {"text_1": "ping", "text_2": "ping"},
    "/pooling": {"input": "ping"},
    "/classify": {"input": "ping"},
    "/generate": _TGI,
    "/generate_stream": _TGI,
}
