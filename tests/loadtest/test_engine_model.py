"""The simulated engine, without an event loop: what takes how long, who waits, what the caches hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.engine_model import EngineModel, EngineSpec, Sequence
from loadtest.engine_stats import render
from loadtest.text import block_keys

SPEC = EngineSpec(ttft_s_per_token=0.001, itl_s=0.02, itl_growth=0.1, slots=2, kv_tokens=1600, step_tokens=100)


def step(model: EngineModel, now: float) -> float:
    """One step; the time after it."""
    duration_s = model.begin_step(now)
    assert duration_s is not None
    model.end_step(now + duration_s)
    return now + duration_s


def submit(model: EngineModel, prompt_tokens: int, max_tokens: int, text: str = "", **fields: float) -> Sequence:
    sequence = Sequence(prompt_tokens=prompt_tokens, max_tokens=max_tokens, keys=block_keys(text, 16), **fields)
    model.submit(sequence, 0.0)
    return sequence


def test_time_to_first_token_follows_the_prompts_length() -> None:
    model = EngineModel(SPEC)
    sequence = submit(model, 250, 3)
    now = 0.0
    while not sequence.produced:
        now = step(model, now)
    assert now == pytest.approx(0.250)
    assert step(model, now) == pytest.approx(now + 0.02)


def test_a_decode_step_takes_longer_with_more_sequences() -> None:
    model = EngineModel(SPEC)
    submit(model, 1, 5)
    submit(model, 1, 5)
    now = step(model, 0.0)
    assert step(model, now) - now == pytest.approx(0.02 * 1.1)


def test_speed_divides_and_a_slow_request_multiplies_all_times() -> None:
    fast = EngineModel(SPEC, speed=10.0)
    submit(fast, 100, 1)
    assert fast.begin_step(0.0) == pytest.approx(0.01)
    slow = EngineModel(SPEC)
    submit(slow, 100, 1, slow=10.0)
    assert slow.begin_step(0.0) == pytest.approx(1.0)


def test_more_requests_than_slots_wait_and_follow_in_order() -> None:
    model = EngineModel(SPEC)
    sequences = [submit(model, 1, 2) for _ in range(3)]
    now = step(model, 0.0)
    assert (len(model.running), list(model.waiting)) == (2, sequences[2:])
    now = step(model, step(model, now))
    assert [sequence.produced for sequence in sequences] == [2, 2, 1]


def test_an_equal_prompt_head_is_not_computed_again() -> None:
    model = EngineModel(SPEC)
    text = "a" * 640
    first = submit(model, 160, 1, text)
    step(model, step(model, 0.0))
    model.leave(first, "stop", 1.0)
    second = submit(model, 170, 1, text + "b" * 40)
    assert model.begin_step(1.0) == pytest.approx(0.010)
    assert second.cached_tokens == 160
    assert (model.stats.prefix_hits, model.stats.prefix_queries) == (160, 330)


def test_the_blocks_of_a_prompt_that_is_cached_whole_leave_one_token_to_compute() -> None:
    model = EngineModel(SPEC)
    for _ in range(2):
        sequence = submit(model, 160, 1, "a" * 640)
        while not sequence.done:
            step(model, 0.0)
        model.leave(sequence, "stop", 0.0)
    assert sequence.cached_tokens == 144


def test_a_full_kv_cache_preempts_the_one_that_came_last() -> None:
    model = EngineModel(EngineSpec(kv_tokens=160, slots=4))
    first, last = submit(model, 64, 60), submit(model, 64, 60)
    now = 0.0
    while model.running or model.waiting:
        now = step(model, now)
        assert model.pool.used <= model.pool.capacity
        if not first.done and last.started_s is None:
            assert list(model.waiting) == [last]
        for sequence in (first, last):
            if sequence.done:
                model.leave(sequence, "length", now)
    assert model.stats.preemptions >= 1
    assert (first.produced, last.produced) == (60, 60)
    assert model.pool.used == 0


def test_a_prefill_without_an_answer_is_done_when_the_prompt_is_read() -> None:
    model = EngineModel(SPEC)
    sequence = submit(model, 150, 0)
    step(model, 0.0)
    assert not sequence.done
    step(model, 0.1)
    assert sequence.done
    assert model.stats.generation_tokens == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 300), st.integers(0, 30), st.integers(0, 4)),
        min_size=1,
        max_size=60,
    )
)
def test_whatever_comes_and_goes_no_block_is_lost_or_lent_twice(events: list[tuple[int, int, int, int]]) -> None:
    model = EngineModel(EngineSpec(kv_tokens=640, slots=3, step_tokens=64))
    inside: list[Sequence] = []
    now = 0.0
    for kind, prompt_tokens, max_tokens, which in events:
        if kind == 0:
            inside.append(submit(model, prompt_tokens, max_tokens, "ab"[which % 2] * prompt_tokens * 4))
        elif kind == 1 and inside:
            model.leave(inside.pop(which % len(inside)), "abort", now)
        elif (duration_s := model.begin_step(now)) is not None:
            now += duration_s
            model.end_step(now)
        held = {key for sequence in model.running for key in sequence.held_keys}
        private = sum(sequence.private_blocks for sequence in model.running)
        assert model.pool.used == len(held) + private <= model.pool.capacity
    for sequence in inside:
        model.leave(sequence, "abort", now)
    assert (model.pool.used, list(model.running), list(model.waiting)) == (0, [], [])


def test_a_name_that_is_the_head_of_another_is_told_apart_in_the_metrics_page() -> None:
    model = EngineModel(SPEC)
    for _ in range(5):
        submit(model, 1, 5)
    model.begin_step(0.0)
    page = render("m", model.stats, model.gauges())
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 2.0\n' in page
    assert 'vllm:num_requests_waiting{engine="0",model_name="m"} 3.0\n' in page
    assert 'block_size="16",enable_prefix_caching="True",num_gpu_blocks="100",engine="0"' in page
