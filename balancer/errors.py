"""The error tree: every way a request can be refused or can fail, with its status and stable code.

`server.py` turns these into answers, in one place; nothing else knows the wire form of an error.
"""

from __future__ import annotations


class BalancerError(Exception):
    """A request ends here: `status` and `code` are the outward contract, the message is for people."""

    status = 500
    code = "internal"
    kind = "server_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.lines = b""  # further header lines for the answer
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status


class ClientError(BalancerError):
    """The request itself is at fault; sending it again unchanged cannot help."""

    status = 400
    code = "invalid_request"
    kind = "invalid_request_error"


class BadRequest(ClientError):
    """400: `invalid_json`, `invalid_request` or `invalid_header`."""


class Unauthenticated(ClientError):
    """401: no key, or one that is not known."""

    status = 401
    code = "unauthenticated"
    kind = "authentication_error"


class Forbidden(ClientError):
    """403: the key is known and may not do this."""

    status = 403
    code = "forbidden"
    kind = "permission_error"


class NotFound(ClientError):
    """404: `not_found` (no such path) or `unknown_model`."""

    status = 404
    code = "not_found"
    kind = "not_found_error"


class MethodNotAllowed(ClientError):
    """405, with the methods that the path takes."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class TooLarge(ClientError):
    """413 `body_too_large`."""

    status = 413
    code = "body_too_large"


class RateLimited(BalancerError):
    """429: the tenant has used what it may use for now; `retry_after_s` says when more is there."""

    status = 429
    code = "rate_limited"
    kind = "rate_limit_error"


class CapacityError(BalancerError):
    """503: nothing is wrong with the request, there is no room or no node for it now."""

    status = 503
    code = "no_eligible_node"
    kind = "overloaded_error"


class QueueFull(CapacityError):
    """More requests wait than may."""

    code = "queue_full"


class QueueTimeout(CapacityError):
    """No slot came free while it was worth waiting."""

    code = "queue_timeout"


class NoEligibleNode(CapacityError):
    """Every node that serves the model refused, is known down, or is drained."""


class Draining(CapacityError):
    """This balancer is shutting down."""

    code = "draining"


class UpstreamFailed(BalancerError):
    """The last attempt failed in a way that is the nodes' doing."""

    status = 502
    code = "upstream_bad_answer"
    kind = "upstream_error"


class Unreachable(UpstreamFailed):
    """No connection, or it was reset before an answer came."""

    code = "upstream_unreachable"


class BadAnswer(UpstreamFailed):
    """The node answered with something that is not a good answer."""


class Truncated(UpstreamFailed):
    """The answer broke off."""

    code = "upstream_truncated"


class FirstTokenTimeout(UpstreamFailed):
    """No first byte within `timeouts.first_byte_s`."""

    status = 504
    code = "first_token_timeout"


class DeadlineExceeded(BalancerError):
    """The caller's deadline, or `timeouts.total_s`, passed."""

    status = 504
    code = "deadline_exceeded"
    kind = "timeout_error"


class CacheMiss(BalancerError):
    """504: the caller wanted a cached answer or none."""

    status = 504
    code = "cache_miss"
    kind = "timeout_error"
