"""Conversations of several turns under shared system prompts, with the times at which they are asked."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from loadtest.call import render
from loadtest.sim.arrival import Arrival
from loadtest.text import block_keys, count_tokens
from loadtest.traffic import ChatMix, Conversation, conversations, words

# Assistants with documents: long shared system prompts, a long document in every fourth opening, five turns. A word is
# about 1.5 tokens; the mean prompt has some 2,000 tokens and the mean answer 60.
MIX = ChatMix(
    model="sim-model",
    system_prompts=6,
    system_words=500,
    short_words=(10, 60),
    long_words=(800, 2400),
    long_share=0.25,
    mean_turns=5.0,
    repeat_share=0.0,
    deterministic_share=0.0,
    stream_share=1.0,
    answer_tokens=(24, 96),
)
# Between an answer and the next question.
MEAN_THINK_S = 1.5
# What an answer takes at a node that is neither idle nor full; the trace is fixed, so it cannot wait for the real end.
EXPECTED_TTFT_S, EXPECTED_TPOT_S = 0.5, 0.025


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request: what is asked, and when, in seconds from the start."""

    at_s: float
    body: Mapping[str, Any]

    def arrival(self, block_tokens: int) -> Arrival:
        """The same request as the simulator takes it."""
        prompt = render(self.body["messages"], continue_final=False)
        return Arrival(self.at_s, count_tokens(prompt), self.body["max_tokens"], block_keys(prompt, block_tokens))


def make(requests: int, rate_per_s: float, rng: Random) -> list[Turn]:
    """`requests` turns in the order of their times, `rate_per_s` on average once conversations overlap.

    Answers in the histories are made up, so that every policy is asked the very same. The first conversations are met
    in the middle, so that the rate is there from the start.
    """
    source = conversations(MIX, rng)
    session_rate = rate_per_s / (MIX.mean_turns + 0.5)
    pending: list[tuple[float, int, Conversation]] = []
    going = round(session_rate * MIX.mean_turns * (MEAN_THINK_S + EXPECTED_TTFT_S + 60 * EXPECTED_TPOT_S))
    for _ in range(going):
        talk = next(source)
        heapq.heappush(pending, (rng.uniform(0.0, MEAN_THINK_S), talk.number, talk))
    next_s = rng.expovariate(session_rate)
    turns: list[Turn] = []
    while len(turns) < requests:
        if pending and pending[0][0] <= next_s:
            at_s, _, talk = heapq.heappop(pending)
        else:
            at_s, talk = next_s, next(source)
            next_s += rng.expovariate(session_rate)
        body = {**talk.ask(rng), "ignore_eos": True}
        turns.append(Turn(at_s=at_s, body=body))
        tokens = body["max_tokens"]
        talk.hear(words(rng, 2 * tokens // 3, 2 * tokens // 3))
        if not talk.over:
            pause_s = EXPECTED_TTFT_S + tokens * EXPECTED_TPOT_S + rng.expovariate(1.0 / MEAN_THINK_S)
            heapq.heappush(pending, (at_s + pause_s, talk.number, talk))
    return turns
