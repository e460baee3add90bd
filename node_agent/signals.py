"""Which series of which engine carries what: exact names, newest first, as each engine publishes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from node_agent.exposition import Families, Series

# One signal: the names it has had, newest first. `name{label=value}` picks one series of a name.
Names = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """Where one kind of engine says what; empty: it does not say it, and the report carries null."""

    prefixes: tuple[str, ...] = ()  # a series that starts so betrays the kind
    metrics_path: str = "/metrics"
    health_path: str = "/health"
    running: Names = ()
    queue: tuple[Names, ...] = ()  # summed
    kv_usage: Names = ()
    slots: Names = ()
    capacity_tokens: Names = ()
    blocks: Names = ()
    block_tokens: Names = ()
    cache_info: tuple[str, str, str] | None = None  # name, label of tokens per block, label of blocks
    context_tokens: Names = ()
    hit_ratio: Names = ()
    latency_sum: Names = ()
    latency_count: Names = ()
    latency_unit_s: float = 1.0
    ttft: Names = ()
    ttft_unit_s: float = 1.0
    itl: Names = ()
    counters: Mapping[str, tuple[Names, ...]] = field(default_factory=dict)  # ours -> theirs, summed
    # Counters that move with every step of the engine, so that all of them standing still while requests run is a
    # wedge. Counters that move only when a request ends do not belong here.
    progress: tuple[Names, ...] = ()


_VLLM = Signals(
    prefixes=("vllm:",),
    running=("vllm:num_requests_running",),
    # Deferred requests wait on purpose (long prefills, remote KV): no congestion.
    queue=(("vllm:num_requests_waiting_by_reason{reason=capacity}", "vllm:num_requests_waiting"),),
    kv_usage=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    cache_info=("vllm:cache_config_info", "block_size", "num_gpu_blocks"),
    latency_sum=("vllm:e2e_request_latency_seconds_sum",),
    latency_count=("vllm:e2e_request_latency_seconds_count",),
    ttft=("vllm:time_to_first_token_seconds",),
    itl=("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    counters={
        "prefill_seconds": (("vllm:request_prefill_time_seconds_sum",),),
        "prompt_tokens": (("vllm:prompt_tokens_total",),),
        "cached_tokens": (
            ("vllm:prompt_tokens_cached_total", "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
        ),
        "generation_tokens": (("vllm:generation_tokens_total",),),
        "preemptions": (("vllm:num_preemptions_total",),),
        "prefix_queries": (("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),),
        "prefix_hits": (("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),),
    },
    progress=(
        ("vllm:generation_tokens_total",),
        ("vllm:prompt_tokens_total",),
        ("vllm:iteration_tokens_total_count",),
    ),
)

_SGLANG = Signals(
    prefixes=("sglang:",),
    # Not /health: that one runs a generation on an idle server, once a second here.
    health_path="/get_model_info",
    running=("sglang:num_running_reqs",),
    queue=(
        ("sglang:num_queue_reqs",),
        ("sglang:num_grammar_queue_reqs",),
        ("sglang:num_prefill_bootstrap_queue_reqs",),
        ("sglang:num_prefill_inflight_queue_reqs",),
        ("sglang:num_decode_prealloc_queue_reqs",),
        ("sglang:num_decode_transfer_queue_reqs",),
    ),
    kv_usage=("sglang:token_usage", "sglang:full_token_usage"),
    capacity_tokens=("sglang:max_total_num_tokens",),
    cache_info=("sglang:cache_config_info", "page_size", "num_pages"),
    context_tokens=("sglang:num_used_tokens", "sglang:kv_used_tokens"),
    hit_ratio=("sglang:cache_hit_rate",),
    latency_sum=("sglang:e2e_request_latency_seconds_sum",),
    latency_count=("sglang:e2e_request_latency_seconds_count",),
    ttft=("sglang:time_to_first_token_seconds",),
    itl=("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
    counters={
        "uncached_tokens": (("sglang:realtime_tokens_total{mode=prefill_compute}",),),
        "prompt_tokens": (("sglang:prompt_tokens_total",),),
        "cached_tokens": (("sglang:cached_tokens_total",),),
        "generation_tokens": (("sglang:realtime_tokens_total{mode=decode}", "sglang:generation_tokens_total"),),
        "preemptions": (("sglang:num_retracted_requests_total",),),
        "prefix_queries": (
            ("sglang:realtime_tokens_total{mode=prefill_compute}",),
            ("sglang:realtime_tokens_total{mode=prefill_cache}",),
        ),
        "prefix_hits": (("sglang:realtime_tokens_total{mode=prefill_cache}",),),
    },
    progress=(("sglang:realtime_tokens_total",),),
)

_TGI = Signals(
    prefixes=("tgi_",),
    running=("tgi_batch_current_size",),
    queue=(("tgi_queue_size",),),
    latency_sum=("tgi_request_duration_sum",),
    latency_count=("tgi_request_duration_count",),
    itl=("tgi_request_mean_time_per_token_duration",),  # each request's mean: the nearest there is
    counters={
        "generation_tokens": (("tgi_request_generated_tokens_sum",),),
        "prompt_tokens": (("tgi_request_input_length_sum",),),
    },
)

_LLAMACPP = Signals(
    prefixes=("llamacpp:",),
    running=("llamacpp:requests_processing",),
    queue=(("llamacpp:requests_deferred",),),
    kv_usage=("llamacpp:kv_cache_usage_ratio",),  # old builds only; /slots says it for the others
    counters={
        "prefill_seconds": (("llamacpp:prompt_seconds_total",),),
        "uncached_tokens": (("llamacpp:prompt_tokens_total",),),
        "generation_tokens": (("llamacpp:tokens_predicted_total",),),
        "prefix_queries": (("llamacpp:prompt_tokens_total",), ("llamacpp:prompt_tokens_cached_total",)),
        "prefix_hits": (("llamacpp:prompt_tokens_cached_total",),),
    },
    progress=(("llamacpp:n_decode_total",),),
)

_TRITON = Signals(
    prefixes=("nv_inference_", "nv_trt_llm_"),
    health_path="/v2/health/ready",
    running=("nv_trt_llm_request_metrics{request_type=active}",),
    queue=(("nv_trt_llm_request_metrics{request_type=waiting}", "nv_inference_pending_request_count"),),
    kv_usage=("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",),
    slots=("nv_trt_llm_request_metrics{request_type=max}",),
    blocks=("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}",),
    block_tokens=("nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",),
    latency_sum=("nv_inference_request_duration_us",),
    latency_count=("nv_inference_request_success",),
    latency_unit_s=1e-6,
    ttft=("nv_inference_first_response_histogram_ms",),
    ttft_unit_s=1e-3,
)

_TRTLLM = Signals(
    prefixes=("trtllm_",),
    metrics_path="/prometheus/metrics",
    running=("trtllm_num_requests_running",),
    queue=(("trtllm_num_requests_waiting",),),
    kv_usage=("trtllm_kv_cache_utilization",),
    slots=("trtllm_max_num_active_requests",),
    blocks=("trtllm_kv_cache_max_blocks",),
    block_tokens=("trtllm_kv_cache_tokens_per_block",),
    hit_ratio=("trtllm_kv_cache_hit_rate",),
    latency_sum=("trtllm_e2e_request_latency_seconds_sum",),
    latency_count=("trtllm_e2e_request_latency_seconds_count",),
    ttft=("trtllm_time_to_first_token_seconds",),
    itl=("trtllm_time_per_output_token_seconds",),
    counters={
        "prefill_seconds": (("trtllm_request_prefill_time_seconds_sum",),),
        "prompt_tokens": (("trtllm_prompt_tokens_total",),),
        "cached_tokens": (("trtllm_prompt_cached_tokens_total",),),
        "generation_tokens": (("trtllm_generation_tokens_total",),),
    },
)

SIGNALS: dict[str, Signals] = {
    "vllm": _VLLM,
    "sglang": _SGLANG,
    "tgi": _TGI,
    "llamacpp": _LLAMACPP,
    "triton": _TRITON,
    "trtllm": _TRTLLM,
    "ollama": Signals(metrics_path="", health_path="/api/version"),
}
UNKNOWN = Signals()

# Some builds and routers write the same series with another separator.
_SPELLINGS = {"sglang_": "sglang:", "trtllm:": "trtllm_"}
START_TIME = "process_start_time_seconds"
GPU_MEMORY_USED, GPU_MEMORY_TOTAL = "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"


def _names(signals: Signals) -> set[str]:
    """Every series name that these signals are read from."""
    plain = [signals.running, signals.kv_usage, signals.slots, signals.capacity_tokens, signals.blocks]
    plain += [signals.block_tokens, signals.context_tokens, signals.hit_ratio]
    plain += [signals.latency_sum, signals.latency_count, *signals.queue, *signals.progress]
    plain += [names for groups in signals.counters.values() for names in groups]
    plain += [tuple(f"{name}_bucket" for name in (*signals.ttft, *signals.itl))]
    info = {signals.cache_info[0]} if signals.cache_info else set()
    return {name.partition("{")[0] for names in plain for name in names} | info


_WANTED = frozenset().union(*(_names(signals) for signals in SIGNALS.values())) | {
    START_TIME,
    GPU_MEMORY_USED,
    GPU_MEMORY_TOTAL,
}


def wanted(name: str) -> bool:
    """True for the series that some signal needs; everything else is skipped while parsing."""
    return name in _WANTED or _spelled(name) in _WANTED


def normal(families: Mapping[str, list[Series]]) -> Families:
    """Return the families under the spelling that SIGNALS uses."""
    return {_spelled(name): series for name, series in families.items()}


def _spelled(name: str) -> str:
    for other, ours in _SPELLINGS.items():
        if name.startswith(other):
            return ours + name.removeprefix(other)
    return name


_PREFIXES = {kind: signals.prefixes for kind, signals in SIGNALS.items() if signals.prefixes}
_PREFIXES["sglang"] += ("sglang_",)
_PREFIXES["trtllm"] += ("trtllm:",)
_KIND = {
    kind: re.compile(rf"^(?:# (?:HELP|TYPE) )?(?:{'|'.join(map(re.escape, prefixes))})", re.MULTILINE)
    for kind, prefixes in _PREFIXES.items()
}


def kind_of(text: str) -> str | None:
    """Tell the engine by the names on its metrics page, comments included; None if none is known."""
    return next((kind for kind, pattern in _KIND.items() if pattern.search(text)), None)
