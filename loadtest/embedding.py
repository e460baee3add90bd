"""Deterministic vectors: texts that share many runs of three letters have similar ones."""

from __future__ import annotations

import math
from hashlib import blake2b
from random import Random
from zlib import crc32

# Only so many letters are looked at for likeness; the rest still makes the vector another one.
LIKENESS_CHARS = 4096
# Weight of what tells apart texts with the same letters: small against likeness, large against rounding.
OWN_WEIGHT = 0.02


def embed(model: str, text: str, dimensions: int) -> list[float]:
    """A unit vector for a text: equal for equal model and text, close to those of texts with similar wording."""
    digest = blake2b(f"{model}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    own = Random(int.from_bytes(digest, "big"))
    vector = [own.gauss(0.0, OWN_WEIGHT) for _ in range(dimensions)]
    raw = f" {text[:LIKENESS_CHARS].lower()} ".encode("utf-8", "surrogatepass")
    for start in range(len(raw) - 2):
        hashed = crc32(raw[start : start + 3])
        vector[(hashed >> 1) % dimensions] += 1.0 if hashed & 1 else -1.0
    norm = math.sqrt(math.fsum(value * value for value in vector)) or 1.0
    return [value / norm for value in vector]


def likeness(left: list[float], right: list[float]) -> float:
    """The cosine of two unit vectors, moved from -1..1 to 0..1."""
    return (1.0 + math.fsum(a * b for a, b in zip(left, right, strict=True))) / 2.0
