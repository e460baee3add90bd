"""Calibrated engines: how long one step takes, and how much KV cache there is.

A step that computes `p` prompt tokens (0: a pure decode step) while `n` sequences decode over `c` context tokens takes

    max(decode_s, prefill_base_s + prefill_s·p) + attention_s·pairs + decode_sequence_s·n + decode_context_s·c

seconds; `pairs` counts (query token, key token) pairs of the prompt tokens. The maximum is the roofline: a step reads
all weights once (decode_s), however few tokens it computes, and is bound by arithmetic once there are many.

Sources
- [splitwise] Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA 2024; its
  measured latencies of Llama-2-70B (vLLM, BF16) on DGX-A100 and DGX-H100 are published as `data/perf_model.csv` in
  github.com/Mutinifni/splitwise-sim. `MEASURED` repeats the medians of the rows used here.
- [nim] NVIDIA NIM performance pages (docs.nvidia.com/nim): Llama-3.1-8B class guard model on one A100-80GB in BF16,
  500 prompt tokens: 48.3 ms to the first token at concurrency 1.
- [a100-sweep] J. Musgrave, "vLLM throughput-latency sweep on NVIDIA A100": Llama-3.1-8B BF16 on an A100-40GB decodes
  about 75 tokens/s alone, 77 % of its memory bandwidth's ceiling.
- [h100-sweep] InferenceBench, "Recipe: concurrency sweep": Llama-3.1-8B FP16, vLLM on one H100-80GB: 6.48 ms a token
  at concurrency 1, 6.59 ms at 4.
- [datasheet] NVIDIA datasheets, dense BF16 and memory bandwidth: H100 SXM 989 TFLOP/s, 3.35 TB/s, 80 GB; A100 SXM 312,
  2.039, 80; A100-40GB 312, 1.555, 40; L4 121, 0.300, 24.
What no source measured is derived from the datasheet with the efficiencies the measured rows show; each such figure
says so where it stands. `attention_s` is always derived: 4·layers·width operations a pair at half of the peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

# Bytes of BF16 keys and values that one token keeps: 2 · layers · KV heads · head size · 2 B (Llama 3 model cards).
KV_BYTES_70B = 2 * 80 * 8 * 128 * 2
KV_BYTES_8B = 2 * 32 * 8 * 128 * 2
WEIGHT_BYTES_70B = 2 * 70.6e9
WEIGHT_BYTES_8B = 2 * 8.03e9
# Share of the peak that reading the KV cache in decode attention and computing prefill attention reach.
KV_READ_EFFICIENCY = 0.75
ATTENTION_EFFICIENCY = 0.5
# vLLM's gpu_memory_utilization default, and what activations and graphs take of it (bytes per GPU, typical).
MEMORY_UTILIZATION = 0.9
ACTIVATION_BYTES = 2e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator by its datasheet: dense BF16 operations/s, bytes/s, bytes."""

    flops: float
    bandwidth: float
    memory_bytes: float


H100 = Gpu(flops=989e12, bandwidth=3.35e12, memory_bytes=80e9)
A100 = Gpu(flops=312e12, bandwidth=2.039e12, memory_bytes=80e9)
A100_40 = Gpu(flops=312e12, bandwidth=1.555e12, memory_bytes=40e9)
L4 = Gpu(flops=121e12, bandwidth=0.300e12, memory_bytes=24e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """What one node's engine can do. Times in seconds, sizes in tokens; `tests/sim` checks them against the sources."""

    name: str
    decode_s: float  # a decode step with nothing to decode: reading the weights, launching kernels
    decode_sequence_s: float  # more for each sequence that decodes
    decode_context_s: float  # more for each context token read
    prefill_base_s: float  # a prefill step's fixed part
    prefill_s: float  # more for each prompt token computed
    attention_s: float  # more for each (query, key) pair of the prompt tokens computed
    kv_tokens: int
    block_tokens: int = 512  # granularity of prefix caching: the Mooncake traces name 512-token blocks
    max_sequences: int = 128
    step_tokens: int = 2048  # vLLM's budget for chunked prefill (max_num_batched_tokens)

    def step_s(self, prompt_tokens: int, pairs: float, decoding: int, context_tokens: float) -> float:
        """Seconds of one step; see the module."""
        if prompt_tokens:
            base = max(self.decode_s, self.prefill_base_s + self.prefill_s * prompt_tokens) + self.attention_s * pairs
        else:
            base = self.decode_s
        return base + self.decode_sequence_s * decoding + self.decode_context_s * context_tokens

    def prefill_alone_s(self, prompt_tokens: int) -> float:
        """Seconds until an idle engine with an empty cache gives the first token of a prompt."""
        total, done = 0.0, 0
        while done < prompt_tokens:
            chunk = min(self.step_tokens, prompt_tokens - done)
            total += self.step_s(chunk, chunk * (done + chunk / 2), 0, 0)
            done += chunk
        return total


def _kv_tokens(gpu: Gpu, gpus: int, weight_bytes: float, kv_bytes: int) -> int:
    free = gpus * (gpu.memory_bytes * MEMORY_UTILIZATION - ACTIVATION_BYTES) - weight_bytes
    return int(free / kv_bytes)


def _attention_s(gpu: Gpu, gpus: int, layers: int, width: int) -> float:
    return 4 * layers * width / (gpus * gpu.flops * ATTENTION_EFFICIENCY)


def _context_s(gpu: Gpu, gpus: int, kv_bytes: int) -> float:
    return kv_bytes / (gpus * gpu.bandwidth * KV_READ_EFFICIENCY)


# decode_s, decode_sequence_s, prefill_base_s, prefill_s: fitted to [splitwise], tensor parallel over 8 GPUs.
H100_70B = EngineProfile(
    name="h100-70b",
    decode_s=29.4e-3,
    decode_sequence_s=0.30e-3,
    decode_context_s=_context_s(H100, 8, KV_BYTES_70B),
    prefill_base_s=26e-3,
    prefill_s=54e-6,
    attention_s=_attention_s(H100, 8, 80, 8192),
    kv_tokens=_kv_tokens(H100, 8, WEIGHT_BYTES_70B, KV_BYTES_70B),
)
A100_70B = EngineProfile(
    name="a100-70b",
    decode_s=44.4e-3,
    decode_sequence_s=0.36e-3,
    decode_context_s=_context_s(A100, 8, KV_BYTES_70B),
    prefill_base_s=34e-3,
    prefill_s=117.5e-6,
    attention_s=_attention_s(A100, 8, 80, 8192),
    kv_tokens=_kv_tokens(A100, 8, WEIGHT_BYTES_70B, KV_BYTES_70B),
)
# decode: [h100-sweep]; its 0.04 ms a sequence. prefill_s: derived, 2 operations a weight at half of the peak.
H100_8B = EngineProfile(
    name="h100-8b",
    decode_s=6.44e-3,
    decode_sequence_s=0.04e-3,
    decode_context_s=_context_s(H100, 1, KV_BYTES_8B),
    prefill_base_s=4e-3,
    prefill_s=WEIGHT_BYTES_8B / (0.5 * H100.flops),
    attention_s=_attention_s(H100, 1, 32, 4096),
    kv_tokens=_kv_tokens(H100, 1, WEIGHT_BYTES_8B, KV_BYTES_8B),
)
# decode_s: 77 % of the bandwidth, as [a100-sweep]. prefill: 55 % of the peak, which gives [nim]'s 48 ms.
A100_8B = EngineProfile(
    name="a100-8b",
    decode_s=WEIGHT_BYTES_8B / (0.77 * A100.bandwidth),
    decode_sequence_s=0.06e-3,
    decode_context_s=_context_s(A100, 1, KV_BYTES_8B),
    prefill_base_s=2e-3,
    prefill_s=WEIGHT_BYTES_8B / (0.55 * A100.flops),
    attention_s=_attention_s(A100, 1, 32, 4096),
    kv_tokens=_kv_tokens(A100, 1, WEIGHT_BYTES_8B, KV_BYTES_8B),
)
# All derived: 85 % of the bandwidth, half of the peak. (A card this slow spends no visible share on launches.)
L4_8B = EngineProfile(
    name="l4-8b",
    decode_s=WEIGHT_BYTES_8B / (0.85 * L4.bandwidth),
    decode_sequence_s=0.15e-3,
    decode_context_s=_context_s(L4, 1, KV_BYTES_8B),
    prefill_base_s=5e-3,
    prefill_s=WEIGHT_BYTES_8B / (0.5 * L4.flops),
    attention_s=_attention_s(L4, 1, 32, 4096),
    kv_tokens=_kv_tokens(L4, 1, WEIGHT_BYTES_8B, KV_BYTES_8B),
)

PROFILES: Mapping[str, EngineProfile] = {p.name: p for p in (H100_70B, A100_70B, H100_8B, A100_8B, L4_8B)}


def slower(profile: EngineProfile, factor: float) -> EngineProfile:
    """The same engine with every step `factor` times longer."""
    return replace(
        profile,
        name=f"{profile.name}/{factor:g}",
        decode_s=profile.decode_s * factor,
        decode_sequence_s=profile.decode_sequence_s * factor,
        decode_context_s=profile.decode_context_s * factor,
        prefill_base_s=profile.prefill_base_s * factor,
        prefill_s=profile.prefill_s * factor,
        attention_s=profile.attention_s * factor,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One published latency, in seconds: prefill of a whole prompt, or a decode step of a batch at 576 tokens each."""

    profile: str
    what: str  # "prefill" or "decode"
    size: int  # prompt tokens, or sequences in the batch
    seconds: float
    source: str


def _splitwise(profile: str, what: str, figures: Mapping[int, float]) -> tuple[Measured, ...]:
    return tuple(
        Measured(profile=profile, what=what, size=size, seconds=ms / 1000, source="splitwise")
        for size, ms in figures.items()
    )


# Medians over the five repetitions of each row (tensor parallel 8; 512 prompt tokens and 128 generated for decode).
# Prompts over 2,048 tokens were measured in one unchunked step, which our engine never takes: no rows of those.
MEASURED: tuple[Measured, ...] = (
    *_splitwise("h100-70b", "prefill", {512: 53.4, 1024: 77.9, 2048: 136.8}),
    *_splitwise("a100-70b", "prefill", {512: 94.3, 1024: 154.5, 2048: 274.2}),
    *_splitwise("h100-70b", "decode", {1: 29.8, 4: 31.8, 8: 32.5, 16: 34.2, 32: 38.6, 64: 50.2}),
    *_splitwise("a100-70b", "decode", {1: 44.9, 4: 45.8, 8: 46.5, 16: 50.4, 32: 53.0, 64: 71.6}),
    Measured(profile="h100-8b", what="decode", size=1, seconds=6.48e-3, source="h100-sweep"),
    Measured(profile="h100-8b", what="decode", size=4, seconds=6.59e-3, source="h100-sweep"),
    Measured(profile="a100-8b", what="prefill", size=500, seconds=48.3e-3, source="nim"),
)
