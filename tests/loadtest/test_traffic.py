"""The request mix and its arrivals."""

from __future__ import annotations

from itertools import islice, pairwise
from random import Random

import orjson
import pytest

from loadtest.traffic import ChatMix, bursty_arrivals, chat_requests, conversations, poisson_arrivals


def test_the_same_seed_gives_the_same_requests() -> None:
    one, other = (list(islice(chat_requests(ChatMix(), Random(7)), 50)) for _ in range(2))
    assert one == other
    assert one != list(islice(chat_requests(ChatMix(), Random(8)), 50))


def test_conversations_share_a_few_system_prompts_and_each_turn_carries_the_ones_before() -> None:
    requests = list(islice(chat_requests(ChatMix(mean_turns=4.0), Random(1)), 300))
    assert len({request.body["messages"][0]["content"] for request in requests}) == 4
    last: dict[int, list[dict[str, str]]] = {}
    for request in requests:
        history = request.body["messages"]
        before = last.get(request.conversation)
        assert request.turn == (len(history) - 2) // 2
        assert before is None or history[: len(before)] == before
        last[request.conversation] = history
    assert len(last) < 150


def test_frequent_questions_make_whole_requests_equal() -> None:
    mix = ChatMix(repeat_share=0.5, frequent_questions=3, answer_tokens=(32, 32), stream_share=0.0)
    firsts = [next(iter([talk.ask(Random(0))])) for talk in islice(conversations(mix, Random(2)), 100)]
    keys = [orjson.dumps(body) for body in firsts]
    assert len(set(keys)) < 65


def test_long_prompts_come_as_often_as_asked() -> None:
    talks = islice(conversations(ChatMix(long_share=0.3, repeat_share=0.0), Random(3)), 400)
    long = sum(len(talk.messages[-1]["content"].split()) > 500 for talk in talks)
    assert long / 400 == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize("arrivals", [poisson_arrivals, bursty_arrivals])
def test_arrivals_keep_their_rate_and_never_go_back(arrivals) -> None:
    times_s = list(islice(arrivals(50.0, Random(4)), 100_000))
    assert len(times_s) / times_s[-1] == pytest.approx(50.0, rel=0.05)
    assert all(before <= after for before, after in pairwise(times_s))


def test_bursts_are_busier_than_poisson() -> None:
    def variance_to_mean(times_s: list[float]) -> float:
        counts = [0] * (int(times_s[-1]) + 1)
        for time_s in times_s:
            counts[int(time_s)] += 1
        mean = sum(counts) / len(counts)
        return sum((count - mean) ** 2 for count in counts) / len(counts) / mean

    assert variance_to_mean(list(islice(poisson_arrivals(50.0, Random(5)), 20_000))) < 1.5
    assert variance_to_mean(list(islice(bursty_arrivals(50.0, Random(5)), 20_000))) > 5.0


def test_bursts_that_exceed_the_rate_are_refused() -> None:
    with pytest.raises(ValueError):
        next(bursty_arrivals(10.0, Random(0), burst_factor=20.0, burst_share=0.1))
