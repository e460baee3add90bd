"""Policies compared over HTTP: the trace, one short run, and the table."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from loadtest.bench.picks import Fleet
from loadtest.clock import SystemClock
from loadtest.compare import table, trace
from loadtest.compare.__main__ import _simulated
from loadtest.compare.run import NODE, Measured, measure, profiles
from loadtest.engine_model import EngineModel, Sequence


def test_a_trace_is_the_same_for_the_same_seed_and_in_the_order_of_time() -> None:
    one, two = (trace.make(50, 10.0, Random(3)) for _ in range(2))
    assert one == two
    times = [turn.at_s for turn in one]
    assert times == sorted(times)


def test_later_turns_repeat_what_was_said() -> None:
    arrivals = [turn.arrival(NODE.block_tokens) for turn in trace.make(300, 10.0, Random(3))]
    blocks = [block for arrival in arrivals for block in arrival.blocks]
    assert len(set(blocks)) < 0.4 * len(blocks), "most of what is asked was asked before"


def test_the_simulated_node_takes_as_long_as_the_fake_one() -> None:
    fake, simulated = EngineModel(NODE), profiles()[0]
    fake.submit(Sequence(prompt_tokens=400, max_tokens=10), 0.0)
    assert fake.begin_step(0.0) is not None
    fake.end_step(0.0)
    assert fake.begin_step(0.0) == simulated.step_s(0, 0.0, 1, 400)
    # A prefill beside a stream: the prompt's tokens, and the decode step.
    fake.end_step(0.0)
    fake.submit(Sequence(prompt_tokens=300, max_tokens=10), 0.0)
    step_s = fake.begin_step(0.0)
    assert step_s is not None
    assert abs(step_s - simulated.step_s(300, 0.0, 1, 400)) < 1e-9
    assert profiles()[-1].decode_s == 2 * simulated.decode_s


async def test_a_run_times_every_answer_of_a_real_balancer() -> None:
    turns = trace.make(8, 10.0, Random(1))
    at_once = [replace(turn, at_s=0.0, body={**turn.body, "max_tokens": 4}) for turn in turns]
    run = await measure("predicted_cost", at_once, SystemClock())
    assert (run.requests, run.failures) == (8, 0)
    assert 0.0 < run.ttft_s[0] < run.e2e_s[0]
    assert run.balancer_cpu > 0


def measured(policy: str, p95_s: float, **changes: float) -> Measured:
    three = (p95_s / 2, p95_s, 2 * p95_s)
    run = Measured(
        policy=policy,
        requests=10,
        failures=0,
        ttft_s=three,
        e2e_s=three,
        hit_ratio=0.5,
        uneven=0.1,
        load_cpu=0.1,
        balancer_cpu=0.1,
    )
    return replace(run, **changes)  # type: ignore[arg-type]


def test_the_table_holds_medians_and_the_verdict_compares_orders() -> None:
    slow = table.http_row("slow", [measured("slow", p95_s) for p95_s in (9.0, 4.0, 5.0)])
    fast = table.http_row("fast", [measured("fast", 1.0, failures=1), measured("fast", 1.0)])
    assert slow[1] == (2.5, 5.0, 10.0)
    assert fast[3] == 0.05
    assert table.order([slow, fast]) == ["fast", "slow"]
    assert "in the simulator the same" in table.verdict([slow, fast], [slow, fast])
    swapped = [("slow", *fast[1:]), ("fast", *slow[1:])]
    assert "in the simulator another one: slow < fast" in table.verdict([slow, fast], swapped)
    assert table.render("over HTTP", [slow, fast]).splitlines()[1].startswith("slow")


def test_in_the_simulator_prices_beat_counting_on_this_trace() -> None:
    # The nodes differ by two and most of a prompt is held somewhere: counting requests knows of neither.
    turns = trace.make(300, 10.0, Random(1))
    counted, priced = (_simulated(policy, turns) for policy in ("least_outstanding", "predicted_cost"))
    assert priced.ttft_s[0] < 0.6 * counted.ttft_s[0]
    assert priced.hit_ratio > 1.3 * counted.hit_ratio


def test_the_bench_of_picks_picks() -> None:
    assert Fleet(20, 10_240).pick(256) > 0.0
