"""Heads that were understood before need not be parsed again.

Clients and nodes that keep a connection send the same head over and over, apart from the length of the body. llhttp
has judged it once; a second one that equals it byte for byte, the digits of Content-Length left out, says the same.
"""

from __future__ import annotations

import re

from balancer.core.outcome import Outcome, of_status
from balancer.wire.framing import connection_tokens, header_lines, media_type

HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: (\d{1,12})(?=\r\n)")
# Larger heads are parsed every time: a memo is kept per connection.
MEMO_BYTES = 4096

# What to do with a node's header, by its name. `openai-*` and `x-*` go to clients by prefix, unless they are ours
# (contract, "Bodies and headers").
_IGNORED, _RETURNED, _READ = 1, 2, 3
_ROLES = {
    b"content-type": _RETURNED,
    b"cache-control": _RETURNED,
    b"content-disposition": _RETURNED,
    b"content-encoding": _READ,
    b"retry-after": _READ,
    b"connection": _READ,
    b"content-length": _IGNORED,
    b"transfer-encoding": _IGNORED,
    b"date": _IGNORED,
    b"server": _IGNORED,
}
_OURS = (b"x-balancer-", b"x-ratelimit-", b"x-request-id")


def split(data: bytes) -> tuple[bytes, int, int] | None:
    """A whole message with a Content-Length: its head without the length's digits, where the body begins, the length.

    None where the message is not whole in `data`, or has bytes behind it, or says its length in another way.
    """
    end = data.find(HEAD_END, 0, MEMO_BYTES)
    if end < 0:
        return None
    length = _LENGTH.search(data, 0, end + 2)
    if length is None:
        return None
    begin = end + 4
    size = int(length[1])
    if len(data) != begin + size:
        return None
    return data[: length.start(1)] + data[length.end(1) : end], begin, size


class AnswerHead:
    """What a node's head says: how the body is to be read, and which lines of it go to the client."""

    __slots__ = ("content_type", "encoded", "keep_alive", "lines", "media_type", "retry_after", "status", "verdict")

    def __init__(
        self, status: int, headers: list[tuple[bytes, bytes]], returned: frozenset[bytes], *, keep_alive: bool
    ) -> None:
        self.status = status
        self.verdict: Outcome = of_status(status)
        self.keep_alive = keep_alive
        self.content_type = b""
        self.media_type = b""
        self.retry_after: bytes | None = None
        self.encoded = False
        dropped: frozenset[bytes] = frozenset()
        kept = []
        for pair in headers:
            name, value = pair
            role = _ROLES.get(name) or _role(name, returned)
            if role == _RETURNED:
                kept.append(pair)
                if name == b"content-type":
                    self.content_type, self.media_type = value, media_type(value)
            elif name == b"content-encoding":
                self.encoded = value.strip().lower() not in (b"identity", b"")
            elif name == b"retry-after":
                self.retry_after = value
            elif name == b"connection":
                dropped = connection_tokens(value)
        self.lines = header_lines([pair for pair in kept if pair[0] not in dropped])


def _role(name: bytes, returned: frozenset[bytes]) -> int:
    if name in returned or (name.startswith((b"x-", b"openai-")) and not name.startswith(_OURS)):
        return _RETURNED
    return _IGNORED
