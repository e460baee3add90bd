"""An entry is read back exactly as it was written, and nothing else is read at all."""

from __future__ import annotations

import dataclasses
import zlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.core.cache_entry import LINE_BYTES, OVERHEAD_BYTES, Soiled, Stored, decode, encode, is_older
from balancer.core.pace import RECORD_BYTES

NAME = "balancer:v1:cache:acme:m:{0}"
KEY = b"0123456789abcdef"
MOST = 1 << 20
STORED = Stored(True, b"text/event-stream", b"data: x\n\n" * 50, 1.7e9, 1.25, 60.0, 5.0, b"\x00\x09\x05\x09")


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "signed"])
@pytest.mark.parametrize("compress_bytes", [0, 1, 10_000])
def test_an_entry_comes_back_as_it_was(key: bytes | None, compress_bytes: int) -> None:
    data = encode(STORED, NAME, compress_bytes=compress_bytes, key=key)
    assert decode(data, NAME, max_bytes=MOST, key=key) == STORED


def test_only_a_body_that_gets_smaller_is_compressed() -> None:
    assert len(encode(STORED, NAME, compress_bytes=1)) < len(STORED.body) / 2
    random = dataclasses.replace(STORED, body=bytes(range(256)))
    assert encode(random, NAME, compress_bytes=1).endswith(random.body)


def reason_of(data: bytes, *, name: str = NAME, key: bytes | None = None, max_bytes: int = MOST) -> str:
    with pytest.raises(Soiled) as caught:
        decode(data, name, max_bytes=max_bytes, key=key)
    return caught.value.reason


def test_with_a_key_only_entries_signed_with_it_for_this_place_are_read() -> None:
    signed = encode(STORED, NAME, key=KEY)
    assert reason_of(encode(STORED, NAME), key=KEY) == "unsigned"
    assert reason_of(encode(STORED, NAME, key=b"another key here"), key=KEY) == "signature"
    assert reason_of(signed, name=NAME + "x", key=KEY) == "signature", "moved to another name"
    for at in (12, 80, len(signed) - 1):
        changed = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]
        assert reason_of(changed, key=KEY) == "signature"
    assert reason_of(signed) == "form", "without a key a signed entry is none"


def with_field(at: int, value: object) -> bytes:
    line, _, rest = encode(STORED, NAME).partition(b"\n")
    about = orjson.loads(line)
    about[at] = value
    return orjson.dumps(about) + b"\n" + rest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\n",
        b"null\n",
        b"[]\n{}",
        b"\xff" * 1000,
        encode(STORED, NAME)[:-1],
        encode(STORED, NAME) + b" ",
        encode(dataclasses.replace(STORED, body=b""), NAME),
        *(with_field(0, value) for value in (1, 3, "2", None)),
        *(with_field(1, value) for value in (1, None, "true")),
        with_field(2, 7),
        *(with_field(at, value) for at in (3, 4, 5, 6) for value in (-1.0, 1, "1", None)),
        *(with_field(at, value) for at in (7, 8) for value in (-1, 1.0, 10**9, True, None)),
        *(with_field(9, value) for value in ("gzip", "zlib", None, [])),
    ],
)
def test_what_is_not_exactly_an_entry_is_refused(data: bytes) -> None:
    assert reason_of(data) == "form"


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    assert reason_of(data) == "form"
    assert reason_of(data, key=KEY) in ("unsigned", "signature")


def test_a_compressed_body_is_never_larger_than_it_says_nor_than_allowed() -> None:
    bomb = zlib.compress(b"\0" * 50_000_000)
    about = [2, True, "text/event-stream", 1.7e9, 1.0, 60.0, 0.0, 0, 1000, "zlib"]
    assert reason_of(orjson.dumps(about) + b"\n" + bomb) == "form"
    about[8] = 50_000_000
    assert reason_of(orjson.dumps(about) + b"\n" + bomb) == "form"
    packed = encode(STORED, NAME, compress_bytes=1)
    assert reason_of(packed, max_bytes=len(STORED.body) - 1) == "form"
    assert reason_of(packed[:-2]) == "form", "cut off"
    assert reason_of(packed + b"x") == "form", "something behind it"


def test_what_stands_before_a_body_is_bounded() -> None:
    longest = dataclasses.replace(STORED, pace=b"\0" * RECORD_BYTES, content_type=b"x" * 512)
    data = encode(longest, NAME, key=KEY)
    assert len(data) - len(longest.body) <= OVERHEAD_BYTES
    assert data.index(b"\n") < LINE_BYTES


@pytest.mark.parametrize("key", [None, KEY])
def test_age_is_read_from_the_beginning_of_an_entry(key: bytes | None) -> None:
    beginning = encode(STORED, NAME, key=key)[:LINE_BYTES]
    assert is_older(beginning, 1.7e9 + 1)
    assert not is_older(beginning, 1.7e9)
    assert is_older(beginning, None)
    for soiled in (b"", b"x", b"[]\n", b"[2,true]\n", b"\xff"):
        assert is_older(soiled, 0.0), "what is no entry goes with the old"


def test_a_lifetime_ends_by_the_clock_only_where_there_is_a_grace() -> None:
    assert STORED.is_fresh(1.7e9 + 59)
    assert not STORED.is_fresh(1.7e9 + 60)
    assert dataclasses.replace(STORED, grace_s=0.0).is_fresh(1.7e9 + 10_000), "the store's expiry says so"
    assert STORED.left_s(1.7e9 + 59) == pytest.approx(1.0)
