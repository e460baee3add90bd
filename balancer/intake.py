"""Head and body -> InferenceRequest. Everything a client can get wrong is a 4xx here, before any node hears of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import orjson

from balancer.auth import Auth
from balancer.core import cache_key, json_splice
from balancer.core.request import (
    NO_WISHES,
    CacheMode,
    Dialect,
    Endpoint,
    InferenceRequest,
    Priority,
    Tenant,
    Wishes,
)
from balancer.errors import BadRequest, ClientError
from balancer.registry import Registry
from balancer.settings import ModelRule, Settings
from balancer.wire.framing import SAFE_VALUE, connection_tokens, header_lines, media_type
from balancer.wire.inbound_request import InboundRequest

# Client headers that go to nodes by name; `anthropic-*` and `openai-*` go by prefix (contract, "Bodies and headers").
_FORWARDED = frozenset({b"content-type", b"accept", b"user-agent", b"traceparent", b"tracestate", b"baggage"})
_PREFIXES = (b"anthropic-", b"openai-")
# Where `model` and `stream` of a multipart upload have to stand.
MULTIPART_HEAD_BYTES = 64 * 1024
# No longer name is a model's; it would stand in logs, in records and in keys.
MODEL_CHARS = 512
_OURS = frozenset(
    {
        b"x-balancer-timeout-s",
        b"x-balancer-priority",
        b"x-balancer-session",
        b"x-balancer-cache",
        b"x-balancer-cache-ttl-s",
        b"x-balancer-comments",
    }
)
_T = TypeVar("_T")
_MODES = {mode.value.encode(): mode for mode in CacheMode if mode is not CacheMode.DEFAULT}
_SWITCH = {b"on": True, b"off": False}
_PRIORITIES = {priority.name.lower().encode(): priority for priority in Priority}


class Head:
    """What a request's head says, once it has passed. The next request on its connection may share it."""

    __slots__ = ("cors", "endpoint", "forward", "given_id", "lines", "tenant", "wishes")

    def __init__(
        self,
        endpoint: Endpoint,
        tenant: Tenant,
        headers: Mapping[bytes, bytes],
        given_id: str | None,
        forward: tuple[tuple[bytes, bytes], ...],
    ) -> None:
        self.endpoint = endpoint
        self.tenant = tenant
        self.given_id = given_id
        self.forward = forward
        self.cors = b""  # lines for the answer
        self.lines = header_lines(forward) + b"accept-encoding: identity\r\nx-request-id: "
        self.wishes = NO_WISHES if _OURS.isdisjoint(headers) else _wishes(headers)


def _wishes(headers: Mapping[bytes, bytes]) -> Wishes:
    session = headers.get(b"x-balancer-session")
    if session is not None and not SAFE_VALUE.fullmatch(session):
        raise _bad_header(b"x-balancer-session", "1 to 128 visible ASCII characters")
    return Wishes(
        timeout_s=_seconds(headers, b"x-balancer-timeout-s"),
        priority=_one_of(headers, b"x-balancer-priority", _PRIORITIES, Priority.NORMAL),
        session=session.decode("ascii") if session is not None else None,
        cache_mode=_one_of(headers, b"x-balancer-cache", _MODES, CacheMode.DEFAULT),
        cache_ttl_s=_seconds(headers, b"x-balancer-cache-ttl-s"),
        comments=_one_of(headers, b"x-balancer-comments", _SWITCH, True),
    )


def given_id(headers: Mapping[bytes, bytes]) -> str | None:
    """The client's X-Request-Id, if it sent one. Raises BadRequest for one that cannot be echoed."""
    given = headers.get(b"x-request-id")
    if given is None:
        return None
    if not SAFE_VALUE.fullmatch(given):
        raise _bad_header(b"x-request-id", "1 to 128 visible ASCII characters")
    return given.decode("ascii")


class Intake:
    """Understands requests under the settings of the moment."""

    def __init__(self, settings: Settings, registry: Registry, auth: Auth) -> None:
        self._registry = registry
        self.configure(settings, auth)

    def configure(self, settings: Settings, auth: Auth) -> None:
        """New settings, for requests that come from now on."""
        self._auth = auth
        self._total_s = settings.timeouts.total_s
        self._json_depth = settings.limits.json_depth
        self._ask_usage = settings.upstream.ask_usage
        self._forwarded = _FORWARDED | {name.lower().encode() for name in settings.upstream.forward_headers}
        self._aliases = {alias: rule.name for rule in settings.models for alias in rule.aliases}
        self.rules: Mapping[str, ModelRule] = {rule.name: rule for rule in settings.models}

    def head(self, endpoint: Endpoint, inbound: InboundRequest, id_: str | None) -> Head:
        """Judge a head. Raises Unauthenticated, BadRequest or ClientError."""
        headers = inbound.headers
        tenant = self._auth.identify(headers)
        encoding = headers.get(b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            raise ClientError(
                "a body with a Content-Encoding is not taken here", status=415, code="unsupported_encoding"
            )
        return Head(endpoint, tenant, headers, id_, self._forward(headers))

    def understand(self, inbound: InboundRequest, id_: str) -> InferenceRequest:
        """The request that a head and a body make. Raises BadRequest, Forbidden."""
        head: Head = inbound.context
        endpoint, body = head.endpoint, inbound.body
        parsed: dict[str, Any] | None = None
        is_exact = True
        if endpoint.multipart:
            model, stream = self._read_multipart(inbound)
        else:
            parsed, is_exact = self._parse(body)
            model, stream = parsed.get("model"), parsed.get("stream", False)
        if model is not None and not isinstance(model, str):
            raise BadRequest("model: must be a string", param="model")
        if model is not None and len(model) > MODEL_CHARS:
            raise BadRequest(f"model: is longer than {MODEL_CHARS} characters", param="model")
        if stream is None:
            stream = False
        if not isinstance(stream, bool):
            raise BadRequest("stream: must be true or false", param="stream")
        stream = endpoint.always_streams or (stream and endpoint.streams)
        if inbound.version == "1.0" and stream:
            raise BadRequest("streams need HTTP/1.1", param="stream")
        if model is None:
            model = self._only_model()
        elif model in self._aliases:
            model = self._aliases[model]
            if parsed is not None:
                body = json_splice.replace_member(body, "model", model)
            else:
                body = with_field(body, inbound.headers.get(b"content-type", b""), "model", model)
        self._auth.permit_model(head.tenant, model)
        usage_body, wants_usage = self._usage(endpoint, parsed, body) if stream else (None, True)
        wishes = head.wishes
        total_s = self._total_s if wishes.timeout_s is None else min(self._total_s, wishes.timeout_s)
        request = InferenceRequest(
            id_,
            endpoint,
            head.tenant,
            wishes,
            head.forward,
            b"%b%b\r\n" % (head.lines, id_.encode()),
            inbound.target,
            model,
            body,
            usage_body,
            parsed,
            is_exact,
            stream,
            wants_usage,
            inbound.received_s,
            inbound.received_s + total_s,
            inbound.version == "1.0",
        )
        if endpoint.dialect is Dialect.RESPONSES:
            self._refuse_split_memory(request)
        return request

    def _parse(self, body: bytes) -> tuple[dict[str, Any], bool]:
        """The body, and whether what was parsed is all of it."""
        cache_key.check_depth(body, self._json_depth)
        cache_key.check_numbers(body)
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(parsed, dict):
            raise BadRequest("the body must be a JSON object", code="invalid_json")
        is_exact = len(body) <= cache_key.CANONICAL_BYTES and cache_key.is_exact(body, parsed)
        if not is_exact and json_splice.repeated_members(body):
            raise BadRequest("the body has a name twice, which can be read two ways", code="invalid_json")
        return parsed, is_exact

    def _read_multipart(self, inbound: InboundRequest) -> tuple[str | None, bool]:
        kind = inbound.headers.get(b"content-type", b"")
        if media_type(kind) != b"multipart/form-data":
            raise BadRequest("the body must be multipart/form-data", param="content-type")
        if repeated_field(inbound.body, kind, "model"):
            raise BadRequest("the form has more than one model", param="model")
        fields = form_fields(inbound.body[:MULTIPART_HEAD_BYTES], kind)
        return fields.get("model"), fields.get("stream", "").lower() in ("true", "1")

    def _only_model(self) -> str:
        """The fleet's only model, for a body that names none."""
        models = self._registry.models()
        if len(models) == 1:
            return next(iter(models))
        if models:
            raise BadRequest("model: is missing, and there is more than one here", param="model")
        return ""

    def _forward(self, headers: Mapping[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
        forwarded = self._forwarded
        passed = [pair for pair in headers.items() if pair[0] in forwarded or pair[0].startswith(_PREFIXES)]
        if b"connection" in headers:
            dropped = connection_tokens(headers[b"connection"])
            passed = [pair for pair in passed if pair[0] not in dropped]
        return tuple(passed)

    def _usage(self, endpoint: Endpoint, parsed: dict[str, Any] | None, body: bytes) -> tuple[bytes | None, bool]:
        """A stream's body with usage asked for, where the client did not; and whether the client did."""
        if parsed is None or endpoint.dialect is not Dialect.OPENAI:
            return None, True
        options = parsed.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage"):
            return None, True
        if not self._ask_usage:
            return None, False
        if options is None or isinstance(options, dict):
            return json_splice.ask_usage(body, parsed), False
        return None, False  # not an object: the node will say what it thinks of it

    def _refuse_split_memory(self, request: InferenceRequest) -> None:
        """What leans on a node's own memory needs the node that has it: fine while there is only one."""
        parsed = request.parsed or {}
        leaning = [name for name in ("previous_response_id", "conversation") if parsed.get(name) is not None]
        if parsed.get("background") is True:
            leaning.append("background")
        if leaning and len(self._registry.serving(request.model)) > 1:
            raise BadRequest(
                f"{leaning[0]}: needs a node's own memory, and several nodes serve this model", param=leaning[0]
            )


def form_fields(data: bytes, content_type: bytes) -> dict[str, str]:
    """The short text fields of a multipart/form-data body's beginning; parts with a file name are passed over."""
    return {
        name: data[start:end].decode("utf-8", "replace")
        for name, start, end, is_file in _parts(data, content_type)
        if not is_file
    }


def with_field(body: bytes, content_type: bytes, wanted: str, value: str) -> bytes:
    """The body with another value in one text field; every other byte stays."""
    for name, start, end, is_file in _parts(body[:MULTIPART_HEAD_BYTES], content_type):
        if name == wanted and not is_file:
            return body[:start] + value.encode() + body[end:]
    return body


def repeated_field(body: bytes, content_type: bytes, wanted: str) -> bool:
    """Whether a form's field could be read in two ways: it is there twice, as a file, or behind the beginning."""
    found = [(start, is_file) for name, start, _, is_file in _parts(body, content_type) if name == wanted]
    return len(found) > 1 or any(is_file or start > MULTIPART_HEAD_BYTES for start, is_file in found)


def _parts(data: bytes, content_type: bytes) -> Iterator[tuple[str, int, int, bool]]:
    """The parts of a form: name, where the value begins and ends, and whether it has a file name."""
    boundary = b""
    for parameter in content_type.split(b";")[1:]:
        name, _, value = parameter.strip().partition(b"=")
        if name.lower() == b"boundary":
            boundary = value.strip(b'"')
    if not boundary or len(boundary) > 70:
        raise BadRequest("multipart/form-data without a boundary", param="content-type")
    mark = b"--" + boundary
    start = data.find(mark)
    while start >= 0:
        start += len(mark)
        end = data.find(b"\r\n" + mark, start)
        if end < 0:
            return
        head_end = data.find(b"\r\n\r\n", start, end)
        disposition = _DISPOSITION.search(data, start, head_end + 2) if head_end >= 0 else None
        if disposition is not None and (field := _FIELD_NAME.search(disposition[1])) is not None:
            wanted = (field[1] or field[2] or b"").decode("utf-8", "replace")
            yield wanted, head_end + 4, end, b"filename" in disposition[1].lower()
        start = end + 2


_DISPOSITION = re.compile(rb"\r\ncontent-disposition:([^\r\n]*)\r\n", re.IGNORECASE)
_FIELD_NAME = re.compile(rb';\s*name\s*=\s*(?:"([^"]*)"|([^;\s]+))', re.IGNORECASE)


def _seconds(headers: Mapping[bytes, bytes], name: bytes) -> float | None:
    value = headers.get(name)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds < math.inf or b"_" in value:
        raise _bad_header(name, "a positive number of seconds")
    return seconds


def _one_of(headers: Mapping[bytes, bytes], name: bytes, known: Mapping[bytes, _T], default: _T) -> _T:
    value = headers.get(name)
    if value is None:
        return default
    found = known.get(value.strip().lower())
    if found is None:
        raise _bad_header(name, "one of " + ", ".join(key.decode() for key in known))
    return found


def _bad_header(name: bytes, wanted: str) -> BadRequest:
    return BadRequest(f"{name.decode()}: must be {wanted}", code="invalid_header", param=name.decode())
