"""HTTP/1.1 framing, sans-io: heads, chunks, tokens. Requests to nodes and answers to clients are built anew here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus

STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
CHUNK_END = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

Headers = Iterable[tuple[bytes, bytes]]

# A request id or other value we echo: visible ASCII, bounded, so that it can go into logs and heads as it is.
SAFE_VALUE = re.compile(rb"[\x21-\x7e]{1,128}")


def status_line(status: int) -> bytes:
    """The status line for any status that a node may send."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body. `data` must not be empty: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def header_lines(headers: Headers) -> bytes:
    """Header lines as they stand in a head."""
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])


def connection_tokens(value: bytes) -> frozenset[bytes]:
    """The lower-case names listed in a Connection header."""
    return frozenset(token.strip().lower() for token in value.split(b","))


def retry_after_s(value: bytes | None, wall_s: float) -> float | None:
    """Seconds that a Retry-After header asks for (a number, or a date); None when there is none to be read."""
    if value is None:
        return None
    text = value.decode("latin-1").strip()
    try:
        if text[:1].isdigit():
            return float(text) if math.isfinite(float(text)) else None
        return max(0.0, parsedate_to_datetime(text).timestamp() - wall_s)
    except (ValueError, TypeError):
        return None


def media_type(content_type: bytes) -> bytes:
    """`text/html` of `Text/HTML; charset=utf-8`."""
    kind = _MEDIA_TYPES.get(content_type)
    return content_type.partition(b";")[0].strip().lower() if kind is None else kind


# The spellings that nearly every answer has.
_MEDIA_TYPES = {
    b"application/json": b"application/json",
    b"text/event-stream; charset=utf-8": b"text/event-stream",
    b"text/event-stream": b"text/event-stream",
}


class DateHeader:
    """The Date line, made once a second."""

    __slots__ = ("_line", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._line = b""

    def line(self, wall_s: float) -> bytes:
        """`date: …` with its line end, for the given seconds since the epoch."""
        second = int(wall_s)
        if second != self._second:
            self._second = second
            self._line = b"date: %b\r\n" % formatdate(second, usegmt=True).encode()
        return self._line
