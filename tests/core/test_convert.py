"""Replaying a stored answer in the other form: what can be said is said whole, what cannot is None."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.core.convert import for_replay, has_usage, stream_to_unary, unary_to_stream

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
BASE = {"id": "c-1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
DONE = b"data: [DONE]\n\n"


def event(choices: list[dict[str, Any]] | None = None, **rest: Any) -> bytes:
    return b"data: " + orjson.dumps({**BASE, "choices": choices or [], **rest}) + b"\n\n"


def delta(delta: dict[str, Any], finish: str | None = None, index: int = 0, **rest: Any) -> bytes:
    return event([{"index": index, "delta": delta, "finish_reason": finish, **rest}])


ROLE = delta({"role": "assistant", "content": ""})
STOP = delta({}, "stop")
USAGE_EVENT = event(usage=USAGE)
STREAM = ROLE + delta({"content": "Hel"}) + delta({"content": "lo"}) + STOP + USAGE_EVENT + DONE
UNARY = {
    **BASE,
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": USAGE,
}


def unary(*events: bytes, chat: bool = True) -> Any:
    body = stream_to_unary(b"".join(events), chat=chat)
    return None if body is None else orjson.loads(body)


def events_of(stream: bytes | None) -> list[Any]:
    assert stream is not None
    assert stream.endswith(DONE)
    return [orjson.loads(text.removeprefix(b"data: ")) for text in stream.split(b"\n\n")[:-2]]


# Streams made whole


@pytest.mark.parametrize("form", [STREAM, STREAM.removesuffix(DONE), STREAM.replace(b"\n", b"\r\n"), STREAM.rstrip()])
def test_a_stream_becomes_the_answer_whose_pieces_it_holds(form: bytes) -> None:
    assert unary(form) == UNARY


def test_comments_and_data_over_several_lines_are_read() -> None:
    several = STOP.replace(b',"model"', b'\ndata: ,"model"')

    assert several != STOP
    assert unary(b": waiting\n\n", ROLE, delta({"content": "Hello"}), several, USAGE_EVENT, DONE) == UNARY


def test_completions_join_their_texts() -> None:
    pieces = [event([{"index": 0, "text": text, "logprobs": None, "finish_reason": None}]) for text in ("a", "", "b")]
    end = event([{"index": 0, "text": "", "finish_reason": "length", "stop_reason": None}])

    answer = unary(*pieces, end, USAGE_EVENT, chat=False)

    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]


def test_choices_are_told_apart_by_their_index() -> None:
    pieces = [delta({"content": text}, index=index) for index, text in [(1, "b"), (0, "a"), (1, "d"), (0, "c")]]

    answer = unary(*pieces, delta({}, "stop", index=1), delta({}, "length", index=0), USAGE_EVENT)

    said = [(one["index"], one["message"]["content"], one["finish_reason"]) for one in answer["choices"]]
    assert said == [(0, "ac", "length"), (1, "bd", "stop")]


def test_reasoning_and_refusal_are_texts_of_their_own() -> None:
    pieces = [delta({"reasoning_content": "hm"}), delta({"reasoning_content": "m"}), delta({"refusal": "no"})]

    answer = unary(delta({"role": "assistant", "content": None, "refusal": None}), *pieces, STOP, USAGE_EVENT)

    message = {"role": "assistant", "content": None, "reasoning_content": "hmm", "refusal": "no"}
    assert answer["choices"][0]["message"] == message


def test_tool_calls_are_assembled_by_index() -> None:
    def call(index: int, **rest: Any) -> bytes:
        return delta({"tool_calls": [{"index": index, **rest}]})

    pieces = [
        call(0, id="t0", type="function", function={"name": "f", "arguments": ""}),
        call(1, id="t1", type="function", function={"name": "g", "arguments": "{}"}),
        call(0, function={"arguments": '{"a"'}),
        call(0, id=None, type=None, function={"name": None, "arguments": ":1}"}),
    ]

    answer = unary(*pieces, delta({}, "tool_calls"), USAGE_EVENT)

    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "t0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "t1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_a_tool_call_has_one_name_and_one_id() -> None:
    def told(**again: Any) -> Any:
        first = {"index": 0, "id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        pieces = [delta({"tool_calls": [call]}) for call in (first, {"index": 0, **again})]
        return unary(*pieces, delta({}, "tool_calls"), USAGE_EVENT)

    assert told(id="t", function={"name": "", "arguments": ""}) is not None
    assert told(id="other") is None
    assert told(function={"name": "f"}) is None


def test_logprobs_and_token_ids_are_strung_together() -> None:
    pieces = [
        delta({"content": "a"}, logprobs={"content": [1], "refusal": None}, token_ids=[1, 2]),
        delta({"content": "b"}, logprobs={"content": [2, 3]}, token_ids=[3]),
        delta({}, "stop", logprobs=None, token_ids=None),
    ]

    choice = unary(*pieces, USAGE_EVENT)["choices"][0]

    assert choice["logprobs"] == {"content": [1, 2, 3], "refusal": None}
    assert choice["token_ids"] == [1, 2, 3]


def test_members_that_stay_the_same_are_kept() -> None:
    first = event([{"index": 0, "delta": {"content": "a"}, "finish_reason": None}], system_fingerprint=None, tier="x")
    last = event([{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": 5}], system_fingerprint="f")

    answer = unary(first, last, USAGE_EVENT)

    assert (answer["system_fingerprint"], answer["tier"], answer["choices"][0]["stop_reason"]) == ("f", "x", 5)


def test_the_time_of_the_first_event_is_the_answers() -> None:
    assert unary(STREAM.replace(b'"created":7', b'"created":8').replace(b'"created":8', b'"created":7', 1)) == UNARY


def test_padding_of_the_transport_is_dropped() -> None:
    padded = delta({"content": "Hello"}).replace(b'"id"', b'"obfuscation":"xyz","id"')

    assert unary(ROLE, padded, STOP, USAGE_EVENT) == UNARY


def test_usage_in_the_last_event_with_choices_counts_and_earlier_figures_do_not() -> None:
    finish = event([{"index": 0, "delta": {}, "finish_reason": "stop"}], usage=USAGE)
    middle = event([{"index": 0, "delta": {"content": "Hello"}, "finish_reason": None}], usage={"prompt_tokens": 3})

    assert unary(ROLE, middle, finish, DONE) == UNARY
    assert unary(ROLE, middle, STOP, DONE) is None


@pytest.mark.parametrize(
    "events",
    [
        b"",
        DONE,
        USAGE_EVENT + DONE,
        ROLE + STOP + DONE,  # no usage
        ROLE + delta({"content": "Hello"}) + USAGE_EVENT,  # no finish_reason
        ROLE + STOP + delta({"content": "x"}, index=1) + USAGE_EVENT,  # the second never finished
        STREAM[:-200],
        STREAM.replace(b'"Hel"', b"1"),
        STREAM.replace(b'"Hel"', b'[{"type":"text"}]'),
        STREAM.replace(b'{"content":"Hel"}', b'{"audio":{"data":"xyz"}}'),
        STREAM.replace(b'{"content":"Hel"}', b'"Hel"'),
        STREAM.replace(b'{"content":"Hel"}', b'{"role":"tool"}'),
        STREAM.replace(b'{"content":"Hel"}', b'{"tool_calls":[{"function":{"name":"f"}}]}'),
        STREAM.replace(b'{"content":"Hel"}', b'{"tool_calls":[{"index":0,"function":{"name":"f"}}]}'),
        STREAM.replace(b'{"content":"Hel"}', b'{"tool_calls":[{"index":0,"id":"t","custom":{"input":"x"}}]}'),
        STREAM.replace(b'{"content":"Hel"}', b'{"tool_calls":[{"index":0,"id":"t","function":{"name":"f","x":1}}]}'),
        STREAM.replace(b'{"content":"Hel"}', b'{"tool_calls":[{"index":0,"id":"t","function":{"name":1}}]}'),
        STREAM.replace(b'{"content":"Hel"}', b'{"tool_calls":"f"}'),
        STREAM.replace(b'{"content":"Hel"},', b'{"content":"Hel"},"probs":[1],'),
        STREAM.replace(b'{"content":"Hel"},', b'{"content":"Hel"},"logprobs":[1],'),
        STREAM.replace(b'{"content":"Hel"},', b'{"content":"Hel"},"message":"x",'),
        STREAM.replace(b'"model":"m"', b'"model":"other"', 1),
        STREAM.replace(b'"model":"m"', b'"model":"m","citations":["x"]', 1),
        STREAM.replace(b'"index":0', b'"index":"0"', 1),
        STREAM.replace(b'"finish_reason":"stop"', b'"finish_reason":1'),
        STREAM + b'data: {"error":{"message":"x"}}\n\n',
        STREAM + b"data: []\n\n",
        STREAM + b"data: {\n\n",
    ],
)
def test_a_stream_that_cannot_be_said_in_one_answer_is_refused(events: bytes) -> None:
    assert stream_to_unary(events, chat=True) is None


def test_nesting_beyond_what_can_be_written_is_refused() -> None:
    deep = b'{"content":' + b"[" * 400 + b"]" * 400 + b"}"

    events = STREAM.replace(b'{"content":"Hel"},', b'{"content":"Hel"},"logprobs":{"content":[' + deep + b"]},")

    assert stream_to_unary(events, chat=True) is None


# Answers made a stream


def test_an_answer_becomes_role_text_finish_usage_and_done() -> None:
    events = events_of(unary_to_stream(orjson.dumps(UNARY), chat=True, include_usage=True))

    assert all({"id": "c-1", "created": 7, "model": "m", "object": BASE["object"]}.items() <= e.items() for e in events)
    assert [(e["choices"][0]["delta"], e["choices"][0]["finish_reason"]) for e in events[:-1]] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "Hello"}, None),
        ({}, "stop"),
    ]
    assert (events[-1]["choices"], events[-1]["usage"]) == ([], USAGE)


def test_usage_is_told_only_to_who_asked() -> None:
    events = events_of(unary_to_stream(orjson.dumps(UNARY), chat=True, include_usage=False))

    assert len(events) == 3
    assert not any("usage" in one for one in events)


def test_an_answer_without_usage_streams_only_to_who_needs_none() -> None:
    body = orjson.dumps({**UNARY, "usage": None})

    assert unary_to_stream(body, chat=True, include_usage=False) is not None
    assert unary_to_stream(body, chat=True, include_usage=True) is None


def test_reasoning_is_told_before_the_text() -> None:
    message = {"content": "yes", "reasoning_content": "hm", "role": "assistant"}
    body = orjson.dumps({**UNARY, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    deltas = [e["choices"][0]["delta"] for e in events_of(unary_to_stream(body, chat=True, include_usage=False))]

    assert deltas == [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": "yes"}, {}]


def choice(**changes: Any) -> dict[str, Any]:
    return {**UNARY["choices"][0], **changes}  # type: ignore[index]


def message(**changes: Any) -> dict[str, Any]:
    return choice(message={"role": "assistant", "content": None, **changes})


TOOL = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "changes",
    [
        {"choices": []},
        {"choices": {}},
        {"choices": None},
        {"choices": ["x"]},
        {"choices": [choice(index=None)]},
        {"choices": [choice(), choice()]},
        {"choices": [choice(finish_reason=None)]},
        {"choices": [choice(message=None)]},
        {"choices": [choice(logprobs=[1])]},
        {"choices": [choice(logprobs={"content": 1})]},
        {"choices": [choice(probs={"a": 1})]},
        {"choices": [choice(token_ids="x")]},
        {"choices": [choice(delta="x")]},
        {"choices": [message(content=["parts"])]},
        {"choices": [message(role=None)]},
        {"choices": [message(audio={"data": "x"})]},
        {"choices": [message(score=1)]},
        {"choices": [message(tool_calls=[{**TOOL, "id": None}])]},
        {"choices": [message(tool_calls=[{**TOOL, "index": 1}])]},
        {"choices": [message(tool_calls=[{**TOOL, "x": 1}])]},
        {"choices": [message(tool_calls=[{**TOOL, "function": {"name": "f", "arguments": {}}}])]},
        {"choices": [message(tool_calls=[{"id": "t", "type": "custom", "custom": {}}])]},
        {"choices": [message(tool_calls="x")]},
        {"error": {"message": "x"}},
        {"usage": [1]},
        {"prompt_logprobs": [None]},
    ],
)
def test_an_answer_that_no_stream_can_say_is_refused(changes: dict[str, Any]) -> None:
    assert unary_to_stream(orjson.dumps({**UNARY, **changes}), chat=True, include_usage=False) is None


@pytest.mark.parametrize("text", [None, 1, ["a"]])
def test_a_completion_without_text_is_refused(text: Any) -> None:
    choices = [{"index": 0, "text": text, "finish_reason": "stop"}]
    body = orjson.dumps({**UNARY, "object": "text_completion", "choices": choices})

    assert unary_to_stream(body, chat=False, include_usage=False) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"1", b'"x"', b"{", b"null", b"{}"])
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    assert unary_to_stream(body, chat=True, include_usage=False) is None
    assert unary_to_stream(body, chat=False, include_usage=False) is None


# There and back

TEXT = st.text(max_size=20)
PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT | st.just([])
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
LOGPROBS = st.none() | st.dictionaries(
    st.sampled_from(["content", "refusal", "tokens"]),
    st.none() | st.lists(st.dictionaries(TEXT, NUMBERS | TEXT | st.lists(st.integers(0, 255)), max_size=3), max_size=3),
)
EXTRAS = st.dictionaries(st.sampled_from(["stop_reason", "matched_stop"]), PLAIN)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.text(min_size=1, max_size=8),
            "type": st.just("function"),
            "function": st.fixed_dictionaries({"name": st.text(min_size=1, max_size=8), "arguments": TEXT}),
        }
    ),
    max_size=3,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | TEXT},
    optional={
        "reasoning_content": st.none() | TEXT,
        "refusal": st.none() | TEXT,
        "annotations": st.just([]),
        "audio": st.none(),
        "tool_calls": st.none() | TOOLS,
    },
)


@st.composite
def answers(draw: st.DrawFn, *, chat: bool) -> dict[str, Any]:
    """Unary answers of every shape that a stream can say."""
    spoken = st.fixed_dictionaries({"message": MESSAGES} if chat else {"text": TEXT})
    choices = []
    for index in range(draw(st.integers(1, 3))):
        choice = {"index": index, **draw(spoken), "finish_reason": draw(TEXT), **draw(EXTRAS)}
        if draw(st.booleans()):
            choice["logprobs"] = draw(LOGPROBS)
        if draw(st.booleans()):
            choice["token_ids"] = draw(st.none() | st.lists(st.integers(0, 9)))
        choices.append(choice)
    top = draw(st.dictionaries(st.sampled_from(["system_fingerprint", "service_tier", "prompt_logprobs"]), PLAIN))
    if draw(st.booleans()):
        top["timings"] = {"prompt_ms": draw(NUMBERS)}
    kind = "chat.completion" if chat else "text_completion"
    return {"id": draw(TEXT), "object": kind, "created": 1, "model": "m", "choices": choices, "usage": USAGE, **top}


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans())
def test_an_answer_made_a_stream_and_whole_again_is_the_same(data: st.DataObject, chat: bool) -> None:
    answer = data.draw(answers(chat=chat))
    stream = unary_to_stream(orjson.dumps(answer), chat=chat, include_usage=True)

    assert stream is not None
    body = stream_to_unary(stream, chat=chat)

    assert body is not None
    assert json.loads(body) == answer


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), TEXT), min_size=1, max_size=12), st.booleans())
def test_text_is_the_concatenation_of_its_pieces(pieces: list[tuple[int, str]], chat: bool) -> None:
    def piece(index: int, text: str, finish: str | None) -> bytes:
        said = {"delta": {"content": text}} if chat else {"text": text}
        return event([{"index": index, **said, "finish_reason": finish}])

    indexes = {index for index, _ in pieces}
    told = [piece(index, text, None) for index, text in pieces] + [piece(index, "", "stop") for index in indexes]

    answer = unary(*told, USAGE_EVENT, DONE, chat=chat)

    for choice in answer["choices"]:
        said = choice["message"]["content"] if chat else choice["text"]
        assert said == "".join(text for index, text in pieces if index == choice["index"])


MEMBERS = st.sampled_from(
    ["choices", "index", "delta", "message", "text", "usage", "logprobs", "tool_calls", "function", "content"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(MEMBERS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(JSON, max_size=3), st.booleans(), st.booleans())
def test_whatever_a_node_wrote_nothing_is_raised(bodies: list[Any], chat: bool, include_usage: bool) -> None:
    events = b"".join(b"data: " + orjson.dumps(body) + b"\n\n" for body in bodies)

    stream_to_unary(events, chat=chat)
    for_replay(events, include_usage=include_usage)
    for body in bodies:
        unary_to_stream(orjson.dumps(body), chat=chat, include_usage=include_usage)


# Replay of a stream as a stream


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_the_usage_event_is_cut_out_for_who_did_not_ask(line_end: bytes) -> None:
    events = STREAM.replace(b"\n", line_end)

    assert for_replay(events, include_usage=True) == events
    assert for_replay(events, include_usage=False) == events.replace(USAGE_EVENT.replace(b"\n", line_end), b"")


def test_a_stream_without_usage_is_replayed_only_to_who_needs_none() -> None:
    events = STREAM.replace(USAGE_EVENT, b"")

    assert for_replay(events, include_usage=False) is events
    assert for_replay(events, include_usage=True) is None


def test_usage_events_in_odd_places_are_cut_out_too() -> None:
    odd = b": hello\n\n" + USAGE_EVENT + ROLE + USAGE_EVENT + STOP + b": bye\n\n" + USAGE_EVENT + DONE

    assert for_replay(odd, include_usage=False) == b": hello\n\n" + ROLE + STOP + b": bye\n\n" + DONE


def test_figures_within_an_event_of_the_answer_stay() -> None:
    finish = event([{"index": 0, "delta": {}, "finish_reason": "stop"}], usage=USAGE)
    events = ROLE + finish + DONE

    assert for_replay(events, include_usage=False) == events
    assert for_replay(events, include_usage=True) == events


@pytest.mark.parametrize("nothing", [b"", DONE, b": comment\n\n", b"data: 1\n\n", b"data: {", STOP + DONE])
def test_where_no_usage_is_none_is_found(nothing: bytes) -> None:
    assert not has_usage(nothing)
    assert for_replay(nothing, include_usage=False) == nothing


def test_words_about_usage_are_no_usage() -> None:
    events = delta({"content": '"usage":{"prompt_tokens":1}'}) + event([], usage=None) + STOP + DONE

    assert not has_usage(events)
    assert for_replay(events, include_usage=False) is events
