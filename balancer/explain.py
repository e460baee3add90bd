"""Why a request went where it went: one record per request, kept in a ring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from balancer.core.cost import Explanation, explained
from balancer.core.node import Node
from balancer.core.request import InferenceRequest, NodeId
from balancer.core.routing import Pick
from balancer.core.selection import FULL_SCAN
from balancer.errors import BalancerError

# Records kept; about 2 KiB each.
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
        "picks",
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
        self.picks: list[Pick] = []  # one for each node chosen, and one where nobody could be
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

    def note_pick(self, request: InferenceRequest) -> None:
        """Keep why a node was chosen, or why none could be."""
        if request.picked is not None:
            self.picks.append(request.picked)

    def failed(self, error: BalancerError) -> None:
        """It ended with an error; the status stays what was sent when a head is already out."""
        self.code = error.code
        if self.status == 0:
            self.status = error.status

    def as_dict(self, fleet: Mapping[NodeId, Node]) -> dict[str, Any]:
        """For people and for the admin API. `fleet`: the nodes there are now."""
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
            "choices": self._choices(fleet),
            "waits": {
                "queue_s": round(self.queue_s, 6),
                "to_first_attempt_s": round(self.sent_s - begun, 6) if self.sent_s else None,
                "to_first_token_s": round(self.first_token_s - begun, 6) if self.first_token_s else None,
                "whole_s": round(self.finished_s - begun, 6) if self.finished_s else None,
            },
            "tokens": {"prompt": self.prompt_tokens, "completion": self.completion_tokens},
        }

    def _choices(self, fleet: Mapping[NodeId, Node]) -> list[dict[str, Any]]:
        ended = list(self.attempts)
        choices = []
        for pick in self.picks:
            attempt = next((each for each in ended if each[0] == pick.node), None)
            if attempt is not None:
                ended.remove(attempt)
            choices.append(
                {
                    "node": pick.node,
                    "outcome": attempt[1] if attempt is not None else None,
                    "at_s": round(pick.at_s - self.received_s, 6),
                    "policy": pick.policy,
                    "panic": pick.candidates.panic,
                    "candidates": list(_candidates(pick)),
                    "dropped": _dropped(pick, self.model, fleet),
                }
            )
        return choices


def _candidates(pick: Pick) -> Iterator[dict[str, Any]]:
    """Who was compared: with their prices, least first, or with our requests in flight there."""
    if pick.choice is not None:
        for explanation in explained(pick.choice):
            yield {**priced(explanation), "chosen": explanation.node == pick.node}
    for node, requests in zip(pick.compared, pick.outstanding, strict=True):
        yield {"node": node.id, "requests_in_flight": requests, "chosen": node.id == pick.node}


def _dropped(pick: Pick, model: str, fleet: Mapping[NodeId, Node]) -> dict[NodeId, str]:
    """Every other node, and what kept it from being compared."""
    candidates = pick.candidates
    compared = {node.id for node in (pick.choice.nodes if pick.choice is not None else pick.compared)}
    dropped: dict[NodeId, str] = dict(candidates.dropped)
    for node in candidates.nodes:
        if node.id in pick.tried:
            dropped[node.id] = "tried"
        elif node.id not in compared:
            dropped[node.id] = "not_sampled" if compared and len(candidates.nodes) > FULL_SCAN else "full"
    known = {node.id for node in candidates.nodes} | dropped.keys()
    for id_, node in fleet.items():
        if id_ not in known:
            dropped[id_] = "other_model" if node.serves(model) is not True else "came_later"
    return dropped


def priced(explanation: Explanation) -> dict[str, Any]:
    """One node's price: terms in seconds, what they were made of, and how old that was."""
    ages = {
        "pace": explanation.pace_age_s,
        "tpot": explanation.tpot_age_s,
        "failure": explanation.failure_age_s,
        "report": explanation.report_age_s,
        "others": explanation.others_age_s,
    }
    return {
        "node": explanation.node,
        "cost_s": round(explanation.cost_s, 6),
        "terms_s": {name: round(seconds, 6) for name, seconds in explanation.terms_s.items()},
        "inputs": {
            "requests_in_flight": round(explanation.requests, 2),
            "uncached_tokens": round(explanation.uncached_tokens, 1),
            "held_blocks": explanation.held_blocks,
            "s_per_token": explanation.s_per_token,
            "tpot_s": explanation.tpot_s,
            "pace_is_prior": explanation.is_prior,
            "others_assumed": explanation.others_assumed,
        },
        "ages_s": {name: None if age is None else round(age, 3) for name, age in ages.items()},
    }


def table(told: Mapping[str, Any]) -> str:
    """`as_dict` for a terminal: one table for each choice, its nodes with their prices, least first."""
    waits, tokens = told["waits"], told["tokens"]
    whole = f"{waits['whole_s']:.3f} s" if waits["whole_s"] is not None else "running"
    lines = [
        f"{told['request_id']}: {told['endpoint']} {told['model']}, tenant {told['tenant']}"
        f"{', stream' if told['stream'] else ''}",
        f"{told['status']} {told['code']}".rstrip()
        + f" after {whole}; queue {waits['queue_s']:.3f} s"
        + (f", first token {waits['to_first_token_s']:.3f} s" if waits["to_first_token_s"] is not None else "")
        + f"; cache {told['cache']['result']} {told['cache']['reason']}".rstrip()
        + (f"; tokens {tokens['prompt']} + {tokens['completion']}" if tokens["prompt"] is not None else ""),
    ]
    for number, choice in enumerate(told["choices"], 1):
        lines += ["", _headline(number, choice), *_aligned(_rows(choice))]
    return "\n".join(lines)


def _headline(number: int, choice: Mapping[str, Any]) -> str:
    panic = ", in panic: breakers ignored" if choice["panic"] else ""
    if choice["node"] is None:
        return f"attempt {number}: nobody could be chosen ({choice['policy']}, {choice['at_s']:.3f} s{panic})"
    outcome = choice["outcome"] or "not over"
    return f"attempt {number}: {choice['node']}, {outcome} ({choice['policy']}, {choice['at_s']:.3f} s{panic})"


def _rows(choice: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows. Terms that are zero for every node are left out."""
    found = choice["candidates"]
    rows = [["", "node", "in flight"]]
    terms: list[str] = []
    if found and "terms_s" in found[0]:
        named = dict.fromkeys(name for node in found for name in node["terms_s"])
        terms = [name for name in named if any(node["terms_s"].get(name) for node in found)]
        rows = [["", "node", "cost s", *terms, "in flight", "uncached", "pace age", "report age"]]
    for node in found:
        mark = "*" if node["chosen"] else ""
        if "terms_s" not in node:
            rows.append([mark, node["node"], str(node["requests_in_flight"])])
            continue
        inputs, ages = node["inputs"], node["ages_s"]
        prices = [f"{node['terms_s'].get(name, 0.0):.4f}" for name in terms]
        pace = "prior" if inputs["pace_is_prior"] else _age(ages["pace"])
        counts = [f"{inputs['requests_in_flight']:g}", f"{inputs['uncached_tokens']:.0f}"]
        rows.append([mark, node["node"], f"{node['cost_s']:.4f}", *prices, *counts, pace, _age(ages["report"])])
    rows += [["", id_, f"dropped: {reason}"] for id_, reason in choice["dropped"].items()]
    return rows


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; a dropped node's reason may run on."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[at]) for row in full) for at in range(len(rows[0]))]
    widths[1] = max(len(row[1]) for row in rows)
    lines = []
    for row in rows:
        numbers = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=False)]
        if len(row) < len(rows[0]):
            numbers = [row[2]]
        lines.append("  ".join([f"{row[0]:1}", f"{row[1]:{widths[1]}}", *numbers]).rstrip())
    return lines


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
