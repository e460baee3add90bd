"""A list of texts to embed, taken apart: the vectors that are known, and a smaller request for the others.

Usage is never apportioned. A node counts the tokens of a whole call, so what is stored with each vector is the count
of the call that it came from, and its *group*, the vectors of that call. Vectors serve a later request only together
with all of their group: then the sum of the groups' counts and of the new call's is what a node would have said. An
input that was asked for alone is a group of its own.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

# The form of an entry. Another version is a miss.
_VERSION = 1
# What a usage may hold beside `prompt_tokens` and an equal `total_tokens`, for sums of it to be exact.
_NOTHING: Mapping[str, tuple[Any, ...]] = {"completion_tokens": (0, None), "prompt_tokens_details": (None,)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One stored vector."""

    group: str  # names the call that it came from, and how many inputs that had
    group_size: int
    usage: dict[str, Any]  # of that call
    about: dict[str, Any]  # its answer, without data and usage
    item: dict[str, Any]  # the vector as the answer had it, without its index
    stored_wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What is there, by place in the request, and the places that have to be asked for."""

    known: dict[int, Known]
    missing: list[int]


def inputs_of(parsed: Mapping[str, Any] | None) -> list[Any] | None:
    """The inputs of a request that can be taken apart: texts, or lists of tokens, none of them twice; else None."""
    inputs = parsed.get("input") if parsed is not None else None
    if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and all(type(token) is int for token in inputs)):
        return [inputs]
    if not isinstance(inputs, list) or not inputs or not all(isinstance(value, str | list) for value in inputs):
        return None
    written = {orjson.dumps(value) for value in inputs}
    return inputs if len(written) == len(inputs) else None


def digests(base: str, inputs: Sequence[Any]) -> list[str]:
    """What each input's vector is kept under; `base` is the digest of the request without its inputs."""
    head = b"input:" + base.encode() + b":"
    return [hashlib.sha256(head + orjson.dumps(value)).hexdigest() for value in inputs]


def split(entries: Sequence[Known | None]) -> Split:
    """Which of these may be used: those whose whole group is here."""
    found = Counter(entry.group for entry in entries if entry is not None)
    known = {
        place: entry
        for place, entry in enumerate(entries)
        if entry is not None and found[entry.group] == entry.group_size
    }
    return Split(known=known, missing=[place for place in range(len(entries)) if place not in known])


def entries_of(body: bytes, names: Sequence[str], wall_s: float) -> list[bytes] | None:
    """An entry for each input of a call, in their order; None where its answer cannot be taken apart faithfully."""
    answer = _read(body, len(names))
    if answer is None:
        return None
    data, usage, about = answer
    group = hashlib.sha256("".join(names).encode() + body).hexdigest()
    try:
        return [orjson.dumps((_VERSION, group, len(names), usage, about, item, wall_s)) for item in data]
    except orjson.JSONEncodeError:
        return None


def decode(entry: bytes | None) -> Known | None:
    """Read an entry strictly; None for anything that is not exactly one."""
    if entry is None:
        return None
    try:
        version, group, size, usage, about, item, wall_s = orjson.loads(entry)
    except (orjson.JSONDecodeError, TypeError, ValueError):
        return None
    if version != _VERSION or type(group) is not str or type(size) is not int or type(wall_s) is not float:
        return None
    if size < 1 or not _is_summable(usage) or not isinstance(about, dict) or not _is_vector(item):
        return None
    return Known(group=group, group_size=size, usage=usage, about=about, item=item, stored_wall_s=wall_s)


def merge(parts: Split, body: bytes | None) -> bytes | None:
    """The answer to the whole request, of what is known and of the answer to what was missing.

    None where that answer cannot be taken apart, or counts in another way.
    """
    data: dict[int, dict[str, Any]] = {place: entry.item for place, entry in parts.known.items()}
    groups = {entry.group: entry.usage for entry in parts.known.values()}
    usages = list(groups.values())
    about = next((entry.about for entry in parts.known.values()), {})
    if body is not None:
        answer = _read(body, len(parts.missing))
        if answer is None:
            return None
        items, usage, about = answer
        usages.append(usage)
        data.update(zip(parts.missing, items, strict=True))
    if not usages or any(usage.keys() != usages[0].keys() for usage in usages):
        return None
    tokens = sum(usage["prompt_tokens"] for usage in usages)
    items = [{"index": place, **data[place]} for place in range(len(data))]
    usage = {**usages[-1], "prompt_tokens": tokens, "total_tokens": tokens}
    try:
        return orjson.dumps({**about, "data": items, "usage": usage})
    except orjson.JSONEncodeError:
        return None


def _read(body: bytes, count: int) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]] | None:
    """An answer's vectors in the order of the inputs, its usage, and the rest of it."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(answer, dict):
        return None
    data, usage = answer.pop("data", None), answer.pop("usage", None)
    if not isinstance(data, list) or len(data) != count or not _is_summable(usage):
        return None
    items: dict[int, dict[str, Any]] = {}
    for item in data:
        index = item.pop("index", None) if isinstance(item, dict) else None
        if type(index) is not int or not 0 <= index < count or index in items or not _is_vector(item):
            return None
        items[index] = item
    return [items[index] for index in range(count)], usage, answer


def _is_vector(item: Any) -> bool:
    return isinstance(item, dict) and "index" not in item and isinstance(item.get("embedding"), str | list)


def _is_summable(usage: Any) -> bool:
    """Whether usages of this form may be added up."""
    if not isinstance(usage, dict):
        return False
    tokens = usage.get("prompt_tokens")
    if type(tokens) is not int or tokens < 0 or usage.get("total_tokens") != tokens:
        return False
    rest = usage.keys() - {"prompt_tokens", "total_tokens"}
    return all(name in _NOTHING and usage[name] in _NOTHING[name] for name in rest)
