"""When would-be hits are served: never before the evidence is there, and with the promised confidence."""

from __future__ import annotations

import math
from random import Random

import pytest

from balancer.core.semantic.guards import Verdict
from balancer.core.semantic.trust import MAX_ENTRIES, MAX_SAMPLES, MEMORY, Ask, History, Pair, Sample, Serve, Trust

AGREE, ADDED, REPLACED = Verdict(None), Verdict(None, 1), Verdict(None, 1, 1)
BOUND = 0.01
# Comparisons without an error that the default bound takes, and one of ten times that: at least ln(60) / -ln(1 - b).
CLEAN = {0.01: 407, 0.1: 39}


def pair(entry: str = "e", verdict: Verdict = ADDED, similarity: float = 0.95, model: str = "m") -> Pair:
    return Pair(entry, model, verdict, similarity)


def trust(bound: float = BOUND, observe_share: float = 0.0) -> Trust:
    return Trust(bound, observe_share, Random(1))


def see(
    trust: Trust,
    right: int,
    wrong: int = 0,
    *,
    entry: str = "",
    verdict: Verdict = ADDED,
    similarity: float = 0.95,
) -> None:
    """Comparisons, each of an entry of its own unless one is named."""
    for number in range(right + wrong):
        seen = pair(entry or f"{len(trust.entries)}", verdict, similarity)
        trust.observe(Sample(seen, "r", number >= wrong, 0.0))


def test_nothing_is_served_without_evidence() -> None:
    assert trust().decide(pair(similarity=0.99)) == Ask("learning")


@pytest.mark.parametrize("bound", CLEAN)
def test_a_kind_is_served_once_enough_comparisons_were_right(bound: float) -> None:
    learned = trust(bound)
    while not isinstance(learned.decide(pair()), Serve):
        see(learned, 1)
    assert CLEAN[bound] <= len(learned.entries) <= 1.3 * CLEAN[bound]


def test_an_error_costs_trust_and_more_evidence_earns_it_back() -> None:
    learned = trust()
    see(learned, 520)
    assert learned.decide(pair()) == Serve()
    see(learned, 0, 3)
    assert learned.decide(pair()) == Ask("learning")
    see(learned, 800)
    assert learned.decide(pair()) == Serve()


def test_relations_and_models_do_not_vouch_for_each_other() -> None:
    learned = trust()
    see(learned, 600)
    assert learned.decide(pair()) == Serve()
    for other in (pair(model="other"), pair(verdict=REPLACED), pair(verdict=Verdict(None, 2))):
        assert learned.decide(other) == Ask("learning")


def test_what_is_nearer_is_served_where_the_farther_is_not() -> None:
    learned = trust()
    see(learned, 600, similarity=0.96)
    see(learned, 300, 300, similarity=0.92)
    assert learned.decide(pair(similarity=0.95)) == Serve()
    assert learned.decide(pair(similarity=0.94)) == Ask("learning")


def test_far_pairs_vouch_for_near_ones_too() -> None:
    learned = trust()
    see(learned, 600, similarity=0.81)
    assert learned.decide(pair(similarity=0.99)) == Serve()


def test_what_guards_and_nearness_vouch_for_is_served_in_part_from_the_start() -> None:
    """So many that wrong ones stay under the bound if the error rate is the highest that is still believed."""
    learned = trust()
    vouched = pair(verdict=AGREE, similarity=0.9)
    shares = []
    for seen in (0, 150, 600):
        see(learned, seen, verdict=AGREE)
        shares.append(sum(learned.decide(vouched) == Serve() for _ in range(1000)) / 1000)
    assert 0.2 < shares[0] < shares[1] <= shares[2] == 1.0
    assert trust().decide(pair(verdict=AGREE, similarity=0.89)) == Ask("learning")


def test_errors_take_that_trust_away() -> None:
    learned = trust()
    see(learned, 0, 10, verdict=AGREE)
    assert sum(learned.decide(pair("new", AGREE)) == Serve() for _ in range(1000)) < 200


def test_an_entry_that_went_wrong_takes_only_what_is_nearer_and_after_two_errors_nothing() -> None:
    learned = trust()
    see(learned, 2000)
    see(learned, 0, 1, entry="e", similarity=0.93)
    assert learned.decide(pair("e", similarity=0.93)) == Ask("entry")
    assert learned.decide(pair("e", similarity=0.94)) == Serve()
    assert learned.decide(pair("f", similarity=0.93)) == Serve()
    see(learned, 0, 1, entry="e", similarity=0.93)
    see(learned, 2000)
    assert learned.decide(pair("e", similarity=0.99)) == Ask("entry")


def test_an_entry_with_a_history_of_its_own_does_not_need_its_kind() -> None:
    learned = trust()
    see(learned, 600, entry="e")
    see(learned, 0, 50)
    assert learned.decide(pair("f", similarity=0.95)) == Ask("learning")
    assert learned.decide(pair()) == Serve()


def test_a_share_of_what_could_be_served_is_asked_all_the_same() -> None:
    learned = trust(observe_share=0.1)
    see(learned, 600)
    decisions = [learned.decide(pair()) for _ in range(2000)]
    assert decisions.count(Ask("observing")) == pytest.approx(200, abs=60)
    assert set(decisions) == {Serve(), Ask("observing")}


def test_a_kill_lowers_the_trust_of_neighbours_and_of_nobody_else() -> None:
    learned = trust()
    see(learned, 2000)
    learned.kill("dead", {"near": 0.9})
    assert learned.decide(pair("near", similarity=0.9)) == Ask("entry")
    assert learned.decide(pair("near", similarity=0.91)) == Serve()
    assert learned.decide(pair("far", similarity=0.85)) == Serve()


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_the_ends_of_the_range(bound: float) -> None:
    learned = trust(bound)
    see(learned, 5000)
    assert isinstance(learned.decide(pair("new")), Ask if bound == 0.0 else Serve)


def test_at_the_bound_trust_is_a_rare_mistake_however_often_one_looks() -> None:
    """A kind that is wrong as often as the bound is ever trusted in at most 5 % of all runs (and 3 sigma of 400)."""
    rng = Random(7)
    bound, runs, trusted = 0.05, 400, 0
    for _ in range(runs):
        history = History()
        for _ in range(1000):
            history.add(rng.random() >= bound)
            if history.evidence(bound) >= 20.0:
                trusted += 1
                break
    assert trusted / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_a_kind_that_is_far_better_than_the_bound_is_trusted_soon() -> None:
    rng = Random(7)
    learned = 0
    for _ in range(100):
        history = History()
        for _ in range(400):
            history.add(rng.random() >= 0.005)
        learned += history.evidence(0.05) >= 20.0
    assert learned >= 95


@pytest.mark.parametrize(("right", "wrong"), [(0, 0), (100, 0), (1000, 0), (1000, 5), (50, 50)])
def test_the_upper_rate_is_above_what_was_seen_and_below_one_with_evidence(right: int, wrong: int) -> None:
    history = History(right, wrong)
    upper = history.upper_rate()
    assert upper > (history.rate or 0.0)
    assert (upper < 1.0) == (right > 0)


def test_old_evidence_fades() -> None:
    history = History()
    for _ in range(2 * MEMORY):
        history.add(True)
    assert history.right <= MEMORY
    for _ in range(MEMORY // 4):
        history.add(False)
    assert history.rate is not None
    assert history.rate > 0.2


def test_histories_and_samples_are_bounded() -> None:
    learned = trust()
    see(learned, MAX_ENTRIES + 10)
    assert len(learned.entries) == MAX_ENTRIES
    assert len(learned.samples) == MAX_SAMPLES


def test_the_report_tells_each_kind() -> None:
    learned = trust()
    see(learned, 600)
    see(learned, 10, 10, verdict=REPLACED)
    told = {kind["kind"]: kind for kind in learned.report()}
    assert told["added >= 0.80"]["trusted"]
    assert told["added >= 0.80"]["error_rate"] == 0.0
    assert 0.0 < told["added >= 0.80"]["error_rate_upper_95"] <= 0.01
    assert not told["replaced >= 0.95"]["trusted"]
    assert told["replaced >= 0.95"]["error_rate"] == 0.5
