"""The predicted cost, term by term, and the node that a pick takes by it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.books import FAILURE_DECAY_S, MIN_SAMPLES, Books, Outstanding, Sent, Work
from balancer.core.cost import (
    FULL_SCAN,
    HOLDER_CANDIDATES,
    PRICES,
    RANDOM_CANDIDATES,
    CostPolicy,
    Offer,
    PredictedCost,
    _costs,
    _figures,
    caution_s,
    cost_s,
    explained,
)
from balancer.core.health import NodeReport
from balancer.core.prefix_index import PrefixIndex
from balancer.core.request import NodeId

S = 0.001  # seconds per prompt token of the nodes below
POLICY = CostPolicy()


@dataclass(slots=True, eq=False)
class Server:
    id: NodeId
    books: Books = field(default_factory=Books)
    weight: float = 1.0


def server(name: str, s_per_token: float = S) -> Server:
    """A node that has shown its pace, idle at time 0."""
    made = Server(NodeId(name))
    now = -100.0
    for _ in range(MIN_SAMPLES):
        sent = made.books.dispatched(Work(prompt_tokens=1000), 0, now)
        now += 1000 * s_per_token
        made.books.first_token(sent, now)
        made.books.finished(sent, now)
    return made


def fleet(count: int) -> tuple[Server, ...]:
    return tuple(server(f"n{at}") for at in range(count))


def offer(books: Books, now: float = 0.0, **changes: Any) -> Offer:
    work = Work(prompt_tokens=1000.0, expected_output=100.0)
    return Offer(
        **{"figures": books.figures(now), "work": work, "held_blocks": 0, "most_held": 0, "now": now, **changes}
    )


def price(name: str, books: Books, now: float = 0.0, **changes: Any) -> float:
    return PRICES[name](offer(books, now, **changes))


def test_an_idle_node_costs_its_prefill_and_what_it_takes_from_others() -> None:
    books = server("a").books

    assert price("backlog", books) == 0.0
    assert price("prefill", books) == pytest.approx(1.0)
    assert price("interference", books) == pytest.approx(2.0 * 1.0 * 0.3)
    assert price("decode", books) == pytest.approx(0.1 * 100 * 0.025)
    assert [price(name, books) for name in ("waste", "slots", "kv_pressure", "failure")] == [0.0] * 4


def test_the_backlog_is_the_time_to_read_what_was_sent_before() -> None:
    books = server("a").books
    books.dispatched(Work(prompt_tokens=2000), 0, 0.0)

    assert price("backlog", books, 0.5) == pytest.approx(1.5)


def test_waiting_beyond_two_seconds_counts_five_times() -> None:
    books = server("a").books
    assert price("late", books) == 0.0

    books.dispatched(Work(prompt_tokens=2000), 0, 0.0)
    assert price("late", books, 0.5) == pytest.approx(4.0 * (1.5 + 1.0 - 2.0))


def test_what_is_held_need_not_be_read() -> None:
    books = server("a").books
    work = Work(prompt_tokens=1000.0, block_tokens=256.0)

    assert price("prefill", books, work=work, held_blocks=3) == pytest.approx(0.232)
    assert price("prefill", books, work=work, held_blocks=4) == pytest.approx(0.001)


def test_reading_again_what_another_node_holds_is_charged_twice() -> None:
    books = server("a").books
    work = Work(prompt_tokens=1000.0, block_tokens=256.0)

    assert price("waste", books, work=work, held_blocks=1, most_held=3) == pytest.approx(2.0 * 0.512)


def test_interference_grows_with_the_streams_there_up_to_fifty() -> None:
    books = Books()
    for _ in range(60):
        books.dispatched(Work(prompt_tokens=1), 0, 0.0)
    at_sixty = price("interference", books)
    books.dispatched(Work(prompt_tokens=1), 0, 0.0)

    assert at_sixty == price("interference", books) == pytest.approx(2.0 * 0.2 * (0.3 + 0.02 * 50))


def test_taken_slots_cost_the_wait_for_one() -> None:
    books = Books(slots=2)
    books.dispatched(Work(prompt_tokens=1, expected_output=0), 0, 0.0)
    assert price("slots", books) == 0.0

    books.dispatched(Work(prompt_tokens=1, expected_output=0), 0, 0.0)
    books.dispatched(Work(prompt_tokens=1, expected_output=0), 0, 0.0)
    assert price("slots", books) == pytest.approx(2 * 100 * 0.025 / 2)


def test_kv_pressure_begins_at_85_percent() -> None:
    books = Books(kv_tokens=10_000)
    books.dispatched(Work(prompt_tokens=7500, expected_output=0), 0, 0.0)
    assert price("kv_pressure", books) == 0.0

    books.dispatched(Work(prompt_tokens=1000, expected_output=0), 0, 0.0)
    assert price("kv_pressure", books) == pytest.approx(20 * 0.1)


def test_a_failure_costs_twelve_seconds_and_fades() -> None:
    books = Books()
    books.failed(books.dispatched(Work(prompt_tokens=1), 0, 0.0), 0.0)

    assert price("failure", books, 0.0) == pytest.approx(12.0)
    assert price("failure", books, FAILURE_DECAY_S) == pytest.approx(12.0 / math.e)


def test_work_without_generation_has_no_decode_price() -> None:
    books = server("a").books
    work = Work(prompt_tokens=1000.0, generates=False, streams=False)

    assert price("decode", books, work=work) == price("slots", books, work=work) == 0.0


def test_a_share_costs_nothing_for_the_first_request_and_more_for_each_further_one() -> None:
    assert caution_s(0.1, 0, POLICY) == 0.0
    assert caution_s(0.1, 2, POLICY) == pytest.approx(4.5)
    assert caution_s(1.0, 50, POLICY) == 0.0


# -- the pick


def test_the_least_cost_wins() -> None:
    slow, fast = server("slow", 3 * S), server("fast")
    policy = PredictedCost[Server](PrefixIndex())
    choice = policy.choose([slow, fast], Work(prompt_tokens=1000.0), 0.0, Random(1))

    assert choice is not None
    assert choice.node is fast
    assert explained(choice)[0].cost_s == pytest.approx(cost_s(offer(fast.books, work=Work(prompt_tokens=1000.0))))


def test_among_near_equals_the_fewest_requests_win() -> None:
    busy, idle = server("busy"), server("idle", 1.02 * S)
    sent = busy.books.dispatched(Work(prompt_tokens=1, expected_output=0), 0, 0.0)
    busy.books.first_token(sent, 0.0)
    work = Work(prompt_tokens=5000.0, expected_output=0.0)
    policy = PredictedCost[Server](PrefixIndex(), CostPolicy(interference_per_request=0.0))
    choice = policy.choose([busy, idle], work, 0.0, Random(1))

    assert choice is not None
    assert choice.node is idle


def test_equal_nodes_share_at_random() -> None:
    nodes = fleet(4)
    policy = PredictedCost[Server](PrefixIndex())
    rng = Random(1)
    counts = Counter(policy.choose(nodes, Work(prompt_tokens=9.0), 0.0, rng).node.id for _ in range(400))  # type: ignore[union-attr]

    assert min(counts[node.id] for node in nodes) > 60


def test_the_prefix_draws_until_its_holder_is_too_busy() -> None:
    holder, other = server("holder"), server("other")
    index = PrefixIndex()
    index.placed(holder.id, (1, 2, 3), 0.0)
    policy = PredictedCost[Server](index)
    work = Work(prompt_tokens=800.0, blocks=(1, 2, 3), block_tokens=256.0)
    choice = policy.choose([other, holder], work, 0.0, Random(1))
    assert choice is not None
    assert (choice.node, choice.held_blocks) == (holder, 3)

    holder.books.dispatched(Work(prompt_tokens=5000), 0, 0.0)
    choice = policy.choose([other, holder], work, 0.0, Random(1))
    assert choice is not None
    assert (choice.node, choice.held_blocks) == (other, 0)


def test_a_newcomer_is_taken_to_be_like_the_others() -> None:
    nodes = [server("a", 0.004), server("b", 0.002), server("c", 0.003), Server(NodeId("new"))]
    PredictedCost[Server](PrefixIndex()).choose(nodes, Work(prompt_tokens=9.0), 0.0, Random(1))

    assert nodes[3].books.s_per_token == pytest.approx(0.003)


def test_a_node_that_cannot_be_used_is_not_taken() -> None:
    nodes = fleet(40)
    policy = PredictedCost[Server](PrefixIndex())
    only = nodes[33]
    for _ in range(20):
        choice = policy.choose(nodes, Work(prompt_tokens=9.0), 0.0, Random(1), usable=lambda node: node is only)
        assert choice is not None
        assert choice.node is only

    assert policy.choose(nodes, Work(prompt_tokens=9.0), 0.0, Random(1), usable=lambda node: False) is None
    assert policy.choose((), Work(prompt_tokens=9.0), 0.0, Random(1)) is None


def test_further_prices_are_added() -> None:
    a, b = fleet(2)
    policy = PredictedCost[Server](PrefixIndex())
    further = {"session": lambda node: 0.0 if node is b else 5.0}
    choice = policy.choose([a, b], Work(prompt_tokens=9.0), 0.0, Random(1), further=further)
    assert choice is not None
    assert choice.node is b

    best, worst = policy.explain([a, b], Work(prompt_tokens=9.0), 0.0, further)
    assert (best.node, worst.terms_s["session"]) == (b.id, 5.0)


def test_of_a_large_fleet_a_sample_is_priced_that_has_the_holders_and_the_last_winners() -> None:
    nodes = fleet(200)
    index = PrefixIndex()
    for node in nodes[:3]:
        index.placed(node.id, (1, 2), 0.0)
    index.placed(NodeId("not a candidate"), (1, 2, 3), 0.0)
    policy = PredictedCost[Server](index)
    rng = Random(1)
    roster = policy._roster(nodes)
    roster.winners = [nodes[150], nodes[151]]
    for _ in range(50):
        scan = policy._sampled(roster, index.levels((1, 2, 3)), rng)
        assert {nodes[0], nodes[1], nodes[2], nodes[150], nodes[151]} <= set(scan)
        assert RANDOM_CANDIDATES <= len(scan) == len(set(scan)) <= RANDOM_CANDIDATES + HOLDER_CANDIDATES + 2


@pytest.mark.parametrize("count", [FULL_SCAN + 1, 23, 100, 1000])
def test_every_node_of_a_large_fleet_is_as_likely_to_be_looked_at(count: int) -> None:
    nodes = tuple(Server(NodeId(str(at))) for at in range(count))
    policy = PredictedCost[Server](PrefixIndex())
    roster = policy._roster(nodes)
    rng = Random(1)
    rounds = 200 * count // RANDOM_CANDIDATES
    counts = Counter(node.id for _ in range(rounds) for node in policy._sampled(roster, (), rng))

    assert len(counts) == count
    assert max(counts.values()) < 1.5 * 200
    assert min(counts.values()) > 0.5 * 200


def test_what_is_kept_of_large_fleets_is_bounded() -> None:
    policy = PredictedCost[Server](PrefixIndex())
    for _ in range(50):
        policy.choose(fleet(FULL_SCAN + 1), Work(prompt_tokens=9.0), 0.0, Random(1))

    assert len(policy._rosters) == 8


def test_a_black_hole_draws_about_one_percent() -> None:
    nodes = fleet(8)
    hole = nodes[3]
    policy = PredictedCost[Server](PrefixIndex())
    rng = Random(1)
    now, taken = 0.0, 0
    running: list[tuple[float, Server, Sent]] = []
    for _ in range(3000):
        now += 0.05
        for end in [end for end in running if end[0] <= now]:
            running.remove(end)
            end[1].books.finished(end[2], now, 100)
        work = Work(prompt_tokens=500.0, expected_output=100.0)
        choice = policy.choose(nodes, work, now, rng)
        assert choice is not None
        sent = choice.node.books.dispatched(work, choice.held_blocks, now)
        if choice.node is hole:
            taken += 1
            hole.books.failed(sent, now + 0.005)
        else:
            choice.node.books.first_token(sent, now + 0.5)
            running.append((now + 3.0, choice.node, sent))

    assert taken <= 60


# -- the running form


def test_every_price_is_explained_with_the_age_of_its_evidence() -> None:
    a, b = server("a"), Server(NodeId("b"))
    a.books.failed(a.books.dispatched(Work(prompt_tokens=1), 0, 5.0), 5.0)
    b.books.shared(Outstanding(requests=1), 6.0)
    first, last = PredictedCost[Server](PrefixIndex()).explain([a, b], Work(prompt_tokens=1000.0), 7.0)

    assert (first.node, last.node) == (b.id, a.id)
    assert list(last.terms_s) == list(PRICES)
    assert last.cost_s == pytest.approx(sum(last.terms_s.values()))
    assert (last.failure_age_s, last.report_age_s, last.is_prior) == (2.0, None, False)
    assert (first.others_age_s, first.pace_age_s, first.is_prior) == (1.0, None, True)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["stream", "unary", "embed", "first", "finish", "fail", "cancel", "share", "assume", "report", "pardon"]
        ),
        st.integers(0, 3),
        st.integers(0, 9),
        st.floats(0.0, 2.0),
    ),
    max_size=80,
)
POLICIES = st.builds(
    CostPolicy,
    decode=st.floats(0, 2),
    interference=st.floats(0, 4),
    interference_most_requests=st.floats(0, 10),
    waste=st.floats(0, 4),
    late=st.floats(0, 4),
    late_from_s=st.floats(0, 4),
    kv_share=st.floats(0, 1),
    kv_pressure=st.floats(0, 40),
    failure=st.floats(0, 40),
)


@given(STEPS, POLICIES, st.floats(1, 20_000), st.booleans())
def test_the_running_form_equals_the_named_terms(
    steps: list[tuple[str, int, int, float]], policy: CostPolicy, prompt: float, generates: bool
) -> None:
    nodes = [Server(NodeId(str(at)), Books(slots=3, kv_tokens=[30_000, None][at % 2])) for at in range(4)]
    live: list[tuple[Server, Sent]] = []
    now = 50.0
    for name, which, size, pause_s in steps:
        now += pause_s
        node = nodes[which]
        work = Work(prompt_tokens=1 + 700.5 * size, expected_output=20.0 * size)
        if name == "stream":
            live.append((node, node.books.dispatched(work, size % 3, now)))
        elif name == "unary":
            live.append((node, node.books.dispatched(work._replace(streams=False), 0, now)))
        elif name == "embed":
            live.append((node, node.books.dispatched(work._replace(streams=False, generates=False), 0, now)))
        elif name == "share":
            node.books.shared(Outstanding(tokens=100.0 * size, context=900.0 * size, requests=size), now)
        elif name == "assume":
            node.books.assumed(Outstanding(requests=size), now)
        elif name == "report":
            node.books.reported(NodeReport(id="n", url="", running=float(size), slots=size), now, now)
        elif name == "pardon":
            (node.books.forgive if size % 2 else node.books.recovered)()
        elif live:
            at, sent = live.pop(size % len(live))
            if name == "first":
                at.books.first_token(sent, now)
                live.append((at, sent))
            elif name == "finish":
                at.books.finished(sent, now, 30 * size, 100)
            elif name == "fail":
                at.books.failed(sent, now)
            else:
                at.books.cancelled(sent, now)
        _check(nodes, Work(prompt_tokens=prompt, expected_output=77.0, generates=generates), now, policy)
    _check(nodes, Work(prompt_tokens=prompt, expected_output=77.0, generates=generates), now + 30.0, policy)


def _check(nodes: list[Server], work: Work, now: float, policy: CostPolicy) -> None:
    for node in nodes:
        kept = node.books.figures(now)
        assert kept == node.books._take_figures(), "an event changed a figure and left the old one in use"
    for held in (None, [0, 2, 5, 1]):
        running = _costs(_figures(nodes, now), work, held, now, policy)
        for at, (node, cost) in enumerate(zip(nodes, running, strict=True)):
            named = cost_s(
                Offer(
                    figures=node.books.figures(now),
                    work=work,
                    held_blocks=held[at] if held else 0,
                    most_held=5 if held else 0,
                    now=now,
                    policy=policy,
                )
            )
            assert cost == pytest.approx(named, rel=1e-9, abs=1e-9)
