"""A stored answer and its form in a shared store: a line of JSON about it, how it paced, then the body.

The store is shared and may be soiled, so nothing is read loosely: what is not exactly an entry raises Soiled. With a
key every entry is signed (HMAC-SHA-256) together with the name that it stands under, so that neither its content nor
its place can be changed by whoever else writes to that store.
"""

from __future__ import annotations

import hmac
import zlib
from dataclasses import dataclass
from typing import Literal

import orjson

# The form of an entry. Another version is a miss.
VERSION = 2
# What stands before a body at most: the signature, the line, the pace.
OVERHEAD_BYTES = 32 * 1024
# The line alone with its signature: enough of an entry to know its age.
LINE_BYTES = 1024
# Level 1 leaves a twentieth of an event stream and half of prose, at 100 to 600 MB/s; level 6 takes up to five times as
# long for 3 % less.
ZLIB_LEVEL = 1

_SIGNED = b"hmac-sha256 "
_SIGNATURE_BYTES = len(_SIGNED) + 64 + 1

Reason = Literal["form", "unsigned", "signature"]


class Soiled(Exception):
    """Not an entry of ours; `reason` says why: `form`, `unsigned` or `signature`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(slots=True)
class Stored:
    """A node's whole answer, as it came."""

    stream: bool  # server-sent events, else one body
    content_type: bytes
    body: bytes
    stored_wall_s: float
    node_seconds: float  # what a node spent on it
    ttl_s: float
    grace_s: float = 0.0  # it may be kept this long after its lifetime, for when nothing else answers
    pace: bytes = b""  # `core.pace`; empty: not recorded
    status: int = 200

    def is_fresh(self, wall_s: float) -> bool:
        """Whether its lifetime goes on. Without a grace the store's own expiry says so, and clocks need not agree."""
        return self.grace_s == 0.0 or wall_s < self.stored_wall_s + self.ttl_s

    def left_s(self, wall_s: float) -> float:
        """Seconds of its lifetime that are left."""
        return self.stored_wall_s + self.ttl_s - wall_s


def encode(stored: Stored, name: str, *, compress_bytes: int = 0, key: bytes | None = None) -> bytes:
    """An entry for the place `name`; compressed from `compress_bytes` on (0: never), signed where there is a key."""
    body, coding = stored.body, ""
    if compress_bytes and len(body) >= compress_bytes:
        smaller = zlib.compress(body, ZLIB_LEVEL)
        if len(smaller) < len(body):
            body, coding = smaller, "zlib"
    kind, size = stored.content_type.decode("latin-1"), len(stored.body)
    times = (stored.stored_wall_s, stored.node_seconds, stored.ttl_s, stored.grace_s)
    about = (VERSION, stored.stream, kind, *times, len(stored.pace), size, coding)
    data = b"%b\n%b%b" % (orjson.dumps(about), stored.pace, body)
    return data if key is None else b"%b%b %b" % (_SIGNED, _signature(name, data, key), data)


def decode(data: bytes, name: str, *, max_bytes: int, key: bytes | None = None) -> Stored:
    """Read an entry strictly. Raises Soiled; no body larger than `max_bytes` comes of it."""
    if key is not None:
        if not data.startswith(_SIGNED):
            raise Soiled("unsigned")
        signature, data = data[len(_SIGNED) : _SIGNATURE_BYTES - 1], data[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, _signature(name, data, key)):
            raise Soiled("signature")
    line, _, rest = data.partition(b"\n")
    try:
        version, stream, kind, stored_s, took_s, ttl_s, grace_s, pace_size, size, coding = orjson.loads(line)
    except (orjson.JSONDecodeError, TypeError, ValueError):
        raise Soiled("form") from None
    if version != VERSION or type(stream) is not bool or type(kind) is not str or coding not in ("", "zlib"):
        raise Soiled("form")
    if any(type(value) is not float or value < 0.0 for value in (stored_s, took_s, ttl_s, grace_s)):
        raise Soiled("form")
    if any(type(value) is not int or value < 0 for value in (pace_size, size)) or size > max_bytes:
        raise Soiled("form")
    body = rest[pace_size:]
    if coding:
        body = _inflated(body, size)
    if len(body) != size or not size:
        raise Soiled("form")
    content_type = kind.encode("latin-1", "replace")
    return Stored(stream, content_type, body, stored_s, took_s, ttl_s, grace_s, rest[:pace_size])


def is_older(beginning: bytes, before_wall_s: float | None) -> bool:
    """Whether an entry was stored before then, by its first LINE_BYTES; its signature is not looked at.

    True without a time, and for what is no entry.
    """
    if before_wall_s is None:
        return True
    if beginning.startswith(_SIGNED):
        beginning = beginning[_SIGNATURE_BYTES:]
    try:
        found = orjson.loads(beginning.partition(b"\n")[0])[3]
    except (orjson.JSONDecodeError, TypeError, LookupError):
        return True
    return type(found) is not float or found < before_wall_s


def _inflated(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes, or Soiled; never more memory than that, whatever was sent."""
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(data, size + 1)
    except zlib.error:
        raise Soiled("form") from None
    if not inflate.eof or inflate.unused_data or inflate.unconsumed_tail:
        raise Soiled("form")
    return body


def _signature(name: str, data: bytes, key: bytes) -> bytes:
    return hmac.digest(key, b"%b\n%b" % (name.encode(), data), "sha256").hex().encode()
