"""Which requests may share an answer, and their key: every part of a request that can change what a node says.

Two bodies share a key when they hold the same JSON, whatever the order of names and the white space. Where the
parser's view of a body is not the whole of it (a name given twice, an integer it cannot hold), the key is made of
the body's bytes, so that the key and a node can never read it differently.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

import orjson

from balancer.core.request import CacheMode, Dialect, InferenceRequest
from balancer.errors import BadRequest

# The scheme: another one shares nothing with this one. Also the prefix of every name in Redis.
VERSION = "balancer:v1"
# The scope in place of a tenant where the operator lets all tenants share.
SHARED = "shared"
# Larger bodies are keyed by their raw bytes: making them canonical costs more than the sharing is worth.
CANONICAL_BYTES = 1024 * 1024
# CPython refuses to read a longer integer, and many nodes are written in it; no real field comes near.
MAX_NUMBER_DIGITS = 4300

# What few requests differ in is remembered up to this size: beyond, a caller could fill memory with it.
REMEMBERED_BYTES = 256

# Fields that name the caller or the way the answer is delivered, and change nothing about it.
LEFT_OUT_FIELDS = ("stream", "stream_options", "user", "metadata")
LEFT_OUT_HEADERS = frozenset({b"user-agent", b"x-request-id", b"traceparent", b"tracestate", b"baggage"})

_VERSION = VERSION.encode()
_CANONICAL, _RAW, _NONE = b"json", b"raw", b"none"
# Every digit as `0`, all else as it is: a run of digits becomes a run of one byte, which `in` finds.
_DIGITS_ALIKE = bytes(ord("0") if ord("0") <= byte <= ord("9") else byte for byte in range(256))
# 19 digits are the fewest that may not fit: the least 64-bit integer is -9223372036854775808.
_LONG_RUN, _SAMPLED_RUN, _STRIDE = b"0" * 19, b"000", 6
# A whole integer of 19 digits or more: no part of a fraction or an exponent. Never backtracks over digits.
_LONG_INTEGER = re.compile(rb"(?<![\d.eE+-])-?\d{19,}+(?![.eE])")
_BRACKETS = bytes({ord("["): 1, ord("{"): 1, ord("]"): 255, ord("}"): 255}.get(byte, 0) for byte in range(256))
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]*")


# What `_lengths` makes of three parts.
_THREE = struct.Struct(">4Q")


# -- the key


def derive(
    *,
    tenant: str | None,
    endpoint: str,
    query: bytes,
    model: str,
    revision: str | None,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    parsed: Mapping[str, Any] | None,
    exact: bool | None = None,
) -> str:
    """The digest (SHA-256, hex) that equal requests have in common.

    `tenant` is None where all tenants share; `model` is the name after alias and stands in for the body's own;
    `headers` are the client's that a node would get, `Content-Type` among them. `exact` is what `is_exact` says of the
    client's own bytes and their parse; without it, `body` and `parsed` have to be these. With it, `body` may already
    hold `model` in the alias's place; nothing else may have been changed.
    """
    kind, written = identity(body, parsed, model, exact)
    counted = tuple([pair for pair in headers if pair[0] not in LEFT_OUT_HEADERS])
    remembered = len(model) + sum([len(name) + len(value) for name, value in counted]) <= REMEMBERED_BYTES
    if remembered:
        head = _head(tenant, endpoint, model, revision) + _named(counted)
    else:
        head = _head.__wrapped__(tenant, endpoint, model, revision) + _named.__wrapped__(counted)
    lengths = _THREE.pack(3, len(query), len(kind), len(written))
    return hashlib.sha256(b"%b%b%b%b%b" % (head, lengths, query, kind, written)).hexdigest()


@lru_cache(maxsize=1024)
def _named(headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """The headers that count, by name, and their lengths before them; a client's are the same on every request."""
    named = [(name.lower(), value) for name, value in headers]
    named = [pair for pair in named if pair[0] not in LEFT_OUT_HEADERS]
    named.sort(key=_first)  # stable: the order of values under one name stays
    parts = [part for pair in named for part in pair]
    return _lengths(parts) + b"".join(parts)


@lru_cache(maxsize=1024)
def _head(tenant: str | None, endpoint: str, model: str, revision: str | None) -> bytes:
    """The parts that few requests differ in, and their lengths before them."""
    scope = b"" if tenant is None else b"=" + tenant.encode()
    parts = [_VERSION, scope, endpoint.encode(), model.encode(), b"" if revision is None else revision.encode()]
    return _lengths(parts) + b"".join(parts)


def _lengths(parts: list[bytes]) -> bytes:
    """How many parts there are and how long each is: put before them, it makes them readable in one way only."""
    return struct.pack(f">{len(parts) + 1}Q", len(parts), *map(len, parts))


def identity(
    body: bytes, parsed: Mapping[str, Any] | None, model: str, exact: bool | None = None
) -> tuple[bytes, bytes]:
    """What of the body the key covers, and how it is written: canonical JSON where that is exact, else the bytes."""
    if parsed is None:
        return (_RAW, body) if body else (_NONE, b"")
    if exact is False or len(body) > CANONICAL_BYTES:
        return _RAW, body
    if exact is None and not is_exact(body, parsed):
        return _RAW, body
    fields = dict(parsed)
    for name in LEFT_OUT_FIELDS:
        fields.pop(name, None)
    if type(fields.get("model")) is str:
        fields["model"] = model
    return _CANONICAL, orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)


def is_exact(body: bytes, parsed: Mapping[str, Any]) -> bool:
    """Whether `parsed` is all of `body`: no name twice in one object, no integer that became a float.

    False also where it nests deeper than orjson writes (254), though not deeper than it reads.

    Exact, given that orjson took `body` and made `parsed` of it. Outside strings a colon stands only after a name,
    and written again every name and string that was kept has the colons it had before, escaped ones included. So the
    body has more colons than its parse written again if, and only if, something was dropped.
    """
    try:
        again = orjson.dumps(parsed)
    except TypeError:
        return False
    if again == body:
        return True
    return body.count(b":") + _escaped_colons(body) == again.count(b":") and not has_huge_integer(body)


def _escaped_colons(body: bytes) -> int:
    if b"\\u003" not in body:
        return 0
    body = body.replace(b"\\\\", b"")  # what follows an escaped backslash is no escape
    return body.count(b"\\u003a") + body.count(b"\\u003A")


def has_huge_integer(body: bytes) -> bool:
    """Whether JSON text holds an integer outside of -2**63 .. 2**64 - 1, which orjson reads as a float."""
    # Every sixth byte: a run of 19 digits shows at least three in a row.
    if _SAMPLED_RUN not in body[::_STRIDE].translate(_DIGITS_ALIKE):
        return False
    if _LONG_RUN not in body.translate(_DIGITS_ALIKE):
        return False
    return any(_is_huge(match.group()) for match in _LONG_INTEGER.finditer(skeleton(body)))


def _is_huge(integer: bytes) -> bool:
    return len(integer) > 20 or not -(2**63) <= int(integer) < 2**64


def skeleton(body: bytes) -> bytes:
    """JSON text with its strings emptied to one quote each: only structure, numbers and literals are left."""
    if b"\\" in body:
        # Escapes start at the first backslash of a run, so pairs go first; then every quote left is a delimiter.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b'"'.join(body.split(b'"')[::2])


def _first(pair: tuple[bytes, bytes]) -> bytes:
    return pair[0]


# -- whether there may be a shared answer at all


def not_cacheable(request: InferenceRequest, *, everything: bool, rule: bool | None) -> str | None:
    """Why no answer to this request may be kept or shared; None when one may.

    `everything` is the operator's `cache.cacheable: all`, `rule` the model's own `cacheable` where it has one. The
    reason is one of `endpoint`, `multipart`, `no_body`, `bypass`, `stateful`, `model`, `sampling`.
    """
    endpoint, parsed = request.endpoint, request.parsed
    if not endpoint.cacheable:
        return "endpoint"
    if endpoint.multipart:
        return "multipart"
    if parsed is None:
        return "no_body"
    if request.wishes.cache_mode is CacheMode.BYPASS:
        return "bypass"
    if _is_stateful(parsed):
        return "stateful"
    if rule is False:
        return "model"
    if rule or everything or request.wishes.cache_ttl_s or not endpoint.samples:
        return None
    return None if _is_deterministic(parsed, endpoint.dialect) else "sampling"


def _is_stateful(parsed: Mapping[str, Any]) -> bool:
    """Whether the answer leans on what a node remembers, or is to be remembered by it."""
    for name in ("store", "background"):
        if parsed.get(name, False) not in (False, None):
            return True
    return parsed.get("previous_response_id") is not None or parsed.get("conversation") is not None


def _is_deterministic(parsed: Mapping[str, Any], dialect: Dialect) -> bool:
    settings = parsed.get("parameters") if dialect is Dialect.TGI else parsed
    if not isinstance(settings, Mapping):
        return False
    temperature, seed = settings.get("temperature"), settings.get("seed")
    if type(seed) is int and seed >= 0:  # engines take a negative one to mean: draw one
        return True
    return type(temperature) in (int, float) and temperature == 0


# -- what is refused before it is parsed


def check_depth(body: bytes, limit: int) -> None:
    """Raise BadRequest if JSON text nests deeper than `limit`; costs little unless it has more brackets than that."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    steps = memoryview(skeleton(body).translate(_BRACKETS, _NOT_BRACKETS)).cast("b")
    depth = 0
    deepest = 0
    for step in steps:
        depth += step
        if depth > deepest:
            deepest = depth
            if deepest > limit:
                raise BadRequest(f"the body nests deeper than {limit} levels", code="invalid_json")


def check_numbers(body: bytes, limit: int = MAX_NUMBER_DIGITS) -> None:
    """Raise BadRequest if JSON text holds a number with more than `limit` digits in a row."""
    stride = limit // 2  # a longer run shows at least two in a row
    if len(body) <= limit or b"00" not in body[::stride].translate(_DIGITS_ALIKE):
        return
    run = b"0" * (limit + 1)
    if run in body.translate(_DIGITS_ALIKE) and run in skeleton(body).translate(_DIGITS_ALIKE):
        raise BadRequest(f"a number in the body has more than {limit} digits", code="invalid_json")


# -- names in Redis; braces are cluster hash tags


def answer_name(tenant: str | None, model: str, digest: str) -> str:
    """Where a stored answer is kept."""
    return f"{VERSION}:cache:{_scope(tenant)}:{encoded(model)}:{{{digest}}}"


def flight_name(digest: str, form: str = "") -> str:
    """Where balancers agree on who makes a call that several wait for; `form` tells the ways to deliver it apart."""
    name = f"{VERSION}:flight:{{{digest}}}"
    return f"{name}:{form}" if form else name


def digest_of(answer_name: str) -> str:
    """The digest in the name of a stored answer."""
    return answer_name.rpartition("{")[2].removesuffix("}")


def limit_name(tenant: str, kind: str = "") -> str:
    """Where a tenant's bucket is kept; `kind` tells further buckets of the same tenant apart."""
    name = f"{VERSION}:limit:{{{encoded(tenant)}}}"
    return f"{name}:{kind}" if kind else name


def semantic_name(tenant: str | None, model: str, partition: str) -> str:
    """Where the answers are kept that may stand in for one another."""
    return f"{VERSION}:sem:{_scope(tenant)}:{encoded(model)}:{{{partition}}}"


def verdict_name(tenant: str, fingerprint: str) -> str:
    """Where it is kept that a prompt kills nodes."""
    return f"{VERSION}:verdict:{encoded(tenant)}:{{{fingerprint}}}"


def answer_pattern(tenant: str | None, model: str | None, digest: str | None) -> str:
    """The glob that matches the stored answers with all that is given; None matches any."""
    scope = "*" if tenant is None else encoded(tenant)
    return (
        f"{VERSION}:cache:{scope}:{'*' if model is None else encoded(model)}"
        f":{{{'*' if digest is None else encoded(digest)}}}"
    )


def answer_matcher(tenant: str | None, model: str | None, digest: str | None) -> Callable[[str], bool]:
    """`answer_pattern` as a function; only names of stored answers match."""
    wanted = [(at, encoded(part)) for at, part in ((3, tenant), (4, model)) if part is not None]
    if digest is not None:
        wanted.append((5, f"{{{encoded(digest)}}}"))

    def matches(name: str) -> bool:
        parts = name.split(":")
        return len(parts) == 6 and parts[2] == "cache" and all(parts[at] == part for at, part in wanted)

    return matches


def answer_parts(name: str) -> tuple[str, str, str]:
    """Tenant (or `shared`), model and digest of a stored answer's name."""
    tenant, model, digest = name.split(":")[3:6]
    return unquote(tenant), unquote(model), digest[1:-1]


def encoded(text: str) -> str:
    """Percent-encoded outside `[A-Za-z0-9._-]`: no colon, brace or glob character is left."""
    if _PLAIN_NAME.fullmatch(text):
        return text
    return quote(text, safe="").replace("~", "%7E")


def _scope(tenant: str | None) -> str:
    return SHARED if tenant is None else encoded(tenant)
