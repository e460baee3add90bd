"""Requests share a key exactly when nothing that can change the answer tells them apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balancer.core import cache_key
from balancer.core.cache_key import (
    check_depth,
    check_numbers,
    derive,
    has_huge_integer,
    identity,
    is_exact,
    not_cacheable,
    skeleton,
)
from balancer.core.request import CacheMode, Dialect, Endpoint, InferenceRequest, Wishes
from balancer.errors import BadRequest

JSON_HEADERS = ((b"content-type", b"application/json"),)
PINNED = "1a0a2a8083697cc4f7aa6b96348f3865b2c20f7d2b2c17168c623bd501c7d546"
CHAT = Endpoint(path="/v1/chat/completions", name="chat", dialect=Dialect.OPENAI, streams=True, samples=True)


def key_of(body: bytes, **parts: Any) -> str:
    all_parts: dict[str, Any] = {
        "tenant": "acme",
        "endpoint": "/v1/chat/completions",
        "query": b"",
        "model": "qwen",
        "revision": None,
        "headers": JSON_HEADERS,
        "parsed": orjson.loads(body),
    }
    return derive(body=body, **(all_parts | parts))


# -- JSON text as an adversary would write it

# Pieces of strings: what looks like structure, and every way to write a quote, a colon or a backslash.
PIECES = [
    "a",
    ":",
    '\\"',
    '\\":',
    "\\\\",
    "\\u003a",
    "\\u003A",
    "\\\\u003a",
    "\\u0022",
    "\\u0061",
    "\\u00e9",
    "é",
    "\\n",
    "\\/",
]
MORE_PIECES = ["b", "{", "}", "[", ",", " :", "1" * 19, "9" * 25, "😀", "\\ud83d\\ude00"]
SPACES = st.sampled_from(["", "", "", " ", "  ", "\n", "\t", "\r\n"])
STRINGS = st.lists(st.sampled_from(PIECES + MORE_PIECES), max_size=4).map(lambda pieces: f'"{"".join(pieces)}"')
NAMES = st.sampled_from(['"a"', '"\\u0061"', '"b"', '":"', '"\\u003a"', '"\\""', '"\\\\"', '""', '"a\\":"', '"model"'])
INTEGERS = ["0", "-0", "1", "-1", "1234567890123456789", "18446744073709551615", "18446744073709551616", "9" * 19]
INTEGERS += ["-9223372036854775808", "-9223372036854775809", "-" + "9" * 19, "1" + "0" * 20, "9" * 30]
FRACTIONS = ["1.0", "1e2", "1E+2", "0.1234567890123456789012", "1234567890123456789012.5", "1e-1234567890123456789"]
FRACTIONS += [
    "1e-" + "0" * 24 + "1",
    "1E+" + "0" * 24 + "2",
    "12345678901234567890e0",
    "0." + "1" * 40,
    "-1" + "0" * 25 + "E-3",
]
NUMBERS = st.sampled_from(INTEGERS + FRACTIONS)
LITERALS = st.sampled_from(["true", "false", "null"])


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    members = draw(st.lists(st.tuples(SPACES, NAMES, SPACES, SPACES, values, SPACES), max_size=4))
    return "{" + ",".join(f"{a}{name}{b}:{c}{value}{d}" for a, name, b, c, value, d in members) + "}"


@st.composite
def arrays(draw: st.DrawFn, values: st.SearchStrategy[str]) -> str:
    members = draw(st.lists(st.tuples(SPACES, values, SPACES), max_size=4))
    return "[" + ",".join(f"{a}{value}{b}" for a, value, b in members) + "]"


VALUES = st.recursive(
    st.one_of(STRINGS, NUMBERS, LITERALS), lambda inner: st.one_of(objects(inner), arrays(inner)), max_leaves=12
)
BODIES = objects(VALUES).map(str.encode)


def is_exact_by_reference(body: bytes) -> bool:
    """The slow way, with the standard library's parser and a look at every name and every integer."""
    good = True

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal good
        good = good and len({name for name, _ in pairs}) == len(pairs)
        return dict(pairs)

    def held(digits: str) -> int:
        nonlocal good
        good = good and -(2**63) <= int(digits) < 2**64
        return int(digits)

    json.loads(body.decode(), object_pairs_hook=distinct, parse_int=held)
    return good


@settings(max_examples=600, deadline=None)
@given(body=BODIES)
@example(body=b'{"a":1,"a":2,"b":"\\u003a"}')  # an escaped colon that makes up for a dropped name
@example(body=b'{"a":1,"a":2,"b":"\\u003A"}')
@example(body=b'{"a" :1,"a":2}')
@example(body=b'{"a":1,"\\u0061":2}')
@example(body=b'{"a":{"b":":::","b":1},"a":1,"c":"\\u003a\\u003a\\u003a\\u003a\\u003a\\u003a"}')
@example(body=b'{"a":"\\\\","a":"\\\\\\":","b":"\\\\u003a"}')
@example(body=b'{"a":9223372036854775808, "b": -9223372036854775809}')
@example(body=b'{ "a":18446744073709551616}')
def test_exactness_agrees_with_the_slow_reference(body: bytes) -> None:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return  # refused long before
    assert is_exact(body, parsed) is is_exact_by_reference(body)


@settings(max_examples=300, deadline=None)
@given(body=BODIES)
def test_huge_integers_are_found_wherever_they_stand(body: bytes) -> None:
    huge = False

    def held(digits: str) -> int:
        nonlocal huge
        huge = huge or not -(2**63) <= int(digits) < 2**64
        return 0

    json.loads(body.decode(), parse_int=held)
    assert has_huge_integer(body) is huge


def test_integer_that_even_the_reference_refuses_is_huge() -> None:
    assert has_huge_integer(b"[" + b"9" * 5000 + b"]")


@given(padding=st.integers(0, 20), number=st.sampled_from(["18446744073709551616", "-9223372036854775809"]))
def test_huge_integer_is_found_at_every_offset(padding: int, number: str) -> None:
    body = f"{' ' * padding}[{number}]".encode()
    assert has_huge_integer(body)
    assert not is_exact(body, orjson.loads(body))


@settings(max_examples=300, deadline=None)
@given(body=BODIES)
def test_skeleton_keeps_what_is_outside_of_strings(body: bytes) -> None:
    text, outside, inside, escaped = body.decode(), [], False, False
    for char in text:
        if not inside:
            outside.append(char)
            inside = char == '"'
        elif escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == '"':
            inside = False
    assert skeleton(body) == "".join(outside).encode()


# -- what shares a key


def shuffled(value: Any, rng: Any) -> Any:
    if isinstance(value, dict):
        names = list(value)
        rng.shuffle(names)
        return {name: shuffled(value[name], rng) for name in names}
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False), TEXT
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(
    fields=st.dictionaries(TEXT, JSON_VALUES, max_size=5),
    rng=st.randoms(use_true_random=False),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_order_spacing_and_escapes_do_not_matter(
    fields: dict[str, Any], rng: Any, indent: int, ascii_only: bool
) -> None:
    plain = orjson.dumps(fields)
    other = json.dumps(shuffled(fields, rng), indent=indent, ensure_ascii=ascii_only).encode()
    assert key_of(plain) == key_of(other)


@settings(max_examples=200, deadline=None)
@given(one=BODIES, other=BODIES)
def test_equal_keys_mean_equal_json_or_equal_bytes(one: bytes, other: bytes) -> None:
    try:
        parsed, parsed_other = orjson.loads(one), orjson.loads(other)
    except orjson.JSONDecodeError:
        return
    exact = is_exact_by_reference(one) and is_exact_by_reference(other)
    kept = [{k: v for k, v in p.items() if k not in cache_key.LEFT_OUT_FIELDS} for p in (parsed, parsed_other)]
    for fields in kept:
        if isinstance(fields.get("model"), str):
            fields["model"] = "m"
    same = repr(canonical(kept[0])) == repr(canonical(kept[1])) if exact else one == other
    assert (key_of(one, model="m") == key_of(other, model="m")) is same


def canonical(value: Any) -> Any:
    """Sorted pairs, with the types of numbers in sight."""
    if isinstance(value, dict):
        return ("object", sorted((name, canonical(inner)) for name, inner in value.items()))
    if isinstance(value, list):
        return [canonical(item) for item in value]
    return (type(value).__name__, value)


@pytest.mark.parametrize(
    "other",
    [
        b'{"model":"qwen","messages":[],"temperature":0.0}',  # 0 is not 0.0
        b'{"model":"qwen","messages":[],"temperature":false}',
        b'{"model":"qwen","messages":[],"temperature":0,"never_heard_of":1}',
        b'{"model":"qwen","messages":[{}],"temperature":0}',
        b'{"model":"qwen","messages":null,"temperature":0}',
        b'{"model":"qwen","messages":[]}',
        b'{"model":"qwen","messages":[],"temperature":0,"options":{"user":"u"}}',
        b'{"messages":[],"temperature":0}',
        b'{"model":null,"messages":[],"temperature":0}',
    ],
)
def test_every_field_of_the_body_counts(other: bytes) -> None:
    assert key_of(b'{"model":"qwen","messages":[],"temperature":0}') != key_of(other)


def test_who_asks_and_how_it_is_delivered_do_not_count() -> None:
    plain = key_of(b'{"model":"qwen","seed":1}')
    assert plain == key_of(
        b'{"stream_options":{"include_usage":true},"seed":1,"user":"u","stream":true,"metadata":{"a":1},"model":"qwen"}'
    )


def test_such_fields_count_below_the_top_level() -> None:
    assert key_of(b'{"a":{"user":"x"}}') != key_of(b'{"a":{"user":"y"}}')


def test_alias_and_real_name_share() -> None:
    assert key_of(b'{"model":"fast","seed":1}', model="qwen") == key_of(b'{"model":"qwen","seed":1}', model="qwen")


def test_known_to_be_exact_the_body_may_hold_the_model_in_place_of_the_alias() -> None:
    parsed = orjson.loads(b'{"model":"a:b","seed":1}')
    for body in (b'{"model":"a:b","seed":1}', b'{"model":"qwen","seed":1}'):
        assert key_of(body, parsed=parsed, model="qwen", exact=True) == key_of(b'{"seed":1,"model":"qwen"}')


def test_long_names_of_models_and_long_headers_count_and_are_not_remembered() -> None:
    before = cache_key._head.cache_info().currsize, cache_key._named.cache_info().currsize
    keys = {key_of(b"{}", model="m" * length) for length in range(1000, 1010)}
    keys |= {key_of(b"{}", headers=((b"openai-x", b"x" * length),)) for length in range(1000, 1010)}
    assert len(keys) == 20
    assert (cache_key._head.cache_info().currsize, cache_key._named.cache_info().currsize) == before


def test_what_is_known_to_be_inexact_is_keyed_by_its_bytes() -> None:
    assert identity(b"{}", {}, "m", False) == (b"raw", b"{}")


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "other"},
        {"tenant": None},
        {"tenant": "shared"},
        {"endpoint": "/v1/completions"},
        {"query": b"a=1"},
        {"model": "qwen2"},
        {"revision": "2"},
        {"headers": (*JSON_HEADERS, (b"openai-organization", b"o"))},
        {"headers": ((b"content-type", b"application/json; charset=utf-8"),)},
        {"headers": ()},
    ],
)
def test_every_part_of_a_request_counts(change: dict[str, Any]) -> None:
    body = b'{"model":"qwen","seed":1}'
    assert key_of(body) != key_of(body, **change)


def test_a_tenant_called_shared_is_not_everybody() -> None:
    body = b'{"model":"qwen","seed":1}'
    assert key_of(body, tenant="shared") != key_of(body, tenant=None)


def test_headers_that_say_nothing_about_the_answer_do_not_count() -> None:
    noise = ((b"User-Agent", b"x"), (b"x-request-id", b"1"), (b"traceparent", b"t"), (b"tracestate", b"t"))
    body = b'{"model":"qwen","seed":1}'
    assert key_of(body) == key_of(body, headers=(*noise, *JSON_HEADERS, (b"Baggage", b"b")))


def test_order_and_case_of_header_names_do_not_count_but_order_of_values_does() -> None:
    body = b"{}"
    one = key_of(body, headers=((b"Accept", b"a"), (b"openai-x", b"1"), (b"openai-x", b"2")))
    assert one == key_of(body, headers=((b"OpenAI-X", b"1"), (b"openai-x", b"2"), (b"accept", b"a")))
    assert one != key_of(body, headers=((b"openai-x", b"2"), (b"openai-x", b"1"), (b"accept", b"a")))


TEXTS = st.text(st.sampled_from("ab=\x00"), max_size=3)
HEADERS = st.lists(st.tuples(st.sampled_from([b"a", b"ab", b"b"]), TEXTS.map(str.encode)), max_size=2)


@given(
    *[st.tuples(TEXTS, TEXTS, TEXTS.map(str.encode), TEXTS, TEXTS, HEADERS, TEXTS.map(str.encode)) for _ in range(2)]
)
def test_bytes_cannot_move_from_one_part_to_another(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    def key(parts: tuple[Any, ...]) -> str:
        tenant, endpoint, query, model, revision, headers, body = parts
        return derive(
            tenant=tenant, endpoint=endpoint, query=query, model=model, revision=revision, headers=headers,
            body=body, parsed=None,
        )  # fmt: skip

    def sorted_headers(parts: tuple[Any, ...]) -> Iterable[Any]:
        return sorted(parts[5], key=lambda pair: pair[0])

    same = (*one[:5], sorted_headers(one), one[6]) == (*other[:5], sorted_headers(other), other[6])
    assert (key(one) == key(other)) is same


# -- where the body's own bytes are the key


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":1,"a":1}',
        b'{"a":{"b":[{"c":1,"c":2}]}}',
        b'{"a":123456789012345678901234567890}',
        b'{"seed": -9223372036854775809}',
    ],
)
def test_body_that_its_parse_does_not_tell_is_keyed_by_its_bytes(body: bytes) -> None:
    assert identity(body, orjson.loads(body), "m") == (b"raw", body)
    assert key_of(body) != key_of(body + b" ")


def test_large_body_is_keyed_by_its_bytes() -> None:
    text = "x" * cache_key.CANONICAL_BYTES
    body = orjson.dumps({"prompt": text})
    assert identity(body, orjson.loads(body), "m") == (b"raw", body)


def test_body_too_deep_to_write_again_is_keyed_by_its_bytes() -> None:
    body = b'{"a":' + b"[" * 400 + b"]" * 400 + b"}"
    assert identity(body, orjson.loads(body), "m") == (b"raw", body)


def test_canonical_and_raw_bodies_never_meet() -> None:
    body = b'{"a":1}'
    assert key_of(body) != key_of(body, parsed=None)


def test_scheme_is_stable() -> None:
    """Stored answers are found again by the next release; a change here needs a new VERSION."""
    body = b'{"model":"qwen","messages":[{"role":"user","content":"hi"}],"temperature":0}'
    assert key_of(body, query=b"a=1", revision="r1") == PINNED


# -- what may be kept at all


def request(body: dict[str, Any] | None, endpoint: Endpoint = CHAT, **wishes: Any) -> InferenceRequest:
    """No more of a request than the decision looks at."""
    return cast(InferenceRequest, SimpleNamespace(endpoint=endpoint, parsed=body, wishes=Wishes(**wishes)))


def why_not(
    body: dict[str, Any] | None,
    endpoint: Endpoint = CHAT,
    *,
    everything: bool = False,
    rule: bool | None = None,
    **wishes: Any,
) -> str | None:
    return not_cacheable(request(body, endpoint, **wishes), everything=everything, rule=rule)


@pytest.mark.parametrize("body", [{"temperature": 0}, {"temperature": 0.0}, {"seed": 7}, {"seed": 0, "temperature": 1}])
def test_deterministic_sampling_is_cacheable(body: dict[str, Any]) -> None:
    assert why_not(body) is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"temperature": None},
        {"temperature": 0.1},
        {"temperature": False},
        {"temperature": "0"},
        {"seed": None},
        {"seed": -1},  # engines take it to mean: draw one
        {"seed": True},
    ],
)
def test_other_sampling_is_cacheable_only_when_somebody_says_so(body: dict[str, Any]) -> None:
    assert why_not(body) == "sampling"
    assert why_not(body, everything=True) is None
    assert why_not(body, rule=True) is None
    assert why_not(body, cache_ttl_s=60.0) is None
    assert why_not(body, everything=True, rule=False) == "model"


def test_endpoint_without_sampling_is_cacheable() -> None:
    assert why_not({"input": "x"}, Endpoint(path="/v1/embeddings", name="embeddings")) is None


def test_tgi_sampling_is_read_where_tgi_has_it() -> None:
    generate = Endpoint(path="/generate", name="generate", dialect=Dialect.TGI, samples=True)
    assert why_not({"inputs": "x", "parameters": {"seed": 1}}, generate) is None
    assert why_not({"inputs": "x", "seed": 1}, generate) == "sampling"
    assert why_not({"inputs": "x", "parameters": [1]}, generate) == "sampling"


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True},
        {"store": "true"},
        {"store": 1},
        {"background": True},
        {"previous_response_id": "r"},
        {"conversation": {"id": "c"}},
    ],
)
def test_answer_that_leans_on_a_nodes_memory_is_never_cacheable(fields: dict[str, Any]) -> None:
    assert why_not({"temperature": 0, **fields}, everything=True, rule=True, cache_ttl_s=5.0) == "stateful"


def test_state_that_is_declined_does_not_matter() -> None:
    assert why_not({"temperature": 0, "store": False, "background": None, "previous_response_id": None}) is None


def test_several_choices_are_cacheable() -> None:
    assert why_not({"temperature": 0, "n": 3}) is None


def test_multipart_bypass_and_missing_bodies_are_never_cacheable() -> None:
    audio = Endpoint(path="/v1/audio/transcriptions", name="transcriptions", multipart=True)
    assert why_not({}, audio, everything=True) == "multipart"
    assert why_not(None, everything=True) == "no_body"
    assert why_not({"seed": 1}, Endpoint(path="/x", name="x", cacheable=False), everything=True) == "endpoint"
    assert why_not({"seed": 1}, cache_mode=CacheMode.BYPASS, everything=True) == "bypass"


# -- guards


def depth_of(value: Any) -> int:
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def values(pairs: list[tuple[str, Any]]) -> list[Any]:
    return [value for _, value in pairs]


def refuses(check: Any, *arguments: Any) -> bool:
    try:
        check(*arguments)
    except BadRequest as error:
        return error.code == "invalid_json"
    return False


@settings(max_examples=300, deadline=None)
@given(body=BODIES, limit=st.integers(1, 6))
def test_depth_is_judged_exactly(body: bytes, limit: int) -> None:
    assert refuses(check_depth, body, limit) is (depth_of(json.loads(body, object_pairs_hook=values)) > limit)


def test_brackets_in_strings_are_not_depth() -> None:
    check_depth(orjson.dumps({"code": '[{"' * 500}), 2)


@pytest.mark.parametrize("number", ["9" * 4301, "-" + "9" * 4301, "0." + "1" * 5000, "1e" + "0" * 4301])
def test_endless_numbers_are_refused(number: str) -> None:
    for padding in range(0, 4000, 999):
        assert refuses(check_numbers, b'{"a":' + b" " * padding + number.encode() + b"}")


def test_long_runs_of_digits_in_strings_and_long_but_bounded_numbers_pass() -> None:
    check_numbers(orjson.dumps({"prompt": "3" * 100_000}))
    check_numbers(b"[" + b"9" * 4300 + b"]")


# -- names in Redis


def test_names_are_those_of_the_contract() -> None:
    digest = "ab" * 32
    assert cache_key.answer_name("acme", "qwen2.5-7b", digest) == f"balancer:v1:cache:acme:qwen2.5-7b:{{{digest}}}"
    assert cache_key.answer_name(None, "org/m:x", digest) == f"balancer:v1:cache:shared:org%2Fm%3Ax:{{{digest}}}"
    assert cache_key.flight_name(digest) == f"balancer:v1:flight:{{{digest}}}"
    assert cache_key.limit_name("a~{b}") == "balancer:v1:limit:{a%7E%7Bb%7D}"
    assert cache_key.limit_name("acme", "tokens") == "balancer:v1:limit:{acme}:tokens"
    assert cache_key.semantic_name("acme", "m", "p") == "balancer:v1:sem:acme:m:{p}"
    assert cache_key.verdict_name("acme", "f") == "balancer:v1:verdict:acme:{f}"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_encoded_names_hold_nothing_special_and_stay_apart(text: str) -> None:
    name = cache_key.encoded(text)
    assert not set(name) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-%")
    assert unquote(name) == text


def test_patterns_match_what_is_given_and_nothing_by_accident() -> None:
    assert cache_key.answer_pattern(None, None, None) == "balancer:v1:cache:*:*:{*}"
    assert cache_key.answer_pattern("a*", "m?", "[d]") == "balancer:v1:cache:a%2A:m%3F:{%5Bd%5D}"
