"""What a node's agent says of its engine every few seconds."""

from __future__ import annotations

from balancer.core.health import NodeReport
from loadtest.sim.engine import Engine

# NVML's share of GPU memory in use: engines reserve it at their start, so it never changes.
MEMORY_RATIO = 0.92


class Agent:
    """One node's reports. The latency is the mean of what was answered since the report before."""

    def __init__(self, at: int, engine: Engine) -> None:
        self.at = at
        self._engine = engine
        self._answered = 0
        self._answered_s = 0.0
        self._latency_s: float | None = None
        self._starts = 0

    def answered(self, e2e_s: float) -> None:
        """One request was done after so long."""
        self._answered += 1
        self._answered_s += e2e_s

    def restarted(self) -> None:
        """The engine began anew."""
        self._starts += 1

    def report(self) -> NodeReport:
        """The figures now; a new interval begins."""
        engine = self._engine
        if self._answered:
            self._latency_s = self._answered_s / self._answered
        self._answered, self._answered_s = 0, 0.0
        return NodeReport(
            id=f"n{self.at}",
            url=f"http://n{self.at}",
            engine="simulated",
            engine_boot_id=f"{self.at}-{self._starts}",
            queue_depth=float(len(engine.waiting)),
            running=float(len(engine.running)),
            slots=float(engine.profile.max_sequences),
            kv_usage_ratio=engine.pool.used / engine.pool.capacity,
            kv_capacity_tokens=float(engine.pool.capacity),
            kv_block_tokens=float(engine.pool.block_tokens),
            context_tokens=float(engine.context_tokens),
            avg_latency_seconds=self._latency_s,
            prefill_seconds_total=engine.prefill_busy_s,
            uncached_prompt_tokens_total=float(engine.computed_tokens),
            generation_tokens_total=float(engine.generated_tokens),
            gpu_memory_utilization=MEMORY_RATIO,
        )
