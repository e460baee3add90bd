"""Who may use the parts of the operations port that show or change things."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from balancer.auth import matches
from balancer.errors import Forbidden, Unauthenticated


class Gate:
    """Lets in whoever has the key; where no key is set, only callers on this machine.

    Without a key a page in the operator's browser is the other way in: hence a look at `Host`, which keeps names
    out that were bound to this address, and at `Origin`. `X-Forwarded-For` is anybody's word and not read.
    """

    def __init__(self, what: str, sha256: str | None) -> None:
        self._what = what
        self._sha256 = sha256

    def admit(self, headers: Mapping[str, str], peer: str | None) -> None:
        """Raises Unauthenticated or Forbidden. `peer` is the address at the other end of the connection."""
        if self._sha256 is not None:
            scheme, _, key = headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not matches(key.strip().encode("utf-8", "surrogateescape"), self._sha256):
                raise Unauthenticated(f"the {self._what} is required: Authorization: Bearer KEY")
            return
        host, origin = headers.get("Host"), headers.get("Origin")
        if peer is None or not _is_loopback(peer):
            raise Forbidden(f"without a configured {self._what} only callers on this machine are served")
        if host is not None and not _is_local_name(host):
            raise Forbidden(f"without a configured {self._what} Host must be an address or localhost")
        if origin is not None and origin.partition("://")[2] != host:
            raise Forbidden(f"without a configured {self._what} pages of other origins are not served")


def _is_loopback(address: str) -> bool:
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ip_address(name)
    except ValueError:
        return False
    return True
