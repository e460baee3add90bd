"""Splicing into JSON text: the one member changes, every other byte stays."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.core.json_splice import append_member, repeated_members, replace_member

SPACE = st.text(" \t\n\r", max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["model", "a", "", 'q"{', "é😀", "stream", "[", "]}"])


def is_valid(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:  # lone surrogates
        return False
    return True


@st.composite
def spelt(draw: st.DrawFn, value: Any) -> str:
    """One of the ways in which a value can be written."""
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    if isinstance(value, str) and value and draw(st.booleans()):
        codes = value.encode("utf-16-be", "surrogatepass")
        text = '"' + "".join(f"\\u{codes[at]:02x}{codes[at + 1]:02X}" for at in range(0, len(codes), 2)) + '"'
    return text


@st.composite
def objects(draw: st.DrawFn) -> list[tuple[str, str, str]]:
    """An object's members as written: name, what stands before the value, value with what stands behind it."""
    members = []
    for name in draw(st.lists(NAMES, max_size=5)):
        before = draw(SPACE) + draw(spelt(name)) + draw(SPACE) + ":" + draw(SPACE)
        number = st.sampled_from(["1.0", "1e5", "-0", "10000000000000000000000000000000000", "0.10", "true"])
        value = draw(number | VALUES.flatmap(spelt).filter(is_valid))
        members.append((name, before, value))
    return members


def written(members: list[tuple[str, str, str]], replaced: dict[str, str] | None = None, space: str = "") -> bytes:
    parts = [before + (replaced or {}).get(name, value) + space for name, before, value in members]
    return (space + "{" + space + ",".join(parts) + "}" + space).encode()


@settings(max_examples=200, deadline=None)
@given(objects(), NAMES, VALUES, SPACE)
def test_replacing_changes_the_named_values_and_no_other_byte(
    members: list[tuple[str, str, str]], name: str, value: Any, space: str
) -> None:
    value = orjson.loads(orjson.dumps(value)) if is_dumpable(value) else "x"
    expected = written(members, {name: orjson.dumps(value).decode()}, space)

    assert replace_member(written(members, None, space), name, value) == expected


@settings(max_examples=200, deadline=None)
@given(objects(), NAMES, VALUES, SPACE)
def test_appending_adds_one_member_and_keeps_every_byte(
    members: list[tuple[str, str, str]], name: str, value: Any, space: str
) -> None:
    value = value if is_dumpable(value) else "x"
    body = written(members, None, space)

    longer = append_member(body, name, value)

    kept = body[: body.rindex(b"}")].rstrip()
    assert longer.startswith(kept)
    assert longer.endswith(body[len(kept) :])
    assert json.loads(longer) == {**json.loads(body), name: value}


@settings(max_examples=100, deadline=None)
@given(objects(), SPACE)
def test_repeated_names_are_those_that_stand_there_twice(members: list[tuple[str, str, str]], space: str) -> None:
    names = [name for name, _, _ in members]

    assert repeated_members(written(members, None, space)) == {name for name in names if names.count(name) > 1}


def is_dumpable(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits, lone surrogates
        return False
    return True


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"a"}', b'{"model":"b"}'),
        (b' { "x" : 1.0 , "model"\t:\n"a" } ', b' { "x" : 1.0 , "model"\t:\n"b" } '),
        (rb'{"\u006dodel":"a"}', rb'{"\u006dodel":"b"}'),
        (b'{"model":{"model":"a"},"y":"\\"model\\":1"}', b'{"model":"b","y":"\\"model\\":1"}'),
        (b'{"model":1,"model":[[{}]],"z":{"model":2}}', b'{"model":"b","model":"b","z":{"model":2}}'),
        (b'{"m":"a"}', b'{"m":"a"}'),
        (b"{}", b"{}"),
    ],
)
def test_every_top_level_member_of_the_name_is_replaced(body: bytes, expected: bytes) -> None:
    assert replace_member(body, "model", "b") == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", b'{"s":{"u":true}}'),
        (b" { \n} ", b' {"s":{"u":true} \n} '),
        (b'{"a":1}', b'{"a":1,"s":{"u":true}}'),
        (b'{"a":"}"\n}\r\n', b'{"a":"}","s":{"u":true}\n}\r\n'),
        (b'{"a":{}}', b'{"a":{},"s":{"u":true}}'),
    ],
)
def test_a_member_is_added_before_the_closing_brace(body: bytes, expected: bytes) -> None:
    assert append_member(body, "s", {"u": True}) == expected


def test_an_escaped_spelling_counts_as_the_same_name() -> None:
    assert repeated_members(rb'{"stream":true,"s\u0074ream":false,"n":{"n":1}}') == {"stream"}


def test_numbers_of_any_length_and_values_of_any_depth_pass() -> None:
    digits = b"9" * 10_000
    deep = b"[" * 1000 + b"]" * 1000

    body = b'{"seed":' + digits + b',"model":' + deep + b',"x":' + deep + b"}"

    assert replace_member(body, "model", "b") == b'{"seed":' + digits + b',"model":"b","x":' + deep + b"}"


@pytest.mark.parametrize("body", [b'{"a":[1', b'{"a":1', b'{"a"', b'{"a":"x', b"{", b"{ "])
def test_what_is_no_json_is_an_error_and_no_endless_loop(body: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        repeated_members(body)
