"""What a simulated engine counts, and how vLLM would print it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Bucket bounds in seconds, as vLLM's V1 engine declares them.
TTFT_BOUNDS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
ITL_BOUNDS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)


class Histogram:
    """Counts by bucket; a value equal to a bound falls under it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """The Prometheus text of it, without help and type."""
        seen = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {seen}'
        yield f"{name}_sum{{{labels}}} {self.total}"
        yield f"{name}_count{{{labels}}} {seen}"


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine started; tokens, requests and seconds."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    ttft_s: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    itl_s: Histogram = field(default_factory=lambda: Histogram(ITL_BOUNDS_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_S))
    queue_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_S))
    prefill_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_S))
    decode_s: Histogram = field(default_factory=lambda: Histogram(REQUEST_BOUNDS_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """The state of the engine at one moment."""

    running: int
    waiting: int
    kv_usage_ratio: float
    block_tokens: int
    blocks: int


FINISH_REASONS = ("stop", "length", "abort", "error")


def render(model: str, stats: EngineStats, gauges: Gauges) -> str:
    """The engine's metrics page in Prometheus text, with vLLM's names and labels."""
    labels = f'engine="0",model_name="{model}"'
    return "\n".join([*_gauges(labels, gauges), *_counters(labels, stats), *_histograms(labels, stats), ""])


def _gauges(labels: str, gauges: Gauges) -> Iterator[str]:
    for name, value in (
        ("num_requests_running", gauges.running),
        ("num_requests_waiting", gauges.waiting),
        ("kv_cache_usage_perc", gauges.kv_usage_ratio),
    ):
        yield f"# TYPE vllm:{name} gauge"
        yield f"vllm:{name}{{{labels}}} {float(value)}"
    yield "# TYPE vllm:num_requests_waiting_by_reason gauge"
    yield f'vllm:num_requests_waiting_by_reason{{{labels},reason="capacity"}} {float(gauges.waiting)}'
    yield f'vllm:num_requests_waiting_by_reason{{{labels},reason="deferred"}} 0.0'
    yield "# TYPE vllm:cache_config_info gauge"
    cache = f'block_size="{gauges.block_tokens}",enable_prefix_caching="True",num_gpu_blocks="{gauges.blocks}"'
    yield f'vllm:cache_config_info{{{cache},engine="0"}} 1.0'


def _counters(labels: str, stats: EngineStats) -> Iterator[str]:
    for name, value in (
        ("prompt_tokens_total", stats.prompt_tokens),
        ("prompt_tokens_cached_total", stats.cached_prompt_tokens),
        ("generation_tokens_total", stats.generation_tokens),
        ("prefix_cache_queries_total", stats.prefix_queries),
        ("prefix_cache_hits_total", stats.prefix_hits),
        ("num_preemptions_total", stats.preemptions),
    ):
        yield f"# TYPE vllm:{name} counter"
        yield f"vllm:{name}{{{labels}}} {float(value)}"
    yield "# TYPE vllm:request_success_total counter"
    for reason in FINISH_REASONS:
        yield f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {float(stats.finished[reason])}'


def _histograms(labels: str, stats: EngineStats) -> Iterator[str]:
    for name, histogram in (
        ("time_to_first_token_seconds", stats.ttft_s),
        ("inter_token_latency_seconds", stats.itl_s),
        ("e2e_request_latency_seconds", stats.e2e_s),
        ("request_queue_time_seconds", stats.queue_s),
        ("request_prefill_time_seconds", stats.prefill_s),
        ("request_decode_time_seconds", stats.decode_s),
    ):
        yield f"# TYPE vllm:{name} histogram"
        yield from histogram.lines(f"vllm:{name}", labels)
