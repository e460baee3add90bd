"""One node's accounts: what is outstanding there, and how fast it works it off."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.books import (
    DEFAULT_SLOTS,
    FAILURE_DECAY_S,
    MIN_SAMPLES,
    OTHERS_DECAY_S,
    OVERDUE_S,
    PRIOR_S_PER_TOKEN,
    PRIOR_TPOT_S,
    Books,
    Outstanding,
    Sent,
    Work,
)
from balancer.core.health import NodeReport


def stream(tokens: float, **changes: Any) -> Work:
    return Work(**{"prompt_tokens": tokens, "expected_output": 0.0, **changes})


def unary(tokens: float) -> Work:
    return stream(tokens, streams=False)


def embedding(tokens: float) -> Work:
    return stream(tokens, streams=False, generates=False)


def report(**figures: Any) -> NodeReport:
    return NodeReport(id="a", url="http://a", **figures)


def read(books: Books, tokens: int, seconds: float, now: float) -> float:
    """One stream's prompt is read on an idle node in so many seconds, and it ends; returns when."""
    sent = books.dispatched(stream(tokens), 0, now)
    books.first_token(sent, now + seconds)
    books.finished(sent, now + seconds)
    return now + seconds


def trained(s_per_token: float, now: float = 0.0) -> tuple[Books, float]:
    books = Books()
    for _ in range(MIN_SAMPLES):
        now = read(books, 1000, 1000 * s_per_token, now)
    return books, now


# -- what is outstanding


def test_a_request_is_outstanding_from_the_pick_until_its_end() -> None:
    books = Books()
    sent = books.dispatched(Work(prompt_tokens=1000, expected_output=300), 0, 10.0)
    assert (books.n, books.queued_tokens, books.context_tokens) == (1, 1000, 1150)

    books.first_token(sent, 10.2)
    assert (books.n, books.queued_tokens, books.context_tokens) == (1, 0, 1150)

    books.finished(sent, 12.0, 300, 1000)
    assert (books.n, books.queued_tokens, books.context_tokens) == (0, 0, 0)


def test_blocks_that_the_node_holds_are_not_outstanding_but_are_context() -> None:
    books = Books()
    books.dispatched(stream(1000, block_tokens=256.0), 3, 0.0)

    assert (books.queued_tokens, books.context_tokens) == (1000 - 768, 1000)


def test_a_prompt_held_whole_still_counts_one_token() -> None:
    books = Books()
    books.dispatched(stream(700, block_tokens=256.0), 3, 0.0)

    assert books.queued_tokens == 1


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled"])
@pytest.mark.parametrize("again", ["finished", "failed", "cancelled", "first_token"])
def test_an_end_counts_once_and_nothing_after_it(end: str, again: str) -> None:
    books = Books()
    sent = books.dispatched(stream(1000), 0, 0.0)
    books.dispatched(stream(500), 0, 0.0)
    getattr(books, end)(sent, 1.0)
    failure, samples = books.failure, books.pace_samples
    getattr(books, again)(sent, 2.0)

    assert (books.n, books.queued_tokens, books.failure, books.pace_samples) == (1, 500, failure, samples)


def test_a_hung_head_keeps_nothing_of_those_that_overtake_it() -> None:
    books = Books()
    books.dispatched(stream(100), 0, 0.0)
    for now in range(1, 1000):
        read(books, 10, 0.1, float(now))

    assert len(books._fifo) == 1


# -- the pace


def test_a_new_node_is_believed_to_read_at_the_prior_pace() -> None:
    books = Books()
    for count in range(MIN_SAMPLES - 1):
        read(books, 1000, 1.0, float(10 * count))

    assert books.is_new
    assert books.s_per_token == PRIOR_S_PER_TOKEN


def test_a_new_node_takes_over_the_fleets_pace_and_an_old_one_does_not() -> None:
    books = Books()
    books.expect(0.001)
    assert books.s_per_token == 0.001

    old, _ = trained(0.002)
    old.expect(0.001)
    assert old.s_per_token == pytest.approx(0.002)


def test_the_pace_is_seconds_per_uncached_token_from_when_the_node_could_begin() -> None:
    books = Books()
    sent = [books.dispatched(stream(1000), 0, 0.0) for _ in range(MIN_SAMPLES)]  # all at once: one after the other
    for at, one in enumerate(sent):
        books.first_token(one, 0.3 * (at + 1))

    assert books.s_per_token == pytest.approx(0.0003)


def test_a_node_that_slows_down_is_seen_within_a_few_prompts() -> None:
    books, now = trained(0.0002)
    for _ in range(40):
        now = read(books, 3000, 3000 * 0.0006, now + 0.1)

    assert books.s_per_token > 0.0005


def test_first_tokens_of_one_step_do_not_make_a_node_infinitely_fast() -> None:
    books = Books()
    sent = [books.dispatched(stream(100), 0, 0.0) for _ in range(MIN_SAMPLES)]
    for one in sent:
        books.first_token(one, 0.0)

    assert books.s_per_token > 0.0


def test_a_cancelled_heads_time_is_not_charged_to_the_next_prompt() -> None:
    books, now = trained(0.0002)
    long = books.dispatched(stream(50_000), 0, now)
    short = books.dispatched(stream(1000), 0, now)
    books.cancelled(long, now + 5.0)
    books.first_token(short, now + 5.2)

    assert books.s_per_token == pytest.approx(0.0002)


def test_embeddings_teach_the_pace_by_their_whole_time() -> None:
    books = Books()
    now = 0.0
    for _ in range(MIN_SAMPLES):
        sent = books.dispatched(embedding(500), 0, now)
        now += 0.4
        books.finished(sent, now, None, 1000)  # twice as many tokens as estimated

    assert books.s_per_token == pytest.approx(0.0004)
    assert books.tpot_at_s is None


# -- the backlog


def test_the_backlog_shrinks_while_the_head_is_read() -> None:
    books, now = trained(0.001)
    books.dispatched(stream(1000), 0, now)
    books.dispatched(stream(500), 0, now)

    assert books.backlog_s(now) == pytest.approx(1.5)
    assert books.backlog_s(now + 0.4) == pytest.approx(1.1)
    assert books.backlog_s(now + 1.2) == pytest.approx(0.5)


def test_an_overdue_head_makes_the_backlog_grow() -> None:
    books, now = trained(0.001)
    books.dispatched(stream(1000), 0, now)

    assert books.backlog_s(now + 1.5 + OVERDUE_S) == pytest.approx(0.0)
    assert books.backlog_s(now + 5.0) == pytest.approx(4.0)


def test_a_prompt_behind_the_head_begins_when_the_head_is_read() -> None:
    books, now = trained(0.001)
    head = books.dispatched(stream(1000), 0, now)
    books.dispatched(stream(1000), 0, now)
    books.first_token(head, now + 1.0)

    assert books.backlog_s(now + 1.25) == pytest.approx(0.75)


# -- unary answers


def test_a_unary_prompt_leaves_by_the_nodes_own_pace() -> None:
    books, now = trained(0.001)
    books.dispatched(unary(1000), 0, now)
    books.dispatched(unary(500), 0, now)

    assert books.outstanding(now + 0.9).tokens == 1500
    assert books.outstanding(now + 1.0).tokens == 500
    assert books.outstanding(now + 1.6) == Outstanding(tokens=0, context=1500, requests=2, read=MIN_SAMPLES * 1000)


def test_a_later_first_token_takes_off_the_unary_prompts_before_it() -> None:
    books, now = trained(0.001)
    books.dispatched(unary(1000), 0, now)
    sent = books.dispatched(stream(1000), 0, now)
    books.first_token(sent, now + 0.5)

    assert books.queued_tokens == 0


def test_unary_prompts_in_between_do_not_bend_the_pace() -> None:
    books, now = trained(0.0002)
    for _ in range(60):  # the node is really five times slower, and nine of ten requests are unary
        sent = [books.dispatched(unary(1000), 0, now) for _ in range(9)]
        last = books.dispatched(stream(1000), 0, now)
        now += 10.0
        books.first_token(last, now)
        for one in [*sent, last]:
            books.finished(one, now)

    assert books.s_per_token == pytest.approx(0.001, rel=0.02)


def test_a_unary_answer_teaches_no_pace_but_its_time_per_output_token() -> None:
    books, now = trained(0.001)
    samples, pace = books.pace_samples, books.s_per_token
    for _ in range(MIN_SAMPLES):
        sent = books.dispatched(unary(1000), 0, now)
        now += 1.0 + 100 * 0.05
        books.finished(sent, now, 100)

    assert (books.pace_samples, books.s_per_token) == (samples, pace)
    assert books.tpot_s(1000.0) == pytest.approx(0.05)


# -- time per output token


def decode(books: Books, context: float, tpot_s: float, now: float) -> float:
    sent = books.dispatched(stream(context), 0, now)
    books.first_token(sent, now)
    books.finished(sent, now + 100 * tpot_s, 101)
    return now + 100 * tpot_s


def test_time_per_output_token_is_a_prior_at_first() -> None:
    books = Books()
    decode(books, 1000, 0.2, 0.0)

    assert books.tpot_s(5000.0) == PRIOR_TPOT_S


def test_time_per_output_token_grows_with_context_as_seen() -> None:
    books, now = Books(), 0.0
    for at in range(30):
        context = 1000.0 * (1 + at % 10)
        now = decode(books, context, 0.01 + 2e-6 * context, now)

    assert books.tpot_s(8000.0) == pytest.approx(0.026, rel=0.02)
    assert books.tpot_s(2000.0) == pytest.approx(0.014, rel=0.02)


def test_where_context_never_varied_the_slope_keeps_to_its_bounds() -> None:
    books, now = Books(), 0.0
    for _ in range(10):
        now = decode(books, 1000.0, 0.02, now)

    assert books.tpot_s(1000.0) == pytest.approx(0.02)
    assert books.tpot_s(2000.0) == pytest.approx(0.02 * 1.15)
    assert books.tpot_s(0.0) == pytest.approx(0.02 * 0.85)


# -- failures


def test_failures_add_up_fade_and_are_worked_off() -> None:
    books = Books()
    for _ in range(3):
        books.failed(books.dispatched(stream(10), 0, 5.0), 5.0)
    assert books.failure_now(5.0) == pytest.approx(1 - 0.7**3)
    assert books.failure_now(5.0 + FAILURE_DECAY_S) == pytest.approx((1 - 0.7**3) / math.e)

    for _ in range(30):
        read(books, 10, 0.1, 5.0)
    assert books.failure == 0.0


def test_what_a_client_does_is_not_held_against_the_node() -> None:
    books = Books()
    books.cancelled(books.dispatched(stream(10), 0, 0.0), 1.0)

    assert books.failure == 0.0


# -- reports and other balancers


def test_a_report_tells_capacity() -> None:
    books = Books()
    assert (books.slots, books.kv_tokens) == (DEFAULT_SLOTS, math.inf)
    books.reported(report(slots=64.0, kv_capacity_tokens=400_000.0, kv_block_tokens=16.0), 1.0, 1.0)
    assert (books.slots, books.kv_tokens, books.kv_block_tokens) == (64.0, 400_000.0, 16.0)

    books.reported(report(), 2.0, 2.0)
    assert (books.slots, books.kv_tokens) == (64.0, 400_000.0)


def test_a_new_boot_id_is_a_restart() -> None:
    books = Books()

    assert not books.reported(report(engine_boot_id="a"), 1.0, 1.0)
    assert not books.reported(report(), 2.0, 2.0)
    assert not books.reported(report(engine_boot_id="a"), 3.0, 3.0)
    assert books.reported(report(engine_boot_id="b"), 4.0, 4.0)
    assert not books.reported(report(engine_boot_id="a"), 3.5, 4.0)  # from the past


def test_others_are_what_is_reported_less_what_was_ours_then() -> None:
    books = Books()
    books.reported(report(), 0.0, 0.0)
    for now in (1.0, 2.0):
        books.dispatched(stream(1000), 0, now)
    for now in (3.1, 3.2, 3.3):  # after what the report is about
        books.dispatched(stream(1000), 0, now)
    books.reported(report(running=9.0, queue_depth=3.0, context_tokens=9000.0), 3.0, 3.3)

    others = books.others_now(3.0)
    assert (others.requests, others.context) == (10.0, 7000.0)
    assert 0.0 < others.tokens < 10 * 1000
    assert books.others_now(3.0 + OTHERS_DECAY_S).requests == pytest.approx(10.0 / math.e)


def test_what_balancers_tell_goes_before_a_reports_difference() -> None:
    books = Books()
    books.shared(Outstanding(tokens=5000, context=9000, requests=7), 10.0)
    books.reported(report(running=99.0), 10.1, 10.1)
    assert books.others == Outstanding(tokens=5000, context=9000, requests=7)

    books.shared(Outstanding(tokens=1, context=1, requests=1), 9.0)  # came late
    assert books.others == Outstanding(tokens=5000, context=9000, requests=7)
    books.shared(Outstanding(), 10.2)
    assert books.others is None


def test_others_prompts_are_ahead_of_ours_and_their_time_is_not_charged_to_us() -> None:
    books, now = trained(0.001)
    books.shared(Outstanding(tokens=3000, context=3000, requests=3), now)
    sent = books.dispatched(stream(1000), 0, now)
    assert books.backlog_s(now) == pytest.approx(4.0)
    assert books.backlog_s(now + 3.0) < 3.0  # not overdue: theirs are ahead

    books.shared(Outstanding(tokens=0, context=3000, requests=3, read=3000), now + 4.0)
    books.first_token(sent, now + 4.0)
    assert books.s_per_token == pytest.approx(0.001)


def test_what_a_node_read_of_others_before_our_prompt_came_teaches_nothing() -> None:
    books, now = trained(0.001)
    books.shared(Outstanding(read=50_000), now)
    assert read(books, 1000, 1.0, now) == now + 1.0
    assert books.s_per_token == pytest.approx(0.001)


def test_the_pace_is_right_however_many_others_send_to_the_node() -> None:
    """Prompts of four balancers take turns; what the others' have been read is told now and then, and late."""
    books, now = trained(0.001)
    theirs = told = 0
    sent = [books.dispatched(stream(500), 0, now) for _ in range(40)]
    for number, mine in enumerate(sent):
        now += 4 * 0.5
        theirs += 3 * 500
        if number % 3 == 0:
            told = theirs - 1500
        books.shared(Outstanding(tokens=100, context=100, requests=1, read=told), now)
        books.first_token(mine, now)
    assert books.s_per_token == pytest.approx(0.001, rel=0.05)


def test_where_only_reports_tell_of_others_their_prompts_are_taken_to_be_mixed_with_ours() -> None:
    books, now = trained(0.001)
    books.reported(report(running=0.0, queue_depth=3.0), now, now)
    assert books.others is not None
    sent = books.dispatched(stream(1000), 0, now)
    ahead = books.others.tokens
    books.first_token(sent, now + 0.001 * (1000 + ahead))
    assert books.s_per_token == pytest.approx(0.001, rel=0.1)


def test_an_engines_counters_teach_the_pace_where_no_first_token_does() -> None:
    books = Books()
    for at in range(MIN_SAMPLES + 1):
        figures = report(prefill_seconds_total=0.5 * at, uncached_prompt_tokens_total=1000.0 * at)
        books.reported(figures, float(at), float(at))
    assert books.s_per_token == pytest.approx(0.0005)

    books.reported(report(prefill_seconds_total=0.0, uncached_prompt_tokens_total=0.0), 9.0, 9.0)  # restarted
    assert books.s_per_token == pytest.approx(0.0005)


def test_prefills_that_overlap_do_not_count_for_more_than_the_time_that_passed() -> None:
    books = Books()
    for at in range(MIN_SAMPLES + 1):
        figures = report(prefill_seconds_total=8.0 * at, uncached_prompt_tokens_total=1000.0 * at)
        books.reported(figures, float(at), float(at))

    assert books.s_per_token == pytest.approx(0.001)


def test_an_engines_counters_are_left_alone_while_our_own_first_tokens_tell() -> None:
    books, now = trained(0.0002)
    books.reported(report(prefill_seconds_total=0.0, uncached_prompt_tokens_total=0.0), now, now)
    now = read(books, 1000, 0.2, now)
    samples = books.pace_samples
    books.reported(report(prefill_seconds_total=9.0, uncached_prompt_tokens_total=10.0), now, now)

    assert books.pace_samples == samples


# -- whatever happens

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["stream", "unary", "embed", "first", "finish", "fail", "cancel", "report", "share", "read", "again"]
        ),
        st.integers(0, 7),
        st.floats(0.0, 3.0),
    ),
    max_size=120,
)


@given(EVENTS)
def test_the_books_balance_whatever_happens(events: list[tuple[str, int, float]]) -> None:
    books = Books(slots=4, kv_tokens=20_000)
    live: list[Sent] = []
    over: list[Sent] = []
    now = 100.0
    total = 0.0
    for name, which, pause_s in events:
        now += pause_s
        work = stream(1.0 + 400.7 * which, blocks=(1, 2), expected_output=50.0 * which)
        if name == "stream":
            live.append(books.dispatched(work, which % 3, now))
        elif name == "unary":
            live.append(books.dispatched(Work(prompt_tokens=100.0 * which, streams=False), 0, now))
        elif name == "embed":
            live.append(books.dispatched(embedding(100.0 * which), 0, now))
        elif name == "report":
            total += 50.0 * which
            figures = report(
                running=float(which),
                queue_depth=2.0,
                context_tokens=1000.0,
                prefill_seconds_total=total / 1000,
                uncached_prompt_tokens_total=total,
            )
            books.reported(figures, now - 0.1, now)
        elif name == "share":
            books.shared(Outstanding(tokens=100.0 * which, context=50.0, requests=which), now)
        elif name == "read":
            books.backlog_s(now)
        elif name == "again" and over:
            one = over[which % len(over)]
            books.first_token(one, now)
            books.finished(one, now, 5, 5)
            books.failed(one, now)
        elif live:
            one = live[which % len(live)]
            if name == "first":
                books.first_token(one, now)
            elif name in ("finish", "fail", "cancel"):
                live.remove(one)
                over.append(one)
                if name == "finish":
                    books.finished(one, now, 10 * which, 100 * which)
                else:
                    (books.failed if name == "fail" else books.cancelled)(one, now)
        assert books.n == len(live)
        assert books.queued_tokens == sum(one.tokens for one in live if one.queued)
        assert books.context_tokens == sum(one.context for one in live)
        assert set(books._fifo) == {one for one in live if one.queued}
        assert books.backlog_s(now) >= -1e-9
        assert books.s_per_token > 0.0
        assert books.tpot_s(0.0) >= 0.0
        assert 0.0 <= books.failure_now(now) <= 1.0
        assert books.head_tokens == (next(iter(books._fifo)).tokens if books._fifo else 0)
    for one in live:
        books.cancelled(one, now)
    assert (books.n, books.queued_tokens, books.context_tokens, books.over_slots) == (0, 0, 0, 0.0)
    assert not books._fifo
    assert books._unary_queued == 0
