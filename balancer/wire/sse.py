"""Server-sent events as they pass: whole events only, content begun, good end reached, usage seen.

A scanner is fed every read of one stream. As long as nothing remarkable is in a read it is handed back as it is;
only reads with a landmark in them (an end, a usage, an error) are taken apart. See contract, "Dialects".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import orjson

from balancer.core.event_text import DONE, EVENT_END, fields
from balancer.core.outcome import Outcome
from balancer.core.request import Dialect

# An event that does not end is handed on in parts beyond this size, so that it cannot hold memory.
EVENT_BYTES = 256 * 1024
# What a node's own error message may carry on to the client.
MESSAGE_CHARS = 500

# Of an oversized event so much of one part is looked at again with the next, for landmarks that lie across both.
SEAM_BYTES = 128

_ENDS = (b"\n\n", b"\n\r\n")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the node counted them; `cached` of the prompt it had read before, None where it does not say."""

    prompt: int
    completion: int
    cached: int | None = None


def usage_of(body: Any) -> Usage | None:
    """The usage object of an answer in any dialect's names; None where there is none."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens", 0))
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else usage.get("cache_read_input_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return None
    return Usage(prompt, completion, cached if type(cached) is int else None)


def _parse(payload: bytes) -> Any:
    """The JSON of an event; half of an emoji, escaped, whose other half is in the next event, is taken as it is."""
    try:
        return orjson.loads(payload)
    except orjson.JSONDecodeError:
        return json.loads(payload, parse_constant=_no_constant)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def all_parse(events: bytes) -> bool:
    """Whether every event of a whole stream holds JSON (or `[DONE]`): ordinary ones go by unread while they flow."""
    payloads = [fields(event)[1] for event in EVENT_END.split(events)]
    try:
        orjson.loads(b"[" + b",".join([p for p in payloads if p is not None and p != DONE]) + b"]")
    except orjson.JSONDecodeError:
        return False
    return True


class StreamScanner:
    """Follows one stream. Subclasses know a dialect's landmarks and what its events mean."""

    __slots__ = ("_part", "_tail", "content", "events", "good_end", "message", "outcome", "usage", "withheld")

    # How one event ends in which nothing remarkable can be: most reads of a stream are known by it alone.
    ordinary_end = b"\0"  # no event ends so

    def __init__(self) -> None:
        self.content = False  # the first content event has passed
        self.good_end = False
        self.usage: Usage | None = None
        self.events = 0  # content events, near enough tokens for pacing
        self.outcome: Outcome | None = None  # what was wrong, when something was
        self.message: str | None = None  # the node's own words about it
        self.withheld: list[bytes] | None = None  # events kept from the client, which a stored answer still has
        self._tail = b""
        self._part: bytes | None = None  # an oversized event is passing in parts: the end of the last one

    def feed(self, data: bytes) -> bytes:
        """Take one read; return what may be handed on now, which may be nothing.

        An incomplete event waits for its end, so that a stream never breaks inside one. After the good end and
        after `outcome` is set, nothing more is handed on.
        """
        if self.good_end or self.outcome is not None:
            return b""
        if self._tail:
            data = self._tail + data
            self._tail = b""
        if self._part is not None:
            return self._pass_part(data)
        if self.content and data.endswith(self.ordinary_end) and data.find(b"\n\n") == len(data) - 2:
            self.events += 1
            return data
        if not data.endswith(_ENDS):
            end = max(data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3)
            end = end if end > 2 else 0  # not found is -1
            if len(data) - end > EVENT_BYTES:
                return self._begin_parts(data, end)
            data, self._tail = data[:end], data[end:]
        if self.content and not self.remarkable(data):
            self.events += data.count(b"\n\n") or data.count(b"\n\r\n")
            return data
        return self._take_apart(data)

    def closed(self) -> Outcome:
        """The stream is over: OK at its good end, else what was missing."""
        if self.outcome is not None:
            return self.outcome
        return Outcome.OK if self.good_end else self.missing()

    @property
    def mid_event(self) -> bool:
        """Whether what was handed on so far ends inside an (oversized) event."""
        return self._part is not None

    def remarkable(self, data: bytes) -> bool:
        """Whether a read has to be taken apart. False positives cost time, false negatives are bugs."""
        raise NotImplementedError  # pragma: no cover

    def missing(self) -> Outcome:
        """What to call a stream that ended without its good end."""
        return Outcome.NO_GOOD_END

    def on_event(self, name: bytes, body: Any) -> bool:
        """Learn from one event; False when it is not for the client."""
        raise NotImplementedError  # pragma: no cover

    def on_part(self, part: bytes, *, first: bool, last: bool) -> None:
        """Learn what can be learnt from a part of an oversized event, which is never parsed; none has usage."""
        self.content = True
        self.events += first

    def _begin_parts(self, data: bytes, end: int) -> bytes:
        """An event grew too large: hand on what lies before it, and what is there of it."""
        before = self._take_apart(data[:end])
        if self.good_end or self.outcome is not None:
            return before
        self._part = b""
        data, self._tail = self._tail + data[end:], b""
        return before + self._pass_part(data)

    def _pass_part(self, data: bytes) -> bytes:
        end = EVENT_END.search(data)
        if end is None:
            stop = max(len(data) - 3, len(data.rstrip(b"\r\n")))  # the rest may begin the event's ending
            data, self._tail = data[:stop], data[stop:]
            self._see_part(data, last=False)
            return data
        self._see_part(data[: end.end()], last=True)
        self._part = None
        return data[: end.end()] + self.feed(data[end.end() :])

    def _see_part(self, data: bytes, *, last: bool) -> None:
        seen = (self._part or b"") + data
        self.on_part(seen, first=not self._part, last=last)
        self._part = seen[-SEAM_BYTES:]

    def _take_apart(self, data: bytes) -> bytes:
        out = []
        start = 0
        for end in EVENT_END.finditer(data):
            event = data[start : end.end()]
            start = end.end()
            if self._keep(event):
                out.append(event)
            if self.good_end or self.outcome is not None:
                break  # nothing belongs behind it
        else:
            if start < len(data):  # an empty line too many: it belongs to the next event
                self._tail = data[start:] + self._tail
        return out[0] if len(out) == 1 else b"".join(out)

    def _keep(self, event: bytes) -> bool:
        name, payload = fields(event)
        if payload is None:
            return True  # a comment, or an event without data
        if payload == DONE:
            return self.on_done()
        try:
            body = _parse(payload)
        except (ValueError, RecursionError):
            self.outcome = Outcome.BAD_BODY
            return False
        if isinstance(body, dict) and (error := body.get("error")) is not None and not self.error_is_content(body):
            return self.fail(error)
        keep = self.on_event(name, body)
        if not keep and self.outcome is None:
            self.withheld = [*(self.withheld or ()), event]
        return keep

    def error_is_content(self, body: dict[str, Any]) -> bool:
        """Whether an event with an `error` member is an ordinary one in this dialect."""
        return False

    def on_done(self) -> bool:
        """`[DONE]` came."""
        return True

    def fail(self, error: Any) -> bool:
        """The node says that it failed."""
        self.outcome = Outcome.STREAM_ERROR if self.content else Outcome.ERROR_OBJECT
        message = error.get("message") if isinstance(error, dict) else error
        if isinstance(message, str):
            self.message = message[:MESSAGE_CHARS]
        return False


_FINISH = re.compile(rb'finish_reason"\s*:\s*[^n\s]')


class OpenAIScanner(StreamScanner):
    """Chat and completions: `finish_reason` for each of n choices, then `[DONE]`."""

    __slots__ = ("_choices", "_finished", "_withhold_usage")

    # As vLLM and SGLang write it. Its choices are not finished, so no usage that counts is in it: that comes with or
    # behind the last finish.
    ordinary_end = b'"finish_reason":null}]}\n\n'

    def __init__(self, choices: int, *, withhold_usage: bool) -> None:
        super().__init__()
        self._choices = choices
        self._finished: set[int] = set()
        self._withhold_usage = withhold_usage

    def remarkable(self, data: bytes) -> bool:
        return b'"usage"' in data or b"[DONE]" in data or b'"error"' in data or _FINISH.search(data) is not None

    def missing(self) -> Outcome:
        return Outcome.NO_GOOD_END if self._all_finished else Outcome.NO_FINISH_REASON

    @property
    def _all_finished(self) -> bool:
        return len(self._finished) >= self._choices

    def on_done(self) -> bool:
        if self._all_finished:
            self.good_end = True
            return True
        self.outcome = Outcome.NO_FINISH_REASON
        return False

    def on_event(self, name: bytes, body: Any) -> bool:
        if not isinstance(body, dict):
            self.outcome = Outcome.BAD_BODY
            return False
        usage = usage_of(body)
        if usage is not None:
            self.usage = usage
        choices = body.get("choices")
        if not choices:
            return not (self._withhold_usage and usage is not None)
        if not isinstance(choices, list):
            self.outcome = Outcome.BAD_BODY
            return False
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            if choice.get("finish_reason") is not None:
                index = choice.get("index")
                self._finished.add(index if type(index) is int else 0)
            if _has_content(choice):
                self.content = True
                self.events += 1
        return True

    def on_part(self, part: bytes, *, first: bool, last: bool) -> None:
        super().on_part(part, first=first, last=last)
        if self._choices == 1 and _FINISH.search(part):
            self._finished.add(0)


def _has_content(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for key, value in delta.items() if key != "role")
    return bool(choice.get("text"))


class AnthropicScanner(StreamScanner):
    """Messages: `content_block_delta` begins, `message_stop` ends."""

    __slots__ = ("_started",)

    def __init__(self) -> None:
        super().__init__()
        self._started = Usage(0, 0)

    def remarkable(self, data: bytes) -> bool:
        return b"message_" in data or b"error" in data

    def on_event(self, name: bytes, body: Any) -> bool:
        kind = body.get("type") if isinstance(body, dict) else None
        if kind == "content_block_delta":
            self.content = True
            self.events += 1
        elif kind == "message_start":
            self._started = usage_of(body.get("message")) or self._started
        elif kind == "message_delta":
            usage = body.get("usage")
            output = usage.get("output_tokens") if isinstance(usage, dict) else None
            if type(output) is int:
                self.usage = usage_of(body) or replace(self._started, completion=output)
        elif kind == "message_stop":
            self.good_end = True
        return True


_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})
_RESPONSE_KIND = re.compile(rb'(?:^event:\s*|"type"\s*:\s*")(response\.[\w.]+)')


class ResponsesScanner(StreamScanner):
    """Responses: any `response.*.delta` begins; completed, incomplete or failed ends."""

    __slots__ = ("_large",)

    def __init__(self) -> None:
        super().__init__()
        self._large = ""  # what kind of oversized event is passing: the last one has all of the answer in it

    def remarkable(self, data: bytes) -> bool:
        return b"response.completed" in data or b"response.incomplete" in data or b"rror" in data or b"failed" in data

    def error_is_content(self, body: dict[str, Any]) -> bool:
        return body.get("type") != "error"

    def on_event(self, name: bytes, body: Any) -> bool:
        kind = body.get("type") if isinstance(body, dict) else None
        if kind == "error" or name == b"error":
            return self.fail(body)
        if not isinstance(kind, str):
            return True
        if kind.endswith(".delta"):
            self.content = True
            self.events += 1
        elif kind in _RESPONSE_ENDS:
            self.good_end = True
            self.usage = usage_of(body.get("response"))
        return True

    def on_part(self, part: bytes, *, first: bool, last: bool) -> None:
        if first:
            kind = _RESPONSE_KIND.search(part)
            self._large = kind[1].decode() if kind else ""
            self.content = self.content or self._large.endswith(".delta")
        self.good_end = last and self._large in _RESPONSE_ENDS


_GENERATED = re.compile(rb'"generated_text"\s*:\s*"')


class TgiScanner(StreamScanner):
    """TGI's generate_stream: the first `token` begins, `generated_text` that is not null ends."""

    __slots__ = ("_large_ends",)

    def __init__(self) -> None:
        super().__init__()
        self._large_ends = False  # the oversized event that is passing has the whole text in it

    def remarkable(self, data: bytes) -> bool:
        return b'"error"' in data or _GENERATED.search(data) is not None

    def on_event(self, name: bytes, body: Any) -> bool:
        if not isinstance(body, dict):
            self.outcome = Outcome.BAD_BODY
            return False
        if "token" in body:
            self.content = True
            self.events += 1
        if body.get("generated_text") is not None:
            self.good_end = True
            details = body.get("details")
            if isinstance(details, dict) and type(details.get("generated_tokens")) is int:
                prompt = details.get("input_length")
                self.usage = Usage(prompt if type(prompt) is int else 0, details["generated_tokens"])
        return True

    def on_part(self, part: bytes, *, first: bool, last: bool) -> None:
        super().on_part(part, first=first, last=last)
        self._large_ends = _GENERATED.search(part) is not None or (self._large_ends and not first)
        self.good_end = last and self._large_ends


def scanner_for(dialect: Dialect, choices: int, *, withhold_usage: bool) -> StreamScanner | None:
    """The scanner of a dialect; None where streams are plain bytes."""
    if dialect is Dialect.OPENAI:
        return OpenAIScanner(choices, withhold_usage=withhold_usage)
    if dialect is Dialect.ANTHROPIC:
        return AnthropicScanner()
    if dialect is Dialect.RESPONSES:
        return ResponsesScanner()
    if dialect is Dialect.TGI:
        return TgiScanner()
    return None
