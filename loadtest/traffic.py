"""What clients ask and when: a mix of chat requests, and arrival times. Pure generators; `Random` is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from loadtest.text import WORDS

Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMix:
    """Shares are 0..1, lengths are in words from the first to the second number."""

    model: str | None = None
    system_prompts: int = 4  # how many different ones all conversations share
    system_words: int = 150
    short_words: tuple[int, int] = (8, 60)
    long_words: tuple[int, int] = (600, 2500)
    long_share: float = 0.1  # of first questions that bring a document along
    mean_turns: float = 2.5  # of a conversation
    repeat_share: float = 0.1  # of conversations that begin with a question that many ask
    frequent_questions: int = 20
    deterministic_share: float = 0.5  # of conversations with temperature 0; the others have 0.8
    stream_share: float = 0.8
    answer_tokens: tuple[int, int] = (16, 128)


@dataclass(slots=True, kw_only=True)
class Conversation:
    """A chat that grows by one question and one answer at a time, under a system prompt that others share."""

    number: int
    turns: int
    mix: ChatMix
    temperature: float
    messages: list[Message] = field(default_factory=list)
    asked: int = 0

    @property
    def over(self) -> bool:
        return self.asked >= self.turns

    def ask(self, rng: Random) -> dict[str, Any]:
        """The body of the next request. The first question was put in by `new_conversation`."""
        if self.asked:
            self.messages.append({"role": "user", "content": words(rng, *self.mix.short_words)})
        self.asked += 1
        body: dict[str, Any] = {"messages": list(self.messages), "temperature": self.temperature}
        if self.mix.model is not None:
            body["model"] = self.mix.model
        body["max_tokens"] = rng.randint(*self.mix.answer_tokens)
        if rng.random() < self.mix.stream_share:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def hear(self, answer: str) -> None:
        """Take the answer into the history, which the next request carries."""
        self.messages.append({"role": "assistant", "content": answer})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One request of the mix, with the conversation it belongs to and its place in it."""

    conversation: int
    turn: int
    body: dict[str, Any]


def words(rng: Random, fewest: int, most: int) -> str:
    """A text of no meaning."""
    return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))


def conversations(mix: ChatMix, rng: Random) -> Iterator[Conversation]:
    """Conversations for ever. System prompts and frequent questions are the same for the same `rng` seed."""
    systems = [words(rng, mix.system_words, mix.system_words) for _ in range(mix.system_prompts)]
    frequent = [words(rng, *mix.short_words) for _ in range(mix.frequent_questions)]
    number = 0
    while True:
        repeated = rng.random() < mix.repeat_share
        question = rng.choice(frequent) if repeated else _question(mix, rng)
        # Frequent questions come under one system prompt, so that whole requests are equal.
        system = [systems[0] if repeated else rng.choice(systems)] if systems else []
        yield Conversation(
            number=number,
            turns=1 + int(rng.expovariate(1.0) * (mix.mean_turns - 1.0) + rng.random()),
            mix=mix,
            temperature=0.0 if repeated or rng.random() < mix.deterministic_share else 0.8,
            messages=[*({"role": "system", "content": text} for text in system), {"role": "user", "content": question}],
        )
        number += 1


def chat_requests(mix: ChatMix, rng: Random, *, open_conversations: int = 8) -> Iterator[ChatRequest]:
    """Requests for ever, the turns of several conversations among each other. Answers in the histories are made up."""
    source = conversations(mix, rng)
    going = [next(source) for _ in range(open_conversations)]
    while True:
        place = rng.randrange(open_conversations)
        talk = going[place]
        yield ChatRequest(conversation=talk.number, turn=talk.asked, body=talk.ask(rng))
        talk.hear(words(rng, *mix.answer_tokens))
        if talk.over:
            going[place] = next(source)


def poisson_arrivals(rate_per_s: float, rng: Random) -> Iterator[float]:
    """Times in seconds from 0, at `rate_per_s` on average, independent of each other."""
    now = 0.0
    while True:
        now += rng.expovariate(rate_per_s)
        yield now


def bursty_arrivals(
    rate_per_s: float, rng: Random, *, burst_factor: float = 5.0, burst_share: float = 0.1, mean_burst_s: float = 2.0
) -> Iterator[float]:
    """Times in seconds at `rate_per_s` on average, of which bursts of `burst_factor` times that take `burst_share`.

    Raises ValueError when the bursts alone would bring more than the whole rate.
    """
    calm_factor = (1.0 - burst_share * burst_factor) / (1.0 - burst_share)
    if calm_factor < 0.0:
        raise ValueError("burst_factor * burst_share must not exceed 1")
    mean_calm_s = mean_burst_s * (1.0 - burst_share) / burst_share
    start_s = 0.0
    while True:
        for factor, mean_s in ((calm_factor, mean_calm_s), (burst_factor, mean_burst_s)):
            end_s = start_s + mean_s * rng.uniform(0.5, 1.5)
            yield from _within(start_s, end_s, factor * rate_per_s, rng)
            start_s = end_s


def _within(start_s: float, end_s: float, rate_per_s: float, rng: Random) -> Iterator[float]:
    now = start_s
    while rate_per_s > 0.0:
        now += rng.expovariate(rate_per_s)
        if now >= end_s:
            return
        yield now


def _question(mix: ChatMix, rng: Random) -> str:
    question = words(rng, *mix.short_words)
    return f"{words(rng, *mix.long_words)}\n\n{question}" if rng.random() < mix.long_share else question
