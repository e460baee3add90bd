"""What several tests ask, and how they look at what they are told."""

from __future__ import annotations

import hashlib
from typing import Any

from tests.harness import Balancer
from tests.integration.raw_http import Answer, ask, chat

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "overloaded_error",
}


def told(answer: Answer) -> tuple[int, str | None]:
    """Status and code; the rest of an error's form is checked."""
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-request-id")
    retry_after = answer.header("retry-after")
    if answer.status in (429, 503):
        assert retry_after is not None
        assert int(retry_after) >= 1
    else:
        assert retry_after is None
    code = answer.code
    assert answer.json["error"]["type"] == TYPES.get(answer.status, answer.json["error"]["type"])
    assert "127.0.0.1" not in answer.body.decode()
    return answer.status, code


def key(name: str, tenant: str | None = None, **limits: Any) -> dict[str, Any]:
    """The settings of the key `name`, of the tenant of that name."""
    return {"tenant": tenant or name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **limits}


def auth(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"auth": {"keys": list(entries)}}


def bearer(name: str) -> str:
    return f"Authorization: Bearer {name}"


def different(number: int = 0, **fields: Any) -> dict[str, Any]:
    """Requests that share no answer."""
    return chat(f"number {number}", **fields)


async def caches(balancer: Balancer, *requests: tuple[Any, ...]) -> list[str | None]:
    """The cache's verdict on each request, one after the other."""
    answers = [await ask(balancer, *request) for request in requests]
    assert [answer.status for answer in answers] == [200] * len(answers)
    return [answer.cache for answer in answers]
