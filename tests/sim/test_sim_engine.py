"""One simulated engine: what a stage jump may and may not change."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from loadtest.sim.arrival import Arrival
from loadtest.sim.engine import NEVER_S, Engine
from loadtest.sim.forecast import finish_s
from loadtest.sim.profiles import H100_70B, PROFILES
from loadtest.sim.sequence import Sequence

SMALL = replace(H100_70B, kv_tokens=8192)


def play(engine: Engine, arrivals: list[Arrival]) -> dict[int, tuple[float, float]]:
    """(first token, end) of each arrival."""
    times: dict[int, tuple[float, float]] = {}
    firsts: dict[int, float] = {}
    following = 0
    while following < len(arrivals) or engine.stage_end_s < NEVER_S:
        if following < len(arrivals) and arrivals[following].at_s < engine.stage_end_s:
            engine.submit(Sequence(following, arrivals[following]), arrivals[following].at_s)
            following += 1
            continue
        end_s = engine.stage_end_s
        first, done = engine.end_stage()
        firsts.update({sequence.key: end_s for sequence in first})
        for sequence in done:
            assert sequence.key not in times
            times[sequence.key] = (firsts[sequence.key], end_s)
    return times


def test_alone_a_request_takes_its_prefill_and_a_step_a_token() -> None:
    first_s, end_s = play(Engine(H100_70B), [Arrival(0.0, 1000, 101)])[0]
    assert first_s == pytest.approx(H100_70B.prefill_alone_s(1000))
    steps_s = sum(H100_70B.step_s(0, 0.0, 1, 1001 + step) for step in range(100))
    assert end_s - first_s == pytest.approx(steps_s)


def test_cutting_a_run_of_steps_for_nothing_changes_no_time() -> None:
    plain = play(Engine(H100_70B), [Arrival(0.0, 1000, 200)])[0]
    engine = Engine(H100_70B)
    engine.submit(Sequence(0, Arrival(0.0, 1000, 200)), 0.0)
    engine.end_stage()
    nobody = Sequence(9, Arrival(0.5, 10, 10))
    end_s = 0.0
    for cut in range(20):
        engine.cancel(nobody, 0.5 + 0.2 * cut)  # it was never there: the run is cut all the same
        if engine.stage_end_s <= 0.7 + 0.2 * cut:
            end_s = engine.stage_end_s
            engine.end_stage()
    while engine.stage_end_s < NEVER_S:
        end_s = engine.stage_end_s
        engine.end_stage()
    assert end_s == pytest.approx(plain[1])


def test_equal_heads_are_computed_once() -> None:
    blocks = tuple(range(8))
    engine = Engine(H100_70B)
    times = play(engine, [Arrival(0.0, 4100, 5, blocks), Arrival(5.0, 4100, 5, blocks)])
    assert engine.hit_tokens == 8 * 512
    assert times[1][0] - 5.0 < 0.2 * times[0][0]


def test_what_was_used_longest_ago_leaves_the_cache_first() -> None:
    engine = Engine(SMALL)
    prompts = [tuple(range(100 * number, 100 * number + 6)) for number in range(4)]
    play(engine, [Arrival(10.0 * at, 3072, 2, blocks) for at, blocks in enumerate(prompts)])
    assert engine.pool.matching(prompts[0]) < 6
    assert engine.pool.matching(prompts[3]) == 6


def test_a_full_cache_preempts_the_last_comer_and_everybody_ends() -> None:
    engine = Engine(SMALL)
    times = play(engine, [Arrival(0.01 * at, 1500, 1500) for at in range(8)])
    assert engine.preemptions > 0
    assert len(times) == 8
    assert engine.pool.used == 0


def test_no_more_than_the_sequence_slots_run_at_once() -> None:
    engine = Engine(replace(H100_70B, max_sequences=4))
    for key in range(10):
        engine.submit(Sequence(key, Arrival(0.0, 100, 50)), 0.0)
    while engine.stage_end_s < NEVER_S:
        assert len(engine.running) <= 4
        engine.end_stage()


@pytest.mark.parametrize("profile", [SMALL, PROFILES["l4-8b"]], ids=["small", "l4"])
def test_nothing_is_lost_or_kept_on_random_traffic(profile: object) -> None:
    rng = Random(3)
    engine = Engine(SMALL if profile is SMALL else PROFILES["l4-8b"])
    at_s, arrivals = 0.0, []
    for _ in range(300):
        at_s += rng.expovariate(1.0)
        prompt = rng.randint(1, 4000)
        head = rng.randint(0, 5)
        arrivals.append(Arrival(at_s, prompt, rng.randint(1, 300), tuple(head * 100 + n for n in range(prompt // 512))))
    times = play(engine, arrivals)
    assert len(times) == 300
    assert all(arrivals[key].at_s < first <= end for key, (first, end) in times.items())
    assert (engine.pool.used, engine.context_tokens, len(engine.running)) == (0, 0, 0)
    # A preempted sequence's first token is not produced twice.
    assert engine.generated_tokens == sum(arrival.output_tokens for arrival in arrivals)


def test_a_forecast_comes_true_when_nothing_else_arrives() -> None:
    engine = Engine(H100_70B)
    arrivals = [Arrival(0.05 * at, 2000 + 100 * at, 100 + at) for at in range(20)]
    for key, arrival in enumerate(arrivals[:-1]):
        while engine.stage_end_s <= arrival.at_s:
            engine.end_stage()
        engine.submit(Sequence(key, arrival), arrival.at_s)
    while engine.stage_end_s <= arrivals[-1].at_s:
        engine.end_stage()
    foreseen_s = finish_s(engine, arrivals[-1], arrivals[-1].at_s)
    assert play(Engine(H100_70B), arrivals)[19][1] == pytest.approx(foreseen_s)
