"""A stored chat or completions answer, replayed in the form that is asked for: stream or unary.

Nothing is invented and nothing is lost: what the other form cannot say is None, and the cache calls it a miss.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from balancer.core.assembly import LISTS, Unfaithful, assemble, extend, extend_logprobs, is_plain
from balancer.core.event_text import DONE, fields, payloads, spans, spans_from_the_end

_DONE_EVENT = b"data: [DONE]\n\n"
_USAGE_OBJECT = re.compile(rb'"usage"\s*:\s*\{')
_SPOKEN_LAST = {"content": 1, "refusal": 2}  # reasoning comes before what is made of it


def stream_to_unary(events: bytes, *, chat: bool) -> bytes | None:
    """The unary body with the same answer as a whole stream; None where it has no usage or cannot be said."""
    try:
        return _written(assemble([orjson.loads(data) for data in payloads(events)], chat=chat))
    except (orjson.JSONDecodeError, Unfaithful):
        return None


def unary_to_stream(body: bytes, *, chat: bool, include_usage: bool) -> bytes | None:
    """A stream with the same answer as a unary body, to `[DONE]`; None where it cannot be said.

    Each text and each tool call is one delta. An answer without usage is no answer to who asks for it.
    """
    try:
        answer = orjson.loads(body)
        if not isinstance(answer, dict):
            return None
        events = list(_events_of(answer, chat=chat, include_usage=include_usage))
        return b"".join([b"data: " + _written(event) + b"\n\n" for event in events]) + _DONE_EVENT
    except (orjson.JSONDecodeError, Unfaithful):
        return None


def for_replay(events: bytes, *, include_usage: bool) -> bytes | None:
    """A whole stored stream as this client asked for it; None when it wants usage and there is none.

    The usage event is left out for a client that does not want it; every other byte stays as it came.
    """
    if include_usage:
        return events if has_usage(events) else None
    kept = _without_last_usage(events)
    return _without_any_usage(kept) if _USAGE_OBJECT.search(kept) else kept


def has_usage(events: bytes) -> bool:
    """Whether a whole stream tells its usage: in an event of its own, or in the last with choices."""
    for start, end in spans_from_the_end(events):
        event = _parsed(events[start:end])
        if event is not None:
            if _usage(event):
                return True
            if event.get("choices"):
                return False
    return False


def _without_last_usage(events: bytes) -> bytes:
    for start, end in spans_from_the_end(events):
        event = _parsed(events[start:end])
        if event is not None:
            return events[:start] + events[end:] if _is_usage(event) else events
    return events


def _without_any_usage(events: bytes) -> bytes:
    kept = []
    for start, end in spans(events):
        event = events[start:end]
        if b'"usage"' not in event or not _is_usage(_parsed(event)):
            kept.append(event)
    return b"".join(kept)


def _is_usage(event: dict[str, Any] | None) -> bool:
    """Whether an event has usage and nothing of the answer."""
    return event is not None and not event.get("choices") and _usage(event)


def _usage(event: dict[str, Any]) -> bool:
    return isinstance(event.get("usage"), dict) and bool(event["usage"])


def _parsed(event: bytes) -> dict[str, Any] | None:
    """An event's JSON object; None for comments, `[DONE]` and what is none."""
    _, data = fields(event)
    if data is None or data == DONE:
        return None
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _events_of(answer: dict[str, Any], *, chat: bool, include_usage: bool) -> Iterator[dict[str, Any]]:
    choices = answer.get("choices")
    usage = answer.get("usage") or None
    if answer.get("error") is not None or not isinstance(choices, list) or not choices:
        raise Unfaithful("no choices")
    if not isinstance(usage, dict | None) or (include_usage and usage is None):
        raise Unfaithful("usage")
    base = {name: value for name, value in answer.items() if name not in ("choices", "usage", "timings")}
    if not all(is_plain(value) for value in base.values()):
        raise Unfaithful("an unknown member")
    base["object"] = "chat.completion.chunk" if chat else "text_completion"
    indexes = [choice.get("index") if isinstance(choice, dict) else None for choice in choices]
    if any(type(index) is not int for index in indexes) or len(set(indexes)) < len(indexes):
        raise Unfaithful("index")
    pieces = [piece for choice in choices for piece in _pieces(choice, chat=chat)]
    yield from ({**base, "choices": [piece]} for piece in pieces[:-1])
    timings = {"timings": answer["timings"]} if answer.get("timings") else {}
    yield {**base, "choices": [pieces[-1]], **timings}
    if include_usage:
        yield {**base, "choices": [], "usage": usage}


def _pieces(choice: dict[str, Any], *, chat: bool) -> Iterator[dict[str, Any]]:
    """The pieces of one choice: its role, what it says, its end."""
    apart = {"index", "finish_reason", "logprobs", "message" if chat else "text"}
    tokens = {name: choice[name] for name in LISTS if choice.get(name)}  # they go with what is said
    rest = {name: value for name, value in choice.items() if name not in apart and name not in tokens}
    if not isinstance(choice.get("finish_reason"), str) or not all(is_plain(value) for value in rest.values()):
        raise Unfaithful("a choice")
    if chat and "delta" in choice:
        raise Unfaithful("delta")
    for name, value in tokens.items():
        extend({}, name, value)
    blank: dict[str, Any] = {"index": choice["index"]}
    if "logprobs" in choice:
        extend_logprobs({}, choice["logprobs"])
        blank["logprobs"] = None
        tokens["logprobs"] = choice["logprobs"]
    said = _deltas(choice.get("message")) if chat else _text(choice.get("text"))
    speaking = next((piece for piece in said if piece.get("delta", piece).get("content")), said[-1])
    speaking.update(tokens)
    for piece in said:
        yield {**blank, **piece, "finish_reason": None}
    yield {**blank, **({"delta": {}} if chat else {"text": ""}), **rest, "finish_reason": choice["finish_reason"]}


def _text(text: Any) -> list[dict[str, Any]]:
    if not isinstance(text, str):
        raise Unfaithful("text")
    return [{"text": text}]


def _deltas(message: Any) -> list[dict[str, Any]]:
    """A message's deltas: the role with all that is empty, then each text, then each tool call."""
    if not isinstance(message, dict) or not isinstance(message.get("role", "assistant"), str):
        raise Unfaithful("message")
    first: dict[str, Any] = {"role": message.get("role") or "assistant"}
    texts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for name in sorted(message.keys() - {"role"}, key=lambda name: (_SPOKEN_LAST.get(name, 0), name)):
        value = message[name]
        if value is None or value == []:
            first[name] = value
        elif name == "tool_calls":
            calls = [{name: [call]} for call in _calls(value)]
        elif not isinstance(value, str):
            raise Unfaithful(name)
        else:
            if not value or name == "content":
                first[name] = ""
            if value:
                texts.append({name: value})
    return [{"delta": delta} for delta in (first, *texts, *calls)]


def _calls(calls: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(calls, list):
        raise Unfaithful("tool_calls")
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or function.keys() != {"name", "arguments"}:
            raise Unfaithful("function")
        if call.keys() - {"index"} != {"id", "type", "function"} or call.get("index", index) != index:
            raise Unfaithful("tool_calls")
        needed = (call["id"], call["type"], function["name"])
        if not all(isinstance(text, str) and text for text in needed) or not isinstance(function["arguments"], str):
            raise Unfaithful("tool_calls")
        yield {**call, "index": index}


def _written(value: dict[str, Any]) -> bytes:
    """JSON. Raises Unfaithful for what is nested deeper than orjson writes, though not deeper than it reads."""
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise Unfaithful("nested too deeply") from error
