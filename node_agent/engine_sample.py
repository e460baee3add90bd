"""What one look at an engine tells, whatever its kind; every figure it does not tell is None, never 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from node_agent.exposition import Families, first, mean, peak, total, total_of
from node_agent.signals import GPU_MEMORY_TOTAL, GPU_MEMORY_USED, START_TIME, Signals
from node_agent.window import Histogram, read_histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model the engine offers. `loaded` False: it would have to be loaded first."""

    id: str
    loaded: bool | None = None
    max_context_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What changes rarely, and is asked for rarely."""

    version: str | None = None
    models: tuple[Model, ...] | None = None
    slots: int | None = None
    kv_capacity_tokens: int | None = None
    kv_block_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSample:
    """One reading of the engine's load. `progress` stands still only while the engine does."""

    queue_depth: int | None = None
    running: int | None = None
    slots: int | None = None
    kv_usage_ratio: float | None = None
    kv_capacity_tokens: int | None = None
    kv_block_tokens: int | None = None
    context_tokens: int | None = None
    waiting_prompt_tokens: int | None = None
    prefix_hit_ratio: float | None = None
    gpu_memory_ratio: float | None = None
    counters: Mapping[str, float] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    progress: float | None = None
    start_time: float | None = None


def from_metrics(signals: Signals, families: Families) -> EngineSample:
    """Read a metrics page by the names of its kind."""
    block_tokens = peak(families, signals.block_tokens)
    blocks = total(families, signals.blocks)
    info_tokens, info_capacity = _cache_info(signals, families)
    capacity = total(families, signals.capacity_tokens)
    if capacity is None and blocks is not None and block_tokens is not None:
        capacity = blocks * block_tokens
    return EngineSample(
        queue_depth=_whole(total_of(families, signals.queue)),
        running=_whole(total(families, signals.running)),
        slots=_whole(total(families, signals.slots)),
        kv_usage_ratio=peak(families, signals.kv_usage),
        kv_capacity_tokens=_whole(capacity) if capacity is not None else info_capacity,
        kv_block_tokens=_whole(block_tokens) if block_tokens is not None else info_tokens,
        context_tokens=_whole(total(families, signals.context_tokens)),
        prefix_hit_ratio=mean(families, signals.hit_ratio),
        gpu_memory_ratio=_ratio(total(families, (GPU_MEMORY_USED,)), total(families, (GPU_MEMORY_TOTAL,))),
        counters=_counters(signals, families),
        histograms=_histograms(signals, families),
        progress=total_of(families, signals.progress),
        start_time=peak(families, (START_TIME,)),
    )


def _counters(signals: Signals, families: Families) -> dict[str, float]:
    read = {name: total_of(families, groups) for name, groups in signals.counters.items()}
    latency_sum = total(families, signals.latency_sum)
    read["latency_seconds"] = None if latency_sum is None else latency_sum * signals.latency_unit_s
    read["latency_count"] = total(families, signals.latency_count)
    return {name: value for name, value in read.items() if value is not None}


def _histograms(signals: Signals, families: Families) -> dict[str, Histogram]:
    read = {
        "ttft": read_histogram(families, signals.ttft, signals.ttft_unit_s),
        "itl": read_histogram(families, signals.itl),
    }
    return {name: histogram for name, histogram in read.items() if histogram is not None}


def _cache_info(signals: Signals, families: Families) -> tuple[int | None, int | None]:
    """Tokens per block and capacity in tokens, from the labels of an info series; summed over ranks."""
    if signals.cache_info is None:
        return None, None
    name, tokens_label, blocks_label = signals.cache_info
    pairs = [
        (whole(one.labels.get(tokens_label)), whole(one.labels.get(blocks_label))) for one in first(families, (name,))
    ]
    tokens = next((tokens for tokens, _ in pairs if tokens), None)
    capacity = sum(tokens * blocks for tokens, blocks in pairs if tokens and blocks)
    return tokens, capacity or None


def with_llamacpp_slots(sample: EngineSample, answer: object) -> EngineSample:
    """Add what llama.cpp's /slots tells: how many slots are busy, what they hold, and that they move."""
    slots = list(_mappings(answer))
    if not slots:
        return sample
    busy = [slot for slot in slots if slot.get("is_processing")]
    held = [_first_whole(slot, "n_tokens", "n_prompt_tokens", "n_past") for slot in busy]
    sizes = [whole(slot.get("n_ctx")) for slot in slots]
    decoded = sum(whole(part.get("n_decoded")) or 0 for slot in busy for part in _mappings(slot.get("next_token")))
    prefilled = sum(whole(slot.get("n_prompt_tokens_processed")) or 0 for slot in busy)
    return replace(
        sample,
        slots=len(slots),
        running=len(busy) if sample.running is None else sample.running,
        kv_usage_ratio=len(busy) / len(slots) if sample.kv_usage_ratio is None else sample.kv_usage_ratio,
        # With several slots the context may be split or shared among them, and nothing says which.
        kv_capacity_tokens=sizes[0] if len(sizes) == 1 else None,
        context_tokens=None if None in held else sum(tokens for tokens in held if tokens),
        progress=(sample.progress or 0.0) + decoded + prefilled if sample.progress is not None or busy else None,
    )


def with_sglang_loads(sample: EngineSample, answer: object) -> EngineSample:
    """Add what SGLang's /v1/loads tells per data-parallel rank; the metrics page goes first where both speak."""
    ranks = list(_mappings(answer.get("loads") if isinstance(answer, dict) else answer))
    if not ranks:
        return sample

    def summed(*names: str) -> int | None:
        values = [_first_whole(rank, *names) for rank in ranks]
        return None if None in values else sum(value for value in values if value)

    usage = [rank["token_usage"] for rank in ranks if isinstance(rank.get("token_usage"), int | float)]
    return replace(
        sample,
        running=_prefer(sample.running, summed("num_running_reqs")),
        queue_depth=_prefer(sample.queue_depth, summed("num_waiting_reqs")),
        slots=_prefer(sample.slots, summed("max_running_requests")),
        kv_capacity_tokens=_prefer(sample.kv_capacity_tokens, summed("max_total_num_tokens")),
        context_tokens=_prefer(sample.context_tokens, summed("num_used_tokens", "num_tokens")),
        waiting_prompt_tokens=summed("num_waiting_uncached_tokens"),
        kv_usage_ratio=max(usage, default=None) if sample.kv_usage_ratio is None else sample.kv_usage_ratio,
    )


def whole(value: object) -> int | None:
    """Return a whole number given as such or as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return int(float(value))
    except (ValueError, OverflowError):
        return None


def _whole(value: float | None) -> int | None:
    return whole(value)


def _prefer(ours: int | None, theirs: int | None) -> int | None:
    return theirs if ours is None else ours


def _ratio(part: float | None, of: float | None) -> float | None:
    return None if part is None or not of else part / of


def _mappings(value: object) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON list; one object counts as a list of one."""
    items: Sequence[object] = value if isinstance(value, list) else [value]
    return (item for item in items if isinstance(item, dict))


def _first_whole(values: Mapping[str, Any], *names: str) -> int | None:
    return next((number for name in names if (number := whole(values.get(name))) is not None), None)
