"""HostReport version 1, what the balancer hears of this host: the fields, exactly as they travel.

What is not known is None (`null`), never 0. Fields may be added; readers ignore those they do not know.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import orjson

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """One model of a node."""

    id: str
    loaded: bool | None = None
    max_context_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Median and 99th percentile in seconds, of what the engine observed in the last ~30 s."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One engine. Totals count since the engine's start; `age_s` is the age of the load figures."""

    id: str
    url: str
    engine: str | None = None
    engine_version: str | None = None
    engine_boot_id: str | None = None
    models: tuple[ModelReport, ...] | None = None
    queue_depth: int | None = None
    running: int | None = None
    slots: int | None = None
    kv_usage_ratio: float | None = None
    kv_capacity_tokens: int | None = None
    kv_block_tokens: int | None = None
    context_tokens: int | None = None
    waiting_prompt_tokens: int | None = None
    prefix_hit_ratio: float | None = None
    avg_latency_seconds: float | None = None
    ttft_seconds: Quantiles | None = None
    itl_seconds: Quantiles | None = None
    prefill_seconds_total: float | None = None
    uncached_prompt_tokens_total: int | None = None
    generation_tokens_total: int | None = None
    preemptions_total: int | None = None
    gpu_memory_utilization: float | None = None
    gpus: tuple[str, ...] = ()
    wedged: bool | None = None
    healthy: bool = True
    problems: tuple[str, ...] = ()
    age_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """One GPU. `xid_recent` holds the codes of the last hour, oldest first."""

    uuid: str | None = None
    index: int | None = None
    name: str | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    memory_used_by_others_bytes: int | None = None
    utilization_ratio: float | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    clock_sm_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    ecc_uncorrected_total: int | None = None
    remapped_rows_pending: bool | None = None
    xid_recent: tuple[int, ...] | None = None
    pcie_width: int | None = None
    problems: tuple[str, ...] = ()
    age_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """One look at a host. `seq` counts within `boot_id`, which is new at each start of the agent.

    `age_s` is the age of the oldest load figures in it, counted by the agent, so that clocks need not agree.
    """

    version: int = VERSION
    host: str
    boot_id: str
    seq: int
    age_s: float
    interval_s: float
    drain: bool = False
    simulated: bool = False
    nodes: tuple[NodeReport, ...] = ()
    gpus: tuple[GpuReport, ...] = field(default=())

    def aged(self, by_s: float) -> HostReport:
        """Return the same report as it is told `by_s` seconds later."""
        return replace(
            self,
            age_s=_plus(self.age_s, by_s) or 0.0,
            nodes=tuple(replace(node, age_s=_plus(node.age_s, by_s)) for node in self.nodes),
            gpus=tuple(replace(gpu, age_s=_plus(gpu.age_s, by_s)) for gpu in self.gpus),
        )

    def to_json(self) -> bytes:
        """Return the report as it travels."""
        return orjson.dumps(self)


def _plus(age_s: float | None, by_s: float) -> float | None:
    return None if age_s is None else round(age_s + max(0.0, by_s), 4)
