"""Calls of tools are found in every dialect, and not where an answer only speaks of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.core.tool_calls import has_tool_calls

CALL = {"id": "c", "type": "function", "function": {"name": "pay", "arguments": "{}"}}


def message(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", **fields}, "finish_reason": "stop"}]}


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(message(tool_calls=[CALL])).encode(),
        json.dumps(message(tool_calls=[CALL]), separators=(",", ":")).encode(),
        json.dumps(message(tool_calls=[CALL]), indent=1).encode(),
        json.dumps(message(function_call={"name": "pay", "arguments": "{}"})).encode(),
        event({"choices": [{"delta": {"tool_calls": [{"index": 0, **CALL}]}}]}) + b"data: [DONE]\n\n",
        event({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}),
        json.dumps({"content": [{"type": "tool_use", "id": "t", "name": "pay", "input": {}}]}).encode(),
        json.dumps({"content": [], "stop_reason": "tool_use"}).encode(),
        json.dumps({"output": [{"type": "function_call", "name": "pay", "arguments": "{}"}]}).encode(),
        json.dumps({"output": [{"type": "custom_tool_call", "name": "pay"}]}).encode(),
        json.dumps({"output": [{"type": "mcp_call", "name": "pay"}]}).encode(),
    ],
)
def test_a_call_is_found(body: bytes) -> None:
    assert has_tool_calls(body)


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(message(content="x")).encode(),
        json.dumps(message(content="x", tool_calls=[])).encode(),
        json.dumps(message(content="x", tool_calls=None, function_call=None)).encode(),
        json.dumps(
            message(content='"tool_calls": [{"type": "function_call"}], "finish_reason": "tool_calls"')
        ).encode(),
        event({"choices": [{"delta": {"content": '{"type": "tool_use"}', "tool_calls": None}}]}),
        b"",
    ],
)
def test_what_only_speaks_of_calls_has_none(body: bytes) -> None:
    assert not has_tool_calls(body)
