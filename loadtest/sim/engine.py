"""A simulated inference engine: continuous batching, chunked prefill, prefix caching, preemption.

It works in stages. A stage is one step that computes prompt tokens (beside everybody's decoding), or a run of decode
steps in which nothing changes: its length has a closed form, so a thousand tokens cost as much as one. Who drives it
calls `end_stage` at `stage_end_s`; whatever comes in between cuts a run at the next step's end.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from loadtest.sim.arrival import Arrival
from loadtest.sim.kv_pool import KvPool
from loadtest.sim.profiles import EngineProfile
from loadtest.sim.sequence import Sequence

NEVER_S = math.inf


class Engine:
    """Sequences in, first tokens and ends out. `slow` multiplies all times from the next stage on."""

    def __init__(self, profile: EngineProfile) -> None:
        self.profile = profile
        self.slow = 1.0
        self.halted = False
        self.pool = KvPool(profile.kv_tokens, profile.block_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}  # in the order of their admission
        self.prefilling: dict[Sequence, None] = {}
        self.decoding: dict[Sequence, int] = {}  # -> the step at which its decoding began
        self.context_tokens = 0  # of all that decode
        self.steps = 0  # decode steps so far: everybody who decodes got one token from each
        self._ends: list[tuple[int, int, Sequence]] = []
        self._order = 0
        self.stage_start_s = 0.0
        self.stage_end_s = NEVER_S
        self._stage_steps = 0
        self._stage_decoding = 0
        self._chunks: list[tuple[Sequence, int]] | None = None
        self.busy_s = 0.0
        self.preemptions = 0
        self.prompt_tokens = 0
        self.hit_tokens = 0
        self.generated_tokens = 0
        self.prefill_busy_s = 0.0
        self.computed_tokens = 0

    def __repr__(self) -> str:
        return f"<Engine {self.profile.name} running={len(self.running)} waiting={len(self.waiting)} {self.pool}>"

    def accepts(self, arrival: Arrival) -> bool:
        """Whether the request fits into the KV cache at all."""
        return arrival.prompt_tokens + arrival.output_tokens <= self.pool.capacity

    def submit(self, sequence: Sequence, now: float) -> None:
        """Queue a sequence; it is looked at when the step under way ends."""
        self.waiting.append(sequence)
        self._wake(now)

    def cancel(self, sequence: Sequence, now: float) -> None:
        """Take a sequence out, waiting or running."""
        if sequence.running:
            self._settle(sequence, now)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._wake(now)

    def halt(self) -> None:
        """Nothing moves any more (a hang); `resume` goes on."""
        self.halted = True
        self.stage_end_s = NEVER_S

    def resume(self, now: float) -> None:
        """Go on after a halt: the step that was interrupted is done anew."""
        self.halted = False
        self._plan(now)

    def crash(self) -> list[Sequence]:
        """Lose everything and halt; return who was there."""
        lost = [*self.running, *self.waiting]
        for sequence in lost:
            sequence.running = False
        self.waiting.clear()
        self.running.clear()
        self.prefilling.clear()
        self.decoding.clear()
        self._ends.clear()
        self._chunks = None
        self.context_tokens = 0
        self.pool.clear()
        self.halt()
        return lost

    def end_stage(self) -> tuple[list[Sequence], list[Sequence]]:
        """The stage is over: who got a first token from it, who is done. The next one is planned."""
        now = self.stage_end_s
        self.busy_s += now - self.stage_start_s
        n = len(self.decoding)
        if n and self._stage_steps:
            grown = n * self._stage_steps
            self.steps += self._stage_steps
            self.context_tokens += grown
            self.generated_tokens += grown
            self.pool.take(grown)
        firsts = self._end_prefill(now) if self._chunks else []
        ends = self._ends
        done: list[Sequence] = []
        while ends and ends[0][0] <= self.steps:
            step, _, sequence = heapq.heappop(ends)
            if sequence in self.decoding and sequence.done_at_step == step:
                self._settle(sequence, now)
                self._release(sequence)
                done.append(sequence)
        self._plan(now)
        return firsts, done

    def _end_prefill(self, now: float) -> list[Sequence]:
        firsts: list[Sequence] = []
        assert self._chunks is not None
        block_tokens = self.pool.block_tokens
        self.prefill_busy_s += now - self.stage_start_s
        for sequence, chunk in self._chunks:
            if sequence not in self.prefilling:  # cancelled meanwhile
                continue
            sequence.computed += chunk
            self.computed_tokens += chunk
            blocks, held = sequence.arrival.blocks, sequence.held
            while len(held) < len(blocks) and (len(held) + 1) * block_tokens <= sequence.computed:
                block = blocks[len(held)]
                self.pool.publish(block)
                held.append(block)
                sequence.private -= block_tokens
            if sequence.computed < sequence.target:
                continue
            del self.prefilling[sequence]
            if not sequence.produced:
                firsts.append(sequence)
            sequence.produced += 1
            sequence.private += 1
            self.pool.take(1)
            self.generated_tokens += 1
            self.decoding[sequence] = self.steps
            self.context_tokens += sequence.prompt_tokens + sequence.produced
            sequence.done_at_step = self.steps + sequence.output_tokens - sequence.produced
            self._order += 1
            heapq.heappush(self._ends, (sequence.done_at_step, self._order, sequence))
        self._chunks = None
        return firsts

    def _settle(self, sequence: Sequence, now: float) -> None:
        """Bring the figures of a decoding sequence up to date."""
        since = self.decoding.get(sequence)
        if since is not None:
            grown = self.steps - since
            sequence.produced += grown
            sequence.private += grown
            self.decoding[sequence] = self.steps

    def _release(self, sequence: Sequence) -> None:
        del self.running[sequence]
        sequence.running = False
        self.prefilling.pop(sequence, None)
        if self.decoding.pop(sequence, None) is not None:
            self.context_tokens -= sequence.prompt_tokens + sequence.produced
        self.pool.give(sequence.private)
        self.pool.leave(sequence.held)
        sequence.private = 0
        sequence.held = []

    def _wake(self, now: float) -> None:
        """Something changed: plan if idle, else cut a run of decode steps at the end of the step under way."""
        if self.halted:
            return
        if self.stage_end_s == NEVER_S:
            self._plan(now)
        elif self._stage_steps > 1 and self._chunks is None:
            steps = self._steps_until(now)
            if steps < self._stage_steps:
                self._stage_steps = steps
                self.stage_end_s = self.stage_start_s + self._run_s(steps)

    def _run_s(self, steps: int) -> float:
        n = self._stage_decoding
        profile = self.profile
        step = profile.decode_s + profile.decode_sequence_s * n + profile.decode_context_s * self.context_tokens
        return self.slow * (steps * step + profile.decode_context_s * n * steps * (steps - 1) / 2)

    def _steps_until(self, now: float) -> int:
        """How many steps of the run have ended when the one under way at `now` has."""
        passed = now - self.stage_start_s
        low, high = 1, self._stage_steps
        guess = int(passed * high / max(self._run_s(high), 1e-12))  # nearly linear: the answer is close
        low = max(1, min(guess, high))
        while low > 1 and self._run_s(low - 1) >= passed:
            low -= 1
        while low < high and self._run_s(low) < passed:
            low += 1
        return low

    def _plan(self, now: float) -> None:
        """Admit, preempt where the cache is full, and lay out the next stage from `now` on."""
        self.stage_start_s = now
        self._chunks = None
        while len(self.decoding) > self.pool.free and len(self.running) > 1:
            self._preempt(next(reversed(self.running)), now)
        n = len(self.decoding)
        budget = self.profile.step_tokens - n
        chunks: list[tuple[Sequence, int]] = []
        pairs = 0.0
        for sequence in self.prefilling:
            if budget <= 0:
                break
            chunk = min(budget, sequence.target - sequence.computed)
            chunks.append((sequence, chunk))
            pairs += chunk * (sequence.computed + chunk / 2)
            budget -= chunk
        while budget > 0 and self.waiting and len(self.running) < self.profile.max_sequences:
            sequence = self.waiting[0]
            if not self._admit(sequence, n):
                break
            self.waiting.popleft()
            chunk = min(budget, sequence.target - sequence.computed)
            chunks.append((sequence, chunk))
            pairs += chunk * (sequence.computed + chunk / 2)
            budget -= chunk
        self._stage_decoding = n
        if chunks:
            self._chunks = chunks
            self._stage_steps = 1 if n else 0
            tokens = sum(chunk for _, chunk in chunks)
            step_s = self.profile.step_s(tokens, pairs, n, self.context_tokens)
            self.stage_end_s = now + self.slow * step_s
        elif n:
            ends = self._ends
            while ends[0][2] not in self.decoding or ends[0][2].done_at_step != ends[0][0]:
                heapq.heappop(ends)
            self._stage_steps = max(1, min(ends[0][0] - self.steps, self.pool.free // n))
            self.stage_end_s = now + self._run_s(self._stage_steps)
        else:
            self._stage_steps = 0
            self.stage_end_s = NEVER_S

    def _admit(self, sequence: Sequence, reserve: int) -> bool:
        pool = self.pool
        target = sequence.prompt_tokens + sequence.produced
        blocks = sequence.arrival.blocks
        hits = blocks[: min(pool.matching(blocks), (target - 1) // pool.block_tokens)]
        cached = len(hits) * pool.block_tokens
        if not pool.fits(hits, target - cached + reserve + 1) and self.running:
            return False
        pool.use(hits)
        pool.take(target - cached)
        sequence.held = list(hits)
        sequence.private = target - cached
        sequence.computed = cached
        sequence.target = target
        sequence.running = True
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = cached
            self.prompt_tokens += sequence.prompt_tokens
            self.hit_tokens += cached
        self.running[sequence] = None
        self.prefilling[sequence] = None
        return True

    def _preempt(self, sequence: Sequence, now: float) -> None:
        self._settle(sequence, now)
        self._release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1
