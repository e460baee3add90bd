"""Public traces as arrivals, and what may be done to their time.

Mooncake (`*.jsonl`): one object a line with `timestamp` (ms, in ticks of about 3 s), `input_length`, `output_length`
and `hash_ids`, the ids of the prompt's 512-token prefix blocks; the last may stand for a part of a block, which no
engine shares. Azure (`*.csv`): TIMESTAMP, ContextTokens, GeneratedTokens; nothing of prefixes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from loadtest.sim.arrival import Arrival

MOONCAKE_BLOCK_TOKENS = 512


class TraceError(Exception):
    """The file is no trace that is known here."""


def load(path: Path, rng: Random) -> list[Arrival]:
    """Read a trace file, by its suffix. `rng` spreads what shares a time stamp. Raises TraceError and OSError."""
    text = path.read_text("utf-8")
    try:
        if path.suffix == ".jsonl":
            return mooncake((json.loads(line) for line in text.splitlines() if line.strip()), rng)
        if path.suffix == ".csv":
            return azure(csv.DictReader(text.splitlines()))
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path.name}: not a trace: {error!r}") from error
    raise TraceError(f"{path.name}: only Mooncake's .jsonl and Azure's .csv are known")


def mooncake(rows: Iterable[dict[str, Any]], rng: Random) -> list[Arrival]:
    """Rows of a Mooncake trace. The stamps are coarse ticks: arrivals are spread evenly at random over their tick."""
    found = [
        Arrival(
            at_s=row["timestamp"] / 1000.0,
            prompt_tokens=max(1, int(row["input_length"])),
            output_tokens=max(1, int(row["output_length"])),
            blocks=tuple(row["hash_ids"][: int(row["input_length"]) // MOONCAKE_BLOCK_TOKENS]),
        )
        for row in rows
    ]
    return _spread(found, rng)


def azure(rows: Iterable[dict[str, str]]) -> list[Arrival]:
    """Rows of an Azure trace; the first one comes at 0."""
    found = []
    first: datetime | None = None
    for row in rows:
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])  # microseconds; the trace has a digit more
        first = first or at
        found.append(
            Arrival(
                at_s=(at - first).total_seconds(),
                prompt_tokens=max(1, int(row["ContextTokens"])),
                output_tokens=max(1, int(row["GeneratedTokens"])),
            )
        )
    return sorted(found, key=lambda arrival: arrival.at_s)


def excerpt(arrivals: Sequence[Arrival], from_s: float, length_s: float) -> list[Arrival]:
    """What comes in a window of the trace, which then begins at 0."""
    return [replace(a, at_s=a.at_s - from_s) for a in arrivals if from_s <= a.at_s < from_s + length_s]


def scaled(arrivals: Sequence[Arrival], rate_scale: float) -> list[Arrival]:
    """The same requests, coming `rate_scale` times as fast."""
    return [replace(a, at_s=a.at_s / rate_scale) for a in arrivals]


def with_burst(arrivals: Sequence[Arrival], at_s: float, length_s: float, factor: float) -> list[Arrival]:
    """What would come in `length_s` from `at_s` on comes `factor` times as fast; the quiet lies behind it."""
    found = [
        replace(a, at_s=at_s + (a.at_s - at_s) / factor) if at_s <= a.at_s < at_s + length_s else a for a in arrivals
    ]
    return sorted(found, key=lambda arrival: arrival.at_s)


def _spread(arrivals: list[Arrival], rng: Random) -> list[Arrival]:
    stamps = sorted({arrival.at_s for arrival in arrivals})
    gaps = sorted(after - before for before, after in pairwise(stamps))
    tick_s = gaps[len(gaps) // 2] if gaps else 0.0
    following = dict(pairwise(stamps))
    spread = [
        replace(a, at_s=a.at_s + rng.random() * min(tick_s, following.get(a.at_s, a.at_s + tick_s) - a.at_s))
        for a in arrivals
    ]
    return sorted(spread, key=lambda arrival: arrival.at_s)
