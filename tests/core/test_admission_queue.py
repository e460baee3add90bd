"""Who goes next: priorities that age, tenants that share, lanes that do not block each other; and who gets no place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.admission_queue import AGING_S, LEAST_LEFT, AdmissionQueue, Refused, Ticket
from balancer.core.drain_rate import LEAST_RETRY_S, MOST_RETRY_S
from balancer.core.request import Priority, TenantId

HIGH, NORMAL, LOW = Priority


def enter(queue: AdmissionQueue, **changes: Any) -> Ticket | Refused:
    """Ask for a place; what is not said is the same for all."""
    asked = {"lane": "m", "model": "m", "priority": NORMAL, "tenant": "t", "cost": 100.0, "now": 0.0}
    asked |= {"deadline_s": 1e9, "until_s": 1e9} | changes
    asked["tenant"] = TenantId(asked["tenant"])
    return queue.enter(asked.pop("lane"), **asked)


def place(queue: AdmissionQueue, **changes: Any) -> Ticket:
    ticket = enter(queue, **changes)
    assert isinstance(ticket, Ticket)
    return ticket


def serve(queue: AdmissionQueue, now: float = 0.0, full: frozenset[Hashable] = frozenset()) -> Ticket:
    ticket = queue.first(full)
    assert ticket is not None
    queue.granted(ticket, now)
    return ticket


def drained(queue: AdmissionQueue, gap_s: float, count: int = 20) -> float:
    """Let the queue of model `m` drain at this pace; the time when that is over."""
    for _ in range(count + 1):
        place(queue)
    for number in range(count):
        serve(queue, now=gap_s * (number + 1))
    return gap_s * count


# -- order


def test_one_tenant_is_served_in_the_order_of_arrival() -> None:
    queue = AdmissionQueue(100)
    places = [place(queue, cost=float(cost)) for cost in (900, 1, 50, 3)]
    assert [serve(queue) for _ in places] == places
    assert queue.first(()) is None


def test_higher_priorities_go_first() -> None:
    queue = AdmissionQueue(100)
    low, normal, high = (place(queue, priority=priority) for priority in (LOW, NORMAL, HIGH))
    assert [serve(queue) for _ in range(3)] == [high, normal, low]


def test_a_step_of_priority_is_worth_its_seconds_of_waiting_and_no_more() -> None:
    queue = AdmissionQueue(100)
    low = place(queue, priority=LOW, now=0.0)
    normal = place(queue, priority=NORMAL, now=AGING_S + 0.1)
    high = place(queue, priority=HIGH, now=2 * AGING_S - 0.1)
    assert [serve(queue) for _ in range(3)] == [high, low, normal]


def test_low_priority_is_served_though_high_priority_never_ends() -> None:
    queue = AdmissionQueue(100)
    low = place(queue, priority=LOW)
    place(queue, priority=HIGH)
    for number in range(100):
        now = number * 0.5
        place(queue, priority=HIGH, now=now)
        if serve(queue, now) is low:
            break
    assert now == pytest.approx(2 * AGING_S, abs=1.0)


def test_time_waited_before_counts() -> None:
    queue = AdmissionQueue(100)
    place(queue, priority=HIGH, now=100.0)
    again = place(queue, priority=NORMAL, now=100.0, waited_s=AGING_S + 1.0)
    assert serve(queue) is again


def test_a_tenant_with_a_thousand_waiting_does_not_starve_another() -> None:
    queue = AdmissionQueue(2000)
    for _ in range(1000):
        place(queue, tenant="many")
    for _ in range(10):
        serve(queue)
    few = [place(queue, tenant="few") for _ in range(5)]
    served = [serve(queue) for _ in range(11)]
    assert [ticket for ticket in served if ticket in few] == few


def test_tenants_share_by_predicted_tokens() -> None:
    queue = AdmissionQueue(10_000)
    for _ in range(400):
        place(queue, tenant="long", cost=900.0)
        place(queue, tenant="short", cost=100.0)
    tokens: Counter[str] = Counter()
    for _ in range(200):
        ticket = serve(queue)
        tokens[ticket.tenant] += 900 if ticket.tenant == "long" else 100
    assert tokens["long"] == pytest.approx(tokens["short"], abs=1000)


def test_a_tenant_that_was_away_saves_nothing_up() -> None:
    queue = AdmissionQueue(1000)
    for _ in range(100):
        place(queue, tenant="steady")
    for _ in range(50):
        serve(queue)
    for _ in range(50):
        place(queue, tenant="newcomer")
    served = Counter(serve(queue).tenant for _ in range(40))
    assert served["steady"] == pytest.approx(20, abs=1)


# -- lanes


def test_a_full_lane_holds_up_only_itself() -> None:
    queue = AdmissionQueue(100)
    first = place(queue, lane="a", priority=HIGH)
    second = place(queue, lane="b", priority=LOW)
    assert queue.is_waiting("a")
    assert serve(queue, full=frozenset({"a"})) is second
    assert not queue.is_waiting("b")
    assert queue.first({"a"}) is None
    assert serve(queue) is first


def test_tenants_share_over_lanes_too() -> None:
    queue = AdmissionQueue(100)
    for lane in range(9):
        place(queue, lane=lane, tenant="many")
    few = place(queue, lane=9, tenant="few")
    assert few in [serve(queue) for _ in range(2)]


# -- no place


def test_a_full_queue_refuses() -> None:
    queue = AdmissionQueue(2)
    place(queue)
    place(queue)
    assert enter(queue) == Refused("queue_full", LEAST_RETRY_S)
    serve(queue)
    assert isinstance(enter(queue), Ticket)


def test_no_queue_at_all_refuses_everybody() -> None:
    assert isinstance(enter(AdmissionQueue(0)), Refused)


def test_a_tenant_below_its_share_displaces_the_newest_of_the_heaviest() -> None:
    queue = AdmissionQueue(10)
    many = [place(queue, tenant="many") for _ in range(10)]
    for number in range(5):
        ticket = place(queue, tenant="few")
        assert ticket.displaced is many[-1 - number]
        assert not ticket.displaced.waits
        assert len(queue) == 10
    assert isinstance(enter(queue, tenant="few"), Refused), "both have their half"
    assert isinstance(enter(queue, tenant="many"), Refused)


def test_the_displaced_is_of_the_lowest_priority() -> None:
    queue = AdmissionQueue(3)
    place(queue, tenant="many", priority=NORMAL)
    low = place(queue, tenant="many", priority=LOW)
    place(queue, tenant="many", priority=HIGH)
    assert place(queue, tenant="few").displaced is low


def test_a_tenants_high_priority_displaces_its_own_lower_one_and_not_the_other_way() -> None:
    queue = AdmissionQueue(2)
    place(queue, priority=HIGH)
    low = place(queue, priority=LOW)
    assert place(queue, priority=NORMAL).displaced is low
    assert isinstance(enter(queue, priority=NORMAL), Refused)
    assert isinstance(enter(queue, priority=LOW), Refused)


def test_who_cannot_make_its_deadline_at_this_pace_is_refused_at_once() -> None:
    queue = AdmissionQueue(100)
    now = drained(queue, gap_s=1.0)
    for _ in range(4):
        place(queue, now=now)
    assert enter(queue, now=now, deadline_s=now + 5.0) == Refused("too_late", pytest.approx(6.0))
    assert enter(queue, now=now, until_s=now + 5.0) == Refused("too_late", pytest.approx(6.0))
    assert isinstance(enter(queue, now=now, deadline_s=now + 6.5), Ticket)


def test_what_an_answer_takes_at_least_counts_against_the_deadline() -> None:
    queue = AdmissionQueue(100)
    queue.rate("m").served(2.0)
    now = drained(queue, gap_s=1.0)
    assert isinstance(enter(queue, now=now, deadline_s=now + 3.5), Refused)
    assert isinstance(enter(queue, now=now, deadline_s=now + 4.5), Ticket)


def test_those_of_lower_priority_are_not_waited_for() -> None:
    queue = AdmissionQueue(100)
    now = drained(queue, gap_s=1.0)
    for _ in range(50):
        place(queue, now=now, priority=LOW)
    assert isinstance(enter(queue, now=now, deadline_s=now + 3.0, priority=NORMAL), Ticket)
    assert isinstance(enter(queue, now=now, deadline_s=now + 3.0, priority=LOW), Refused)


def test_another_tenants_crowd_is_not_waited_for() -> None:
    queue = AdmissionQueue(1000)
    now = drained(queue, gap_s=1.0)
    for _ in range(200):
        place(queue, now=now, tenant="many")
    assert isinstance(enter(queue, now=now, deadline_s=now + 4.0, tenant="few"), Ticket)


def test_nobody_is_refused_where_nobody_waits_or_before_anything_is_known() -> None:
    queue = AdmissionQueue(100)
    place(queue)
    assert isinstance(enter(queue, deadline_s=0.001), Ticket), "nothing is known yet"
    queue = AdmissionQueue(100)
    now = drained(queue, gap_s=10.0)
    serve(queue, now)
    assert isinstance(enter(queue, now=now, deadline_s=now + 1.0), Ticket), "somebody has to find out"


def test_another_models_pace_says_nothing() -> None:
    queue = AdmissionQueue(1000)
    now = drained(queue, gap_s=10.0)
    place(queue, lane="other", model="other", now=now)
    assert isinstance(enter(queue, lane="other", model="other", now=now, deadline_s=now + 1.0), Ticket)


def test_when_to_come_back_follows_the_queue_the_pace_and_the_priority() -> None:
    queue = AdmissionQueue(30)
    now = drained(queue, gap_s=0.5)
    places = [place(queue, now=now, priority=priority) for priority in (HIGH, NORMAL, LOW) for _ in range(9)]
    high, normal, low = (queue.retry_after_s(places[at], now) for at in (0, 9, 18))
    assert (high, normal, low) == pytest.approx((5.0, 10.0, 14.5))


@given(gap_s=st.floats(0.0, 1e6), waiting=st.integers(0, 200))
def test_when_to_come_back_is_bounded(gap_s: float, waiting: int) -> None:
    queue = AdmissionQueue(1000)
    now = drained(queue, gap_s)
    for _ in range(waiting):
        place(queue, now=now)
    assert LEAST_RETRY_S <= queue.retry_after_s(place(queue, now=now), now) <= MOST_RETRY_S


# -- books


def test_leaving_twice_is_leaving_once() -> None:
    queue = AdmissionQueue(10)
    stays, leaves = place(queue), place(queue)
    queue.leave(leaves)
    queue.leave(leaves)
    assert len(queue) == 1
    assert serve(queue) is stays
    assert queue.first(()) is None


def test_places_of_those_who_left_are_cleared_away() -> None:
    queue = AdmissionQueue(100)
    place(queue, cost=0.0)
    for _ in range(50 * LEAST_LEFT):
        queue.leave(place(queue))
    assert sum(len(heap) for heap in queue._lanes["m"].heaps) <= 2 * LEAST_LEFT


def test_models_that_come_and_go_leave_no_rates_behind() -> None:
    queue = AdmissionQueue(100)
    for number in range(2000):
        queue.leave(place(queue, lane=number, model=f"m{number}"))
    assert len(queue._rates) <= 256
    assert not queue._lanes
    assert not queue._tenants


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_everybody_is_served_or_leaves_and_the_counts_agree(seed: int, size: int) -> None:
    rng, queue, now = Random(seed), AdmissionQueue(size), 0.0
    waiting: list[Ticket] = []
    for _ in range(200):
        now += rng.random()
        what = rng.random()
        if what < 0.6:
            answer = enter(
                queue,
                lane=rng.choice("ab"),
                priority=rng.choice(list(Priority)),
                tenant=rng.choice("xyz"),
                cost=rng.random() * 100,
                now=now,
            )
            if isinstance(answer, Ticket):
                waiting.append(answer)
                if answer.displaced is not None:
                    waiting.remove(answer.displaced)
        elif what < 0.9 and waiting:
            waiting.remove(serve(queue, now))
        elif waiting:
            queue.leave(waiting.pop(rng.randrange(len(waiting))))
        assert len(queue) == len(waiting) <= size
        for priority in Priority:
            assert queue.waiting(priority) == sum(ticket.priority is priority for ticket in waiting)
    while waiting:
        waiting.remove(serve(queue, now))
    assert queue.first(()) is None
    assert not queue._lanes
    assert not queue._tenants
