"""Where a Redis is and how to be let in, as its URL says."""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio.connection import SSLConnection, parse_url
from redis.exceptions import RedisError

SCHEMES = ("redis", "rediss", "unix")
# Options after the question mark, beside those that begin with `ssl_`; another one stops the start.
OPTIONS = frozenset({"db", "username", "password"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One server. Its text form names neither user nor password."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None  # a Unix socket
    db: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}?db={self.db}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.db}"

    async def connect(self, protocol: asyncio.Protocol) -> None:
        """Open a connection for `protocol`; raises OSError, or UnicodeError for a host name that is none."""
        loop = asyncio.get_running_loop()
        if self.path is not None:
            await loop.create_unix_connection(lambda: protocol, self.path)
        else:
            name = self.host if self.tls else None
            await loop.create_connection(lambda: protocol, self.host, self.port, ssl=self.tls, server_hostname=name)


def parse(url: str) -> Address:
    """Read redis://, rediss:// or unix:// with user, password, database and `ssl_` options, as redis-py does.

    Raises ValueError, whose message repeats nothing of the URL but the names of options: the rest may be a password.
    """
    scheme = url.partition(":")[0].lower()
    if "sentinel" in scheme or "cluster" in scheme:
        raise ValueError("redis.url: Sentinel and Cluster are not supported; name one server by redis:// or rediss://")
    if scheme not in SCHEMES or "://" not in url:
        raise ValueError("redis.url: must begin with redis://, rediss:// or unix://")
    try:
        split, found = urlsplit(url), dict[str, Any](parse_url(url))
    except ValueError:
        raise ValueError(
            "redis.url: not a valid URL; write / # ? @ and : in a password as %2F %23 %3F %40 %3A"
        ) from None
    if split.fragment or not (scheme == "unix" or re.fullmatch(r"(/\d*)?", split.path)):
        raise ValueError("redis.url: the path is a database number; write / # ? in a password as %2F %23 %3F")
    tls = {name: found.pop(name) for name in list(found) if name.startswith("ssl_")}
    kind = found.pop("connection_class", None)
    if strange := found.keys() - OPTIONS - {"host", "port", "path"}:
        raise ValueError(f"redis.url: unknown option {min(strange)!r}")
    if scheme == "unix" and "path" not in found:
        raise ValueError("redis.url: unix:// needs the path of a socket")
    if tls and kind is not SSLConnection:
        raise ValueError("redis.url: ssl_ options need rediss://")
    return Address(**found, tls=_context(tls) if kind is SSLConnection else None)


def _context(options: dict[str, Any]) -> ssl.SSLContext:
    try:
        return SSLConnection(**options).ssl_context.get()
    except (TypeError, ValueError, OSError, RedisError) as error:
        raise ValueError(f"redis.url: the ssl_ options do not work: {error}") from None
