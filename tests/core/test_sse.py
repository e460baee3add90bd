"""What the scanners see in a stream, whatever the reads that it comes in."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from balancer.core.outcome import Outcome
from balancer.core.request import Dialect
from balancer.wire.sse import EVENT_BYTES, MESSAGE_CHARS, StreamScanner, Usage, scanner_for, usage_of

DONE = b"data: [DONE]\n\n"


def data(body: Any, name: str = "") -> bytes:
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def chat(delta: dict[str, Any] | None = None, finish: str | None = None, index: int = 0, **rest: Any) -> bytes:
    return data({"choices": [{"index": index, "delta": delta or {}, "finish_reason": finish}], **rest})


def typed(kind: str, **rest: Any) -> bytes:
    return data({"type": kind, **rest}, kind)


@dataclass(frozen=True)
class Stream:
    """A good stream: its events, which of them begins the content, what the node counted."""

    dialect: Dialect
    events: tuple[bytes, ...]
    first_content: int
    usage: Usage | None
    missing: Outcome = Outcome.NO_GOOD_END

    def scanner(self, *, withhold: bool = False, choices: int = 1) -> StreamScanner:
        scanner = scanner_for(self.dialect, choices, withhold_usage=withhold)
        assert scanner is not None
        return scanner

    @property
    def whole(self) -> bytes:
        return b"".join(self.events)


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
USAGE_EVENT = data({"choices": [], "usage": USAGE})

STREAMS = {
    "chat": Stream(
        Dialect.OPENAI,
        (
            b": warming up\n\n",
            chat({"role": "assistant", "content": ""}),
            chat({"content": 'say "usage" and [DONE'}),
            chat({"content": "é😀"}),
            chat({}, "stop"),
            USAGE_EVENT,
            DONE,
        ),
        2,
        Usage(3, 2, 1),
        Outcome.NO_FINISH_REASON,
    ),
    "completions": Stream(
        Dialect.OPENAI,
        (
            data({"choices": [{"index": 0, "text": "", "finish_reason": None}]}),
            data({"choices": [{"index": 0, "text": "a", "finish_reason": None}]}),
            data({"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]}),
            DONE,
        ),
        1,
        None,
        Outcome.NO_FINISH_REASON,
    ),
    "tool calls": Stream(
        Dialect.OPENAI,
        (
            chat({"role": "assistant", "content": None}),
            chat({"tool_calls": [{"index": 0, "id": "t", "function": {"name": "f", "arguments": ""}}]}),
            chat({"tool_calls": [{"index": 0, "function": {"arguments": '{"error":1}'}}]}),
            chat({}, "tool_calls"),
            DONE,
        ),
        1,
        None,
        Outcome.NO_FINISH_REASON,
    ),
    "reasoning": Stream(
        Dialect.OPENAI,
        (chat({"role": "assistant"}), chat({"reasoning_content": "hm"}), chat({"content": "x"}, "stop"), DONE),
        1,
        None,
        Outcome.NO_FINISH_REASON,
    ),
    "messages": Stream(
        Dialect.ANTHROPIC,
        (
            typed("message_start", message={"usage": {"input_tokens": 9, "output_tokens": 0}}),
            typed("content_block_start", index=0),
            typed("ping"),
            typed("content_block_delta", index=0, delta={"text": "an error_ in a message_"}),
            typed("content_block_delta", index=0, delta={"text": "x"}),
            typed("content_block_stop", index=0),
            typed("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 4}),
            typed("message_stop"),
        ),
        3,
        Usage(9, 4),
    ),
    "responses": Stream(
        Dialect.RESPONSES,
        (
            typed("response.created", response={"id": "r", "error": None}),
            typed("response.output_item.added", item={}),
            typed("response.output_text.delta", delta="no error, never failed"),
            typed("response.output_text.done", text="x"),
            typed("response.completed", response={"usage": {"input_tokens": 7, "output_tokens": 5}}),
        ),
        2,
        Usage(7, 5),
    ),
    "generate_stream": Stream(
        Dialect.TGI,
        (
            data({"token": {"text": "a"}, "generated_text": None, "details": None}),
            data({"token": {"text": "b"}, "generated_text": None, "details": None}),
            data(
                {
                    "token": {"text": ""},
                    "generated_text": "ab",
                    "details": {"generated_tokens": 3, "input_length": 8},
                }
            ),
        ),
        0,
        Usage(8, 3),
    ),
}
good_streams = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)


@dataclass(frozen=True)
class Seen:
    """All that a scanner makes of a stream, apart from its pace."""

    passed: bytes
    closed: Outcome
    content: bool
    good_end: bool
    usage: Usage | None
    message: str | None
    withheld: bytes


def seen(scanner: StreamScanner, reads: Iterable[bytes]) -> Seen:
    passed = b"".join([scanner.feed(read) for read in reads])
    withheld = b"".join(scanner.withheld or ())
    return Seen(passed, scanner.closed(), scanner.content, scanner.good_end, scanner.usage, scanner.message, withheld)


# The good way


@good_streams
def test_a_good_stream_passes_unchanged_and_reaches_its_good_end(stream: Stream) -> None:
    expected = Seen(stream.whole, Outcome.OK, True, True, stream.usage, None, b"")

    assert seen(stream.scanner(), [stream.whole]) == expected
    assert seen(stream.scanner(), stream.events) == expected


@good_streams
def test_content_begins_with_its_first_event_and_not_before(stream: Stream) -> None:
    scanner = stream.scanner()
    begun = []
    for event in stream.events:
        scanner.feed(event)
        begun.append(scanner.content)

    assert begun.index(True) == stream.first_content


@good_streams
def test_the_good_end_is_reached_with_the_last_event_and_not_before(stream: Stream) -> None:
    scanner = stream.scanner()
    ended = []
    for event in stream.events:
        scanner.feed(event)
        ended.append(scanner.good_end)

    assert ended == [False] * (len(stream.events) - 1) + [True]


@good_streams
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("withhold", [False, True])
def test_a_read_may_end_at_any_byte(stream: Stream, line_end: bytes, withhold: bool) -> None:
    text = stream.whole.replace(b"\n", line_end)
    whole = seen(stream.scanner(withhold=withhold), [text])
    assert whole.closed is Outcome.OK

    for at in range(1, len(text)):
        assert seen(stream.scanner(withhold=withhold), [text[:at], text[at:]]) == whole
    assert seen(stream.scanner(withhold=withhold), [text[at : at + 1] for at in range(len(text))]) == whole


@good_streams
def test_an_event_is_never_handed_on_in_part(stream: Stream) -> None:
    scanner = stream.scanner()
    passed = b""
    for at in range(len(stream.whole)):
        passed += scanner.feed(stream.whole[at : at + 1])
        assert passed == b"" or passed.endswith(b"\n\n")


@good_streams
def test_content_events_are_counted_for_the_pace(stream: Stream) -> None:
    scanner = stream.scanner()
    for event in stream.events:
        scanner.feed(event)

    assert 1 <= scanner.events <= len(stream.events)


def test_other_spellings_of_an_event_are_read() -> None:
    text = (
        b'data:{"choices":[{"delta":{"content":"x"}}]}\n\n'  # no space
        b'id: 7\nretry: 1\ndata: {"choices":\ndata: [{"delta":{},"finish_reason" : "stop"}]}\n\n'  # several lines
        b"event: message\ndata:[DONE] \n\n"
    )

    assert seen(STREAMS["chat"].scanner(), [text]) == Seen(text, Outcome.OK, True, True, None, None, b"")


def test_an_empty_line_too_many_belongs_to_the_next_event() -> None:
    text = STREAMS["chat"].whole.replace(b"\n\n", b"\n\n\n").removesuffix(b"\n")

    for at in range(1, len(text)):
        assert seen(STREAMS["chat"].scanner(), [text[:at], text[at:]]).passed == text


def test_comments_and_pings_are_no_content() -> None:
    scanner = STREAMS["chat"].scanner()
    waiting = b": queued\n\nevent: ping\n\n" + data({}) + data({"choices": [{}]})

    assert scanner.feed(waiting) == waiting
    assert not scanner.content


def test_plain_bytes_have_no_scanner() -> None:
    assert scanner_for(Dialect.PLAIN, 1, withhold_usage=False) is None


# n choices


def test_the_good_end_wants_a_finish_of_every_choice() -> None:
    def finished(*indexes: int) -> Seen:
        events = [chat({"content": "x"})] + [chat({}, "stop", index) for index in indexes]
        return seen(STREAMS["chat"].scanner(choices=2), [b"".join(events) + DONE])

    assert finished(0, 1).closed is Outcome.OK
    assert finished(1, 0).good_end
    assert finished(0).closed is Outcome.NO_FINISH_REASON
    assert finished(0, 0).closed is Outcome.NO_FINISH_REASON


def test_one_event_may_finish_several_choices() -> None:
    choices = [{"index": index, "text": "x", "finish_reason": "stop"} for index in range(3)]

    assert seen(STREAMS["chat"].scanner(choices=3), [data({"choices": choices}) + DONE]).good_end


def test_done_without_a_finish_is_not_handed_on() -> None:
    events = chat({"content": "x"})

    assert seen(STREAMS["chat"].scanner(), [events + DONE]).passed == events


# Usage


@pytest.mark.parametrize("split", [False, True])
def test_usage_nobody_asked_for_is_withheld_and_kept_for_the_store(split: bool) -> None:
    stream = STREAMS["chat"]
    reads = stream.events if split else [stream.whole]

    result = seen(stream.scanner(withhold=True), reads)

    assert result.passed == stream.whole.replace(USAGE_EVENT, b"")
    assert result.withheld == USAGE_EVENT
    assert (result.closed, result.usage) == (Outcome.OK, Usage(3, 2, 1))


def test_usage_beside_content_is_never_withheld() -> None:
    events = chat({"content": "x"}, usage=USAGE) + chat({}, "stop", usage=USAGE) + DONE

    result = seen(STREAMS["chat"].scanner(withhold=True), [events])

    assert (result.passed, result.withheld, result.usage) == (events, b"", Usage(3, 2, 1))


def test_an_event_without_choices_and_usage_is_not_withheld() -> None:
    events = data({"choices": [], "prompt_filter_results": []}) + data({"choices": [], "usage": None})

    assert STREAMS["chat"].scanner(withhold=True).feed(events) == events


def test_the_end_of_a_message_may_count_its_prompt_anew() -> None:
    stream = STREAMS["messages"]
    counted = typed("message_delta", usage={"input_tokens": 20, "output_tokens": 4, "cache_read_input_tokens": 6})

    assert seen(stream.scanner(), [*stream.events[:-2], counted, stream.events[-1]]).usage == Usage(20, 4, 6)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 2}}, Usage(3, 2)),
        ({"usage": {"prompt_tokens": 3, "total_tokens": 3}}, Usage(3, 0)),  # embeddings
        ({"usage": {"input_tokens": 3, "output_tokens": 2}}, Usage(3, 2)),
        ({"usage": {"input_tokens": 3, "output_tokens": 2, "cache_read_input_tokens": 1}}, Usage(3, 2, 1)),
        ({"usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None}}, Usage(3, 2)),
        ({"usage": {"input_tokens": 3, "input_tokens_details": {"cached_tokens": 2}}}, Usage(3, 0, 2)),
        ({"usage": {"prompt_tokens": "3", "completion_tokens": 2}}, None),
        ({"usage": {"prompt_tokens": True, "completion_tokens": 2}}, None),
        ({"usage": {"prompt_tokens": 3, "completion_tokens": None}}, None),
        ({"usage": {}}, None),
        ({"usage": None}, None),
        ({"usage": []}, None),
        ({}, None),
        ([], None),
        (None, None),
    ],
)
def test_usage_is_what_the_node_counted_or_nothing(body: Any, expected: Usage | None) -> None:
    assert usage_of(body) == expected


# Bad ends


@good_streams
def test_a_stream_that_just_ends_is_told_from_a_good_one(stream: Stream) -> None:
    for count in range(len(stream.events)):
        result = seen(stream.scanner(), stream.events[:count])

        assert result.closed in (stream.missing, Outcome.NO_GOOD_END)
        assert result.closed is not Outcome.OK


@good_streams
def test_an_unfinished_event_is_held_back_for_ever(stream: Stream) -> None:
    for at in range(1, len(stream.whole)):
        result = seen(stream.scanner(), [stream.whole[:at]])

        assert result.closed is not Outcome.OK
        assert result.passed == b"" or result.passed.endswith(b"\n\n")


def test_finishes_without_done_miss_the_good_end() -> None:
    stream = STREAMS["chat"]

    assert seen(stream.scanner(), stream.events[:-1]).closed is Outcome.NO_GOOD_END
    assert seen(stream.scanner(), stream.events[:-3]).closed is Outcome.NO_FINISH_REASON


ERRORS = {
    "chat": data({"error": {"message": "boom", "code": 500}}),
    "completions": data({"error": {"message": "boom"}}, "error"),
    "messages": typed("error", error={"type": "overloaded_error", "message": "boom"}),
    "responses": data({"type": "error", "message": "boom", "code": None}, "error"),
    "generate_stream": data({"error": "boom", "error_type": "overloaded"}),
}
node_errors = pytest.mark.parametrize("name", ERRORS)


@node_errors
def test_an_error_instead_of_content_may_be_tried_elsewhere(name: str) -> None:
    stream = STREAMS[name]
    before = stream.events[: stream.first_content]

    result = seen(stream.scanner(), [b"".join(before) + ERRORS[name] + stream.whole])

    assert (result.closed, result.message, result.content) == (Outcome.ERROR_OBJECT, "boom", False)
    assert result.passed == b"".join(before)


@node_errors
def test_an_error_after_content_ends_the_stream_wherever_the_read_ends(name: str) -> None:
    stream = STREAMS[name]
    begun = b"".join(stream.events[: stream.first_content + 1])
    text = begun + ERRORS[name] + stream.whole

    for at in range(1, len(text)):
        result = seen(stream.scanner(), [text[:at], text[at:]])

        assert (result.closed, result.message, result.passed) == (Outcome.STREAM_ERROR, "boom", begun)
        assert not result.good_end


def test_an_event_named_error_is_one_whatever_is_in_it() -> None:
    result = seen(STREAMS["responses"].scanner(), [data("it broke", "error")])

    assert (result.closed, result.message) == (Outcome.ERROR_OBJECT, "it broke")


def test_a_failed_response_is_an_answer_and_no_broken_stream() -> None:
    text = typed("response.failed", response={"error": {"message": "x"}, "usage": None})

    assert seen(STREAMS["responses"].scanner(), [text]) == Seen(text, Outcome.OK, False, True, None, None, b"")


def test_an_error_that_is_null_is_none() -> None:
    events = chat({"content": "x"}, error=None)

    assert seen(STREAMS["chat"].scanner(), [events]).passed == events


def test_a_nodes_own_words_are_cut_short() -> None:
    assert seen(STREAMS["chat"].scanner(), [data({"error": "x" * 2000})]).message == "x" * MESSAGE_CHARS


@pytest.mark.parametrize("error", [True, 1, [], ["x"], {"message": 1}, {"code": "x"}])
def test_an_error_without_words_is_still_an_error(error: Any) -> None:
    result = seen(STREAMS["chat"].scanner(), [data({"error": error})])

    assert (result.closed, result.message) == (Outcome.ERROR_OBJECT, None)


@good_streams
def test_nothing_is_handed_on_behind_the_good_end(stream: Stream) -> None:
    extra = stream.events[stream.first_content]

    assert seen(stream.scanner(), [stream.whole + extra]).passed == stream.whole
    assert seen(stream.scanner(), [stream.whole, extra]).passed == stream.whole


def test_nothing_is_handed_on_behind_an_error() -> None:
    scanner = STREAMS["chat"].scanner()
    scanner.feed(chat({"content": "x"}))
    scanner.feed(ERRORS["chat"])

    assert scanner.feed(chat({"content": "y"})) == b""


# Nonsense


@good_streams
@pytest.mark.parametrize("nonsense", [b"data: {\n\n", b"data: x\n\n", b"data: \xff\n\n", b'data: {"a":NaN}\n\n'])
def test_garbage_in_place_of_the_first_content_is_a_bad_body(stream: Stream, nonsense: bytes) -> None:
    before = b"".join(stream.events[: stream.first_content])
    text = before + nonsense + stream.whole

    for at in range(1, len(text)):
        result = seen(stream.scanner(), [text[:at], text[at:]])

        assert (result.closed, result.passed) == (Outcome.BAD_BODY, before)


@pytest.mark.parametrize(
    "body",
    [
        {"choices": 5},
        {"choices": "x"},
        {"choices": {"a": 1}},
        {"choices": [None, 1, "x", []]},
        {"choices": [{"index": [1], "finish_reason": "stop"}]},
        {"choices": [{"index": {}, "finish_reason": {}}]},
        {"choices": [{"delta": "x", "text": 7}]},
        {"usage": [1], "choices": None},
        {"usage": {"prompt_tokens": [], "completion_tokens": {}}},
        {"type": "message_start", "message": "x"},
        {"type": "message_start", "message": {"usage": [1]}},
        {"type": "message_delta", "usage": [1]},
        {"type": "message_delta", "usage": {"output_tokens": "x"}},
        {"type": ["message_stop"]},
        {"type": "response.completed", "response": [1]},
        {"type": "response.completed", "response": {"usage": 1}},
        {"type": {"a": 1}},
        {"generated_text": ["x"], "details": {"generated_tokens": 1, "input_length": "many"}},
        {"generated_text": {}, "details": [1]},
        {"token": None},
        [],
        None,
        1,
        "x",
        True,
    ],
)
@good_streams
def test_no_shape_of_an_event_breaks_a_scanner(stream: Stream, body: Any) -> None:
    for scanner in (stream.scanner(), stream.scanner(withhold=True, choices=3)):
        scanner.feed(stream.events[0] + data(body))
        scanner.feed(b"".join(stream.events[: stream.first_content + 1]) + data(body) + stream.whole)
        scanner.closed()


# Oversized events

HUGE = "x" * (EVENT_BYTES + 5000)


def reads_of(text: bytes, size: int) -> list[bytes]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1000, 65536, 100_003, EVENT_BYTES - 1, EVENT_BYTES + 1, EVENT_BYTES + 5100, 1 << 20])
def test_an_oversized_event_passes_and_what_surrounds_it_is_still_read(size: int) -> None:
    text = chat({"content": "a"}) + chat({"content": HUGE}) + chat({"content": "b"}, "stop") + USAGE_EVENT + DONE

    for line_end in (b"\n", b"\r\n"):
        spelt = text.replace(b"\n", line_end)
        result = seen(STREAMS["chat"].scanner(), reads_of(spelt, size))

        assert result.passed == spelt
        assert (result.closed, result.usage) == (Outcome.OK, Usage(3, 2, 1))


def test_an_oversized_event_may_end_at_any_byte_of_a_read() -> None:
    large = chat({"content": HUGE})
    text = large + USAGE_EVENT + chat({}, "stop") + DONE
    first = EVENT_BYTES + 1000

    for line_end in (b"\n", b"\r\n"):
        spelt = text.replace(b"\n", line_end)
        end = len(large.replace(b"\n", line_end))
        for at in range(end - 6, end + 6):
            result = seen(STREAMS["chat"].scanner(), [spelt[:first], spelt[first:at], spelt[at:]])

            assert (result.passed, result.closed, result.usage) == (spelt, Outcome.OK, Usage(3, 2, 1))


def test_an_event_without_end_does_not_pile_up() -> None:
    scanner = STREAMS["chat"].scanner()
    sent = passed = 0
    for _ in range(100):
        sent += 65536
        passed += len(scanner.feed(b"x" * 65536))
        assert sent - passed <= EVENT_BYTES + 65536


def test_an_error_before_an_oversized_event_is_still_seen() -> None:
    begun = chat({"content": "a"})

    result = seen(STREAMS["chat"].scanner(), [begun, ERRORS["chat"] + chat({"content": HUGE})[:-10], b"more"])

    assert (result.closed, result.passed) == (Outcome.STREAM_ERROR, begun)


@pytest.mark.parametrize("size", [60_000, EVENT_BYTES + 1000])
def test_a_finish_within_an_oversized_event_counts_for_the_only_choice(size: int) -> None:
    text = chat({"content": HUGE}, "stop") + DONE

    assert seen(STREAMS["chat"].scanner(), reads_of(text, size)).closed is Outcome.OK
    assert seen(STREAMS["chat"].scanner(choices=2), reads_of(text, size)).closed is Outcome.NO_FINISH_REASON


def test_a_finish_may_lie_across_two_parts_of_an_oversized_event() -> None:
    large = chat({"content": HUGE}, "stop")
    first = EVENT_BYTES + 1000

    for at in range(len(large) - 40, len(large)):
        reads = [large[:first], large[first:at], large[at:] + DONE]

        assert seen(STREAMS["chat"].scanner(), reads).closed is Outcome.OK


@pytest.mark.parametrize("size", [60_000, EVENT_BYTES + 1000])
def test_a_response_may_end_with_an_event_that_holds_all_of_it(size: int) -> None:
    stream = STREAMS["responses"]
    end = typed("response.completed", response={"output": HUGE, "usage": {"input_tokens": 7, "output_tokens": 5}})
    text = b"".join(stream.events[:-1]) + end

    result = seen(stream.scanner(), reads_of(text + stream.events[2], size))

    assert (result.closed, result.passed) == (Outcome.OK, text)


def test_a_prompt_echoed_in_an_oversized_event_is_no_content() -> None:
    stream = STREAMS["responses"]
    created = typed("response.created", response={"instructions": HUGE + '"type":"response.completed"'})
    scanner = stream.scanner()

    assert b"".join([scanner.feed(read) for read in reads_of(created, 50_000)]) == created
    assert not scanner.content
    assert not scanner.good_end
    assert seen(scanner, stream.events[1:]).closed is Outcome.OK


@pytest.mark.parametrize("size", [60_000, EVENT_BYTES + 1000])
def test_a_generated_text_may_be_oversized(size: int) -> None:
    stream = STREAMS["generate_stream"]
    large = data({"token": {"text": HUGE}, "generated_text": None})
    text = large + stream.events[0] + data({"token": {"text": ""}, "generated_text": HUGE, "details": None})

    assert seen(stream.scanner(), reads_of(text, size)).closed is Outcome.OK
    assert seen(stream.scanner(), reads_of(large, size)).closed is Outcome.NO_GOOD_END
