"""Verified against guarded, on a stream of repeated and reworded questions whose right answers are known."""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np
import pytest

from balancer.core.semantic.trust import Trust
from loadtest.embedding import embed
from loadtest.semantic_stream import Tally, play, stream

BOUND = 0.02
SEEDS = range(3)


@cache
def vector(text: str) -> np.ndarray:
    return np.array(embed("m", text, 256), np.float32)


def played(mode: str, seed: int, *, treacherous_share: float = 0.0, length: int = 6000) -> Tally:
    """A stream through the cache at its default threshold."""
    asked = stream(length, Random(seed), treacherous_share=treacherous_share)
    return play(asked, vector, mode=mode, threshold=0.90, trust=Trust(BOUND, 0.05, Random(seed)))


@pytest.mark.parametrize("seed", SEEDS)
def test_verified_finds_more_than_guarded_at_the_same_error(seed: int) -> None:
    guarded, verified = played("guarded", seed), played("verified", seed)
    assert guarded.wrong == verified.wrong == 0
    assert verified.served > guarded.served


@pytest.mark.parametrize("treacherous_share", [0.05, 0.5])
def test_where_the_guards_are_blind_the_error_stays_under_the_bound(treacherous_share: float) -> None:
    for seed in SEEDS:
        verified = played("verified", seed, treacherous_share=treacherous_share)
        assert verified.wrong <= BOUND * verified.judged, verified


if __name__ == "__main__":
    for seed in SEEDS:
        for mode in ("guarded", "verified"):
            print(mode, seed, played(mode, seed))
        for share in (0.05, 0.2, 0.5):
            for mode in ("guarded", "verified"):
                print(mode, seed, share, played(mode, seed, treacherous_share=share))
