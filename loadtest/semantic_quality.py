"""How good the semantic cache's guards are, on paraphrase data that is not part of this project.

    python -m loadtest.semantic_quality FOLDER --model-dir FOLDER

The data folder may hold `contrast_*.jsonl` (`lang`, `kind`, `base`, `same`, `diff`), `qqp_*.jsonl` (`a`, `b`, `label`)
and `stsb_*.jsonl` (`a`, `b`, `score`). A *hit* is what the cache would serve for the second question with the first
one stored. It is right for `same`, label 1, or a score of 4.5 and more; anything else ought to miss.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from balancer.core.semantic.guards import Features, compare, read
from balancer.core.semantic.tokens import Unreadable

RIGHT_SCORE = 4.5
PLAIN_THRESHOLDS = (0.80, 0.90, 0.95)
GUARDED_THRESHOLDS = (0.80, 0.85, 0.90, 0.95)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions, and whether the answer to one answers the other."""

    name: str  # of the set
    kind: str
    one: str
    other: str
    right: bool
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair and what the cache sees in it; a cosine is None where the embedder cannot read it."""

    pair: Pair
    plain: float | None  # of the questions as they are
    cosine: float | None  # of their gists, which is what the cache embeds
    reason: str  # of the guards; empty where they agree


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0, also where there is nothing to measure (and why is said)."""
    parser = argparse.ArgumentParser(prog="make semantic", description="The quality table of the semantic cache.")
    parser.add_argument("data", nargs="?", help="folder with contrast_*.jsonl, qqp_*.jsonl, stsb_*.jsonl")
    parser.add_argument("--model-dir", help="folder with config.json, vocab.txt and model.safetensors")
    parser.add_argument("--show", action="store_true", help="print each wrong hit of the guards")
    args = parser.parse_args(argv)
    reason = _missing(args.data, args.model_dir)
    if reason:
        print(f"semantic: skipped: {reason}")
        return 0
    from balancer.semantic.bert import Bert

    bert = Bert(Path(args.model_dir))
    judged = judge(list(pairs(Path(args.data))), lru_cache(maxsize=None)(bert.embed))
    print(table(judged))
    if args.show:
        for one in judged:
            if _hits(one, 0.0, guarded=True) and not one.pair.right and one.pair.score is None:
                print(f"{one.pair.name} {one.cosine:.2f}  {one.pair.one}  |  {one.pair.other}")
    return 0


def _missing(data: str | None, model_dir: str | None) -> str | None:
    if not data or not any(Path(data).glob("*.jsonl")):
        return "no data; make semantic DATA=FOLDER MODEL_DIR=FOLDER"
    if not model_dir or not (Path(model_dir) / "model.safetensors").is_file():
        return "no weights; MODEL_DIR names a folder with config.json, vocab.txt and model.safetensors"
    return None


def pairs(folder: Path) -> Iterator[Pair]:
    """Every pair of every file that is known."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            row: dict[str, Any] = orjson.loads(line)
            if path.name.startswith("contrast"):
                name = f"contrast {row['lang']}"
                yield Pair(name, row["kind"], row["base"], row["same"], True)
                yield Pair(name, row["kind"], row["base"], row["diff"], False)
            elif path.name.startswith("qqp"):
                yield Pair("QQP", "", row["a"], row["b"], row["label"] == 1)
            elif path.name.startswith("stsb"):
                name = "STS-B " + path.name.split("_")[1]
                yield Pair(name, "", row["a"], row["b"], row["score"] >= RIGHT_SCORE, row["score"])


def judge(found: list[Pair], embed: Callable[[str], Any]) -> list[Judged]:
    """Each pair's cosine and what the guards say."""
    features = lru_cache(maxsize=None)(_features)
    judged = []
    for pair in found:
        plain = _cosine(embed(pair.one), embed(pair.other))
        one, other = features(pair.one), features(pair.other)
        if isinstance(one, str) or isinstance(other, str):
            judged.append(Judged(pair, plain, None, "unreadable"))
            continue
        verdict = compare(one, other)
        reason = verdict.reason or ("" if verdict.agree else "words")
        judged.append(Judged(pair, plain, _cosine(embed(one.gist), embed(other.gist)), reason))
    return judged


def _cosine(one: Any, other: Any) -> float | None:
    return None if one is None or other is None else float(one @ other)


def _features(text: str) -> Features | str:
    try:
        return read(text)
    except Unreadable as error:
        return str(error)


def table(judged: list[Judged]) -> str:
    """Right hits of those that may hit, wrong hits of those that must not, set by set."""
    names = list(dict.fromkeys(one.pair.name for one in judged))
    rows = [("plain cosine", threshold, False) for threshold in PLAIN_THRESHOLDS]
    rows += [("guarded", threshold, True) for threshold in GUARDED_THRESHOLDS]
    lines = ["| | threshold | " + " | ".join(f"{name}: right, wrong hits" for name in names) + " |"]
    lines.append("| --- " * (len(names) + 2) + "|")
    for title, threshold, guarded in rows:
        cells = [_cell([one for one in judged if one.pair.name == name], threshold, guarded) for name in names]
        lines.append(f"| {title} | {threshold:.2f} | " + " | ".join(cells) + " |")
    stopped = Counter(
        one.reason for one in judged if one.reason and one.pair.name == "contrast en" and not one.pair.right
    )
    lines.append("")
    lines.append("What stopped the differing questions of contrast en: " + _counts(stopped))
    unread = Counter(one.pair.name for one in judged if one.plain is None)
    lines.append("Pairs that the embedder refuses to read: " + _counts(unread))
    return "\n".join(lines)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def _cell(judged: list[Judged], threshold: float, guarded: bool) -> str:
    right = [one for one in judged if one.pair.right]
    wrong = [one for one in judged if not one.pair.right]
    return ", ".join(_share([_hits(one, threshold, guarded=guarded) for one in part]) for part in (right, wrong))


def _share(hits: list[bool]) -> str:
    return f"{sum(hits)}/{len(hits)} ({sum(hits) / len(hits):.1%})" if hits else "none"


def _hits(one: Judged, threshold: float, *, guarded: bool) -> bool:
    cosine = one.cosine if guarded else one.plain
    return cosine is not None and cosine >= threshold and not (guarded and one.reason)


if __name__ == "__main__":
    sys.exit(main())
