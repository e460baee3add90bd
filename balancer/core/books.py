"""What one node owes us: prompt tokens not yet answered, context in flight, and how fast it has worked them off.

Requests differ by a factor of a thousand in prompt tokens, so outstanding *tokens* are counted beside requests, and
each node's own seconds per token turn them into time. That serves mixed GPUs and grey failures alike: there are no
labels and no thresholds. Only events change the books; every read is a few additions.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from balancer.core.health import NodeReport

# -- priors: what is believed of a node or a request before anything was seen

# Samples before a node's own figures are believed: fewer are mostly the noise of one batch.
MIN_SAMPLES = 5
# Seconds per uncached prompt token (5,000 tokens/s: a 7B to 13B model on one data-centre GPU), while the whole fleet
# is new; afterwards a newcomer gets the fleet's median.
PRIOR_S_PER_TOKEN = 0.0002
# Seconds per output token of the same kind of engine with a middling batch.
PRIOR_TPOT_S = 0.025
# Sequences an engine runs at once, where it does not say: vLLM's `max_num_seqs`.
DEFAULT_SLOTS = 256.0
# Of a large fleet each pick sees another median: differences up to this share are not worth new figures.
EXPECT_RATIO = 0.05
# No engine reads a prompt faster than this; keeps a burst of first tokens of the same step from giving zero.
LEAST_S_PER_TOKEN = 1e-6

# -- how fast old evidence fades

# Share left after 1,000 more prompt tokens: about the last 100,000 count, a few seconds of a busy node.
PACE_KEEP_PER_1K = 0.99
# Share left after 250 more output tokens: about the last 25,000 count, some 20 s of a busy node.
TPOT_KEEP_PER_250 = 0.99
# One long answer counts for no more than this many tokens in the fit: it is still one measurement.
TPOT_MOST_TOKENS = 1000.0
# The fit's slope lies between these shares of (mean time / mean context). Below, a step's time would not depend on
# the KV cache it reads; above, an empty node would be free of charge.
TPOT_LEAST_SLOPE = 0.15
TPOT_MOST_SLOPE = 1.0
# A failure's price fades with this time constant, and half-opens by that: at zero traffic nothing else would.
FAILURE_DECAY_S = 15.0
# Weight of one new outcome in the failure average: a node that fails in 5 ms has the shortest queue, and three
# failures in a row have to outweigh it.
FAILURE_WEIGHT = 0.3
# Below this an average of failures that fades by successes is over.
FAILURE_LEAST = 1e-3
# What others have at a node is believed less and less: after this long it is down to 37 %.
OTHERS_DECAY_S = 3.0
# While balancers tell each other (every 200 ms), a report's difference, which is coarser, is not taken.
SHARED_FRESH_S = 2.0
# Own counts are remembered this often and this long, to compare a report with what we had when it was true.
OWN_EVERY_S = 0.05
OWN_KEPT = 128

# A running stream's answer is on average half written, so half of what is expected of it stands in the KV cache.
WRITTEN_SHARE = 0.5
# A unary answer's decoding took at least this share of its whole time, whatever the prefill was expected to take.
LEAST_DECODE_SHARE = 0.1
# A first token is overdue once it took this much longer than predicted, and this: chunked prefill shares its steps.
OVERDUE_RATIO = 1.5
OVERDUE_S = 0.05

_PACE_FADE = math.log(PACE_KEEP_PER_1K) / 1000.0
_TPOT_FADE = math.log(TPOT_KEEP_PER_250) / 250.0


class Work(NamedTuple):  # one is made for each request: a tuple takes a quarter of a frozen dataclass's time
    """What one request asks of a node, in tokens. Estimates are fine (core/expectations.py)."""

    prompt_tokens: float
    blocks: tuple[int, ...] = ()  # of the prompt, chained (core/prompt_blocks.py); any ints that share heads will do
    block_tokens: float = 256.0  # prompt tokens that one block stands for
    expected_output: float = 256.0  # tokens; of no meaning when it does not generate
    generates: bool = True  # False: embeddings, rerank, scoring
    streams: bool = True  # False: the head of the answer comes after the whole generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Outstanding:
    """What one balancer, or several added up, have at a node: the figures that balancers share."""

    tokens: float = 0.0  # uncached prompt tokens without a first token yet
    context: float = 0.0  # tokens in the KV cache of running requests
    requests: float = 0.0
    read: float = 0.0  # uncached prompt tokens of theirs that the node has read so far; only its growth matters


class Figures(NamedTuple):
    """What prices read of a node's books, as it stood at one moment; what later events do does not change it."""

    s_per_token: float
    queued_tokens: int
    head_tokens: int
    head_from_s: float
    n: int
    context_tokens: int
    slots: float
    over_slots: float
    kv_tokens: float
    tpot_base_s: float
    tpot_slope_s: float
    failure: float
    failure_at_s: float
    others: Outstanding | None
    others_at_s: float
    others_assumed: bool
    is_new: bool
    tpot_is_new: bool
    pace_at_s: float | None
    tpot_at_s: float | None
    reported_at_s: float | None
    head_paced: bool

    def tpot_s(self, context_tokens: float) -> float:
        """Seconds per output token with so much context at the node."""
        return self.tpot_base_s + self.tpot_slope_s * context_tokens

    def failure_now(self, now: float) -> float:
        """The failure average, faded to `now` (0..1)."""
        if self.failure == 0.0:
            return 0.0
        return self.failure * math.exp(-(now - self.failure_at_s) / FAILURE_DECAY_S)

    def others_share(self, now: float) -> float:
        """How much of what others are said to have is still believed (0..1)."""
        age_s = now - self.others_at_s
        return math.exp(-age_s / OTHERS_DECAY_S) if age_s > 0.0 else 1.0

    def others_now(self, now: float) -> Outstanding:
        """What other balancers have at the node, faded by its age."""
        others = self.others
        if others is None:
            return _NOBODY
        share = self.others_share(now)
        return Outstanding(
            tokens=share * others.tokens, context=share * others.context, requests=share * others.requests
        )

    def backlog_s(self, now: float) -> float:
        """Seconds until every prompt sent so far is read, by the node's own pace.

        The head's elapsed time is taken off. Once it is well overdue it is added instead: a node that stopped
        reading looks worse by the second, long before anything times out.
        """
        others = self.others_share(now) * self.others.tokens if self.others is not None else 0.0
        s = self.s_per_token
        backlog = s * (self.queued_tokens + others)
        if self.head_tokens:
            head_s = s * self.head_tokens
            elapsed_s = max(0.0, now - self.head_from_s)
            backlog -= min(elapsed_s, head_s)
            late_s = elapsed_s - s * (self.head_tokens + others)
            if late_s > (OVERDUE_RATIO - 1.0) * s * (self.head_tokens + others) + OVERDUE_S:
                backlog += late_s
        return backlog


_figures_of = attrgetter(*Figures._fields)


class Sent:
    """One request at one node, as `Books.dispatched` hands it out; it ends once. Not to be shared between books."""

    __slots__ = (
        "context",
        "context_before",
        "expected_s",
        "generates",
        "open",
        "pace_total",
        "queued",
        "read_s",
        "sent_s",
        "streams",
        "tokens",
        "uncached_ratio",
    )

    def __init__(
        self, work: Work, tokens: int, context: int, context_before: int, expected_s: float, now: float
    ) -> None:
        self.tokens = tokens  # uncached prompt tokens
        self.uncached_ratio = tokens / max(1.0, work.prompt_tokens)
        self.context = context  # tokens it is counted with
        self.context_before = context_before  # at the node, when it began to decode
        self.expected_s = expected_s  # predicted time to its first token
        self.sent_s = now
        self.pace_total = 0.0  # tokens that taught the pace until this one had
        self.read_s: float | None = None  # when its prompt was read: its first token, or as near as is known
        self.streams = work.streams and work.generates
        self.generates = work.generates
        self.queued = True  # counted as prompt not yet read
        self.open = True

    def __repr__(self) -> str:
        state = "queued" if self.queued else "decoding" if self.open else "over"
        return f"<Sent tokens={self.tokens} {state}>"


class Books:
    """One node's accounts, from what was sent there and what came back.

    Takes plain values and `now` (monotonic seconds). Each `Sent` counts once, however often its end is told. Figures
    that a pick reads (`n`, `queued_tokens`, `context_tokens`, `head_*`, `s_per_token`, `tpot_*`, `over_slots`, …)
    are kept up to date by every event; nobody else writes them.
    """

    __slots__ = (
        "_boot_id",
        "_counters",
        "_fifo",
        "_loose_from_s",
        "_loose_tokens",
        "_others_read",
        "_others_read_before",
        "_own",
        "_own_since_report",
        "_pace_seconds",
        "_pace_tokens",
        "_pace_total",
        "_shared_at_s",
        "_tpot_count",
        "_tpot_w",
        "_tpot_wx",
        "_tpot_wxx",
        "_tpot_wxy",
        "_tpot_wy",
        "_unary_queued",
        "_uncached_mean",
        "_worked_s",
        "context_tokens",
        "failure",
        "failure_at_s",
        "head_from_s",
        "head_paced",
        "head_tokens",
        "is_new",
        "kept",
        "kv_block_tokens",
        "kv_tokens",
        "n",
        "others",
        "others_assumed",
        "others_at_s",
        "over_slots",
        "pace_at_s",
        "pace_samples",
        "queued_tokens",
        "read_tokens",
        "reported_at_s",
        "s_per_token",
        "slots",
        "tpot_at_s",
        "tpot_base_s",
        "tpot_is_new",
        "tpot_slope_s",
    )

    def __init__(self, *, slots: float | None = None, kv_tokens: float | None = None) -> None:
        self.n = 0  # requests in flight
        self.queued_tokens = 0  # uncached prompt tokens sent and not yet answered by a first token
        self.context_tokens = 0  # prompts and half of the expected answers of all requests in flight
        self.slots = slots if slots and slots > 0 else DEFAULT_SLOTS
        self.over_slots = 0.0  # requests beyond the slots with one more, as a share of the slots
        self.kv_tokens = kv_tokens if kv_tokens and kv_tokens > 0 else math.inf  # capacity; inf: not known
        self.kv_block_tokens: float | None = None

        self._fifo: dict[Sent, None] = {}  # prompts not yet read, oldest first
        self._unary_queued = 0  # those of them that will show no first token
        self.head_tokens = 0  # of the prompt being read; 0: none
        self.head_from_s = 0.0  # since when
        self.head_paced = False  # unary: no first token will tell when it is read, the pace does
        self._worked_s = -math.inf  # when the last prompt was read
        self.read_tokens = 0.0  # uncached prompt tokens read so far
        self._loose_tokens = 0  # read by the pace alone since the last first token
        self._loose_from_s = 0.0

        self.s_per_token = PRIOR_S_PER_TOKEN  # seconds per uncached prompt token
        self.is_new = True  # `s_per_token` is a prior
        self.pace_samples = 0
        self.pace_at_s: float | None = None
        self._pace_seconds = 0.0
        self._pace_tokens = 0.0
        self._pace_total = 0.0  # never fades

        self.tpot_base_s = PRIOR_TPOT_S  # seconds per output token = base + slope * context
        self.tpot_slope_s = 0.0
        self.tpot_is_new = True  # they are priors
        self.tpot_at_s: float | None = None
        self._tpot_count = 0
        self._tpot_w = self._tpot_wx = self._tpot_wy = self._tpot_wxx = self._tpot_wxy = 0.0

        self.failure = 0.0  # 0..1, EWMA of outcomes; read through `failure_now`
        self.failure_at_s = 0.0

        self.others: Outstanding | None = None  # what other balancers have there; None: nothing, or not known
        self.others_at_s = -math.inf
        self.others_assumed = False  # nobody said so of this node: it is taken to be like the rest of the fleet
        self._shared_at_s = -math.inf
        self._others_read = 0.0  # as last shared
        self._others_read_before = 0.0  # when the reading of our oldest prompt began
        self.reported_at_s: float | None = None
        self._boot_id: str | None = None
        self._counters: tuple[float, float, float] | None = None  # at_s, prefill seconds, uncached tokens
        self._own: deque[tuple[float, int, int]] | None = None  # at_s, n, context; kept once reports come
        self._own_since_report = 0  # first tokens
        self._uncached_mean = 0.0  # tokens per request
        self.kept: Figures | None = None  # as last taken; None: something changed since

    def __repr__(self) -> str:
        return (
            f"<Books n={self.n} queued={self.queued_tokens} context={self.context_tokens}"
            f" s_per_token={self.s_per_token:.3g}{' (prior)' if self.is_new else ''}>"
        )

    # -- reading

    def figures(self, now: float) -> Figures:
        """What prices read, by now. Taken anew only after an event: what changes a figure drops `kept`."""
        if self.head_paced:
            self.advance(now)
        return self.kept or self._take_figures()

    def _take_figures(self) -> Figures:
        self.kept = Figures._make(_figures_of(self))
        return self.kept

    def tpot_s(self, context_tokens: float) -> float:
        """Seconds per output token with so much context at the node."""
        return self.tpot_base_s + self.tpot_slope_s * context_tokens

    def forgive(self) -> None:
        """One recent failure was not the node's: undo what it did to the average, as if it had been the last."""
        self.failure = max(0.0, (self.failure - FAILURE_WEIGHT) / (1.0 - FAILURE_WEIGHT))
        self.kept = None

    def failure_now(self, now: float) -> float:
        """The failure average, faded to `now` (0..1)."""
        return (self.kept or self._take_figures()).failure_now(now) if self.failure else 0.0

    def others_now(self, now: float) -> Outstanding:
        """What other balancers have at the node, faded by its age."""
        return (self.kept or self._take_figures()).others_now(now)

    def backlog_s(self, now: float) -> float:
        """Seconds until every prompt sent so far is read, by the node's own pace (`Figures.backlog_s`)."""
        return self.figures(now).backlog_s(now)

    def outstanding(self, now: float) -> Outstanding:
        """What we have at the node: what this balancer tells the others."""
        self.advance(now)
        return Outstanding(
            tokens=self.queued_tokens, context=self.context_tokens, requests=self.n, read=self.read_tokens
        )

    # -- a request's life

    def dispatched(self, work: Work, held_blocks: int, now: float) -> Sent:
        """One request goes to the node, in the same step as the pick.

        `held_blocks`: leading blocks of its prompt that the node holds (`Choice.held_blocks`).
        """
        self.advance(now)
        tokens = max(1, round(work.prompt_tokens - work.block_tokens * held_blocks))
        context = round(work.prompt_tokens + (WRITTEN_SHARE * work.expected_output if work.generates else 0.0))
        expected_s = self.backlog_s(now) + self.s_per_token * tokens
        sent = Sent(work, tokens, context, self.context_tokens + context, expected_s, now)
        if not self.queued_tokens:
            self._loose_tokens = 0  # it was idle in between
            self._others_read_before = self._others_read
        self._fifo[sent] = None
        self.queued_tokens += tokens
        if work.generates and not work.streams:
            self._unary_queued += 1
        if not self.head_tokens:
            self._next_head()
        self._uncached_mean += 0.05 * (tokens - self._uncached_mean)
        self._count(1, context, now)
        return sent

    def first_token(self, sent: Sent, now: float) -> None:
        """The first token came. Says nothing when it is told twice, after an end, or of a unary request."""
        if sent.open and sent.streams and sent.queued:
            self.advance(now)
            self._read(sent, now, 1.0)

    def finished(
        self,
        sent: Sent,
        now: float,
        output_tokens: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """A good end; the counts are usage's, None where the node told none."""
        if not sent.open:
            return
        self.advance(now)
        if cached_tokens is not None and prompt_tokens is not None:
            self._correct_pace(sent, max(1, prompt_tokens - cached_tokens))
        if not sent.generates:
            correction = 1.0
            if prompt_tokens is not None and prompt_tokens > 0:
                uncached = prompt_tokens * sent.uncached_ratio
                if cached_tokens is not None:
                    uncached = prompt_tokens - cached_tokens
                correction = max(1.0, uncached) / sent.tokens
            self._read(sent, now, correction)
        elif output_tokens is not None:
            self._learn_decode(sent, output_tokens, now)
        if sent.queued and not sent.streams:
            self._take_off_unary_before(sent, now)
            self._loose_tokens = 0
        if self.failure > 0.0:
            faded = self.failure_now(now) * (1.0 - FAILURE_WEIGHT)
            self.failure = faded if faded >= FAILURE_LEAST else 0.0
            self.failure_at_s = now
        self._close(sent, now)

    def failed(self, sent: Sent, now: float) -> None:
        """An end by the node's fault: its failure price rises."""
        if sent.open:
            faded = self.failure_now(now)
            self.failure = faded + FAILURE_WEIGHT * (1.0 - faded)
            self.failure_at_s = now
            self.advance(now)
            self._close(sent, now)

    def cancelled(self, sent: Sent, now: float) -> None:
        """An end that says nothing of the node: the client left, a hedge lost, a deadline, a bad request."""
        if sent.open:
            self.advance(now)
            self._close(sent, now)

    def advance(self, now: float) -> None:
        """Take off unary prompts that the node has read by now, going by its own pace. Costs nothing otherwise."""
        while self.head_paced and now - self.head_from_s >= self.s_per_token * self.head_tokens:
            head = next(iter(self._fifo))
            end_s = self.head_from_s + self.s_per_token * self.head_tokens
            if not self._loose_tokens:
                self._loose_from_s = self.head_from_s
            self._loose_tokens += head.tokens
            self._worked_s = max(self._worked_s, end_s)
            self._take_off(head, end_s)

    # -- what others say

    def expect(self, s_per_token: float | None, tpot: tuple[float, float] | None = None) -> None:
        """What to believe of its speed while it has fewer than MIN_SAMPLES of its own: the fleet's medians.

        `tpot`: seconds per output token, and more of them per token of context; None: nobody knows. What differs by
        less than EXPECT_RATIO from what is believed already is passed over.
        """
        if s_per_token is not None and self.is_new and _differ(s_per_token, self.s_per_token):
            self.s_per_token = max(LEAST_S_PER_TOKEN, s_per_token)
            self.kept = None
        if self.tpot_is_new and tpot is not None and _differ(tpot[0], self.tpot_base_s):
            self.tpot_base_s, self.tpot_slope_s = tpot
            self.kept = None

    def reported(self, report: NodeReport, at_s: float, now: float) -> bool:
        """Take over an agent's figures, true at `at_s`. True when the engine restarted: what it held is gone.

        The engine's own counters teach the pace where our first tokens cannot: others send there too, or all we
        send is unary. What others have there is what the engine has, less what we had there at the time.
        """
        if self.reported_at_s is not None and at_s < self.reported_at_s:
            return False
        self.reported_at_s = at_s
        restarted = self._boot_id is not None and report.engine_boot_id not in (None, self._boot_id)
        self._boot_id = report.engine_boot_id or self._boot_id
        if report.slots is not None and report.slots > 0:
            self.slots = report.slots
        if report.kv_capacity_tokens is not None and report.kv_capacity_tokens > 0:
            self.kv_tokens = report.kv_capacity_tokens
        if report.kv_block_tokens is not None and report.kv_block_tokens > 0:
            self.kv_block_tokens = report.kv_block_tokens
        self._learn_counters(report, at_s, now)
        if at_s - self._shared_at_s > SHARED_FRESH_S:
            self._infer_others(report, at_s)
        if self._own is None:
            self._own = deque([(now, self.n, self.context_tokens)], maxlen=OWN_KEPT)
        self._count(0, 0, now)
        return restarted

    def assumed(self, others: Outstanding, now: float) -> None:
        """Nobody said lately what others have at this node: it is taken to be like the rest of the fleet.

        Else a node whose agent is silent would look idle beside those that tell.
        """
        self._set_others(others, now)
        self.others_assumed = self.others is not None

    def others_age_s(self, now: float) -> float:
        """Since when nobody said what others have there (seconds; inf: never)."""
        return math.inf if self.others_assumed else now - self.others_at_s

    def recovered(self) -> None:
        """Its failures say nothing of what it is now."""
        self.failure = 0.0
        self.kept = None

    def shared(self, others: Outstanding, at_s: float) -> None:
        """What the other balancers together have at the node, true at `at_s`; goes before a report's difference."""
        if at_s >= self._shared_at_s:
            self._shared_at_s = at_s
            self._others_read = others.read
            self._set_others(others, at_s)

    # -- inside

    def _count(self, requests: int, context: int, now: float) -> None:
        self.kept = None
        self.n += requests
        self.context_tokens += context
        over = self.n - self.slots + 1.0
        self.over_slots = over / self.slots if over > 0.0 else 0.0
        own = self._own
        if own is not None and now - own[-1][0] >= OWN_EVERY_S:
            own.append((now, self.n, self.context_tokens))

    def _close(self, sent: Sent, now: float) -> None:
        sent.open = False
        if sent.queued:
            if next(iter(self._fifo)) is sent:
                self._worked_s = max(self._worked_s, now)  # the time so far was spent on it
            self._take_off(sent, now)
        self._count(-1, -sent.context, now)

    def _take_off(self, sent: Sent, read_s: float) -> None:
        """Its prompt is read, or given up."""
        self.kept = None
        sent.queued = False
        sent.read_s = read_s
        sent.context_before = self.context_tokens
        del self._fifo[sent]
        self.queued_tokens -= sent.tokens
        if sent.generates and not sent.streams:
            self._unary_queued -= 1
        self._next_head()

    def _take_off_unary_before(self, sent: Sent, now: float) -> None:
        """Engines read prompts in the order they came: what is unary and came earlier is read as well."""
        if not self._unary_queued:
            return
        for earlier in list(self._fifo):
            if earlier is sent:
                return
            if earlier.generates and not earlier.streams:
                if not self._loose_tokens:
                    self._loose_from_s = max(earlier.sent_s, self._worked_s)
                self._loose_tokens += earlier.tokens
                self._take_off(earlier, now)

    def _next_head(self) -> None:
        for head in self._fifo:
            self.head_tokens = head.tokens
            self.head_from_s = max(head.sent_s, self._worked_s)
            self.head_paced = head.generates and not head.streams
            return
        self.head_tokens = 0
        self.head_paced = False

    def _read(self, sent: Sent, now: float, correction: float) -> None:
        """Its first token came, or the whole answer of what does not generate: the node read it and all before."""
        own_tokens = self.queued_tokens
        self._take_off_unary_before(sent, now)
        tokens = sent.tokens * correction + self._loose_tokens
        from_s = self._loose_from_s if self._loose_tokens else max(sent.sent_s, self._worked_s)
        seconds = max(0.0, now - from_s)
        self.read_tokens += tokens
        theirs = 0.0  # read in the same time
        if now - self._shared_at_s <= SHARED_FRESH_S:
            theirs = max(0.0, self._others_read - self._others_read_before)
        elif self.others is not None:  # only a report tells of them: theirs are taken to be mixed with ours
            seconds *= own_tokens / (own_tokens + self.others_now(now).tokens)
        self._others_read_before = self._others_read
        self._own_since_report += 1
        self._learn_pace(tokens + theirs, seconds, now)
        sent.pace_total = self._pace_total
        self._loose_tokens = 0
        self._worked_s = max(self._worked_s, now)
        self._take_off(sent, now)

    def _learn_pace(self, tokens: float, seconds: float, now: float) -> None:
        keep = math.exp(_PACE_FADE * tokens)
        self._pace_seconds = self._pace_seconds * keep + seconds
        self._pace_tokens = self._pace_tokens * keep + tokens
        self._pace_total += tokens
        self.pace_samples += 1
        self.pace_at_s = now
        if self.pace_samples >= MIN_SAMPLES:
            self.is_new = False
            self.s_per_token = max(LEAST_S_PER_TOKEN, self._pace_seconds / self._pace_tokens)

    def _correct_pace(self, sent: Sent, uncached_tokens: int) -> None:
        """A first token taught the pace by a guess of what the node held; the engine's own count takes its place.

        Without it a prompt that was believed to be held, and was not, makes the node look a thousand times slower.
        """
        if not sent.streams or sent.queued:
            return
        left = math.exp(_PACE_FADE * (self._pace_total - sent.pace_total))  # of its weight in the sum
        self._pace_tokens = max(1.0, self._pace_tokens + left * (uncached_tokens - sent.tokens))
        if not self.is_new:
            self.s_per_token = max(LEAST_S_PER_TOKEN, self._pace_seconds / self._pace_tokens)

    def _learn_decode(self, sent: Sent, output_tokens: int, now: float) -> None:
        if sent.streams:
            if sent.read_s is None:
                return
            tokens, seconds = output_tokens - 1, now - sent.read_s
        else:
            whole_s = now - sent.sent_s
            prefill_s = sent.expected_s if sent.read_s is None else sent.read_s - sent.sent_s
            tokens, seconds = output_tokens, max(whole_s - prefill_s, LEAST_DECODE_SHARE * whole_s)
        if tokens >= 1 and seconds > 0.0:
            context = 0.5 * (sent.context_before + self.context_tokens)
            if self.others is not None:
                context += self.others_now(now).context
            self._learn_tpot(tokens, seconds / tokens, context)
            self.tpot_at_s = now

    def _learn_tpot(self, tokens: int, tpot_s: float, context: float) -> None:
        weight = min(TPOT_MOST_TOKENS, tokens)
        keep = math.exp(_TPOT_FADE * weight)
        self._tpot_w = w = self._tpot_w * keep + weight
        self._tpot_wx = wx = self._tpot_wx * keep + weight * context
        self._tpot_wy = wy = self._tpot_wy * keep + weight * tpot_s
        self._tpot_wxx = self._tpot_wxx * keep + weight * context * context
        self._tpot_wxy = self._tpot_wxy * keep + weight * context * tpot_s
        self._tpot_count += 1
        if self._tpot_count < MIN_SAMPLES:
            return
        self.tpot_is_new = False
        mean_x, mean_y = wx / w, wy / w
        ratio = mean_y / mean_x if mean_x > 0.0 else 0.0
        spread = self._tpot_wxx / w - mean_x * mean_x
        seen = (self._tpot_wxy / w - mean_x * mean_y) / spread if spread > 1e-6 * mean_x * mean_x else 0.0
        self.tpot_slope_s = min(max(seen, TPOT_LEAST_SLOPE * ratio), TPOT_MOST_SLOPE * ratio)
        self.tpot_base_s = max(0.0, mean_y - self.tpot_slope_s * mean_x)

    def _learn_counters(self, report: NodeReport, at_s: float, now: float) -> None:
        before = self._counters
        seconds, tokens = report.prefill_seconds_total, report.uncached_prompt_tokens_total
        self._counters = None if seconds is None or tokens is None else (at_s, seconds, tokens)
        if before is not None and self._counters is not None:
            ours_tell = self._own_since_report > 0 and self.others is None
            wall_s, read_s, read = (new - old for new, old in zip(self._counters, before, strict=True))
            if not ours_tell and wall_s > 0.0 and read_s > 0.0 and read > 0.0:
                # Engines add up each request's own time, and prompts share steps: never more than passed.
                self.advance(now)
                self._learn_pace(read, min(read_s, wall_s), at_s)
        self._own_since_report = 0

    def _infer_others(self, report: NodeReport, at_s: float) -> None:
        if report.running is None:
            return
        own_n, own_context = self._own_at(at_s)
        waiting = report.queue_depth or 0.0
        reported = report.running + waiting
        requests = max(0.0, reported - own_n)
        if requests < 1.0:
            self._set_others(_NOBODY, at_s)
            return
        context = report.context_tokens
        if context is None and report.kv_usage_ratio is not None and math.isfinite(self.kv_tokens):
            context = report.kv_usage_ratio * self.kv_tokens
        self._set_others(
            Outstanding(
                tokens=requests * waiting / reported * self._uncached_mean,  # theirs are taken to be like ours
                context=max(0.0, (context or 0.0) - own_context),
                requests=requests,
            ),
            at_s,
        )

    def _own_at(self, at_s: float) -> tuple[int, int]:
        for then_s, n, context in reversed(self._own or ()):
            if then_s <= at_s:
                return n, context
        return self.n, self.context_tokens

    def _set_others(self, others: Outstanding, at_s: float) -> None:
        nobody = others.tokens <= 0.0 and others.context <= 0.0 and others.requests <= 0.0
        self.others = None if nobody else others
        self.others_at_s = at_s
        self.others_assumed = False
        self.kept = None


def _differ(one: float, other: float) -> bool:
    return abs(one - other) > EXPECT_RATIO * other


_NOBODY = Outstanding()
