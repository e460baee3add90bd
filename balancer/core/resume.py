"""A stream that broke off, continued on another node: whether that is exact, how the rest is asked for and joined on.

Exact means that no text is lost and none repeated. What is not known to be so is refused: fields of the request go by
allow-list, and anything but plain text in what was said is `NotExact`. `docs/adr/0010-exact-resume.md` has the reasons.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from balancer.core import json_splice
from balancer.core.event_text import DONE, EVENT_END, fields, payloads
from balancer.core.request import InferenceRequest

# Engines that were tested, by how a chat is continued there: with `continue_final_message`, or by ending the messages
# with the assistant's own.
FLAGGED = frozenset({"vllm", "sglang"})
TRAILING = frozenset({"llamacpp"})
ENGINES = FLAGGED | TRAILING

# A request with a larger body is not kept.
BODY_BYTES = 256 * 1024
# Nor is what was said beyond this: some 4,000 tokens as vLLM writes them, a few times that elsewhere.
COPY_BYTES = 1024 * 1024

# Members of a request that say nothing about what was generated before: any value will do.
_ANY = frozenset(
    {
        *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
        *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "logit_bias", "stop_token_ids"),
        *("include_stop_str_in_output", "spaces_between_special_tokens", "add_special_tokens", "priority"),
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "cache_salt"),
        *("chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs", "request_id", "cache_prompt"),
        *("reasoning_effort", "separate_reasoning", "stream_reasoning", "include_reasoning", "parallel_tool_calls"),
    }
)
# Members that leave a text exact only with these values; null is one for each.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stop": ("", []),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "echo": (False,),
    "suffix": ("",),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "return_token_ids": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
_LENGTHS = ("max_tokens", "max_completion_tokens")
# Members of an event that are not the same in each.
_OF_ONE_EVENT = frozenset({"choices", "usage", "timings"})
# Members of a choice that come with its text. The last two say what ended it.
_PLAIN = frozenset({"index", "delta", "text", "finish_reason", "stop_reason", "matched_stop"})
# White space inside a piece of text: it was more than one token.
_SEVERAL_WORDS = re.compile(r"\S\s+\S")
# The text may be reasoning, which templates cut out of a message that is read again.
_REASONING = "think>"


class NotExact(Exception):
    """A text cannot be continued without the risk of losing or repeating some; `reason` is a stable word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def why_not(request: InferenceRequest, engine: str | None) -> str | None:
    """Why a stream from a node of this engine may not be continued, by its request alone; None where it may be.

    Asked of every stream, so it only looks at names and plain values. A field's own name is the reason where the
    field is; `unknown_field` where it is not known.
    """
    parsed = request.parsed
    name = request.endpoint.name
    if parsed is None or name not in ("chat", "completions"):
        return "endpoint"
    if engine not in ENGINES:
        return "engine"
    if len(request.body) > BODY_BYTES:
        return "body_size"
    for member, value in parsed.items():
        if member in _ANY or value is None:
            continue
        if member not in _ONLY:
            return "unknown_field"
        if value not in _ONLY[member]:
            return member
    return _values_against(parsed, chat=name == "chat", engine=engine)


def _values_against(parsed: Mapping[str, Any], *, chat: bool, engine: str) -> str | None:
    if parsed.get("seed") is not None and not is_greedy(parsed):
        return "seed"
    options = parsed.get("stream_options")
    if options is not None and not (isinstance(options, dict) and not any(options.keys() - {"include_usage"})):
        return "stream_options"
    lengths = [parsed[name] for name in _LENGTHS if parsed.get(name) is not None]
    if any(type(length) is not int or length < 1 for length in lengths):
        return "max_tokens"
    if not chat:
        if not isinstance(parsed.get("prompt"), str):
            return "prompt"
        # These write 16 tokens where nothing is said, and would write 16 more.
        return "max_tokens" if not lengths and engine in FLAGGED else None
    messages = parsed.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return None if isinstance(last, dict) and last.get("role") != "assistant" else "messages"


def is_greedy(parsed: Mapping[str, Any]) -> bool:
    """Whether the most likely token is taken every time, so that there is one answer only."""
    return parsed.get("temperature") == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a client was told before its stream broke off."""

    text: str
    tokens: int  # events with text, near enough tokens
    is_counted: bool  # no event had more than one token, as far as can be seen
    has_role: bool  # a chat's first delta has gone out
    base: Mapping[str, Any] = field(default_factory=dict)  # id, created, model and the like of its last event


def read(events: bytes, *, chat: bool) -> Said:
    """The whole events that a client got. Raises NotExact where there was more, or less, than text to go on with."""
    pieces: list[str] = []
    base: dict[str, Any] = {}
    has_role, tokens, is_counted = False, 0, True
    for payload in payloads(events):
        event = _parsed(payload)
        for choice in _choices(event):
            piece, is_role = _piece(choice, chat=chat)
            if choice.get("finish_reason") is not None:
                raise NotExact("finished")
            has_role = has_role or is_role
            if piece is None or (is_role and not piece):
                continue
            pieces.append(piece)
            if piece:
                tokens = len(pieces)  # empty ones behind it: a character that never came
            if _SEVERAL_WORDS.search(piece):
                is_counted = False
        if event.get("choices"):
            base = {name: value for name, value in event.items() if name not in _OF_ONE_EVENT}
    return Said(text=_joined(pieces), tokens=tokens, is_counted=is_counted, has_role=has_role, base=base)


def rest_of(body: bytes, said: Said, *, chat: bool, engine: str) -> bytes:
    """The body that asks a node of this engine for the rest; what it does not have to change stays byte for byte.

    Raises NotExact where the text cannot be gone on with.
    """
    if not said.text:
        return body
    _check_seam(said.text, chat=chat, engine=engine)
    parsed = orjson.loads(body)
    for name in _LENGTHS:
        if parsed.get(name) is not None:
            body = json_splice.replace_member(body, name, _left(parsed[name], said))
    if not chat:
        return json_splice.replace_member(body, "prompt", parsed["prompt"] + said.text)
    body = json_splice.append_item(body, "messages", {"role": "assistant", "content": said.text})
    if engine in FLAGGED:
        body = json_splice.set_member(body, parsed, "add_generation_prompt", False)
        body = json_splice.set_member(body, parsed, "continue_final_message", True)
    return body


def _check_seam(text: str, *, chat: bool, engine: str) -> None:
    """Raise NotExact for a text that the next node would not read as the first one wrote it."""
    if text.endswith("\ufffd"):
        raise NotExact("incomplete_character")
    # White space at the end belongs to the token that was to come; templates trim it at both ends.
    if text[-1].isspace() or (chat and engine in FLAGGED and text[0].isspace()):
        raise NotExact("white_space")
    if chat and _REASONING in text:
        raise NotExact("reasoning")


def _left(length: int, said: Said) -> int:
    if not said.is_counted:
        raise NotExact("tokens_unknown")
    if length <= said.tokens:
        raise NotExact("nothing_left")
    return length - said.tokens


class Stitcher:
    """Rewrites the events of the rest, so that with those before them they are one stream.

    Id, time and model stay those of the first part, a second role is left out, and usage is added up; where it cannot
    be known it is left out, and so are figures of one part alone.
    """

    __slots__ = ("_chat", "_said", "_tail", "_tokens")

    def __init__(self, said: Said, *, chat: bool) -> None:
        self._said = said
        self._chat = chat
        self._tokens = 0  # events with text in the rest
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """The events in `data` as the client is to have them. Raises NotExact for anything but text."""
        data = self._tail + data
        out = []
        start = 0
        for end in EVENT_END.finditer(data):
            out.append(self.join(data[start : end.end()]))
            start = end.end()
        self._tail = data[start:]
        if len(self._tail) > COPY_BYTES:
            raise NotExact("event_size")
        return b"".join(out)

    def join(self, event: bytes) -> bytes:
        """One event; empty where nothing is left of it."""
        _, payload = fields(event)
        if payload is None or payload == DONE:
            return event
        body = _parsed(payload)
        had_choices = bool(body.get("choices"))
        kept = [choice for choice in _choices(body) if self._is_news(choice)]
        if had_choices and not kept:
            return b""
        body |= {name: value for name, value in self._said.base.items() if name in body}
        body.pop("timings", None)
        if isinstance(body.get("usage"), dict):
            usage = self._usage(body["usage"])
            if usage is None and not had_choices:
                return b""
            body["usage"] = usage
        return b"data: %b\n\n" % _written(body)

    def add_up(self, prompt: int, completion: int) -> tuple[int, int] | None:
        """Prompt and generated tokens of the whole stream, by what the second node counted; None where unknown.

        That one read the first part as prompt. Its own tokens, counted by events, have to be what it says itself:
        where they are not, an event is no token there. A token that ends an answer has no event.
        """
        said = self._said.tokens
        if not self._said.is_counted or completion - self._tokens not in (0, 1) or prompt <= said:
            return None
        return prompt - said, completion + said

    def _usage(self, usage: Mapping[str, Any]) -> dict[str, int] | None:
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if type(prompt) is not int or type(completion) is not int:
            return None
        sum_ = self.add_up(prompt, completion)
        if sum_ is None:
            return None
        return {"prompt_tokens": sum_[0], "completion_tokens": sum_[1], "total_tokens": sum(sum_)}

    def _is_news(self, choice: dict[str, Any]) -> bool:
        """Whether a choice has anything for the client, once a second role is out of it."""
        piece, is_role = _piece(choice, chat=self._chat)
        is_end = choice.get("finish_reason") is not None
        self._tokens += bool(piece) or (piece is not None and not is_role and not is_end)
        if not is_role or not self._said.has_role:
            return True
        del choice["delta"]["role"]
        return bool(piece) or is_end


def _piece(choice: dict[str, Any], *, chat: bool) -> tuple[str | None, bool]:
    """The text in one choice of an event, None where it has none, and whether a role is in it. Raises NotExact."""
    if choice.get("index", 0) != 0:
        raise NotExact("n")
    for name, value in choice.items():
        if value and name not in _PLAIN:
            raise NotExact("logprobs" if name == "logprobs" else "not_text")
    if not chat:
        return _text(choice.get("text")), False
    delta = choice.get("delta") or {}
    if not isinstance(delta, dict):
        raise NotExact("unreadable")
    for name, value in delta.items():
        if value and name not in ("role", "content"):
            raise NotExact("reasoning" if name.startswith("reasoning") else "not_text")
    return _text(delta.get("content")), delta.get("role") is not None


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise NotExact("not_text")
    return value


def _choices(event: dict[str, Any]) -> list[dict[str, Any]]:
    choices = event.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise NotExact("unreadable")
    return choices


def _parsed(payload: bytes) -> dict[str, Any]:
    """An event's JSON object; half of an emoji in it is taken as it is. Raises NotExact."""
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        try:
            event = json.loads(payload)
        except (ValueError, RecursionError):
            raise NotExact("unreadable") from None
    if not isinstance(event, dict):
        raise NotExact("unreadable")
    return event


def _written(event: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(event)
    except TypeError:  # half of an emoji
        return json.dumps(event, separators=(",", ":")).encode()


def _joined(pieces: list[str]) -> str:
    """The text of all pieces; the two halves of an emoji are one character. Raises NotExact where one is missing."""
    try:
        return "".join(pieces).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise NotExact("incomplete_character") from None
