"""A prompt's text in the order that an engine reads it, cut into chained blocks.

Two requests share as many leading blocks as their prompts share text, so the next turn of a conversation shares all
full blocks of the turn before. The text is the JSON of system, tools and turns: not what a chat template makes of
them, but equal where that is equal. Blocks are the same in every process and on every machine, so that balancers
can tell each other which node was sent what.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

# Bytes of text in one block: about 256 tokens. Half a block is lost at the end of a shared prefix, on average, some
# 25 ms of reading; a smaller block would cost more time to hash than that is worth.
BLOCK_BYTES = 1024
# Beyond this the prefix is no longer looked at: 256 blocks, some 65,000 tokens, are more than most KV caches share.
HASHED_BYTES = 256 * 1024
# Token ids are written as four bytes each, so that a block of them is 256 tokens as well.
ID_BYTES = 4
# Larger bodies are not written out a second time just to count them.
WRITTEN_BYTES = 512 * 1024
# Content that is no text: what it adds to a prompt is given by its size in the model's patches, not by its bytes.
# Vision models make 250 to 1,600 tokens of one image.
ATTACHMENT_TOKENS = 800.0
_ATTACHMENTS = (b'"image', b'"input_', b'_audio"', b'"audio', b'"video', b'"file', b'"document"')
_CACHE_MARK = b'"cache_control"'
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "tool_use", "thinking", "refusal"})


class Prompt(NamedTuple):
    """What there is to read in a request: how much, and its blocks."""

    size_bytes: float  # of text; token ids count ID_BYTES each
    blocks: tuple[int, ...] = ()
    attachments: int = 0  # images, sounds, files
    token_ids: int | None = None  # exactly so many tokens, where the client sent ids


def read(parsed: Mapping[str, Any] | None, body_bytes: int, model: str = "") -> Prompt:
    """The prompt of a body in any of the dialects; of one that cannot be read, only its size.

    `model` keeps the blocks of models apart that one node serves; `cache_salt` does the same for callers who ask
    that nobody shares their cache.
    """
    if parsed is None:
        return Prompt(size_bytes=body_bytes)
    salt = parsed.get("cache_salt")
    apart = salt if isinstance(salt, str) else ""
    seed = f"{model}\0{apart}\0".encode("utf-8", "replace")
    try:
        for name in ("messages", "prompt", "input", "inputs"):
            if (value := parsed.get(name)) is not None:
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    return _conversation(parsed, value, body_bytes, seed)
                return _plain(value, body_bytes, seed)
    except (orjson.JSONEncodeError, OverflowError, TypeError, UnicodeEncodeError):
        pass
    return Prompt(size_bytes=body_bytes)


def chained(text: bytes, seed: bytes = b"") -> tuple[int, ...]:
    """One number for each full block of the text's first HASHED_BYTES, each made of all text up to its end.

    SHA-1, because processors have it built in: 1.2 microseconds a block, half of what BLAKE2 takes. Nothing here is a
    secret; a block that is equal by chance costs one request some prefill.
    """
    sha1 = hashlib.sha1
    blocks = []
    end = min(len(text), HASHED_BYTES)
    chain = seed
    for start in range(0, end - BLOCK_BYTES + 1, BLOCK_BYTES):
        chain = sha1(chain + text[start : start + BLOCK_BYTES]).digest()
        blocks.append(int.from_bytes(chain[:8], "little"))
    return tuple(blocks)


def _plain(value: Any, body_bytes: int, seed: bytes) -> Prompt:
    """A prompt that is no conversation: text, token ids, or several of either, of which the first is cut."""
    if isinstance(value, str):
        return _of_text(value.encode(), seed)
    if not isinstance(value, list) or not value:
        return Prompt(size_bytes=body_bytes)
    first = value[0]
    if isinstance(first, int):
        return _of_ids(value, len(value), seed)
    if isinstance(first, list):
        return _of_ids(first, sum(len(ids) for ids in value), seed)
    if isinstance(first, str):
        size_bytes = sum(len(text) for text in value)
        return Prompt(size_bytes=size_bytes, blocks=chained(first[:HASHED_BYTES].encode(), seed))
    return Prompt(size_bytes=body_bytes)


def _of_text(text: bytes, seed: bytes) -> Prompt:
    return Prompt(size_bytes=len(text), blocks=chained(text, seed))


def _of_ids(ids: Sequence[Any], count: int, seed: bytes) -> Prompt:
    written = array("I", ids[: HASHED_BYTES // ID_BYTES])
    return Prompt(size_bytes=ID_BYTES * count, blocks=chained(written.tobytes(), seed), token_ids=count)


def _conversation(parsed: Mapping[str, Any], turns: list[Any], body_bytes: int, seed: bytes) -> Prompt:
    system = parsed.get("system") or parsed.get("instructions")
    tools = parsed.get("tools") or parsed.get("functions")
    if system is None and tools and turns[0].get("role") in ("system", "developer"):
        system, turns = turns[:1], turns[1:]
    if body_bytes <= WRITTEN_BYTES:
        text = _written(system, tools, turns)
        if not _needs_care(text, turns, system):
            return _of_text(text, seed)
    return _careful(system, tools, turns, body_bytes, seed)


def _written(system: Any, tools: Any, turns: list[Any]) -> bytes:
    """Without the last bracket: there the next turn goes on."""
    text = orjson.dumps(turns)[:-1]
    if tools:
        text = orjson.dumps(tools) + text
    return orjson.dumps(system) + text if system else text


def _needs_care(text: bytes, turns: list[Any], system: Any) -> bool:
    """Whether there is more than text in it, or a mark that moves on with each turn."""
    in_parts = isinstance(system, list)
    for turn in turns:
        if type(turn) is not dict or type(turn.get("content")) is not str:
            in_parts = True
            break
    return in_parts and (_CACHE_MARK in text or any(name in text for name in _ATTACHMENTS))


def _careful(system: Any, tools: Any, turns: list[Any], body_bytes: int, seed: bytes) -> Prompt:
    """As `_written`; attachments stand as their digests, marks are left out, and little more is written than hashed."""
    seen = _Attachments()
    text = bytearray()
    for before in (system, tools):
        if before:
            text += orjson.dumps(seen.plain(before))
    separator = b"["
    for turn in turns:
        plain = seen.plain(turn)
        if len(text) < HASHED_BYTES:
            text += separator + orjson.dumps(plain)
            separator = b","
    size_bytes = len(text) if len(text) < HASHED_BYTES else max(len(text), body_bytes - seen.size_bytes)
    return Prompt(size_bytes=size_bytes, blocks=chained(bytes(text), seed), attachments=seen.count)


class _Attachments:
    """Counts what is no text, and puts a digest in its place."""

    __slots__ = ("count", "size_bytes")

    def __init__(self) -> None:
        self.count = 0
        self.size_bytes = 0

    def plain(self, piece: Any) -> Any:
        """A turn, or a list of parts, as text alone."""
        if isinstance(piece, list):
            return [self._part(part) for part in piece]
        if isinstance(piece, dict) and isinstance(piece.get("content"), list):
            kept = {name: value for name, value in piece.items() if name != "cache_control"}
            kept["content"] = [self._part(part) for part in piece["content"]]
            return kept
        return piece

    def _part(self, part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        kept = {name: value for name, value in part.items() if name != "cache_control"}
        if isinstance(kept.get("content"), list):  # the result of a tool call, which may show an image
            kept["content"] = [self._part(inner) for inner in kept["content"]]
            return kept
        kind = kept.get("type")
        if not isinstance(kind, str) or kind in _TEXT_PARTS or not _is_attachment(kind):
            return kept
        written = orjson.dumps(kept)
        self.count += 1
        self.size_bytes += len(written)
        return [kind, hashlib.sha1(written).hexdigest()]


def _is_attachment(kind: str) -> bool:
    return kind.startswith(("image", "input_", "audio", "video", "file", "document")) or kind.endswith("_audio")
