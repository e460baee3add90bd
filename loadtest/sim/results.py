"""What became of the requests, and the figures of a run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from loadtest.sim.engine import Engine


class End(IntEnum):
    """How a request ended; each does exactly once."""

    DONE = 0
    TIMEOUT = 1  # no first token within the deadline
    FAILED = 2  # no node gave it a first token
    BROKEN = 3  # its stream stopped in the middle
    REJECTED = 4  # too long for the engine it was sent to


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a good request is: a first token in time for its length, and then a steady pace (seconds)."""

    ttft_s: float = 2.0
    ttft_s_per_token: float = 0.001
    tpot_s: float = 0.150

    def met(self, prompt_tokens: int, ttft_s: float, tpot_s: float) -> bool:
        """Whether a finished request was good."""
        return ttft_s <= self.ttft_s + self.ttft_s_per_token * prompt_tokens and tpot_s <= self.tpot_s


@dataclass(slots=True)
class Tally:
    """Counts while a run goes on. A timeout counts as a first token at its deadline; errors have no times."""

    slo: Slo
    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    e2e_s: array[float] = field(default_factory=lambda: array("d"))
    tpot_s: array[float] = field(default_factory=lambda: array("d"))
    ends: list[int] = field(default_factory=lambda: [0] * len(End))
    good: int = 0
    first_s: float = math.inf
    last_s: float = 0.0

    def done(self, prompt_tokens: int, output_tokens: int, ttft_s: float, e2e_s: float) -> None:
        """A good end."""
        tpot_s = (e2e_s - ttft_s) / (output_tokens - 1) if output_tokens > 1 else 0.0
        self.ends[End.DONE] += 1
        self.ttft_s.append(ttft_s)
        self.e2e_s.append(e2e_s)
        if output_tokens > 1:
            self.tpot_s.append(tpot_s)
        self.good += self.slo.met(prompt_tokens, ttft_s, tpot_s)

    def lost(self, end: End, deadline_s: float) -> None:
        """Any other end."""
        self.ends[end] += 1
        if end is End.TIMEOUT:
            self.ttft_s.append(deadline_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. Seconds, ratios of all requests (0..1), requests per second."""

    policy: str
    requests: int
    ttft_s: tuple[float, float, float]  # P50, P95, P99
    e2e_s: tuple[float, float, float]
    tpot_s: tuple[float, float, float]
    timeout_ratio: float
    error_ratio: float
    slo_ratio: float
    goodput_per_s: float  # good requests a second of arrivals
    hit_ratio: float  # prompt tokens found in a prefix cache
    imbalance: float  # standard deviation over mean of the nodes' busy time
    preemptions: int
    ends: tuple[int, ...]


def percentile(values: Sequence[float], q: float) -> float:
    """The nearest-rank percentile of sorted values, `q` in 0..1; not a number when there are none."""
    if not values:
        return math.nan
    return values[max(0, math.ceil(q * len(values)) - 1)]


def three(values: Sequence[float]) -> tuple[float, float, float]:
    """P50, P95 and P99."""
    ordered = sorted(values)
    return percentile(ordered, 0.50), percentile(ordered, 0.95), percentile(ordered, 0.99)


def variation(values: Sequence[float]) -> float:
    """Standard deviation over mean."""
    mean = sum(values) / len(values)
    if mean == 0.0:
        return 0.0
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)) / mean


def mean(runs: Sequence[Figures]) -> Figures:
    """Several runs of one thing as one: each figure's mean, counts added up."""
    count = len(runs)

    def average(pick: Callable[[Figures], float]) -> float:
        return sum(pick(run) for run in runs) / count

    def averages(pick: Callable[[Figures], tuple[float, float, float]]) -> tuple[float, float, float]:
        first, second, third = (sum(values) / count for values in zip(*(pick(run) for run in runs), strict=True))
        return first, second, third

    return Figures(
        policy=runs[0].policy,
        requests=sum(run.requests for run in runs),
        ttft_s=averages(lambda run: run.ttft_s),
        e2e_s=averages(lambda run: run.e2e_s),
        tpot_s=averages(lambda run: run.tpot_s),
        timeout_ratio=average(lambda run: run.timeout_ratio),
        error_ratio=average(lambda run: run.error_ratio),
        slo_ratio=average(lambda run: run.slo_ratio),
        goodput_per_s=average(lambda run: run.goodput_per_s),
        hit_ratio=average(lambda run: run.hit_ratio),
        imbalance=average(lambda run: run.imbalance),
        preemptions=sum(run.preemptions for run in runs),
        ends=tuple(sum(counts) for counts in zip(*(run.ends for run in runs), strict=True)),
    )


def figures(policy: str, tally: Tally, engines: Sequence[Engine], length_s: float) -> Figures:
    """The figures of a run whose arrivals took `length_s`."""
    total = max(1, sum(tally.ends))
    prompts = sum(engine.prompt_tokens for engine in engines)
    errors = tally.ends[End.FAILED] + tally.ends[End.BROKEN] + tally.ends[End.REJECTED]
    return Figures(
        policy=policy,
        requests=sum(tally.ends),
        ttft_s=three(tally.ttft_s),
        e2e_s=three(tally.e2e_s),
        tpot_s=three(tally.tpot_s),
        timeout_ratio=tally.ends[End.TIMEOUT] / total,
        error_ratio=errors / total,
        slo_ratio=tally.good / total,
        goodput_per_s=tally.good / length_s,
        hit_ratio=sum(engine.hit_tokens for engine in engines) / max(1, prompts),
        imbalance=variation([engine.busy_s for engine in engines]),
        preemptions=sum(engine.preemptions for engine in engines),
        ends=tuple(tally.ends),
    )
