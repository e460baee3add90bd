"""API key -> Tenant. Keys are known by their SHA-256 only."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from balancer.core.request import ANONYMOUS, Tenant, TenantId
from balancer.errors import Forbidden, Unauthenticated
from balancer.settings import AuthConfig

_SCHEME = b"bearer "


class Auth:
    """Who a key belongs to. Without any key configured everybody is the tenant `anonymous`."""

    def __init__(self, config: AuthConfig) -> None:
        self._tenants: Mapping[bytes, Tenant] = {
            bytes.fromhex(key.sha256): Tenant(
                id=TenantId(key.tenant),
                requests_per_minute=key.requests_per_minute,
                burst=key.burst,
                tokens_per_minute=key.tokens_per_minute,
                max_in_flight=key.max_in_flight,
                models=frozenset(key.models) if key.models is not None else None,
                prefer=tuple(key.prefer.items()),
            )
            for key in config.keys
        }
        self._anonymous = Tenant(id=ANONYMOUS)

    def identify(self, headers: Mapping[bytes, bytes]) -> Tenant:
        """The tenant of `Authorization: Bearer KEY` (or `x-api-key`, as Anthropic's clients send it).

        Raises Unauthenticated.
        """
        if not self._tenants:
            return self._anonymous
        value = headers.get(b"authorization")
        if value is None:
            key = headers.get(b"x-api-key")
            if key is None:
                raise Unauthenticated("an API key is required: Authorization: Bearer KEY")
        elif value[:7].lower() == _SCHEME:
            key = value[7:].strip()
        else:
            raise Unauthenticated("the Authorization header must be: Bearer KEY")
        digest = hashlib.sha256(key).digest()
        tenant = self._tenants.get(digest)  # by hash: the time of this says nothing about any key
        if tenant is None:
            raise Unauthenticated("the API key is not known")
        return tenant

    @staticmethod
    def permit_model(tenant: Tenant, model: str) -> None:
        """Raises Forbidden when the tenant's key may not use the model."""
        if tenant.models is not None and model not in tenant.models:
            raise Forbidden(f"the API key may not use the model {model}")


def matches(token: bytes, sha256_hex: str) -> bool:
    """Whether a token is the one with this hash, in constant time."""
    return hmac.compare_digest(hashlib.sha256(token).hexdigest(), sha256_hex.lower())
