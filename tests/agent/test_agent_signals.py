"""Each engine's own metrics page, read by its exact names."""

from __future__ import annotations

import pytest
from agent_fakes import golden

from node_agent.engine_sample import EngineSample, from_metrics, with_llamacpp_slots, with_sglang_loads
from node_agent.exposition import parse
from node_agent.signals import SIGNALS, UNKNOWN, kind_of, normal, wanted


def read(page: str, kind: str) -> EngineSample:
    return from_metrics(SIGNALS[kind], normal(parse(page, wanted)))


@pytest.mark.parametrize(
    ("page", "kind"),
    [
        ("vllm", "vllm"),
        ("vllm_v0", "vllm"),
        ("sglang", "sglang"),
        ("tgi", "tgi"),
        ("llamacpp", "llamacpp"),
        ("triton", "triton"),
        ("triton_plain", "triton"),
        ("trtllm", "trtllm"),
    ],
)
def test_metrics_page_betrays_its_engine(page: str, kind: str) -> None:
    assert kind_of(golden(page)) == kind


def test_page_of_an_idle_engine_betrays_it_by_its_comments() -> None:
    assert kind_of("# HELP sglang:num_running_reqs The number of running requests.\n") == "sglang"
    assert kind_of("# HELP python_info The Python platform.\npython_info 1\n") is None
    assert kind_of("") is None


def test_vllm_with_two_ranks() -> None:
    sample = read(golden("vllm"), "vllm")
    assert (sample.running, sample.queue_depth) == (14, 3)  # deferred requests are no congestion
    assert sample.kv_usage_ratio == pytest.approx(0.612345)  # of the fuller rank
    assert (sample.kv_block_tokens, sample.kv_capacity_tokens) == (16, 2 * 16 * 12968)
    assert sample.start_time == 1.79524011224e9
    assert sample.counters["generation_tokens"] == 912000
    assert (sample.counters["prompt_tokens"], sample.counters["cached_tokens"]) == (5011200, 1100000)
    assert sample.counters["preemptions"] == 3
    assert sample.counters["latency_count"] == 65
    assert sample.counters["prefix_queries"] == 5e6
    assert sample.progress == 912000 + 5011200 + 10000
    assert sample.histograms["ttft"].counts[-1] == 65
    assert sample.histograms["itl"].counts[-1] == 65
    assert sample.slots is None  # vLLM does not tell
    assert sample.context_tokens is None


def test_vllm_before_version_one() -> None:
    sample = read(golden("vllm_v0"), "vllm")
    assert (sample.running, sample.queue_depth, sample.kv_usage_ratio) == (2, 6, 0.42)
    assert sample.histograms["itl"].counts[-1] == 10
    assert "ttft" not in sample.histograms
    assert "preemptions" not in sample.counters
    assert sample.kv_capacity_tokens is None


def test_vllm_without_a_block_count_yet() -> None:
    page = golden("vllm").replace('num_gpu_blocks="12968"', 'num_gpu_blocks="None"')
    assert read(page, "vllm").kv_capacity_tokens is None


def test_sglang_seen_from_all_schedulers_counts_tensor_parallel_ranks_once() -> None:
    sample = read(golden("sglang"), "sglang")
    assert sample.running == 8
    assert sample.queue_depth == 3 + 1  # with the grammar queue
    assert sample.kv_usage_ratio == 0.41
    assert sample.context_tokens == 69000
    assert sample.kv_capacity_tokens == 200000
    assert sample.kv_block_tokens == 1
    assert sample.counters["generation_tokens"] == 10000  # the live counter, not the one of finished requests
    assert sample.counters["uncached_tokens"] == 1800
    assert sample.progress == 2 * 6000
    assert sample.prefix_hit_ratio == 0.25


def test_sglang_in_the_other_spelling() -> None:
    page = golden("sglang").replace("sglang:", "sglang_")
    assert kind_of(page) == "sglang"
    assert read(page, "sglang") == read(golden("sglang"), "sglang")


def test_tgi_tells_no_kv_usage_and_no_live_progress() -> None:
    sample = read(golden("tgi"), "tgi")
    assert (sample.running, sample.queue_depth) == (7, 4)
    assert sample.kv_usage_ratio is None
    assert sample.progress is None  # its token counters move only when a request ends
    assert sample.counters["latency_count"] == 148
    assert sample.counters["latency_seconds"] == 392
    assert sample.counters["generation_tokens"] == 14800
    assert sample.histograms["itl"].counts[-1] == 148


def test_llamacpp_takes_its_kv_usage_from_busy_slots() -> None:
    sample = read(golden("llamacpp"), "llamacpp")
    assert (sample.running, sample.queue_depth, sample.kv_usage_ratio) == (2, 1, None)
    assert sample.counters["uncached_tokens"] == 1200
    assert sample.counters["prefix_queries"] == 1500
    idle = {"id": 1, "n_ctx": 1024, "is_processing": False}
    busy = {
        "id": 0,
        "n_ctx": 1024,
        "is_processing": True,
        "n_prompt_tokens": 879,
        "n_prompt_tokens_processed": 12,
        "next_token": [{"has_next_token": True, "n_decoded": 867}],
    }
    slots = with_llamacpp_slots(sample, [busy, idle, {**idle, "id": 2}, {**idle, "id": 3}])
    assert (slots.slots, slots.kv_usage_ratio, slots.context_tokens) == (4, 0.25, 879)
    assert slots.kv_capacity_tokens is None  # four contexts, or one that is shared: nothing says which
    assert slots.progress == 5100 + 867 + 12


def test_llamacpp_without_a_metrics_page_is_read_from_its_slots() -> None:
    slots = with_llamacpp_slots(EngineSample(), [{"id": 0, "n_ctx": 2048, "is_processing": True, "n_past": 70}])
    assert (slots.running, slots.queue_depth, slots.slots) == (1, None, 1)
    assert (slots.context_tokens, slots.kv_capacity_tokens) == (70, 2048)


def test_triton_with_the_trtllm_back_end() -> None:
    sample = read(golden("triton"), "triton")
    assert (sample.running, sample.queue_depth, sample.slots) == (6, 2, 512)
    assert sample.kv_usage_ratio == 0.25
    assert (sample.kv_block_tokens, sample.kv_capacity_tokens) == (64, 6239 * 64)
    assert sample.counters["latency_seconds"] == pytest.approx(500.0)  # from microseconds
    assert sample.counters["latency_count"] == 200
    assert sample.histograms["ttft"].bounds[0] == pytest.approx(0.1)  # from milliseconds
    assert sample.gpu_memory_ratio == pytest.approx(0.85)


def test_triton_with_another_back_end() -> None:
    sample = read(golden("triton_plain"), "triton")
    assert (sample.running, sample.queue_depth, sample.slots) == (None, 3, None)


def test_trtllm_serve() -> None:
    sample = read(golden("trtllm"), "trtllm")
    assert (sample.running, sample.queue_depth, sample.slots) == (11, 2, 256)
    assert (sample.kv_usage_ratio, sample.kv_block_tokens, sample.kv_capacity_tokens) == (0.375, 32, 128000)
    assert sample.prefix_hit_ratio == 0.125
    assert (sample.counters["prompt_tokens"], sample.counters["cached_tokens"]) == (100000, 40000)
    assert sample.counters["prefill_seconds"] == pytest.approx(20.0)
    assert sample.progress is None


def test_sglang_without_metrics_is_read_from_its_loads() -> None:
    rank = {
        "dp_rank": 0,
        "num_running_reqs": 5,
        "num_waiting_reqs": 2,
        "num_waiting_uncached_tokens": 700,
        "num_used_tokens": 9000,
        "max_total_num_tokens": 100000,
        "max_running_requests": 48,
        "token_usage": 0.09,
    }
    other = {**rank, "dp_rank": 1, "token_usage": 0.5}
    sample = with_sglang_loads(EngineSample(), {"loads": [rank, other]})
    assert (sample.running, sample.queue_depth, sample.slots) == (10, 4, 96)
    assert (sample.kv_usage_ratio, sample.kv_capacity_tokens, sample.context_tokens) == (0.5, 200000, 18000)
    assert sample.waiting_prompt_tokens == 1400


def test_metrics_page_goes_before_the_loads() -> None:
    sample = with_sglang_loads(read(golden("sglang"), "sglang"), {"loads": [{"num_running_reqs": 99}]})
    assert sample.running == 8
    assert sample.waiting_prompt_tokens is None


@pytest.mark.parametrize("answer", [None, [], "text", [1, 2], {"loads": "none"}, {"loads": []}])
def test_odd_answers_change_nothing(answer: object) -> None:
    assert with_sglang_loads(EngineSample(), answer) == EngineSample()
    assert with_llamacpp_slots(EngineSample(), answer if isinstance(answer, list) else []) == EngineSample()


def test_unknown_engine_says_nothing() -> None:
    assert from_metrics(UNKNOWN, parse(golden("vllm"), wanted)).running is None


def test_every_name_is_used_by_one_engine_only() -> None:
    for kind, signals in SIGNALS.items():
        names = [name for group in signals.queue for name in group] + [*signals.running]
        assert all(name.startswith(signals.prefixes) for name in names), kind
