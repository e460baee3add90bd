"""What one node owes us: prompt tokens not yet answered, context in flight, and how fast it has worked them off.

INTERFACE STAGE: names and signatures are final; bodies follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from balancer.core.health import NodeReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one request asks of a node, in tokens (estimates are fine; see core/expectations.py)."""

    prompt_tokens: float
    blocks: tuple[int, ...] = ()  # chained prompt block hashes, core/prompt_blocks.py; any ints that share heads do
    block_tokens: float = 256.0  # prompt tokens one block stands for (`B`)
    expected_output: float = 256.0  # E[out], tokens; ignored when it does not generate
    generates: bool = True  # False: embeddings, rerank, scoring
    streams: bool = True  # False: the head of the answer comes after the whole generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Outstanding:
    """What one balancer (or several, added up) has at a node: the three figures balancers share."""

    tokens: float = 0.0  # uncached prompt tokens without a first token yet
    context: float = 0.0
    requests: float = 0.0


class Sent:
    """One request at one node, as handed out by `Books.dispatched`. Opaque: give it back to the same Books.

    uncached_tokens: int; sent_s: float; open: bool (until finished, failed or cancelled).
    """


class Books:
    """One node's accounts. Plain values and `now` (monotonic seconds); never goes back in time, never raises.

    Read: n (requests in flight), queued_tokens (Q), context_tokens (C), s_per_token (seconds per uncached prompt
    token; prior until 5 samples), tpot_at(context) (seconds per output token), slots, kv_tokens (inf: unknown).
    """

    def __init__(self, *, slots: float | None = None, kv_tokens: float | None = None) -> None: ...

    def dispatched(self, work: Work, held_blocks: int, now: float) -> Sent:
        """One request goes to the node, in the same step as the pick. `held_blocks`: `Choice.held_blocks`."""
        raise NotImplementedError

    def first_token(self, sent: Sent, now: float) -> None:
        """The first token (first content of the stream) came. No-op for unary work or after an end."""

    def finished(
        self, sent: Sent, now: float, output_tokens: int | None = None, prompt_tokens: int | None = None
    ) -> None:
        """A good end. Token counts are usage's, None when unknown. Idempotent with the two other ends."""

    def failed(self, sent: Sent, now: float) -> None:
        """An end by the node's fault: the failure price rises."""

    def cancelled(self, sent: Sent, now: float) -> None:
        """An end that says nothing of the node: client gone, hedge lost, deadline, back-pressure, a bad request."""

    def reported(self, report: NodeReport, at_s: float, now: float) -> bool:
        """Take over an agent's figures, true at `at_s`. Returns True when the engine restarted: its KV is gone."""
        raise NotImplementedError

    def shared(self, others: Outstanding, at_s: float) -> None:
        """What the other balancers together have at the node, true at `at_s`."""

    def outstanding(self, now: float) -> Outstanding:
        """What this balancer has at the node: what it tells the others every 200 ms."""
        raise NotImplementedError
