"""Changes to a JSON object that leave every other byte as it came: spacing, number forms, order, repeated names.

The body is valid JSON already (orjson took it) and an object; what is not raises ValueError or IndexError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed lacks it
from typing import Any

import orjson

_SPACE = " \t\n\r"
_NOT_SPACE = re.compile(r"[^ \t\n\r]")
_MARK = re.compile(r'["\[\]{}]')
_AFTER_SCALAR = re.compile(r"[ \t\n\r,\]}]")


def replace_member(body: bytes, name: str, value: Any) -> bytes:
    """The body with `value` in place of every top-level member `name`, however the name is spelt."""
    text = body.decode()
    written = orjson.dumps(value).decode()
    parts = []
    copied = 0
    for member, start, end in _members(text):
        if member == name:
            parts += [text[copied:start], written]
            copied = end
    return "".join((*parts, text[copied:])).encode() if parts else body


def append_member(body: bytes, name: str, value: Any) -> bytes:
    """The body with one more member, before its closing brace."""
    end = body.rindex(b"}")
    head = body[:end].rstrip()
    comma = b"" if head.endswith(b"{") and not head[:-1].strip() else b","
    return b"".join((head, comma, orjson.dumps(name), b":", orjson.dumps(value), body[len(head) :]))


def set_member(body: bytes, parsed: Mapping[str, Any], name: str, value: Any) -> bytes:
    """The body with `value` as its member `name`, put in place or added; `parsed` is the body before."""
    return replace_member(body, name, value) if name in parsed else append_member(body, name, value)


def ask_usage(body: bytes, parsed: Mapping[str, Any]) -> bytes:
    """The body with usage asked for at the end of a stream; other `stream_options` stay."""
    return set_member(body, parsed, "stream_options", {**(parsed.get("stream_options") or {}), "include_usage": True})


def append_item(body: bytes, name: str, value: Any) -> bytes:
    """The body with one more item at the end of the array that is its top-level member `name`."""
    text = body.decode()
    for member, start, end in _members(text):
        if member == name:
            head = text[: end - 1].rstrip(_SPACE)
            comma = "" if len(head) == start + 1 else ","
            return "".join((head, comma, orjson.dumps(value).decode(), text[len(head) :])).encode()
    return body


def repeated_members(body: bytes) -> frozenset[str]:
    """The top-level names that stand there more than once, escapes resolved."""
    seen: set[str] = set()
    repeated: set[str] = set()
    for name, _, _ in _members(body.decode()):
        (repeated if name in seen else seen).add(name)
    return frozenset(repeated)


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Each top-level member in order: its name, and where its value begins and ends."""
    at = _next(text, _next(text, 0) + 1)
    while text[at] != "}":
        name, at = scanstring(text, at + 1)
        start = _next(text, _next(text, at) + 1)  # over the colon
        end = _value_end(text, start)
        yield name, start, end
        at = _next(text, end)
        if text[at] == ",":
            at = _next(text, at + 1)


def _next(text: str, at: int) -> int:
    """Where the next thing stands that is no white space."""
    if text[at] not in _SPACE:
        return at
    found = _NOT_SPACE.search(text, at)
    if found is None:
        raise json.JSONDecodeError("Unexpected end", text, at)
    return found.start()


def _value_end(text: str, at: int) -> int:
    """Where the value that begins at `at` ends. Counts brackets outside of strings, so that depth costs no stack."""
    if text[at] == '"':
        return int(scanstring(text, at + 1)[1])
    if text[at] not in "[{":
        found = _AFTER_SCALAR.search(text, at)
        return found.start() if found else len(text)
    depth = 0
    while mark := _MARK.search(text, at):
        at = mark.end()
        if mark[0] == '"':
            at = scanstring(text, at)[1]
        elif mark[0] in "[{":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return at
    raise json.JSONDecodeError("Unclosed value", text, at)
