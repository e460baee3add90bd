"""An error as each dialect says it: a body before the head is out, an event after."""

from __future__ import annotations

import math
from typing import Any

import orjson

from balancer.core.request import Dialect
from balancer.errors import BalancerError

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: BalancerError, dialect: Dialect) -> bytes:
    """The JSON body of an error answer."""
    return orjson.dumps(_error_object(error, dialect))


def error_event(error: BalancerError, dialect: Dialect) -> bytes:
    """The event that ends a broken stream; without a good end behind it."""
    body = orjson.dumps(_error_object(error, dialect))
    if dialect is Dialect.ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % body
    if dialect is Dialect.RESPONSES:
        told = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return b"event: error\ndata: %b\n\n" % orjson.dumps(told)
    return b"data: %b\n\n" % body


def _error_object(error: BalancerError, dialect: Dialect) -> dict[str, Any]:
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message, "code": error.code}}
    if dialect is Dialect.TGI:
        return {"error": error.message, "error_type": error.code}
    told = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": told}


def retry_after(error: BalancerError) -> bytes:
    """The Retry-After line that every 429 and 503 carries: whole seconds, at least one."""
    if error.status not in (429, 503):
        return b""
    return b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after_s or 1.0))
