"""The semantic cache's report, written for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def written(report: Mapping[str, Any]) -> str:
    """The report of `GET /admin/cache/semantic` as lines of text."""
    return "".join(f"{line}\n" for line in _lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["enabled"]:
        yield "The semantic cache is off."
        return
    yield f"mode {report['mode']}{', shadow: nothing is served' if report['shadow'] else ''}"
    hits, with_unserved = _percent(report["hit_ratio"]), _percent(report["would_hit_ratio"])
    yield f"hits {hits} of lookups, with those not served {with_unserved}"
    yield "lookups: " + _counts(report["lookups"])
    yield "comparisons with nodes' answers: " + _counts(report["comparisons"])
    if report["kinds"]:
        yield ""
        yield f"{'model':<24} {'kind':<16} {'seen':>6} {'wrong':>6} {'error':>8} {'at most':>8}  served"
    for kind in report["kinds"]:
        yield (
            f"{kind['model']:<24} {kind['kind']:<16} {kind['observed']:>6} {kind['wrong']:>6}"
            f" {_percent(kind['error_rate']):>8} {_percent(kind['error_rate_upper_95']):>8}"
            f"  {'yes' if kind['trusted'] else 'not yet'}"
        )
    if report["kinds"]:
        yield f'"at most" holds with 95 % confidence; the bound is {_percent(report["max_error_rate"])}'
    if report["samples"]:
        yield ""
        yield "latest comparisons, the newest first:"
    for sample in report["samples"]:
        said = "right" if sample["right"] else "WRONG"
        near, kind, key = sample["similarity"], sample["kind"], sample["key"]
        yield f"{said}  {near:.3f}  {kind:<16} {key}  request {sample['request_id']}"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"
