"""What a node is doing for us right now, and how fast it answered lately."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Mean lifetime of a TTFT reading: long enough to outlive one slow prompt, short enough to see a GPU throttle.
TTFT_DECAY_S = 10.0
# Weight of one new reading of the pace, and readings before it is believed.
PACE_WEIGHT = 0.1
PACE_SAMPLES = 3
# Weight of one new inter-token gap: about the last 50 tokens count.
ITL_WEIGHT = 0.02
# A failure's price fades with this time constant (routing notes: a black hole keeps to about 1 % of attempts).
FAILURE_DECAY_S = 15.0
# Weight of one new outcome in the failure average.
FAILURE_WEIGHT = 0.3


# Requests counted and not there at every look for so long are leaks; one on its way is counted for milliseconds.
LEAK_S = 30.0


@dataclass(slots=True)
class Leak:
    """Requests in flight that nobody makes: how many were always too many of late."""

    least: int = 0
    since_s: float = 0.0

    def look(self, excess: int, now: float) -> int:
        """Take one look at how many are counted too many; how many of them are to be taken off."""
        if excess <= 0:
            self.least = 0
            return 0
        if self.least == 0:
            self.least, self.since_s = excess, now
        self.least = min(self.least, excess)
        if now - self.since_s < LEAK_S:
            return 0
        leaked, self.least = self.least, 0
        return leaked


@dataclass(slots=True)
class Load:
    """Own accounting for one node: requests in flight, latency, recent failures."""

    rif: int = 0
    picks_since_report: int = 0
    ttft_s: float = 0.0  # peak-EWMA: jumps up at once, decays over TTFT_DECAY_S
    ttft_at_s: float = 0.0
    itl_s: float = 0.0
    s_per_token: float = 0.0  # EWMA of TTFT per prompt token, queueing included: never too fast for a long prompt
    pace_samples: int = 0
    failure: float = 0.0  # 0..1, EWMA of outcomes; read through `failure_now`
    failure_at_s: float = 0.0

    def begin(self) -> None:
        """One more request is at the node; part of the pick itself, with no await between."""
        self.rif += 1
        self.picks_since_report += 1

    def end(self) -> None:
        """One request less."""
        self.rif -= 1

    @property
    def known_pace(self) -> bool:
        """Whether `s_per_token` rests on enough first tokens."""
        return self.pace_samples >= PACE_SAMPLES

    def first_token(self, ttft_s: float, now: float, prompt_tokens: float = 0.0) -> None:
        """A first token came `ttft_s` seconds after its request was sent."""
        if prompt_tokens > 0.0:
            pace = ttft_s / prompt_tokens
            self.s_per_token += (pace - self.s_per_token) * (PACE_WEIGHT if self.pace_samples else 1.0)
            self.pace_samples += 1
        faded = self.ttft_s * math.exp(-(now - self.ttft_at_s) / TTFT_DECAY_S)
        self.ttft_s = ttft_s if ttft_s > faded else faded + 0.1 * (ttft_s - faded)
        self.ttft_at_s = now

    def tokens(self, count: int, duration_s: float) -> None:
        """`count` tokens followed the first one within `duration_s` seconds."""
        if count > 0:
            gap_s = duration_s / count
            weight = 1.0 - (1.0 - ITL_WEIGHT) ** count
            self.itl_s = gap_s if self.itl_s == 0.0 else self.itl_s + weight * (gap_s - self.itl_s)

    def succeeded(self, now: float) -> None:
        """An attempt went well; what is left of the failure average fades faster."""
        if self.failure > 0.0:
            self.failure = self.failure_now(now) * (1.0 - FAILURE_WEIGHT)
            self.failure_at_s = now
            if self.failure < 1e-3:
                self.failure = 0.0

    def failed(self, now: float) -> None:
        """An attempt failed by the node's fault."""
        faded = self.failure_now(now)
        self.failure = faded + FAILURE_WEIGHT * (1.0 - faded)
        self.failure_at_s = now

    def forgive(self) -> None:
        """One recent failure was not the node's: undo what it did to the average, as if it had been the last."""
        self.failure = max(0.0, (self.failure - FAILURE_WEIGHT) / (1.0 - FAILURE_WEIGHT))

    def failure_now(self, now: float) -> float:
        """The failure average, faded to `now` (0..1)."""
        if self.failure == 0.0:
            return 0.0
        return self.failure * math.exp(-(now - self.failure_at_s) / FAILURE_DECAY_S)
