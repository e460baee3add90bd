"""Answers in this process: bounded, gone when their time is over, the least recently used first."""

from __future__ import annotations

from random import Random

from balancer.core.cache_entry import Stored
from balancer.core.cache_key import answer_name
from balancer.core.local_answers import ENTRY_OVERHEAD_BYTES, SPARE_EXPIRIES, LocalAnswers


def stored(size: int = 1000, at_s: float = 0.0) -> Stored:
    return Stored(False, b"application/json", b"x" * size, at_s, 1.0, 60.0)


def name(number: int, tenant: str = "t", model: str = "m") -> str:
    return answer_name(tenant, model, f"{number:064x}")


def test_an_answer_is_there_until_its_time_is_over() -> None:
    answers = LocalAnswers(1 << 20)
    answers.put(name(1), stored(), 10.0)
    assert answers.get(name(1), 9.9) is not None
    assert answers.get(name(1), 10.0) is None
    assert (len(answers), answers.size_bytes) == (0, 0)


def test_the_least_recently_used_goes_when_there_is_no_room() -> None:
    each = len(name(0)) + 1000 + ENTRY_OVERHEAD_BYTES
    answers = LocalAnswers(3 * each)
    for number in range(3):
        answers.put(name(number), stored(), 10.0)
    answers.get(name(0), 0.0)
    answers.put(name(3), stored(), 10.0)
    assert [answers.get(name(number), 0.0) is not None for number in range(4)] == [True, False, True, True]
    assert (answers.size_bytes, answers.evicted) == (3 * each, 1)
    answers.put(name(0), stored(4 * each), 10.0)
    assert answers.get(name(0), 0.0) is None, "too large for any room; the old one is not right any more"


def test_without_room_nothing_is_kept() -> None:
    answers = LocalAnswers(0)
    answers.put(name(1), stored(), 10.0)
    assert (len(answers), answers.size_bytes) == (0, 0)


def test_forms_count_and_go_with_their_answer() -> None:
    each = len(name(0)) + 1000 + ENTRY_OVERHEAD_BYTES
    answers = LocalAnswers(3 * each)
    for number in range(3):
        answers.put(name(number), stored(), 10.0)
    kept = answers.get(name(2), 0.0)
    assert kept is not None
    answers.add_form(kept, (True, False), b"y" * 500)
    assert answers.size_bytes == 2 * each + 500, "the oldest made room"
    answers.drop(name(2))
    assert answers.size_bytes == each
    answers.add_form(kept, (True, True), b"y" * 500)
    assert answers.size_bytes == each, "it is not kept any more"


def test_purging_takes_what_has_expired_and_no_more_than_it_may() -> None:
    answers = LocalAnswers(1 << 24)
    for number in range(100):
        answers.put(name(number), stored(10), float(number))
    answers.put(name(5), stored(10), 1000.0)
    assert answers.purge(49.0, most=30) == 30
    assert answers.purge(49.0) == 19, "one of them was stored anew"
    assert len(answers) == 51
    answers.clear()
    assert (len(answers), answers.size_bytes, answers.purge(1e9)) == (0, 0, 0)


def test_answers_are_removed_by_what_they_are() -> None:
    answers = LocalAnswers(1 << 24)
    for number, (tenant, model) in enumerate((("a", "m"), ("a", "n"), ("b", "m"), ("c:d", "m/n"))):
        answers.put(name(number, tenant, model), stored(at_s=float(number)), 10.0)
    anything = {"tenant": None, "model": None, "digest": None}
    assert answers.delete(**{**anything, "tenant": "x"}) == 0
    assert answers.delete(**{**anything, "tenant": "c:d", "model": "m/n"}) == 1
    assert answers.delete(**{**anything, "digest": f"{1:064x}"}) == 1
    assert answers.delete(**anything, before_wall_s=1.0) == 1
    assert answers.delete(**anything) == 1


def test_an_answer_renewed_without_end_leaves_no_more_behind_than_it_may() -> None:
    answers, rng = LocalAnswers(1 << 24), Random(1)
    for _ in range(20 * SPARE_EXPIRIES):
        answers.put(name(rng.randrange(10)), stored(10), 1e6 + rng.random())
    assert len(answers._expiries) <= SPARE_EXPIRIES + 3 * 10
    assert answers.size_bytes == 10 * (len(name(0)) + 10 + ENTRY_OVERHEAD_BYTES)
