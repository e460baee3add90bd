"""What an answer says, as text, and whether two answers say the same."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import orjson

from balancer.core import convert
from balancer.core.request import Dialect, Endpoint

# Answers of up to this many words are the same only when the words are.
SHORT_WORDS = 8
# Longer ones: how near their embeddings have to be. Two samplings of one model to one question lie above it; answers
# to two different questions about one thing mostly below.
NEAR = 0.90
# What is compared of a long answer.
MAX_CHARS = 4000

_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_NEGATION = re.compile(r"\b(?:not|no|never|none|nor|cannot|without)\b|n['’]t\b", re.IGNORECASE)
_MARKS = re.compile(r"[*_`#>\"“”]+")


def text_of(body: bytes, *, stream: bool, endpoint: Endpoint) -> str | None:
    """The text of a whole stored answer; None where it is more than one text (a tool call, several choices)."""
    if stream and endpoint.dialect is Dialect.OPENAI:
        body = convert.stream_to_unary(body, chat=endpoint.name == "chat") or b""
        stream = False
    if stream:
        return None
    try:
        answer: Any = orjson.loads(body)
        if endpoint.name == "chat":
            (choice,) = answer["choices"]
            message = choice["message"]
            text = None if message.get("tool_calls") or message.get("refusal") else message["content"]
        elif endpoint.name == "messages":
            (block,) = answer["content"]
            text = block["text"] if block["type"] == "text" else None
        else:
            (text,) = [
                part["text"]
                for item in answer["output"]
                if item["type"] == "message"
                for part in item["content"]
                if part["type"] == "output_text"
            ]
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    return text if type(text) is str and text else None


def same_words(one: str, other: str) -> bool:
    """Equal but for case, spacing, punctuation at the ends of words, and marks of formatting."""
    return _words(one) == _words(other)


def may_agree(one: str, other: str) -> bool:
    """Whether it is worth comparing embeddings: both are long, with the same figures and the same negations."""
    if min(len(_words(one)), len(_words(other))) <= SHORT_WORDS:
        return False
    if Counter(_NUMBER.findall(one)).keys() != Counter(_NUMBER.findall(other)).keys():
        return False
    return len(_NEGATION.findall(one)) == len(_NEGATION.findall(other))


def _words(text: str) -> list[str]:
    words = [word.strip(".,;:!?()[]'’") for word in _MARKS.sub("", text[:MAX_CHARS]).casefold().split()]
    return [word for word in words if word]
