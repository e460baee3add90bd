"""How many requests a node can take at once, by what it reports and by how it behaves.

What an engine cannot take it queues, and a request in an engine's queue can go nowhere else. So each node gets no
more than it takes, and the rest waits here. Unlimited until there is evidence, and evidence is of three kinds:

- reported: sequence slots, and a queue beside full slots or a full KV cache
- a standing queue: for a while no first token came soon, not even the quickest
- back-pressure: it said 408, 425, 429 or 503
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from balancer.core.health import NodeReport

# Beyond its slots a node is sent an eighth more, and two at least: work lies ready when a sequence ends, for longer
# than our next request takes to arrive.
AHEAD_RATIO = 0.125
LEAST_AHEAD = 2.0
# vLLM preempts near the end of its KV cache; with less of it free a queue means that there is no room.
KV_FULL_RATIO = 0.95
SLOTS_FULL_RATIO = 0.95
# Several balancers see the same queue in one engine: none of them cuts itself below half of what runs there.
REPORT_FLOOR_RATIO = 0.5

# A first token is on time within this and 1 ms for each prompt token (the SLO that the simulator judges by) ...
ON_TIME_S = 1.0
PREFILL_S_PER_TOKEN = 0.001
# ... or within this multiple of the least that is usual for the node, where that is more: slow is not full.
USUAL_RATIO = 2.0
# The least of a window has nothing to do with chance from this many first tokens on, sent since the last cut.
WINDOW_S = 1.0
WINDOW_TOKENS = 8
# What is usual drifts up by 1 % a window, and falls at once.
USUAL_DRIFT = 1.01

# Multiplicative decrease, from what is in flight; additive and multiplicative increase, once a second (AIMD).
CUT_RATIO = 0.9
GROW_RATIO = 1.1
GROW_STEP = 1.0
GROW_S = 1.0
# No cut goes below: engines that push back may be small; those with late first tokens batch 16 without effort.
PUSHED_BACK_FLOOR = 4.0
LATE_FLOOR = 16.0
# Without trouble for this long, and used by half at most: the limit has no ground any more.
FORGET_S = 10.0


@dataclass(slots=True)
class Concurrency:
    """One node's limit of requests in flight; `math.inf` is none. Keeps no clock."""

    reported: float = math.inf
    observed: float = math.inf
    _late: bool = field(init=False, default=False)
    _least_s: float = field(init=False, default=math.inf)  # of the window: the time over what the prompt accounts for
    _tokens: int = field(init=False, default=0)
    _window_end_s: float = field(init=False, default=0.0)
    _usual_s: float = field(init=False, default=math.inf)
    _cut_s: float = field(init=False, default=-math.inf)
    _grown_s: float = field(init=False, default=-math.inf)

    @property
    def limit(self) -> float:
        """Requests that it may have in flight."""
        return min(self.reported, self.observed)

    def forget_report(self) -> None:
        """Its agent is silent: what it said holds no longer."""
        self.reported = math.inf

    def forget_trouble(self) -> None:
        """It recovered: how it behaved before says nothing of what it is now."""
        self.observed = math.inf
        self._late = False

    def report(self, report: NodeReport, in_flight: int) -> None:
        """What its agent says, while we have `in_flight` there."""
        slots, running, queued = report.slots, report.running, report.queue_depth
        top = math.inf if slots is None or slots < 1 else slots + _ahead(slots)
        if running is not None and queued is not None:
            ahead = _ahead(running)
            slots_taken = slots is not None and running >= SLOTS_FULL_RATIO * slots
            kv_taken = report.kv_usage_ratio is not None and report.kv_usage_ratio >= KV_FULL_RATIO
            if queued > ahead and running > 0 and (slots_taken or kv_taken):
                kept = in_flight * (1.0 - (queued - ahead) / (running + queued))
                floor = max(PUSHED_BACK_FLOOR, REPORT_FLOOR_RATIO * running)
                self.reported = max(floor, min(kept, self.reported))
            elif self.reported < math.inf:
                self.reported = self.reported * (1.0 + AHEAD_RATIO) + GROW_STEP
                if top == math.inf and in_flight < 0.5 * self.reported:
                    self.reported = math.inf
        self.reported = min(self.reported, top)

    def first_token(self, ttft_s: float, prompt_tokens: float, in_flight: int, now: float) -> bool:
        """The first token of a stream came, `ttft_s` after it was sent; whether that changed the limit."""
        if now - ttft_s < self._cut_s:
            return False  # sent before the last cut could have any effect
        over_s = max(0.0, ttft_s - PREFILL_S_PER_TOKEN * prompt_tokens)
        if self._tokens == 0:
            self._window_end_s = now + WINDOW_S
            self._least_s = over_s
        elif over_s < self._least_s:
            self._least_s = over_s
        self._tokens += 1
        if now < self._window_end_s or self._tokens < WINDOW_TOKENS:
            return False
        return self._close_window(in_flight, now)

    def _close_window(self, in_flight: int, now: float) -> bool:
        least_s = self._least_s
        self._tokens = 0
        self._late = least_s > max(ON_TIME_S, USUAL_RATIO * self._usual_s if self._usual_s < math.inf else 0.0)
        self._usual_s = least_s if least_s < self._usual_s else self._usual_s * USUAL_DRIFT
        if self._late:
            return self._cut(min(in_flight, self.observed), LATE_FLOOR, now)
        return False

    def pushed_back(self, in_flight: int, now: float) -> bool:
        """It said that it is full, with `in_flight` others there; whether that changed the limit."""
        return self._cut(in_flight, PUSHED_BACK_FLOOR, now)

    def succeeded(self, in_flight: int, now: float) -> bool:
        """A request ended well, with `in_flight` others there; whether that changed the limit."""
        if self.observed == math.inf or now - self._grown_s < GROW_S or now - self._cut_s < GROW_S:
            return False
        if in_flight < 0.5 * self.observed:
            if now - self._cut_s < FORGET_S:
                return False
            self.observed = math.inf
            self._late = False
        elif self._late or in_flight + 1 < CUT_RATIO * self.observed:
            return False  # a limit that nobody feels need not grow
        else:
            self.observed = self.observed * GROW_RATIO + GROW_STEP
        self._grown_s = now
        return True

    def _cut(self, taken: float, floor: float, now: float) -> bool:
        """Lower the limit below `taken`, the requests that were too many; so few as the floor never are."""
        if taken <= floor:
            return False
        cut = min(self.observed, max(floor, CUT_RATIO * taken))
        self._cut_s = now
        self._tokens = 0
        changed = cut != self.observed
        self.observed = cut
        return changed


def _ahead(slots: float) -> float:
    return max(LEAST_AHEAD, AHEAD_RATIO * slots)
