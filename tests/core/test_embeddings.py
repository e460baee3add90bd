"""Lists of inputs taken apart and put together: order, exact usage, and nothing that is not a vector."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.embeddings import Known, decode, digests, entries_of, inputs_of, merge, split

WALL_S = 1e9


def tokens_of(text: str) -> int:
    return len(text) + 1


def answer(inputs: list[str], **fields: Any) -> bytes:
    """What a node says: a vector for each input, and how many tokens all of them were."""
    data = [
        {"object": "embedding", "index": i, "embedding": [float(len(text)), i * 0.0]} for i, text in enumerate(inputs)
    ]
    tokens = sum(map(tokens_of, inputs))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return orjson.dumps({"object": "list", "model": "m", "data": data, "usage": usage, **fields})


class Kept:
    """Entries as a cache keeps them."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.asked: list[list[str]] = []

    def ask(self, inputs: list[str]) -> Any:
        names = digests("base", inputs)
        parts = split([decode(self.entries.get(name)) for name in names])
        body = None
        if parts.missing:
            missing = [inputs[place] for place in parts.missing]
            self.asked.append(missing)
            body = answer(missing)
            entries = entries_of(body, [names[place] for place in parts.missing], WALL_S)
            assert entries is not None
            self.entries.update(zip([names[place] for place in parts.missing], entries, strict=True))
        merged = merge(parts, body)
        assert merged is not None
        return orjson.loads(merged)


@given(st.lists(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "eeeee"]), min_size=1, unique=True), max_size=12))
def test_answers_are_those_of_a_node_whatever_was_asked_before(requests: list[list[str]]) -> None:
    kept = Kept()
    for inputs in requests:
        told, whole = kept.ask(inputs), orjson.loads(answer(inputs))
        assert told["usage"] == whole["usage"], "the sum is exact"
        assert [item["index"] for item in told["data"]] == list(range(len(inputs)))
        assert [item["embedding"][0] for item in told["data"]] == [item["embedding"][0] for item in whole["data"]]
        assert {name: told[name] for name in ("object", "model")} == {"object": "list", "model": "m"}


def test_what_was_asked_for_alone_is_known_alone() -> None:
    kept = Kept()
    for text in ("a", "bb"):
        kept.ask([text])
    kept.ask(["bb", "ccc", "a"])
    assert kept.asked == [["a"], ["bb"], ["ccc"]]


def test_of_a_group_all_or_nothing_is_known() -> None:
    kept = Kept()
    kept.ask(["a", "bb"])
    kept.ask(["bb", "ccc"])
    kept.ask(["ccc", "dddd", "bb"])
    assert kept.asked == [["a", "bb"], ["bb", "ccc"], ["dddd"]]


@pytest.mark.parametrize(
    ("given_", "inputs"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([], None),
        (["a", "a"], None),
        ([1.5], None),
        ([{"image": "x"}], None),
        (["a", 1], None),
        (None, None),
        (7, None),
    ],
)
def test_inputs_that_can_be_taken_apart(given_: Any, inputs: Any) -> None:
    assert inputs_of({"input": given_}) == inputs
    assert inputs_of(None) is None


def test_names_differ_by_input_and_by_the_rest_of_the_request() -> None:
    names = [*digests("x", ["a", "b", [1], "[1]"]), *digests("y", ["a"])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "body",
    [
        b"x",
        b"[]",
        answer(["a"]),
        answer(["a", "b"], data=[{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]),
        answer(["a", "b"], data=[{"index": 0, "embedding": [1]}, {"index": 2, "embedding": [1]}]),
        answer(["a", "b"], data=[{"index": 0, "embedding": [1]}, {"index": 1}]),
        answer(["a", "b"], usage=None),
        answer(["a", "b"], usage={"prompt_tokens": 4, "total_tokens": 5}),
        answer(["a", "b"], usage={"prompt_tokens": 4, "total_tokens": 4, "cost": 1}),
        answer(["a", "b"], usage={"prompt_tokens": True, "total_tokens": True}),
    ],
)
def test_an_answer_that_is_not_understood_is_not_taken_apart(body: bytes) -> None:
    names = digests("base", ["a", "b"])
    assert entries_of(body, names, WALL_S) is None
    assert merge(split([None, None]), body) is None


def test_vectors_that_came_out_of_order_go_to_their_inputs() -> None:
    data = [{"index": 1, "embedding": "two"}, {"index": 0, "embedding": "one"}]
    entries = entries_of(answer(["a", "b"], data=data), digests("base", ["a", "b"]), WALL_S)
    assert entries is not None
    known = [decode(entry) for entry in entries]
    assert [entry.item["embedding"] for entry in known if entry is not None] == ["one", "two"]


@pytest.mark.parametrize("soiled", [None, b"", b"x", b"[]", b"[2,3]", b"null", b'[1,"g",0,{},{},{},1.0]'])
def test_a_soiled_entry_is_a_miss(soiled: bytes | None) -> None:
    assert decode(soiled) is None


def test_every_part_of_an_entry_is_checked() -> None:
    (entry,) = entries_of(answer(["a"]), ["name"], WALL_S) or ()
    assert isinstance(decode(entry), Known)
    parts = orjson.loads(entry)
    for place in range(len(parts)):
        for wrong in (None, -1, "x", [], {"index": 1}):
            if wrong == "x" and place == 1:
                continue  # any text is a group
            if wrong == {"index": 1} and place == 4:
                continue  # any object is an answer's rest
            assert decode(orjson.dumps([*parts[:place], wrong, *parts[place + 1 :]])) is None
