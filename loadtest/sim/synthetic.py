"""Made-up agent traffic: sessions of several turns, each repeating all that was said, below shared system prompts."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from loadtest.sim.arrival import Arrival
from loadtest.sim.traces import MOONCAKE_BLOCK_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTraffic:
    """What the sessions are like. Lengths are medians of log-normal draws, in tokens.

    The defaults stand between public agent traces: Mooncake's tool-and-agent trace has a mean prompt of 8,600 tokens,
    outputs of 180 and more than half of all blocks shared.
    """

    requests_per_s: float = 10.0
    system_prompts: int = 12
    system_tokens: int = 3000
    turns: float = 6.0  # mean of a geometric draw
    user_tokens: int = 500
    output_tokens: int = 150
    spread: float = 0.8  # sigma of the log-normal draws
    think_s: float = 8.0  # mean pause between an answer's expected end and the next turn
    longest_prompt: int = 60_000


def generate(traffic: AgentTraffic, count: int, rng: Random) -> Iterator[Arrival]:
    """`count` arrivals in the order of their times, from an empty service on.

    Sessions begin as a Poisson process. The rate grows for as long as sessions last (about two minutes), and stays
    somewhat below `requests_per_s` after that, because long sessions are cut. Block ids never repeat by accident: a
    session's own blocks carry its number.
    """
    session_rate = traffic.requests_per_s / traffic.turns
    pending: list[tuple[float, int, int, int]] = []  # at, session, system prompt, prompt tokens so far
    next_session_s, session, made = rng.expovariate(session_rate), 0, 0
    while made < count:
        if pending and pending[0][0] <= next_session_s:
            at_s, number, system, said = heapq.heappop(pending)
        else:
            at_s, number, system, said = next_session_s, session, _popular(traffic, rng), traffic.system_tokens
            session += 1
            next_session_s += rng.expovariate(session_rate)
        prompt = said + _length(traffic.user_tokens, traffic.spread, rng)
        output = _length(traffic.output_tokens, traffic.spread, rng)
        shared = traffic.system_tokens // MOONCAKE_BLOCK_TOKENS
        blocks = tuple(
            -(system * 4096 + place + 1) if place < shared else (number << 20) + place
            for place in range(prompt // MOONCAKE_BLOCK_TOKENS)
        )
        made += 1
        yield Arrival(at_s, prompt, output, blocks)
        if rng.random() < 1.0 - 1.0 / traffic.turns and prompt + output < traffic.longest_prompt:
            pause_s = rng.expovariate(1.0 / traffic.think_s) + 0.03 * output
            heapq.heappush(pending, (at_s + pause_s, number, system, prompt + output))


def _length(median: int, spread: float, rng: Random) -> int:
    return max(1, round(median * rng.lognormvariate(0.0, spread)))


def _popular(traffic: AgentTraffic, rng: Random) -> int:
    """Which system prompt: a few are used by most (the square of an even draw)."""
    return int(traffic.system_prompts * rng.random() ** 2)
