"""What is held true of an engine, visit after visit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node_agent.engine_sample import EngineFacts, EngineSample, Model
from node_agent.engine_state import SAMPLE_STALE_S, EngineState, Visit, fresh_sample, observe

BUSY = EngineSample(running=3, queue_depth=1, progress=100.0, counters={"generation_tokens": 100.0})
OK = Visit(health="ok", kind="vllm", sample=BUSY)
REFUSED = Visit(health="refused", detail="connection refused")
SILENT = Visit(health="silent", detail="no answer")
MODELS = EngineFacts(version="0.11.0", models=(Model(id="m"),))


def see(state: EngineState, visit: Visit, now: float, process: str | None = None) -> EngineState:
    return observe(state, visit, now, name="a", process=process)


def after(*visits: tuple[float, Visit]) -> EngineState:
    state = EngineState()
    for now, visit in visits:
        state = see(state, visit, now)
    return state


def generated(tokens: float, running: int | None = 3, start_time: float | None = None) -> Visit:
    counters = {"generation_tokens": tokens}
    return replace(OK, sample=EngineSample(running=running, progress=tokens, counters=counters, start_time=start_time))


# ---- reachable or not ----


def test_engine_that_refuses_is_unreachable_at_once_and_its_load_unknown() -> None:
    state = after((0, replace(OK, facts=MODELS)), (1, REFUSED))
    assert not state.reachable
    assert state.sample is None
    assert state.facts == MODELS  # what changes rarely is still the best that is known


def test_engine_that_is_silent_for_a_moment_is_still_reachable() -> None:
    state = after((0, OK), (2, SILENT))
    assert state.reachable
    assert state.sample == BUSY


def test_engine_that_stays_silent_is_unreachable() -> None:
    assert not after((0, OK), (2, SILENT), (3, SILENT)).reachable


def test_engine_that_was_never_heard_is_unreachable_however_patient_one_is() -> None:
    assert not after((0, SILENT)).reachable


def test_one_silence_does_not_make_a_lost_engine_reachable_again() -> None:
    assert not after((0, OK), (1, REFUSED), (2, SILENT)).reachable


def test_engine_that_answers_is_reachable_again() -> None:
    state = after((0, OK), (1, REFUSED), (2, generated(120)))
    assert state.reachable
    assert state.sample is not None


def test_engine_that_answers_with_an_error_is_reachable_and_failing() -> None:
    state = after((0, replace(OK, health="error", detail="/health answered 503")))
    assert state.reachable
    assert state.health == "error"


def test_load_that_is_too_old_is_not_told() -> None:
    state = after((0, OK))
    assert fresh_sample(state, SAMPLE_STALE_S) == BUSY
    assert fresh_sample(state, SAMPLE_STALE_S + 0.1) is None


def test_model_list_is_kept_when_a_later_question_goes_unanswered() -> None:
    state = after((0, replace(OK, facts=MODELS)), (1, replace(OK, facts=EngineFacts())))
    assert state.facts.models == MODELS.models
    assert state.facts.version == "0.11.0"


# ---- wedged or not ----


def test_tokens_that_stand_still_while_requests_run_are_a_wedge() -> None:
    assert after((0, generated(100)), (4.9, generated(100))).wedged is False
    assert after((0, generated(100)), (5, generated(100))).wedged is True


def test_tokens_that_move_are_no_wedge() -> None:
    assert after((0, generated(100)), (5, generated(101)), (9, generated(101))).wedged is False


def test_idle_engine_is_no_wedge() -> None:
    assert after((0, generated(100, running=0)), (60, generated(100, running=0))).wedged is False


def test_standstill_counts_from_when_requests_began_to_run() -> None:
    state = after((0, generated(100, running=0)), (60, generated(100)), (64, generated(100)))
    assert state.wedged is False
    assert see(state, generated(100), 65).wedged is True


def test_wedge_ends_when_tokens_move_again() -> None:
    assert after((0, generated(100)), (6, generated(100)), (7, generated(101))).wedged is False


def test_engine_without_live_counters_cannot_be_called_wedged() -> None:
    still = Visit(health="ok", sample=EngineSample(running=3))
    assert after((0, still), (60, still)).wedged is None
    unknown_load = Visit(health="ok", sample=EngineSample(progress=5.0))
    assert after((0, unknown_load), (60, unknown_load)).wedged is None


def test_restart_is_no_wedge() -> None:
    assert after((0, generated(100, start_time=1.0)), (6, generated(100, start_time=2.0))).wedged is False


# ---- prompt tokens that were computed ----


def prompted(prompt: float, cached: float) -> Visit:
    return replace(OK, sample=EngineSample(counters={"prompt_tokens": prompt, "cached_tokens": cached}))


def test_cached_tokens_that_are_counted_a_moment_before_the_prompt_are_no_restart() -> None:
    state = after((0, prompted(5000, 1000)))
    told = [state.uncached_tokens]
    for now, visit in ((1, prompted(5000, 1900)), (2, prompted(6000, 1900))):
        before, state = state, see(state, visit, now)
        assert boot_id(state) == boot_id(before)
        told.append(state.uncached_tokens)
    assert told == [4000, 4000, 4100]


def test_computed_prompt_tokens_begin_anew_with_the_engine() -> None:
    assert after((0, prompted(5000, 1000)), (1, prompted(10, 0))).uncached_tokens == 10


def test_computed_prompt_tokens_are_unknown_where_the_engine_tells_no_cached_ones() -> None:
    visit = replace(OK, sample=EngineSample(counters={"prompt_tokens": 5.0}))
    assert after((0, visit)).uncached_tokens is None


# ---- which start of the engine ----


def boot_id(state: EngineState) -> str:
    assert state.boot is not None
    return state.boot.id


@pytest.mark.parametrize(
    "restarted",
    [
        [generated(100, start_time=1.0), generated(100, start_time=2.0)],
        [generated(100), generated(3)],
        [generated(100, start_time=1.0), generated(3, start_time=1.0)],
    ],
    ids=["start time", "counter reset", "counter reset at the same start time"],
)
def test_boot_id_changes_when_the_engine_restarted(restarted: list[Visit]) -> None:
    first = after((0, restarted[0]))
    second = see(first, restarted[1], 1)
    assert boot_id(second) != boot_id(first)
    assert len(second.points) == 1  # figures of the old start are not mixed with the new one's


def test_boot_id_changes_with_the_process() -> None:
    first = see(EngineState(), generated(100), 0, process="7-100-x")
    assert boot_id(see(first, generated(101), 1, process="7-100-x")) == boot_id(first)
    assert boot_id(see(first, generated(101), 1, process="9-200-x")) != boot_id(first)


def test_boot_id_changes_with_the_process_even_at_an_equal_start_time() -> None:
    first = see(EngineState(), generated(100, start_time=1.0), 0, process="7-100-x")
    assert boot_id(see(first, generated(101, start_time=1.0), 1, process="9-200-x")) != boot_id(first)


def test_boot_id_stays_when_a_witness_only_begins_or_ceases_to_speak() -> None:
    state = see(EngineState(), generated(100), 0)
    first = boot_id(state)
    state = see(state, generated(101, start_time=5.0), 1, process="7-100-x")
    state = see(state, generated(102), 2)
    state = see(state, REFUSED, 3)
    state = see(state, generated(103, start_time=5.0), 4, process="7-100-x")
    assert boot_id(state) == first


def test_restart_during_an_outage_is_seen_by_the_counters() -> None:
    before = after((0, generated(100)))
    state = see(see(before, REFUSED, 1), generated(3), 2)
    assert boot_id(state) != boot_id(before)


def test_boot_id_is_the_same_for_an_agent_that_was_restarted() -> None:
    assert boot_id(after((0, generated(100, start_time=5.0)))) == boot_id(after((900, generated(200, start_time=5.0))))
    assert boot_id(after((0, generated(100)))) == boot_id(after((900, generated(200))))
    assert boot_id(after((0, generated(100, start_time=5.0)))) != boot_id(after((0, generated(100, start_time=6.0))))


def test_one_restart_that_two_witnesses_see_one_after_the_other_is_one_change() -> None:
    state = see(EngineState(), generated(100, start_time=1.0), 0, process="7-100-x")
    first = boot_id(state)
    state = see(state, generated(3, start_time=2.0), 1, process="7-100-x")  # /proc was read before the restart
    second = boot_id(state)
    state = see(state, generated(4, start_time=2.0), 2, process="9-200-x")
    assert first != second == boot_id(state)
    state = see(EngineState(), generated(100), 0, process="7-100-x")
    state = see(state, Visit(health="ok"), 1, process="9-200-x")  # its metrics did not come
    second = boot_id(state)
    assert boot_id(see(state, generated(100, start_time=2.0), 2, process="9-200-x")) == second


def test_engine_that_is_loading_has_no_boot_id_yet() -> None:
    assert after((0, Visit(health="error"))).boot is None
    assert after((0, Visit(health="error")), (1, generated(0))).boot is not None


def test_every_reset_gets_an_id_of_its_own() -> None:
    state, ids = EngineState(), []
    for now, tokens in enumerate((100, 3, 2, 1)):
        state = see(state, generated(tokens), now)
        ids.append(boot_id(state))
    assert len(set(ids)) == 4
