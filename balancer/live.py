"""An attempt under way, as those who watch its node look at it: watchdog, comparison with peers, breaker."""

from __future__ import annotations

from typing import NamedTuple

from balancer.core.books import PRIOR_S_PER_TOKEN, PRIOR_TPOT_S, Sent
from balancer.core.breaker import Permit
from balancer.core.node import Node
from balancer.core.outcome import Outcome
from balancer.core.request import InferenceRequest
from balancer.core.wedge import Probe, Seen, holds_commit, probe_for
from balancer.wire.answer import Answer

# What the shortest answer takes beside reading and writing.
LEAST_ANSWER_S = 0.01


class Slot(NamedTuple):
    """A node, the right to one attempt there, and its entry in the node's books."""

    node: Node
    permit: Permit
    sent: Sent | None


class LiveAttempt:
    """Stands in `node.live` from when it was counted in flight until it is over."""

    __slots__ = ("answer", "node", "request", "slot", "slow", "tokens")

    def __init__(self, slot: Slot, answer: Answer, request: InferenceRequest) -> None:
        self.slot = slot
        self.node = slot.node
        self.answer = answer
        self.request = request
        self.tokens = 1.0  # of its prompt, by the bytes sent
        self.slow = False  # its first token took far longer than predicted
        slot.node.live.add(self)

    @property
    def outcome(self) -> Outcome:
        """How it ended, or OK as far as is known."""
        raise NotImplementedError

    def has_another(self) -> bool:
        """Whether another node may have the request."""
        raise NotImplementedError

    # -- what it teaches of its node

    def began(self, now: float, slow_factor: float | None) -> None:
        """The first token of a stream came."""
        node, sent, ttft_s = self.node, self.slot.sent, now - self.answer.sent_s
        prefill_s = self._prefill_s()
        node.load.first_token(ttft_s, now, self.tokens)
        node.tally.took(ttft_s, prefill_s)
        if slow_factor is not None:
            predicted_s = prefill_s if sent is None or node.books.is_new else sent.expected_s
            self.slow = ttft_s > slow_factor * predicted_s

    def over(self) -> None:
        """It is over, however it ended."""
        node, answer, outcome = self.node, self.answer, self.outcome
        node.live.discard(self)
        is_good = outcome is Outcome.OK
        if answer.last_byte_s > node.heard_s and (is_good or answer.first_token_s) and self.request.endpoint.engine:
            node.heard_s = answer.last_byte_s
        if self.request.stream:
            if answer.committed and outcome is not Outcome.WEDGED:
                node.tally.begun += 1.0
                if outcome.ruling.breaker is False:
                    node.tally.broken += 1.0
        elif is_good and answer.usage is not None:
            expected_s = self._prefill_s() + PRIOR_TPOT_S * answer.usage.completion
            node.tally.took(answer.last_byte_s - answer.sent_s, expected_s)

    def _prefill_s(self) -> float:
        """Seconds that reading the prompt would take a node nobody knows: the same for every node."""
        sent = self.slot.sent
        return LEAST_ANSWER_S + PRIOR_S_PER_TOKEN * (self.tokens if sent is None else sent.tokens)

    # -- as the watchdog looks at it (`core.wedge.UnderWay`)

    @property
    def heard_s(self) -> float:
        """When the last byte of its answer's body came; 0.0 before the first."""
        answer = self.answer
        return answer.last_byte_s if answer.last_byte_s > answer.first_byte_s else 0.0

    def seen(self) -> Seen | None:
        """How it stands; None before it was sent, and where no engine has to work for it."""
        answer, node, sent = self.answer, self.node, self.slot.sent
        if answer.sent_s == 0.0 or answer.ended or not self.request.endpoint.engine:
            return None
        load, books = node.load, node.books
        if sent is not None and not books.is_new:
            prefill_s, expected_s, known = books.s_per_token * sent.tokens, sent.expected_s, True
        else:
            prefill_s = max(PRIOR_S_PER_TOKEN, load.s_per_token) * self.tokens
            expected_s, known = max(prefill_s, load.ttft_s), load.known_pace
        events = answer.events
        own_gap_s = (answer.last_byte_s - answer.first_token_s) / (events - 1) if events > 1 else 0.0
        return Seen(
            sent_s=answer.sent_s,
            streams=self.request.stream,
            begun=answer.first_token_s > 0.0,
            paused=answer.paused,
            resumed_s=answer.resumed_s,
            expected_s=expected_s,
            prefill_s=prefill_s,
            known_pace=known,
            gap_s=max(own_gap_s, load.itl_s),
        )

    def probe(self) -> Probe | None:
        """The smallest request of its kind; None where there is none that costs next to nothing."""
        return probe_for(self.request.endpoint.path, self.request.model)

    def give_up(self) -> bool:
        """Take it from a node that is wedged, if another one may have it; whether that was so."""
        if not self.has_another():
            return False
        self.answer.give_up(Outcome.WEDGED)
        return True

    def may_commit(self, now: float) -> bool:
        """False while the node is silent as a wedged one is and another one may still have the request."""
        node, seen, limits = self.node, self.seen(), self.answer.limits
        if seen is None:
            return True
        heard_s = max(node.heard_s, max((other.heard_s for other in node.live), default=0.0))
        held = holds_commit(seen, heard_s=heard_s, commit_s=limits.commit_s, stall_s=limits.stall_s, now=now)
        return not ((held or node.is_wedged) and self.has_another())
