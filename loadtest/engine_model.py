"""A simulated inference engine: continuous batching, chunked prefill, prefix cache. Keeps no clock, waits for nothing.

`begin_step` says how long the next step takes, `end_step` who got a token from it; whoever drives it does the waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from loadtest.engine_stats import EngineStats, Gauges
from loadtest.kv_cache import BlockPool


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """How fast and how large the engine is. The defaults are a 7B model on one data-centre GPU, roughly."""

    ttft_s_per_token: float = 0.0002  # prefill, for each prompt token that is not in the prefix cache
    itl_s: float = 0.02  # one decode step with one sequence
    itl_growth: float = 0.02  # share by which each further sequence lengthens a decode step
    slots: int = 16  # sequences that run at once; the others wait
    kv_tokens: int = 200_000
    block_tokens: int = 16
    step_tokens: int = 512  # prompt tokens that one step computes at most
    instant: bool = False  # no time passes, nobody waits


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One answer in the making. Up to `max_tokens` are produced; 0 asks for the prompt's prefill only."""

    prompt_tokens: int
    max_tokens: int
    keys: tuple[int, ...] = ()  # of the prompt's whole blocks
    slow: float = 1.0  # a step with this sequence takes so many times longer
    produced: int = 0
    cached_tokens: int = 0
    done: bool = False
    arrived_s: float = 0.0
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    to_prefill: int = field(default=0, repr=False)
    held_keys: list[int] = field(default_factory=list, repr=False)
    private_blocks: int = field(default=0, repr=False)
    chunk: int = field(default=0, repr=False)  # what the step under way computes of its prompt


class EngineModel:
    """Sequences in, tokens out. `speed` divides all times and may change at any moment."""

    def __init__(self, spec: EngineSpec, *, speed: float = 1.0) -> None:
        self.spec = spec
        self.speed = speed
        self.stats = EngineStats()
        self.pool = BlockPool(max(1, spec.kv_tokens // spec.block_tokens), strict=not spec.instant)
        self.running: dict[Sequence, None] = {}  # in the order of their start
        self.waiting: deque[Sequence] = deque()
        self.busy_s = 0.0  # seconds of work begun since the start

    def __repr__(self) -> str:
        return f"<EngineModel running={len(self.running)} waiting={len(self.waiting)} kv={self.pool.usage_ratio:.2f}>"

    def gauges(self) -> Gauges:
        """What a scrape shows now."""
        spec = self.spec
        return Gauges(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_usage_ratio=self.pool.usage_ratio,
            block_tokens=spec.block_tokens,
            blocks=self.pool.capacity,
        )

    def submit(self, sequence: Sequence, now: float) -> None:
        """Queue a sequence; an instant engine starts it at once."""
        sequence.arrived_s = sequence.last_token_s = now
        self.waiting.append(sequence)
        if self.spec.instant:
            self._admit(now)
            self._prefilled(sequence)

    def leave(self, sequence: Sequence, reason: str, now: float, keys: Seq[int] = ()) -> None:
        """Take a sequence out, finished or not; `keys` are the whole blocks of prompt and answer, to be remembered."""
        if sequence.started_s is None and sequence in self.waiting:
            self.waiting.remove(sequence)
        self._free(sequence)
        self.pool.remember(keys)
        self.stats.finished[reason] += 1
        self.stats.e2e_s.observe(now - sequence.arrived_s)
        if sequence.first_token_s is not None and sequence.produced > 1:
            self.stats.decode_s.observe(sequence.last_token_s - sequence.first_token_s)

    def begin_step(self, now: float) -> float | None:
        """Admit, share out the step's prompt tokens; return how many seconds the step takes, None when idle."""
        self._admit(now)
        if not self.running:
            return None
        budget = self.spec.step_tokens
        decoding = 0
        for sequence in self.running:
            sequence.chunk = min(budget, sequence.to_prefill)
            budget -= sequence.chunk
            decoding += not sequence.to_prefill
        prefill_s = (self.spec.step_tokens - budget) * self.spec.ttft_s_per_token
        decode_s = self.spec.itl_s * (1 + self.spec.itl_growth * (decoding - 1)) if decoding else 0.0
        duration_s = (prefill_s + decode_s) * max(sequence.slow for sequence in self.running) / self.speed
        self.busy_s += duration_s
        return duration_s

    def end_step(self, now: float) -> list[Sequence]:
        """Finish the step: return the sequences that got a token or are done."""
        progressed = []
        for sequence in list(self.running):
            if sequence.started_s is None:  # preempted within this loop
                continue
            prefilling = sequence.to_prefill > 0
            sequence.to_prefill -= sequence.chunk
            if sequence.to_prefill > 0 or (prefilling and not sequence.chunk):
                continue
            if prefilling:
                self._prefilled(sequence)
            if sequence.max_tokens and not self._make_room(sequence):
                continue
            self.produce(sequence, now)
            progressed.append(sequence)
        return progressed

    def produce(self, sequence: Sequence, now: float) -> None:
        """Count one token of a sequence, or the end of a prefill that was all it wanted."""
        if sequence.max_tokens:
            sequence.produced += 1
            self.stats.generation_tokens += 1
            if sequence.first_token_s is None:
                sequence.first_token_s = now
                self.stats.ttft_s.observe(now - sequence.arrived_s)
                self.stats.prefill_s.observe(now - (sequence.started_s or now))
            else:
                self.stats.itl_s.observe(now - sequence.last_token_s)
        sequence.last_token_s = now
        sequence.done = sequence.produced >= sequence.max_tokens
        if sequence.done and not self.spec.instant:
            self._free(sequence)

    def _admit(self, now: float) -> None:
        while self.waiting and (self.spec.instant or len(self.running) < self.spec.slots):
            if not self._start(self.waiting[0], now):
                return
            self.running[self.waiting.popleft()] = None

    def _start(self, sequence: Sequence, now: float) -> bool:
        """Give a sequence its blocks, sharing what the prefix cache holds; False when they are not there."""
        block = self.spec.block_tokens
        tokens = sequence.prompt_tokens + sequence.produced
        hits = min(self.pool.matching(sequence.keys), max(0, tokens - 1) // block)
        fresh = -(-tokens // block) - hits
        shared = sequence.keys[:hits]
        if not self.pool.can_hold(shared, fresh):
            return False
        self.pool.hold(shared)
        self.pool.take(fresh)
        sequence.held_keys, sequence.private_blocks = list(shared), fresh
        sequence.to_prefill = tokens - hits * block
        if not sequence.produced:
            self._count_prompt(sequence, hits * block, now)
        sequence.started_s = now
        return True

    def _count_prompt(self, sequence: Sequence, cached_tokens: int, now: float) -> None:
        sequence.cached_tokens = cached_tokens
        self.stats.prompt_tokens += sequence.prompt_tokens
        self.stats.prefix_queries += sequence.prompt_tokens
        self.stats.prefix_hits += cached_tokens
        self.stats.cached_prompt_tokens += cached_tokens
        self.stats.queue_s.observe(now - sequence.arrived_s)

    def _prefilled(self, sequence: Sequence) -> None:
        """The whole prompt is computed: from now on others may share its blocks."""
        sequence.to_prefill = 0
        fresh = sequence.keys[len(sequence.held_keys) :]
        self.pool.publish(fresh)
        sequence.held_keys += fresh
        sequence.private_blocks -= len(fresh)

    def _make_room(self, sequence: Sequence) -> bool:
        """See to it that the next token has a block, at the expense of whoever came last; False if that was itself."""
        tokens = sequence.prompt_tokens + sequence.produced + 1
        while tokens > (len(sequence.held_keys) + sequence.private_blocks) * self.spec.block_tokens:
            if self.pool.take(1):
                sequence.private_blocks += 1
                continue
            victim = next(reversed(self.running))
            self._free(victim)
            victim.started_s = None
            self.waiting.appendleft(victim)
            self.stats.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _free(self, sequence: Sequence) -> None:
        if sequence in self.running:
            del self.running[sequence]
            self.pool.give_back(sequence.held_keys, sequence.private_blocks)
            sequence.held_keys, sequence.private_blocks = [], 0
