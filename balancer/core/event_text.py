"""Server-sent events as bytes: where each ends, and what it carries."""

from __future__ import annotations

import re
from collections.abc import Iterator

EVENT_END = re.compile(rb"\r?\n\r?\n")
DONE = b"[DONE]"


def fields(event: bytes) -> tuple[bytes, bytes | None]:
    """An event's name and its data, lines joined; None as data when it has none (a comment, say)."""
    if event.startswith(b"data: ") and event.find(b"\n", 0, -2) < 0:
        return b"", event[6:].rstrip()
    name = b""
    data: list[bytes] = []
    for line in event.splitlines():
        if line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
        elif line.startswith(b"event:"):
            name = line[6:].strip()
    return name, b"\n".join(data).strip() if data else None


def payloads(events: bytes) -> Iterator[bytes]:
    """The data of every event in order, `[DONE]` left out; a last event may lack its end."""
    if b"\r" in events:
        events = events.replace(b"\r\n", b"\n")
    for event in events.split(b"\n\n"):
        _, data = fields(event + b"\n\n")
        if data is not None and data != DONE:
            yield data


def spans(events: bytes) -> Iterator[tuple[int, int]]:
    """Where every event begins and ends, its ending included."""
    start = 0
    for end in EVENT_END.finditer(events):
        yield start, end.end()
        start = end.end()
    if start < len(events):
        yield start, len(events)


def spans_from_the_end(events: bytes) -> Iterator[tuple[int, int]]:
    """The same, last event first."""
    end = len(events)
    while end > 0:
        stop = end
        while stop > 0 and events[stop - 1] in b"\r\n":
            stop -= 1
        start = max(_after(events, b"\n\n", stop), _after(events, b"\n\r\n", stop))
        yield start, end
        end = start


def _after(events: bytes, ending: bytes, stop: int) -> int:
    at = events.rfind(ending, 0, stop)
    return 0 if at < 0 else at + len(ending)
