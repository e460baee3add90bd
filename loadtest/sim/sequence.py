"""One answer in the making, at one engine."""

from __future__ import annotations

from loadtest.sim.arrival import Arrival


class Sequence:
    """Its prompt, how much of it is computed, and the cache it holds. The engine is its only writer."""

    __slots__ = (
        "arrival",
        "cached_tokens",
        "computed",
        "done_at_step",
        "held",
        "key",
        "output_tokens",
        "private",
        "produced",
        "prompt_tokens",
        "running",
        "target",
    )

    def __init__(self, key: int, arrival: Arrival) -> None:
        self.key = key
        self.arrival = arrival
        self.prompt_tokens = arrival.prompt_tokens
        self.output_tokens = max(1, arrival.output_tokens)
        self.produced = 0  # up to date when decoding starts and when it is preempted
        self.computed = 0  # tokens in the cache
        self.target = 0  # tokens to compute before it decodes: the prompt, and after a preemption what it had produced
        self.held: list[int] = []  # shared blocks it uses
        self.private = 0  # tokens in blocks of its own, as of the last stage's end less what decoding added
        self.cached_tokens = -1  # found in the cache at its first start
        self.done_at_step = 0
        self.running = False

    def __repr__(self) -> str:
        return f"<Sequence {self.key} {self.computed}/{self.target} computed, {self.produced} produced>"

    def clone(self) -> Sequence:
        """An independent copy."""
        other = Sequence.__new__(Sequence)
        other.key = self.key
        other.arrival = self.arrival
        other.prompt_tokens = self.prompt_tokens
        other.output_tokens = self.output_tokens
        other.produced = self.produced
        other.computed = self.computed
        other.target = self.target
        other.held = self.held.copy()
        other.private = self.private
        other.cached_tokens = self.cached_tokens
        other.done_at_step = self.done_at_step
        other.running = self.running
        return other
