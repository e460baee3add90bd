"""What of a request is the question, and what has to be equal around it; and whether two answers say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.core.request import (
    ANONYMOUS,
    NO_WISHES,
    CacheMode,
    Dialect,
    Endpoint,
    InferenceRequest,
    Tenant,
    Wishes,
)
from balancer.core.semantic import answers
from balancer.core.semantic.question import Question, question_of

CHAT = Endpoint(path="/v1/chat/completions", name="chat", dialect=Dialect.OPENAI, streams=True, samples=True)
MESSAGES = Endpoint(path="/v1/messages", name="messages", dialect=Dialect.ANTHROPIC, streams=True, samples=True)
RESPONSES = Endpoint(path="/v1/responses", name="responses", dialect=Dialect.RESPONSES, streams=True, samples=True)
COMPLETIONS = Endpoint(path="/v1/completions", name="completions", dialect=Dialect.OPENAI, streams=True, samples=True)
ASKED = {"role": "user", "content": "What is DNS?"}


def request(parsed: dict[str, Any] | None, endpoint: Endpoint = CHAT, **fields: Any) -> InferenceRequest:
    given: dict[str, Any] = {
        "id": "r", "endpoint": endpoint, "tenant": Tenant(id=ANONYMOUS), "wishes": NO_WISHES, "forward": (),
        "head_lines": b"", "target": endpoint.path.encode(), "model": "m", "body": json.dumps(parsed).encode(),
        "usage_body": None, "parsed": parsed, "is_exact": True, "stream": False, "wants_usage": True,
        "accepted_s": 0.0, "deadline_s": 1.0, "http10": False,
    }  # fmt: skip
    return InferenceRequest(**{**given, **fields})


def question(
    parsed: dict[str, Any] | None,
    endpoint: Endpoint = CHAT,
    *,
    tenant: str | None = "acme",
    revision: str | None = None,
    embedder: str = "e",
    **fields: Any,
) -> Question | None:
    return question_of(request(parsed, endpoint, **fields), tenant=tenant, revision=revision, embedder=embedder)


def asked(*before: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [*before, ASKED], "temperature": 0, **fields}


@pytest.mark.parametrize(
    ("parsed", "endpoint"),
    [
        (asked(), CHAT),
        (asked(tools=[], n=1, stream=True, logprobs=False), CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is DNS?"}]}]}, CHAT),
        ({"messages": [ASKED], "max_tokens": 5}, MESSAGES),
        ({"input": "What is DNS?"}, RESPONSES),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "What is DNS?"}]}]}, RESPONSES),
    ],
)
def test_the_last_user_message_is_the_question(parsed: dict[str, Any], endpoint: Endpoint) -> None:
    found = question(parsed, endpoint)
    assert found is not None
    assert found.text == "What is DNS?"


@pytest.mark.parametrize(
    ("parsed", "endpoint"),
    [
        ({"prompt": "What is DNS?"}, COMPLETIONS),
        ({"messages": []}, CHAT),
        ({"messages": "What is DNS?"}, CHAT),
        ({"messages": [ASKED, {"role": "assistant", "content": "It"}]}, CHAT),
        ({"messages": [ASKED, {"role": "tool", "content": "x"}]}, CHAT),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}, ASKED]}, CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASKED]}, CHAT),
        ({"messages": [{"role": "user", "content": ""}]}, CHAT),
        ({"messages": [{"role": "user", "content": 2 * [{"type": "text", "text": "a"}]}]}, CHAT),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]}, MESSAGES),
        ({"messages": [7]}, CHAT),
        (asked(tools=[{"type": "function"}]), CHAT),
        (asked(functions=[{"name": "f"}]), CHAT),
        (asked(tool_choice="auto"), CHAT),
        (asked(audio={"voice": "x"}), CHAT),
        (asked(logprobs=True), CHAT),
        (asked(n=2), CHAT),
        ({"input": 7}, RESPONSES),
    ],
)  # fmt: skip
def test_anything_else_is_exact_only(parsed: dict[str, Any], endpoint: Endpoint) -> None:
    assert question(parsed, endpoint) is None


def test_a_caller_or_a_body_that_cannot_be_keyed_says_no() -> None:
    assert question(asked(), wishes=Wishes(cache_mode=CacheMode.EXACT)) is None
    assert question(asked(), is_exact=False) is None
    assert question(None) is None


def partition(*args: Any, **fields: Any) -> str:
    found = question(*args, **fields)
    assert found is not None
    return found.partition


def test_another_wording_is_in_the_same_partition() -> None:
    other = {**asked(), "messages": [{"role": "user", "content": "Tell me what DNS is."}]}
    assert partition(asked()) == partition(other)
    assert partition(asked()) == partition(asked(stream=True, user="u"))


@pytest.mark.parametrize(
    "other",
    [
        {"parsed": asked({"role": "system", "content": "Be brief."})},
        {"parsed": asked({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})},
        {"parsed": asked(temperature=0.0)},
        {"parsed": asked(seed=1)},
        {"parsed": asked(tools=[])},
        {"parsed": asked(unknown=None)},
        {"parsed": {**asked(), "messages": [{**ASKED, "name": "eve"}]}},
        {"parsed": asked(), "tenant": "evil"},
        {"parsed": asked(), "tenant": None},
        {"parsed": asked(), "revision": "2"},
        {"parsed": asked(), "embedder": "other"},
        {"parsed": asked(), "model": "other"},
        {"parsed": asked(), "forward": ((b"openai-beta", b"x"),)},
        {"parsed": asked(), "target": b"/v1/chat/completions?x=1"},
    ],
)
def test_anything_around_the_question_makes_another_partition(other: dict[str, Any]) -> None:
    assert partition(**{"parsed": asked(), **other}) != partition(asked())


# -- answers

SAID = {"type": "message", "content": [{"type": "output_text", "text": "Lima."}]}
UNARY = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Lima."}, "finish_reason": "stop"}]}


def body(answer: Any) -> bytes:
    return json.dumps(answer).encode()


@pytest.mark.parametrize(
    ("answer", "endpoint"),
    [
        (UNARY, CHAT),
        ({"content": [{"type": "text", "text": "Lima."}]}, MESSAGES),
        ({"output": [{"type": "reasoning"}, SAID]}, RESPONSES),
    ],
)  # fmt: skip
def test_the_text_of_an_answer(answer: dict[str, Any], endpoint: Endpoint) -> None:
    assert answers.text_of(body(answer), stream=False, endpoint=endpoint) == "Lima."


@pytest.mark.parametrize(
    ("answer", "endpoint"),
    [
        ({"choices": []}, CHAT),
        ({"choices": [*UNARY["choices"], *UNARY["choices"]]}, CHAT),
        ({"choices": [{"message": {"content": None, "tool_calls": [{}]}}]}, CHAT),
        ({"choices": [{"message": {"content": "no", "refusal": "no"}}]}, CHAT),
        ({"content": [{"type": "tool_use"}]}, MESSAGES),
        ({"output": []}, RESPONSES),
        ([], CHAT),
    ],
)
def test_what_is_no_single_text_is_none(answer: Any, endpoint: Endpoint) -> None:
    assert answers.text_of(body(answer), stream=False, endpoint=endpoint) is None
    assert answers.text_of(b"no json", stream=False, endpoint=endpoint) is None
    assert answers.text_of(body(answer), stream=True, endpoint=endpoint) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Lima", "lima.", True),
        ("**Lima**  is it", "Lima is it!", True),
        ("Lima", "Quito", False),
        ("42", "24", False),
        ("Yes, it is.", "No, it is not.", False),
    ],
)
def test_short_answers_are_the_same_by_their_words(one: str, other: str, same: bool) -> None:
    assert answers.same_words(one, other) is same
    assert not answers.may_agree(one, other)


def test_long_answers_may_agree_only_with_the_same_figures_and_negations() -> None:
    text = "Lima is the capital of Peru, and about 10 million people live in it today."
    assert answers.may_agree(text, "The capital of Peru is Lima, where some 10 million people live today, it is said.")
    assert not answers.may_agree(text, text.replace("10", "11"))
    assert not answers.may_agree(text, text.replace("is the", "is not the"))
