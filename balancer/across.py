"""An answer that another balancer's flight gives, read from Redis as it comes."""

from __future__ import annotations

import asyncio
import re

import orjson

from balancer.relay import Delivered

# What may stand in a header that is sent on.
_TEXT = re.compile(r"[\x20-\x7e]{0,256}")
# The form of a stream's first entry. Another version is not followed.
_VERSION = 1


class _Head:
    __slots__ = ("lines",)

    def __init__(self, content_type: str) -> None:
        self.lines = b"content-type: %b\r\n" % content_type.encode()


class Followed:
    """Stands where a node's answer does, for the clients here."""

    __slots__ = ("began_s", "good", "head", "is_stream", "length", "node", "readable", "status")

    def __init__(self, content_type: str, node: str, length: int | None, *, is_stream: bool, now: float) -> None:
        self.status = 200
        self.head = _Head(content_type)
        self.node = node
        self.length = length
        self.is_stream = is_stream
        self.good = True
        self.began_s = now
        self.readable = asyncio.Event()  # somebody here reads it
        self.readable.set()

    @classmethod
    def decode(cls, data: bytes, now: float) -> Followed | None:
        """Read a stream's first entry strictly; None for anything that is not exactly one."""
        try:
            version, is_stream, length, content_type, node = orjson.loads(data)
        except (orjson.JSONDecodeError, TypeError, ValueError):
            return None
        if version != _VERSION or type(is_stream) is not bool or (length is not None and type(length) is not int):
            return None
        if not all(type(text) is str and _TEXT.fullmatch(text) for text in (content_type, node)):
            return None
        return cls(content_type, node, length, is_stream=is_stream, now=now)

    def pause(self) -> None:
        """No client here reads."""
        self.readable.clear()

    def resume(self) -> None:
        """One does."""
        self.readable.set()


def first_entry(answer: Delivered, content_type: bytes, node: str) -> bytes:
    """How an answer begins, for those who follow it."""
    return orjson.dumps((_VERSION, answer.is_stream, answer.length, content_type.decode("latin-1"), node))
