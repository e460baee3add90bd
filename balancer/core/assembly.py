"""The pieces of an OpenAI stream, put together to the answer that they are pieces of.

Nothing is guessed: what is neither a text that comes in pieces, nor a list that does, nor a value that stays the
same wherever it stands, raises Unfaithful.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Members that are lists of tokens and come in pieces.
LISTS = ("token_ids",)
# Members of an event that say nothing of the others: its kind, padding of the transport, figures so far.
_OF_ONE_EVENT = frozenset({"choices", "usage", "obfuscation", "timings", "object"})


class Unfaithful(Exception):
    """The other form cannot say the same."""


def is_plain(value: Any) -> bool:
    """Whether a value may be repeated in every event: a string, a number, null, an empty list or object."""
    return not (isinstance(value, dict | list) and value)


def agree(into: dict[str, Any], name: str, value: Any) -> None:
    """Keep a member that is the same wherever it stands; null gives way to anything. Raises Unfaithful."""
    known = into.get(name)
    if known is None:
        if not is_plain(value):
            raise Unfaithful(name)
        into[name] = value
    elif value is not None and (type(value) is not type(known) or value != known):
        raise Unfaithful(name)


def extend(into: dict[str, Any], name: str, value: Any) -> None:
    """Keep a list that comes in pieces; null is no piece. Raises Unfaithful."""
    if value is None:
        into.setdefault(name, None)
    elif not isinstance(value, list):
        raise Unfaithful(name)
    elif into.get(name) is None:
        into[name] = list(value)
    else:
        into[name].extend(value)


def extend_logprobs(into: dict[str, Any], value: Any) -> None:
    """Keep log probabilities: an object of lists, each in pieces. Raises Unfaithful."""
    if value is None:
        into.setdefault("logprobs", None)
        return
    if not isinstance(value, dict):
        raise Unfaithful("logprobs")
    if into.get("logprobs") is None:
        into["logprobs"] = {}
    for name, items in value.items():
        extend(into["logprobs"], name, items)


@dataclass(slots=True)
class _ToolCall:
    """One call that the model asks for."""

    fixed: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    arguments: list[str] = field(default_factory=list)

    def add(self, piece: dict[str, Any]) -> None:
        for name, value in piece.items():
            if name == "function":
                self._add_function(value)
            elif name in ("id", "type"):
                if value:
                    agree(self.fixed, name, value)
            elif name != "index" and value is not None:
                raise Unfaithful(name)

    def _add_function(self, function: Any) -> None:
        for name, value in _object(function).items():
            if not value:
                continue
            if name not in ("name", "arguments") or not isinstance(value, str):
                raise Unfaithful(name)
            if name == "arguments":
                self.arguments.append(value)
            elif self.name:
                raise Unfaithful("two names")
            else:
                self.name = value

    def whole(self) -> dict[str, Any]:
        if not self.name or not isinstance(self.fixed.get("id"), str):
            raise Unfaithful("tool call without name or id")
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.fixed["id"], "type": self.fixed.get("type", "function"), "function": function}


@dataclass(slots=True)
class _Choice:
    """One of n answers."""

    index: int
    texts: dict[str, list[str]] = field(default_factory=dict)
    blank: dict[str, Any] = field(default_factory=dict)  # names that only ever came empty
    calls: dict[int, _ToolCall] = field(default_factory=dict)
    role: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)

    def add(self, piece: dict[str, Any], spoken: str) -> None:
        """Learn from one piece; `spoken` names the member that holds what the model said."""
        for name, value in piece.items():
            if name == "delta" and spoken == name:
                self._add_delta(_object(value))
            elif name == spoken:
                self._add_text(name, value)
            elif name == "logprobs":
                extend_logprobs(self.rest, value)
            elif name in LISTS:
                extend(self.rest, name, value)
            elif name == "message" and spoken == "delta":
                raise Unfaithful(name)
            elif name != "index":
                agree(self.rest, name, value)

    def _add_delta(self, delta: dict[str, Any]) -> None:
        for name, value in delta.items():
            if name == "role":
                agree(self.role, name, value)
            elif name == "tool_calls" and value:
                self._add_calls(value)
            else:
                self._add_text(name, value)

    def _add_text(self, name: str, value: Any) -> None:
        if isinstance(value, str) and name != "tool_calls":
            self.texts.setdefault(name, []).append(value)
        elif value is None or value == []:
            self.blank[name] = self.blank.get(name) if value is None else value
        else:
            raise Unfaithful(name)

    def _add_calls(self, pieces: Any) -> None:
        if not isinstance(pieces, list):
            raise Unfaithful("tool_calls")
        for piece in pieces:
            index = _object(piece).get("index")
            if type(index) is not int:
                raise Unfaithful("tool call without index")
            self.calls.setdefault(index, _ToolCall()).add(piece)

    def whole(self, *, chat: bool) -> dict[str, Any]:
        if not isinstance(self.rest.get("finish_reason"), str):
            raise Unfaithful("finish_reason")
        said = {name: "".join(pieces) for name, pieces in self.texts.items()}
        if not chat:
            return {"index": self.index, "text": said.get("text", ""), **self.rest}
        role = self.role.get("role") or "assistant"
        message = {"role": role, "content": None, **self.blank, **said}
        if self.calls:
            message["tool_calls"] = [self.calls[index].whole() for index in sorted(self.calls)]
        return {"index": self.index, "message": message, **self.rest}


def assemble(events: Iterable[Any], *, chat: bool) -> dict[str, Any]:
    """The unary answer whose stream held `events`. Raises Unfaithful."""
    top: dict[str, Any] = {"object": "chat.completion" if chat else "text_completion"}
    choices: dict[int, _Choice] = {}
    usage: Any = None
    for one in events:
        event = _object(one)
        pieces = event.get("choices") or ()
        usage = event.get("usage") or (None if pieces else usage)  # figures of the middle are none of the whole
        _add_top(top, event)
        for piece in _list(pieces):
            index = _object(piece).get("index") or 0
            if type(index) is not int:
                raise Unfaithful("index")
            choices.setdefault(index, _Choice(index)).add(piece, "delta" if chat else "text")
    if not choices or not isinstance(usage, dict):
        raise Unfaithful("choices or usage are missing")
    answers = [choices[index].whole(chat=chat) for index in sorted(choices)]
    return {**top, "choices": answers, "usage": usage}


def _add_top(top: dict[str, Any], event: dict[str, Any]) -> None:
    if event.get("error") is not None:
        raise Unfaithful("error")
    for name, value in event.items():
        if name == "timings" and value:
            top[name] = value  # llama.cpp: they count up to the end
        elif name == "created":
            top.setdefault(name, value)  # llama.cpp: the time of each event
        elif name not in _OF_ONE_EVENT:
            agree(top, name, value)


def _object(value: Any) -> dict[str, Any]:
    """`value` where it is an object, null being an empty one. Raises Unfaithful."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unfaithful("not an object")
    return value


def _list(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise Unfaithful("not a list")
    return value
