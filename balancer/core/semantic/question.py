"""The question in a request: its last user message; and the partition, everything else, which has to be equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from balancer.core import cache_key
from balancer.core.request import CacheMode, Dialect, InferenceRequest

# What the answer may depend on beside the text, and what an answer may set off: never shared between wordings.
_EXACT_ONLY = ("tools", "functions", "tool_choice", "function_call", "audio", "logprobs", "top_logprobs", "prediction")
# Stands in the question's place in the partition.
_PLACE = "\x00question"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and the digest of everything around it."""

    text: str
    partition: str


def question_of(
    request: InferenceRequest, *, tenant: str | None, revision: str | None, embedder: str
) -> Question | None:
    """The request's question; None where no answer to another wording may ever do.

    `tenant` is None where all tenants share; `embedder` names the embedding and the rules in force, so that vectors
    of two models are never compared.
    """
    parsed = request.parsed
    if parsed is None or not request.is_exact or request.wishes.cache_mode is CacheMode.EXACT:
        return None
    if any(parsed.get(name) not in (None, [], False) for name in _EXACT_ONLY) or parsed.get("n") not in (None, 1):
        return None
    found = _last_user_text(request, parsed)
    if found is None:
        return None
    text, masked = found
    return Question(text, _partition(request, masked, tenant, f"{revision}\n{embedder}"))


def _partition(request: InferenceRequest, masked: dict[str, Any], tenant: str | None, revision: str) -> str:
    return cache_key.derive(
        tenant=tenant,
        endpoint=request.endpoint.path,
        query=request.query,
        model=request.model,
        revision=revision,
        headers=request.forward,
        body=b"{}",
        parsed=masked,
        exact=True,
    )


def _last_user_text(request: InferenceRequest, parsed: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The text of the last message, a user's, and the body without it."""
    name = request.endpoint.name
    if name == "responses" and request.endpoint.dialect is Dialect.RESPONSES:
        said = parsed.get("input")
        if type(said) is str:
            return said, {**parsed, "input": _PLACE}
        field = "input"
    elif name in ("chat", "messages"):
        field = "messages"
    else:
        return None
    messages = parsed.get(field)
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return None
    last = messages[-1]
    text = _text_of(last.get("content"))
    if last.get("role") != "user" or text is None or not all(_is_text_only(message) for message in messages):
        return None
    return text, {**parsed, field: [*messages[:-1], {**last, "content": _PLACE}]}


def _text_of(content: Any) -> str | None:
    """A text, or the only part of a content that is one."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        (part,) = content
        if part.get("type") in ("text", "input_text") and part.keys() <= {"type", "text"}:
            content = part.get("text")
    return content if type(content) is str and content.strip() else None


def _is_text_only(message: Any) -> bool:
    """Whether a message holds no image, audio, file or tool call."""
    if not isinstance(message, dict) or message.get("tool_calls") or message.get("role") in ("tool", "function"):
        return False
    content = message.get("content")
    if not isinstance(content, list):
        return type(content) is str
    return all(isinstance(part, dict) and part.get("type") in ("text", "input_text", "output_text") for part in content)
