"""Streams of any content, cut into any reads: nothing is raised, nothing is made up, no lie gets through."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.core.convert import for_replay, has_usage, stream_to_unary, unary_to_stream
from balancer.core.outcome import Outcome
from balancer.core.request import Dialect
from balancer.wire.sse import EVENT_BYTES, StreamScanner, scanner_for

DIALECTS = st.sampled_from([Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.RESPONSES, Dialect.TGI])
LINE_ENDS = st.sampled_from([b"\n", b"\r\n"])
OPENAI_NAMES = ["choices", "delta", "text", "content", "finish_reason", "index", "usage", "error", "message", "role"]
OTHER_NAMES = ["type", "token", "prompt_tokens", "output_tokens", "generated_text", "details", "response", "id"]
NAMES = st.sampled_from([*OPENAI_NAMES, *OTHER_NAMES])
ANTHROPIC_TYPES = ["message_start", "message_delta", "message_stop", "content_block_delta", "error"]
RESPONSE_TYPES = ["response.output_text.delta", "response.completed", "response.failed", "response.created"]
LANDMARKS = ['data: {"error":1}\n\n', "[DONE]", '"usage"', '"finish_reason":"stop"', "\n\n", '"', "é", "x", ""]
WORDS = st.sampled_from([*LANDMARKS, *ANTHROPIC_TYPES, *RESPONSE_TYPES])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


def event(body: Any, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + json.dumps(body).encode() + b"\n\n"


def chunk(delta: dict[str, Any], finish: str | None, index: int) -> bytes:
    return event({"choices": [{"index": index, "delta": delta, "finish_reason": finish}]})


# What OpenAI servers send, in any order: the model below knows what each piece means.
PIECES = st.one_of(
    st.builds(lambda text, index: chunk({"content": text}, None, index), WORDS, st.integers(0, 1)),
    st.builds(lambda index: chunk({}, "stop", index), st.integers(0, 1)),
    st.sampled_from(
        [
            event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}),
            event({"choices": [], "usage": None}),
            event({"error": {"message": "boom"}}),
            b": comment\n\n",
            b"data: [DONE]\n\n",
            b"event: message\n" + chunk({"role": "assistant", "content": ""}, None, 0),
        ]
    ),
)
READS = st.lists(st.integers(1, 400), min_size=1, max_size=40)


def cut(text: bytes, sizes: list[int]) -> list[bytes]:
    reads = []
    at = turn = 0
    while at < len(text):
        reads.append(text[at : at + sizes[turn % len(sizes)]])
        at += sizes[turn % len(sizes)]
        turn += 1
    return reads


def scanner(dialect: Dialect, *, choices: int = 1, withhold: bool = False) -> StreamScanner:
    found = scanner_for(dialect, choices, withhold_usage=withhold)
    assert found is not None
    return found


def model(text: bytes, choices: int, *, withhold: bool) -> tuple[bytes, Outcome]:
    """What OpenAI's scanner has to make of whole events, worked out event by event and without haste."""
    passed = b""
    finished: set[int] = set()
    content = False
    for part in re.findall(rb".*?\r?\n\r?\n", text, re.DOTALL):
        data = b"".join(line[5:].strip() for line in part.splitlines() if line.startswith(b"data:"))
        if data == b"[DONE]":
            whole = len(finished) >= choices
            return (passed + part, Outcome.OK) if whole else (passed, Outcome.NO_FINISH_REASON)
        body = json.loads(data) if data else {"choices": []}
        if "error" in body:
            return passed, Outcome.STREAM_ERROR if content else Outcome.ERROR_OBJECT
        for choice in body["choices"]:
            content = content or bool(choice["delta"].get("content"))
            if choice["finish_reason"]:
                finished.add(choice["index"])
        if not (withhold and body.get("usage")):
            passed += part
    return passed, Outcome.NO_GOOD_END if len(finished) >= choices else Outcome.NO_FINISH_REASON


@settings(max_examples=400)
@given(st.lists(PIECES, max_size=10), READS, LINE_ENDS, st.integers(1, 2), st.booleans())
def test_any_reads_of_any_events_give_what_the_events_say(
    pieces: list[bytes], sizes: list[int], line_end: bytes, choices: int, withhold: bool
) -> None:
    text = b"".join(pieces).replace(b"\n", line_end)
    reader = scanner(Dialect.OPENAI, choices=choices, withhold=withhold)

    passed = b"".join([reader.feed(read) for read in cut(text, sizes)])

    assert (passed, reader.closed()) == model(text, choices, withhold=withhold)


@settings(max_examples=400)
@given(DIALECTS, st.lists(st.tuples(JSON, WORDS), max_size=6), READS, LINE_ENDS, st.booleans())
def test_any_reads_of_any_json_pass_unchanged_up_to_the_verdict(
    dialect: Dialect, bodies: list[tuple[Any, str]], sizes: list[int], line_end: bytes, withhold: bool
) -> None:
    names = [name if name.isidentifier() else "" for _, name in bodies]
    events = [event(body, name).replace(b"\n", line_end) for (body, _), name in zip(bodies, names, strict=True)]
    reader = scanner(dialect, withhold=withhold)
    text = b"".join(events)

    passed = b"".join([reader.feed(read) for read in cut(text, sizes)])

    kept = iter(events)
    assert all(any(part == candidate for candidate in kept) for part in split(passed))  # whole events, in order
    if not withhold:
        assert text.startswith(passed)
    if reader.outcome is None and not reader.good_end:
        assert len(passed) + sum(map(len, reader.withheld or ())) == len(text)
    assert (reader.closed() is Outcome.OK) == (reader.good_end and reader.outcome is None)


def split(text: bytes) -> list[bytes]:
    return re.findall(rb".*?\r?\n\r?\n", text, re.DOTALL)


@settings(max_examples=300)
@given(
    DIALECTS,
    st.lists(
        st.binary(max_size=30) | st.sampled_from([b"\n\n", b"\r\n\r\n", b"data:", b"{}", b"data: [DONE]\n\n", b"\r"])
    ),
    READS,
)
def test_any_bytes_are_passed_on_as_they_are_or_held(dialect: Dialect, parts: list[bytes], sizes: list[int]) -> None:
    text = b"".join(parts)
    reader = scanner(dialect)

    passed = b"".join([reader.feed(read) for read in cut(text, sizes)])

    assert text.startswith(passed)
    assert reader.closed() is not Outcome.OK or b"[DONE]" in passed or dialect is not Dialect.OPENAI


@settings(max_examples=60)
@given(
    DIALECTS,
    st.lists(
        st.sampled_from(
            [
                event({"choices": [{"delta": {"content": "x" * EVENT_BYTES}, "finish_reason": "stop"}]}),
                event({"type": "response.output_text.delta", "delta": "y" * (EVENT_BYTES + 77)}),
                event({"token": {"text": "z" * EVENT_BYTES}, "generated_text": None}),
                event({"choices": [{"delta": {"content": "x"}, "finish_reason": None}]}),
                b": comment\n\n",
            ]
        ),
        max_size=3,
    ),
    st.lists(st.integers(5_000, 300_000), min_size=1, max_size=8),
    LINE_ENDS,
)
def test_oversized_events_pass_whole_and_hold_little(
    dialect: Dialect, events: list[bytes], sizes: list[int], line_end: bytes
) -> None:
    text = b"".join(events).replace(b"\n", line_end)
    reader = scanner(dialect)
    sent = passed = 0

    for read in cut(text, sizes):
        sent += len(read)
        passed += len(reader.feed(read))
        assert sent - passed <= EVENT_BYTES

    assert passed == len(text)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.lists(JSON, max_size=4), st.booleans(), st.booleans())
def test_what_is_converted_is_json_and_what_is_not_is_none(
    noise: bytes, bodies: list[Any], chat: bool, include_usage: bool
) -> None:
    text = b"".join([*map(event, bodies), noise])

    whole = stream_to_unary(text, chat=chat)
    assert whole is None or isinstance(orjson.loads(whole), dict)
    assert unary_to_stream(noise, chat=chat, include_usage=include_usage) is None
    replayed = for_replay(text, include_usage=include_usage)
    assert (replayed is None) == (include_usage and not has_usage(text))
    assert replayed is None or len(replayed) <= len(text)


@settings(max_examples=200)
@given(st.lists(PIECES, max_size=8), LINE_ENDS)
def test_a_replay_without_usage_is_what_a_client_without_it_got(pieces: list[bytes], line_end: bytes) -> None:
    whole = [piece for piece in pieces if b"boom" not in piece and b"[DONE]" not in piece]
    text = b"".join(whole).replace(b"\n", line_end)

    live = scanner(Dialect.OPENAI, withhold=True).feed(text)

    assert for_replay(text, include_usage=False) == live
