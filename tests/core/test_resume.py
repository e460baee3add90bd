"""What may be continued on another node, how the rest is asked for, and how it is joined on."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core import json_splice
from balancer.core.request import ANONYMOUS, NO_WISHES, Dialect, Endpoint, InferenceRequest, Tenant
from balancer.core.resume import BODY_BYTES, COPY_BYTES, NotExact, Said, Stitcher, read, rest_of, why_not

CHAT = Endpoint(path="/v1/chat/completions", name="chat", dialect=Dialect.OPENAI, streams=True)
COMPLETIONS = Endpoint(path="/v1/completions", name="completions", dialect=Dialect.OPENAI, streams=True)
MESSAGES = Endpoint(path="/v1/messages", name="messages", dialect=Dialect.ANTHROPIC, streams=True)
ENDPOINTS = {endpoint.name: endpoint for endpoint in (CHAT, COMPLETIONS, MESSAGES)}
ASKED: dict[str, dict[str, Any]] = {
    "chat": {"model": "m", "stream": True, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "completions": {"model": "m", "stream": True, "max_tokens": 9, "prompt": "hi"},
    "messages": {"model": "m", "stream": True, "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
}
BASE = {"id": "first", "object": "chat.completion.chunk", "created": 7, "model": "m"}
DONE = b"data: [DONE]\n\n"


def request(endpoint: str = "chat", **changes: Any) -> InferenceRequest:
    """A request; a change to None takes a member away."""
    body = {name: value for name, value in (ASKED[endpoint] | changes).items() if value is not None}
    raw = orjson.dumps(body)
    return InferenceRequest(
        id="r",
        endpoint=ENDPOINTS[endpoint],
        tenant=Tenant(id=ANONYMOUS),
        wishes=NO_WISHES,
        forward=(),
        head_lines=b"",
        target=b"/",
        model="m",
        body=raw,
        usage_body=None,
        parsed=body,
        is_exact=True,
        stream=True,
        wants_usage=False,
        accepted_s=0.0,
        deadline_s=1.0,
        http10=False,
    )


def event(choices: list[dict[str, Any]], **rest: Any) -> bytes:
    return b"data: " + json.dumps({**BASE, "choices": choices, **rest}).encode() + b"\n\n"


def delta(finish: str | None = None, /, **delta: Any) -> bytes:
    return event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])


def text(piece: str, finish: str | None = None) -> bytes:
    return event([{"index": 0, "text": piece, "logprobs": None, "finish_reason": finish}])


ROLE = delta(role="assistant", content="")


def said(content: str, **fields: Any) -> Said:
    return Said(**{"text": content, "tokens": 3, "is_counted": True, "has_role": True, "base": {}} | fields)


# -- by the request alone


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_a_plain_request_may_be_continued(endpoint: str, engine: str) -> None:
    harmless = {"temperature": 0.7, "top_p": 0.9, "n": 1, "user": "u", "presence_penalty": 0.0, "logit_bias": {"7": 1}}
    options = {"stream_options": {"include_usage": True}, "tool_choice": "none", "response_format": {"type": "text"}}
    assert why_not(request(endpoint), engine) is None
    assert why_not(request(endpoint, **harmless), engine) is None
    assert why_not(request(endpoint, **options, seed=3, temperature=0), engine) is None
    with_null = request(endpoint)
    assert with_null.parsed is not None
    with_null.parsed["whatever"] = None
    assert why_not(with_null, engine) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"repeat_penalty": 1.1}, "repeat_penalty"),
        ({"seed": 1}, "seed"),
        ({"seed": 1, "temperature": 0.1}, "seed"),
        ({"stop": "x"}, "stop"),
        ({"stop": ["x"]}, "stop"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"min_tokens": 4}, "min_tokens"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"guided_regex": "a+"}, "unknown_field"),
        ({"structured_outputs": {"json": {}}}, "unknown_field"),
        ({"grammar": "root"}, "unknown_field"),
        ({"n_predict": 8}, "unknown_field"),
        ({"truncate_prompt_tokens": 8}, "unknown_field"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"stream_options": 7}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 9.0}, "max_tokens"),
        ({"max_completion_tokens": True}, "max_tokens"),
        ({"user": "u" * BODY_BYTES}, "body_size"),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_request_whose_answer_hangs_on_more_than_its_text_is_not_continued(
    endpoint: str, changes: dict[str, Any], reason: str
) -> None:
    assert why_not(request(endpoint, **changes), "vllm") == reason


@pytest.mark.parametrize("prompt", [["hi"], [1, 2], [[1], [2]], 7, None])
def test_only_a_prompt_that_is_one_text_can_be_made_longer(prompt: Any) -> None:
    assert why_not(request("completions", prompt=prompt), "vllm") == "prompt"


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "x"}], ["x"], "x", None])
def test_only_messages_that_end_with_somebody_elses_can_be_made_longer(messages: Any) -> None:
    assert why_not(request(messages=messages), "vllm") == "messages"


@pytest.mark.parametrize("engine", ["tgi", "ollama", "trtllm", "other", None])
def test_only_engines_that_were_tested_are_asked_to_go_on(engine: str | None) -> None:
    assert why_not(request(), engine) == "engine"


def test_only_chats_and_completions_are_continued() -> None:
    assert why_not(request("messages"), "vllm") == "endpoint"


@pytest.mark.parametrize(("engine", "reason"), [("vllm", "max_tokens"), ("sglang", "max_tokens"), ("llamacpp", None)])
def test_a_completion_of_the_engines_own_length_is_not_continued(engine: str, reason: str | None) -> None:
    assert why_not(request("completions", max_tokens=None), engine) == reason
    assert why_not(request(max_tokens=None), engine) is None


# -- what was said


def test_what_a_chat_said_is_its_text_its_tokens_and_what_its_events_have_in_common() -> None:
    events = ROLE + delta(content="Hel") + b": alive\n\n" + delta(content="lo") + delta(content="")
    found = read(events, chat=True)
    assert found == Said(text="Hello", tokens=2, is_counted=True, has_role=True, base=BASE)


def test_what_a_completion_said() -> None:
    found = read(text("a") + text("", None) + text(" b"), chat=False)
    assert (found.text, found.tokens, found.has_role) == ("a b", 3, False)


def test_nothing_was_said_yet() -> None:
    assert read(b"", chat=True).text == read(ROLE, chat=True).text == ""


def test_an_event_with_more_than_one_word_is_more_than_one_token() -> None:
    assert read(delta(content=" word\n") + delta(content="\n\n  "), chat=True).is_counted
    assert not read(delta(content="two words"), chat=True).is_counted


def test_the_halves_of_an_emoji_are_one_character() -> None:
    halves = b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n'
    other = halves.replace(b"ud83d", b"ude42")
    assert read(halves + other, chat=True).text == "🙂"
    with pytest.raises(NotExact, match="incomplete_character"):
        read(halves, chat=True)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (delta("stop", content="x"), "finished"),
        (delta(content="x") + delta("length"), "finished"),
        (delta(reasoning_content="hm"), "reasoning"),
        (delta(reasoning="hm"), "reasoning"),
        (delta(tool_calls=[{"index": 0}]), "not_text"),
        (delta(refusal="no"), "not_text"),
        (delta(content=["x"]), "not_text"),
        (event([{"index": 1, "delta": {"content": "x"}}]), "n"),
        (event([{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": []}}]), "logprobs"),
        (event([{"index": 0, "delta": {"content": "x"}, "token_ids": [1]}]), "not_text"),
        (event([{"index": 0, "delta": "x"}]), "unreadable"),
        (b'data: {"choices": [7]}\n\n', "unreadable"),
        (b"data: {\n\n", "unreadable"),
        (b"data: []\n\n", "unreadable"),
    ],
)
def test_anything_but_plain_text_is_not_continued(events: bytes, reason: str) -> None:
    with pytest.raises(NotExact, match=reason):
        read(events, chat=True)


def test_what_is_empty_says_nothing() -> None:
    assert read(delta(content="x", tool_calls=[], reasoning_content=None, refusal=""), chat=True).text == "x"


# -- asking for the rest


def test_a_chat_is_continued_by_a_flag() -> None:
    body = b'{ "messages" : [ {"role":"user","content":"hi"} ] , "model":"m", "top_p": 1.0, "max_tokens" : 9}'
    for engine in ("vllm", "sglang"):
        assert rest_of(body, said("so far"), chat=True, engine=engine) == (
            b'{ "messages" : [ {"role":"user","content":"hi"},{"role":"assistant","content":"so far"} ] ,'
            b' "model":"m", "top_p": 1.0, "max_tokens" : 6,"add_generation_prompt":false,"continue_final_message":true}'
        )


def test_flags_that_are_there_are_set() -> None:
    body = b'{"messages":[{}],"continue_final_message":false,"add_generation_prompt":true}'
    rest = orjson.loads(rest_of(body, said("x"), chat=True, engine="vllm"))
    assert (rest["continue_final_message"], rest["add_generation_prompt"]) == (True, False)


def test_a_chat_is_continued_by_a_trailing_message() -> None:
    rest = orjson.loads(rest_of(request().body, said("so far"), chat=True, engine="llamacpp"))
    assert rest.pop("messages")[1:] == [{"role": "assistant", "content": "so far"}]
    assert rest == {"model": "m", "stream": True, "max_tokens": 6}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp"])
def test_a_completion_is_continued_by_its_prompt(engine: str) -> None:
    rest = orjson.loads(rest_of(request("completions").body, said(" there"), chat=False, engine=engine))
    assert rest == {"model": "m", "stream": True, "max_tokens": 6, "prompt": "hi there"}


def test_every_limit_of_length_is_lowered() -> None:
    body = request(max_completion_tokens=20).body
    rest = orjson.loads(rest_of(body, said("x", tokens=4), chat=True, engine="vllm"))
    assert (rest["max_tokens"], rest["max_completion_tokens"]) == (5, 16)


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (said("x\n"), "white_space"),
        (said("x\u00a0"), "white_space"),
        (said(" x"), "white_space"),
        (said("x\ufffd"), "incomplete_character"),
        (said("<think>x"), "reasoning"),
        (said("x", tokens=9), "nothing_left"),
        (said("x", is_counted=False), "tokens_unknown"),
    ],
)
def test_a_text_that_would_be_read_otherwise_is_not_continued(done: Said, reason: str) -> None:
    with pytest.raises(NotExact, match=reason):
        rest_of(request().body, done, chat=True, engine="vllm")


def test_uncounted_tokens_matter_only_where_the_length_is_bounded() -> None:
    body = request(max_tokens=None).body
    assert rest_of(body, said("x", is_counted=False), chat=True, engine="vllm")


def test_where_nothing_was_said_the_request_is_sent_again_as_it_is() -> None:
    assert rest_of(request().body, said("", tokens=0), chat=True, engine="vllm") == request().body


@given(st.lists(st.text(max_size=8), max_size=4), st.text(min_size=1), st.sampled_from([None, 1]))
def test_messages_grow_by_one_and_all_else_stays(contents: list[str], more: str, indent: int | None) -> None:
    value = {"a": [[]], "messages": [{"content": content, "x": ["]"]} for content in contents], "z": {"messages": []}}
    grown = json.loads(json_splice.append_item(json.dumps(value, indent=indent).encode(), "messages", more))
    assert grown == value | {"messages": [*value["messages"], more]}


# -- joining it on


def stitched(*events: bytes, chat: bool = True, done: Said | None = None) -> list[Any]:
    stitcher = Stitcher(done or said("so far", base=BASE), chat=chat)
    out = b"".join(stitcher.feed(part) for part in events)
    assert out == b"" or out.endswith(b"\n\n")
    lines = [line[6:] for line in out.split(b"\n\n") if line.startswith(b"data: ")]
    return ["[DONE]" if line == b"[DONE]" else json.loads(line) for line in lines]


def of_second(raw: bytes) -> bytes:
    return raw.replace(b'"first"', b'"second"').replace(b'"created": 7', b'"created": 9')


USAGE = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 9}}


def test_the_rest_has_the_first_parts_id_and_no_second_role() -> None:
    rest = [of_second(part) for part in (ROLE, delta(content=" and"), delta(content=" on"), delta("stop", content=""))]
    joined = stitched(*rest, event([], usage=USAGE), DONE)
    assert [one["id"] for one in joined[:-1]] == ["first"] * 4
    assert [one["created"] for one in joined[:-1]] == [7] * 4
    assert not any("role" in choice["delta"] for one in joined[:-1] for choice in one["choices"])
    assert [one["choices"][0]["delta"].get("content") for one in joined[:3]] == [" and", " on", ""]
    assert joined[2]["choices"][0]["finish_reason"] == "stop"
    assert joined[3]["usage"] == {"prompt_tokens": 7, "completion_tokens": 6, "total_tokens": 13}
    assert joined[-1] == "[DONE]"


def test_a_role_beside_text_is_taken_out_of_its_event() -> None:
    (one,) = stitched(delta(role="assistant", content="x"))
    assert one["choices"][0]["delta"] == {"content": "x"}


def test_the_first_role_stays() -> None:
    (one,) = stitched(ROLE, done=said("", has_role=False, tokens=0))
    assert one["choices"][0]["delta"]["role"] == "assistant"


@pytest.mark.parametrize("size", [1, 7, 50])
def test_reads_need_not_end_where_events_do(size: int) -> None:
    raw = ROLE + delta(content="a") + b": alive\n\n" + delta("stop") + DONE
    assert stitched(*(raw[at : at + size] for at in range(0, len(raw), size))) == stitched(raw)


def test_figures_of_one_part_alone_are_left_out() -> None:
    (one,) = stitched(event([{"index": 0, "delta": {"content": "x"}}], timings={"prompt_n": 3}))
    assert "timings" not in one


@pytest.mark.parametrize(
    ("usage", "done"),
    [
        ({**USAGE, "completion_tokens": 5}, said("x")),  # more tokens than events: an event is no token there
        ({**USAGE, "completion_tokens": 1}, said("x")),
        (USAGE, said("two words", is_counted=False)),
        ({**USAGE, "prompt_tokens": 3}, said("x")),
        ({"prompt_tokens": "10", "completion_tokens": 3}, said("x")),
    ],
)
def test_usage_that_cannot_be_known_is_left_out(usage: dict[str, Any], done: Said) -> None:
    rest = [delta(content="a"), delta(content="b"), delta("stop"), event([], usage=usage)]
    assert len(stitched(*rest, done=done)) == 3
    texts = [text("a"), text("b"), event([{"index": 0, "text": "", "finish_reason": "stop"}], usage=usage)]
    assert stitched(*texts, chat=False, done=done)[-1]["usage"] is None


@pytest.mark.parametrize("raw", [delta(reasoning_content="x"), delta(tool_calls=[{}]), b"data: 7\n\n"])
def test_a_rest_that_is_more_than_text_does_not_belong(raw: bytes) -> None:
    with pytest.raises(NotExact):
        stitched(delta(content="x"), raw)


def test_an_event_that_does_not_end_is_not_waited_for() -> None:
    stitcher = Stitcher(said("x"), chat=True)
    assert stitcher.feed(b"x" * COPY_BYTES) == b""
    with pytest.raises(NotExact, match="event_size"):
        stitcher.feed(b"x")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8), st.data())
def test_wherever_a_text_is_cut_both_parts_together_are_the_whole(pieces: list[str], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(pieces)))
    first = read(ROLE + b"".join(delta(content=piece) for piece in pieces[:cut]), chat=True)
    rest = stitched(ROLE, *(delta(content=piece) for piece in pieces[cut:]), delta("stop"), DONE, done=first)
    assert rest[-1] == "[DONE]"
    after = "".join(one["choices"][0]["delta"].get("content", "") for one in rest[:-1])
    assert first.text + after == "".join(pieces)
