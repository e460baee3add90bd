"""How each dialect streams, byte for byte: its events, its first content, its error event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration.raw_http import CHAT, MODEL, chat

# Failures are what these tests are about: no node is given up on for them, and nothing is continued elsewhere.
PATIENT: dict[str, Any] = {
    "breaker": {"consecutive_failures": 100_000, "min_requests": 100_000},
    "resume": {"enabled": False},
    "cache": {"enabled": False},
}


def data(value: Any, name: str = "") -> bytes:
    event = f"event: {name}\n" if name else ""
    return f"{event}data: {json.dumps(value)}\n\n".encode()


def delta(text: str | None, reason: str | None = None, index: int = 0, **fields: Any) -> bytes:
    said = {} if text is None else {"content": text}
    return data({"id": "c", "choices": [{"index": index, "delta": said, "finish_reason": reason}], **fields})


def named(name: str, **fields: Any) -> bytes:
    return data({"type": name, **fields}, name)


DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
USAGE_EVENT = data({"id": "c", "choices": [], "usage": USAGE})


@dataclass(frozen=True)
class Dialect:
    path: str
    body: dict[str, Any]
    events: tuple[bytes, ...]
    content: int  # which event is the first with content
    error: Callable[[Any], str]  # the code in the payload of an error event
    error_begins: bytes = b"data: "


def openai_code(payload: Any) -> str:
    assert set(payload) == {"error"}
    assert set(payload["error"]) == {"message", "type", "param", "code"}
    return str(payload["error"]["code"])


def anthropic_code(payload: Any) -> str:
    assert payload["type"] == "error"
    assert {"type", "message"} <= set(payload["error"])
    return str(payload["error"]["code"])


def responses_code(payload: Any) -> str:
    assert payload["type"] == "error"
    assert {"code", "message", "param"} <= set(payload)
    return str(payload["code"])


def tgi_code(payload: Any) -> str:
    assert set(payload) == {"error", "error_type"}
    return str(payload["error_type"])


ASKED = {"stream": True, "stream_options": {"include_usage": True}}
DIALECTS = {
    "chat": Dialect(
        CHAT,
        chat(**ASKED),
        (delta(""), b": a comment\n\n", delta("Hé"), delta("llo 🙂"), delta(None, "stop"), USAGE_EVENT, DONE),
        2,
        openai_code,
    ),
    "completions": Dialect(
        "/v1/completions",
        {"model": MODEL, "prompt": "x", **ASKED},
        (
            data({"choices": [{"index": 0, "text": "", "finish_reason": None}]}),
            data({"choices": [{"index": 0, "text": "He", "finish_reason": None}]}),
            data({"choices": [{"index": 0, "text": "y", "finish_reason": "length"}], "usage": None}),
            USAGE_EVENT.replace(b"\n", b"\r\n"),
            DONE,
        ),
        1,
        openai_code,
    ),
    "messages": Dialect(
        "/v1/messages",
        {**chat(), "stream": True},
        (
            named("message_start", message={"usage": {"input_tokens": 3, "output_tokens": 0}}),
            named("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            named("ping"),
            named("content_block_delta", index=0, delta={"type": "text_delta", "text": "He"}),
            named("content_block_delta", index=0, delta={"type": "text_delta", "text": "message_stop"}),
            named("content_block_stop", index=0),
            named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2}),
            named("message_stop"),
        ),
        3,
        anthropic_code,
        b"event: error\ndata: ",
    ),
    "responses": Dialect(
        "/v1/responses",
        {"model": MODEL, "input": "x", "stream": True},
        (
            named("response.created", response={"status": "in_progress", "error": None}),
            named("response.output_item.added", item={}),
            named("response.output_text.delta", delta="He"),
            named("response.output_text.delta", delta="response.completed"),
            named("response.output_text.done", text="Hello"),
            named("response.completed", response={"usage": {"input_tokens": 3, "output_tokens": 2}, "error": None}),
        ),
        2,
        responses_code,
        b"event: error\ndata: ",
    ),
    "generate_stream": Dialect(
        "/generate_stream",
        {"model": MODEL, "inputs": "x"},
        (
            data({"index": 1, "token": {"text": "He"}, "generated_text": None}).replace(b": ", b":", 1),
            data({"index": 2, "token": {"text": "[DONE]"}, "generated_text": None}),
            data({"index": 3, "token": {"text": "</s>"}, "generated_text": "He[DONE]"}),
        ),
        0,
        tgi_code,
    ),
}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS.keys())


def finish(writer: asyncio.StreamWriter) -> None:
    writer.write(b"0\r\n\r\n")


def closes(writer: asyncio.StreamWriter) -> None:
    writer.close()
