"""Rows of the standard table, cut to seconds: fixed seeds, and bounds with their reason."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from loadtest.sim.results import Figures, mean
from loadtest.sim.rows import ROWS
from loadtest.sim.runs import SATURATED_SLO_RATIO, saturation, simulate
from loadtest.sim.standard import DATA, Traffic

TRAFFIC = Traffic(mooncake=DATA / "mooncake_conversation_600.jsonl", conv=DATA / "azure2023_conv_800.csv", length_s=150)
ROW = {row.name: row for row in ROWS}
SEEDS = (1, 2)


@cache
def cell(row: str, policy: str) -> Figures:
    rate = ROW[row].rate_scale or 2.2
    traffic = replace(TRAFFIC, length_s=300) if row == "black hole" else TRAFFIC
    return mean([simulate(policy, ROW[row].scenario(seed), traffic.arrivals(ROW[row], rate, seed)) for seed in SEEDS])


def test_near_saturation_first_tokens_come_sooner_than_by_counting_requests() -> None:
    # The table's bound is 0.6 at the rate found by bisection; below it queues are short with any policy, hence 0.8.
    assert cell("equal", "predicted_cost").ttft_s[2] < 0.8 * cell("equal", "least_outstanding").ttft_s[2]


def test_with_half_of_the_nodes_half_as_fast_long_answers_end_sooner() -> None:
    # Counting requests gives slow nodes their equal share until they are twice as full; seconds see it at once.
    assert cell("half", "predicted_cost").e2e_s[2] < 0.85 * cell("half", "least_outstanding").e2e_s[2]
    assert cell("half", "predicted_cost").timeout_ratio <= 0.001


def test_on_mixed_cards_nobody_waits_for_the_slow_ones() -> None:
    # The slow cards hold 27,000 tokens: equal counts overfill them, and what waits there times out.
    assert cell("mixed", "predicted_cost").e2e_s[2] < 0.6 * cell("mixed", "least_outstanding").e2e_s[2]
    assert cell("mixed", "predicted_cost").timeout_ratio == 0.0


def test_a_node_that_turns_three_times_slower_costs_little() -> None:
    # Counting tokens without a speed goes on sending it an eighth; learning the speed does not.
    assert cell("slow", "predicted_cost").slo_ratio > cell("slow", "token_count").slo_ratio


def test_a_black_hole_draws_few() -> None:
    # Taking turns loses an eighth of what comes. The decaying price has to be learnt anew every few seconds.
    assert cell("black hole", "predicted_cost").error_ratio < 0.5 * cell("black hole", "round_robin").error_ratio


def test_a_hang_times_nobody_out_under_the_watchdog() -> None:
    assert cell("hang", "predicted_cost").timeout_ratio == 0.0


def test_a_polled_score_without_own_picks_is_worse_than_taking_turns() -> None:
    # A whole interval's traffic goes to the one node that looked best.
    blind = cell("half", "weighted_blind")
    assert blind.slo_ratio < cell("half", "round_robin").slo_ratio
    assert cell("half", "weighted").slo_ratio > blind.slo_ratio


def test_knowing_everything_beats_counting_requests() -> None:
    assert cell("slow", "oracle").slo_ratio > cell("slow", "least_outstanding").slo_ratio


def test_saturation_is_where_the_oracle_just_keeps_the_slo() -> None:
    short = Traffic(mooncake=TRAFFIC.mooncake, conv=TRAFFIC.conv, length_s=40)
    row = ROW["equal"]
    scale = saturation(row.scenario(1), short.arrivals(row, 1.0, 1), 1.0, 16.0, 4)
    assert simulate("oracle", row.scenario(1), short.arrivals(row, scale, 1)).slo_ratio >= SATURATED_SLO_RATIO
    beyond = short.arrivals(row, scale * 2.0, 1)
    assert simulate("oracle", row.scenario(1), beyond).slo_ratio < SATURATED_SLO_RATIO
