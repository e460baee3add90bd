"""A stream of repeated and reworded questions whose right answers are known, and what each mode makes of it.

Every question is about one of many tasks and put in one of many ways. What is asked has one answer; a task that
differs in one word has another. Some ways add words that change nothing but are in no list of the guards: these only
evidence can tell from words that matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from balancer.core.semantic.guards import Features, compare, read
from balancer.core.semantic.trust import BANDS, Pair, Sample, Serve, Trust

Embed = Callable[[str], Any]

DOING = ("repair", "clean", "paint", "sell", "store", "measure", "transport", "rent", "insure", "decorate", "polish")
THINGS = (
    *("bicycle", "tricycle", "violin", "viola", "kettle", "teapot", "mirror", "lamp", "carpet", "curtain", "ladder"),
    *("guitar", "piano", "fridge", "freezer", "helmet", "saddle", "canoe", "kayak", "clock", "watch", "vase", "sofa"),
)
PLAIN_WAYS = (
    "How do I {task}?",
    "How can I {task}?",
    "How to {task}?",
    "How do you {task}?",
    "What is the best way to {task}?",
    "What is the right way to {task}?",
    "Could you please tell me how to {task}?",
    "Explain how to {task}.",
    "Please explain how to {task}.",
    "I want to know how to {task}.",
    "Tell me how I can {task}.",
    "How should I {task}?",
)
# Said by people who ask the same: a word more that is in no list.
WORDY_WAYS = (
    "How do I properly {task}?",
    "How can I {task} nicely?",
    "How do I {task} myself?",
    "How do I {task} nowadays, roughly?",
    "Honest question: how do I {task}?",
    "How on earth do I {task}?",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of the stream."""

    text: str
    answer: str


def stream(length: int, rng: Random, *, wordy_share: float = 0.35, treacherous_share: float = 0.0) -> Iterator[Asked]:
    """Requests: tasks by popularity (Zipf), ways at random.

    Of a treacherous task, each way has an answer of its own: what no guard can see.
    """
    tasks = [f"{verb} a {thing}" for verb in DOING for thing in THINGS]
    rng.shuffle(tasks)
    treacherous = {task for task in tasks if rng.random() < treacherous_share}
    weights = [1.0 / (rank + 10) for rank in range(len(tasks))]
    for task in rng.choices(tasks, weights, k=length):
        way = rng.choice(WORDY_WAYS if rng.random() < wordy_share else PLAIN_WAYS)
        yield Asked(way.replace("{task}", task), f"{task} {way}" if task in treacherous else task)


@dataclass(slots=True)
class Tally:
    """What became of a stream."""

    requests: int = 0
    judged: int = 0  # lookups that found something that might be served
    exact: int = 0
    served: int = 0
    wrong: int = 0
    relations: dict[str, tuple[int, int]] = field(default_factory=dict)  # served, wrong

    def serve(self, relation: str, right: bool) -> None:
        """Count a semantic hit."""
        self.served += 1
        self.wrong += not right
        served, wrong = self.relations.get(relation, (0, 0))
        self.relations[relation] = (served + 1, wrong + (not right))


class _Seen:
    """Every question answered so far, once."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self.answers: list[str] = []
        self.features: list[Features] = []
        self._rows: list[Any] = []
        self._matrix: Any = None

    def add(self, asked: Asked, features: Features, vector: Any) -> None:
        self.texts[asked.text] = len(self.answers)
        self.answers.append(asked.answer)
        self.features.append(features)
        self._rows.append(vector)
        self._matrix = None

    def nearest(self, vector: Any, count: int) -> list[tuple[float, int]]:
        if not self._rows:
            return []
        if self._matrix is None:
            self._matrix = np.array(self._rows)
        cosines = self._matrix @ vector
        return [(float(cosines[place]), int(place)) for place in np.argsort(-cosines, kind="stable")[:count]]


def play(
    requests: Iterator[Asked], embed: Embed, *, mode: str, threshold: float, trust: Trust, candidates: int = 8
) -> Tally:
    """Play a stream through exact cache, guards and trust, as the service does."""
    tally, seen = Tally(), _Seen()
    least = threshold if mode == "guarded" else BANDS[-1]
    for asked in requests:
        tally.requests += 1
        if asked.text in seen.texts:
            tally.exact += 1
            continue
        features, vector = read(asked.text), embed(asked.text)
        near = [(cosine, place) for cosine, place in seen.nearest(vector, candidates) if cosine >= least]
        pairs = [Pair(str(place), "m", compare(features, seen.features[place]), cosine) for cosine, place in near]
        fit = [pair for pair in pairs if pair.verdict.reason is None and (pair.verdict.agree or mode != "guarded")]
        if fit:
            tally.judged += 1
            pair = min(fit, key=lambda pair: pair.rank)
            right = seen.answers[int(pair.entry)] == asked.answer
            if mode == "guarded" or isinstance(trust.decide(pair), Serve):
                tally.serve(pair.relation, right)
                continue
            trust.observe(Sample(pair, "", right, 0.0))
        seen.add(asked, features, vector)
    return tally
