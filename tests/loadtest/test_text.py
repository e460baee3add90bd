"""The fake model's text: the same everywhere, without a seam."""

from __future__ import annotations

from random import Random

import pytest

from loadtest.text import Story, block_keys, count_tokens, from_token_ids, to_token_ids

PROMPTS = [
    "",
    "Hello",
    "Hello ",
    "two  ",
    "line\n",
    "tab\t",
    "ends with a the",
    "日本 ",
    "<|user|>\nhi<|end|>\n<|assistant|>\n",
]


def write(prompt: str, words: int, salt: str = "m") -> str:
    story = Story(prompt, salt)
    return "".join(story.next_word() for _ in range(words))


@pytest.mark.parametrize("prompt", [*PROMPTS, "x" * 70_000 + " y"])
def test_a_text_cut_anywhere_goes_on_as_if_it_had_not_been_cut(prompt: str) -> None:
    whole = write(prompt, 60)
    uncut = Story(prompt, "m")
    for cut in {0, 1, 2, 3, len(whole) - 1, len(whole), *(Random(1).randrange(len(whole)) for _ in range(40))}:
        story = Story(prompt + whole[:cut], "m")
        assert story.length == uncut.length
        rest = ""
        while len(rest) < len(whole) - cut:
            rest += story.next_word()
        assert rest == whole[cut:]
        assert story.written == uncut.written + 60


def test_any_change_of_prompt_or_salt_changes_the_text() -> None:
    assert write("a question", 20) == write("a question", 20)
    assert len({write("a question", 20), write("A question", 20), write("a question", 20, salt="n")}) == 3


def test_token_ids_give_the_text_back() -> None:
    text = "Größe 日本語 🙂 \0\0 end"
    assert from_token_ids(to_token_ids(text)) == text
    assert len(to_token_ids(text)) == count_tokens(text)


def test_texts_share_the_keys_of_their_common_head_only() -> None:
    one, other = block_keys("a" * 640 + "b" * 640, 16), block_keys("a" * 640 + "c" * 640, 16)
    assert len(one) == 20
    assert one[:10] == other[:10]
    assert not set(one[10:]) & set(other[10:])
