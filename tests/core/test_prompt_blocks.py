"""A prompt's blocks: what two requests share of their prompts, they share of their blocks."""

from __future__ import annotations

import subprocess
import sys
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.prompt_blocks import BLOCK_BYTES, HASHED_BYTES, WRITTEN_BYTES, Prompt, chained, read


def words(size: int, seed: int = 1) -> str:
    return Random(seed).randbytes(size // 2).hex()


def turn(role: str, content: object) -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(text: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, **more}]


def shared(one: Prompt, other: Prompt) -> int:
    count = 0
    for left, right in zip(one.blocks, other.blocks, strict=False):
        if left != right:
            break
        count += 1
    return count


def chat(turns: list[Any], size: int = 1000, **fields: Any) -> Prompt:
    return read({"model": "m", "messages": turns, **fields}, size, "m")


SYSTEM = turn("system", words(3000, 2))
USER = turn("user", words(5000, 3))
ANSWER = turn("assistant", words(4000, 4))
MORE = turn("user", words(2000, 5))


def test_the_next_turn_shares_all_full_blocks_of_the_turn_before() -> None:
    first, second = chat([SYSTEM, USER]), chat([SYSTEM, USER, ANSWER, MORE])

    assert shared(first, second) == len(first.blocks) == 7
    assert len(second.blocks) == 13


def test_another_question_shares_the_system_prompt_and_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": words(4000, 6)}}]
    one, other = chat([SYSTEM, USER], tools=tools), chat([SYSTEM, MORE], tools=tools)

    assert shared(one, other) == 6
    assert shared(one, chat([SYSTEM, USER])) == 2  # without tools only the system prompt is the same


def test_a_different_beginning_shares_nothing() -> None:
    assert shared(chat([SYSTEM, USER]), chat([USER, SYSTEM])) == 0


def test_models_and_salts_are_apart() -> None:
    body = {"messages": [SYSTEM, USER]}

    assert shared(read(body, 9000, "m"), read(body, 9000, "n")) == 0
    assert shared(read(body, 9000, "m"), read({**body, "cache_salt": "x"}, 9000, "m")) == 0


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": words(5000)},
        {"input": words(5000)},
        {"inputs": words(5000)},
        {"prompt": [words(5000)]},
        {"prompt": list(range(1300))},
        {"prompt": [list(range(1300))]},
        {"input": [turn("user", words(5000))]},
        {"system": words(4000), "messages": [turn("user", parts(words(1000)))]},
        {"instructions": words(4000), "input": [turn("user", words(1000))]},
    ],
)
def test_every_dialects_prompt_is_found(body: dict[str, Any]) -> None:
    prompt = read(body, 77)

    assert len(prompt.blocks) in (4, 5)
    assert 5000 <= prompt.size_bytes <= 5250


def test_token_ids_are_counted_as_what_they_are() -> None:
    assert read({"prompt": list(range(1300))}, 77).token_ids == 1300
    assert read({"input": [[1, 2], [3]]}, 77).token_ids == 3


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"prompt": 5},
        {"prompt": []},
        {"prompt": [None]},
        {"messages": "hello"},
        {"messages": [{}]},
        {"messages": [{"role": "user", "content": 2**70}]},
        {"messages": [turn("user", "\ud800")]},
        {"prompt": "\ud800" * 2000},
        {"prompt": [-1, 2]},
        {"prompt": [2**40]},
        {"prompt": [1, "x"]},
        {"prompt": [[1], "x"]},
        {"messages": [turn("user", parts("x")), None, 3, [1]]},
        {"messages": [turn("user", [None, 3, {"type": 5}, {"type": "image"}])]},
    ],
)
def test_what_cannot_be_read_still_has_a_size(body: dict[str, Any] | None) -> None:
    prompt = read(body, 77)

    assert prompt.blocks == ()
    assert prompt.size_bytes > 0


def image(seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + words(300_000, seed)}}


def test_an_image_counts_as_one_attachment_and_not_by_its_bytes() -> None:
    asked = turn("user", [*parts(words(3000)), image(1)])
    prompt = chat([SYSTEM, asked], 310_000)

    assert prompt.attachments == 1
    assert prompt.size_bytes < 6500
    assert shared(prompt, chat([SYSTEM, asked, ANSWER, MORE], 310_000)) == len(prompt.blocks) == 5
    assert shared(prompt, chat([SYSTEM, turn("user", [image(2), *parts(words(3000))])], 310_000)) == 2


def test_an_image_in_a_tools_result_is_found() -> None:
    shown = {"type": "image", "source": {"type": "base64", "data": words(9000)}}
    result = turn("user", [{"type": "tool_result", "tool_use_id": "t", "content": [*parts("ok"), shown]}])

    assert chat([SYSTEM, result]).attachments == 1


def test_an_image_that_comes_later_leaves_the_head_as_it_was() -> None:
    before = chat([SYSTEM, turn("user", parts(words(5000)))])
    after = chat([SYSTEM, turn("user", parts(words(5000))), ANSWER, turn("user", [image(1)])], 320_000)

    assert shared(before, after) == len(before.blocks)


def test_a_cache_mark_that_moves_on_changes_nothing() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    first = chat([turn("user", parts(words(5000), **mark))], system=parts(words(3000, 2), **mark))
    turns = [turn("user", parts(words(5000))), ANSWER, turn("user", parts("go on", **mark))]
    second = chat(turns, system=parts(words(3000, 2), **mark))

    assert shared(first, second) == len(first.blocks) == 7


def test_a_conversation_that_grows_beyond_what_is_written_keeps_its_head() -> None:
    before = chat([SYSTEM, USER, ANSWER], 12_000)
    after = chat([SYSTEM, USER, ANSWER, turn("user", words(WRITTEN_BYTES))], WRITTEN_BYTES + 13_000)

    assert shared(before, after) == len(before.blocks)
    assert len(after.blocks) == HASHED_BYTES // BLOCK_BYTES
    assert after.size_bytes >= WRITTEN_BYTES


def test_hashing_stops_after_the_first_256_kib() -> None:
    assert len(chained(b"x" * (2 * HASHED_BYTES))) == HASHED_BYTES // BLOCK_BYTES
    assert read({"prompt": "x" * (2 * HASHED_BYTES)}, 5).size_bytes == 2 * HASHED_BYTES


def test_every_process_makes_the_same_blocks() -> None:
    program = "from balancer.core.prompt_blocks import chained; print(chained(b'abc' * 1000, b'm'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == str(chained(b"abc" * 1000, b"m"))


@given(st.integers(0, 6000), st.integers(0, 3000), st.integers(0, 3000))
def test_shared_blocks_are_exactly_the_full_blocks_of_shared_text(common: int, left: int, right: int) -> None:
    head = words(6000)[:common].encode()
    one, other = head + b"a" + b"l" * left, head + b"b" + b"r" * right
    blocks = [set(chained(one)), set(chained(other))]

    assert len(blocks[0] & blocks[1]) == common // BLOCK_BYTES
    assert len(chained(one)) == len(one) // BLOCK_BYTES
