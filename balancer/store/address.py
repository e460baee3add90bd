"""Where a Redis is and how to be let in, as its URL says: one server, a master that Sentinels know, or a Cluster."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import Connection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

SCHEMES = ("redis", "rediss", "unix")
# Of several servers; each with `rediss+` for TLS.
KINDS = ("sentinel", "cluster")
# Options after the question mark, beside those that begin with `ssl_`; another one stops the start.
OPTIONS = frozenset({"db", "username", "password"})
SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})
PORTS = {"sentinel": 26379, "cluster": 6379}
# A Sentinel that does not answer within this is passed over.
SENTINEL_S = 0.2

_HOST = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:/,]+)(:(?P<port>\d{1,5}))?")


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
    tls_options: tuple[tuple[str, Any], ...] = field(default=(), repr=False)  # as redis-py takes them

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix://{self.path}?db={self.db}"
        return f"{'rediss' if self.tls else 'redis'}://{self.server}/{self.db}"

    @property
    def server(self) -> str:
        """`HOST:PORT`, or the path."""
        if self.path is not None:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def connect(self, protocol: asyncio.Protocol) -> None:
        """Open a connection for `protocol`; raises OSError, or UnicodeError for a host name that is none."""
        loop = asyncio.get_running_loop()
        if self.path is not None:
            await loop.create_unix_connection(lambda: protocol, self.path)
        else:
            name = self.host if self.tls else None
            await loop.create_connection(lambda: protocol, self.host, self.port, ssl=self.tls, server_hostname=name)

    async def resolve(self) -> Address:
        """The server to connect to: this one."""
        return self

    async def ask(self, *words: str, within_s: float) -> Any:
        """One command's reply as it comes, over a connection of its own; raises RedisError or OSError."""
        client = self.client(within_s)
        execute: Any = client.execute_command
        try:
            async with asyncio.timeout(within_s):
                return await execute(*words)
        finally:
            await client.aclose()

    def client(
        self, timeout_s: float, *, connect_s: float | None = None, connections: int = 1, wait_s: float | None = None
    ) -> Redis:
        """A redis-py client for what is in no request's way, without retries; the caller closes it.

        `wait_s` is how long a call waits for a connection; like `connect_s` it is `timeout_s` where it is None.
        """
        kind: type[Connection | UnixDomainSocketConnection] = Connection
        where: dict[str, Any] = {"host": self.host, "port": self.port}
        if self.path is not None:
            kind, where = UnixDomainSocketConnection, {"path": self.path}
        elif self.tls is not None:
            kind, where = SSLConnection, {**where, **dict(self.tls_options)}
        pool = BlockingConnectionPool(
            connection_class=kind,
            max_connections=connections,
            timeout=timeout_s if wait_s is None else wait_s,
            **self.login,
            **_limits(timeout_s, connect_s),
            **where,
        )
        return Redis.from_pool(pool)

    @property
    def login(self) -> dict[str, Any]:
        """User, password and database as redis-py names them."""
        return {"db": self.db, "username": self.username, "password": self.password}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentinels:
    """The master of a service, as Sentinels know it; asked anew for each connection."""

    service: str
    sentinels: tuple[Address, ...]
    master: Address  # but for host and port

    def __str__(self) -> str:
        servers = ",".join(sentinel.server for sentinel in self.sentinels)
        return f"{'rediss' if self.master.tls else 'redis'}+sentinel://{servers}/{self.service}/{self.master.db}"

    async def resolve(self) -> Address:
        """The master as the first Sentinel that answers knows it; raises OSError when none does."""
        for sentinel in self.sentinels:
            try:
                found = await sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service, within_s=SENTINEL_S)
                host, port = found
                return dataclasses.replace(self.master, host=host.decode(), port=int(port))
            except (RedisError, OSError, TypeError, ValueError):
                continue  # away, or it does not know the service
        raise ConnectionError(f"no Sentinel knows the master of {self.service}")

    def client(
        self, timeout_s: float, *, connect_s: float | None = None, connections: int = 1, wait_s: float | None = None
    ) -> Redis:
        """A redis-py client of the master, as it is at each connection; no call waits for a free one."""
        tls = {"ssl": True, **dict(self.master.tls_options)} if self.master.tls is not None else {}
        login = {name: value for name, value in self.sentinels[0].login.items() if value}
        new_manager: Any = Sentinel
        new_pool: Any = SentinelConnectionPool
        manager = new_manager(
            [(sentinel.host, sentinel.port) for sentinel in self.sentinels],
            sentinel_kwargs={**login, **_limits(SENTINEL_S, None), **tls},
        )
        limits = _limits(timeout_s, connect_s)
        pool = new_pool(self.service, manager, max_connections=connections, **self.master.login, **limits, **tls)
        return Redis.from_pool(pool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Servers of a Cluster to begin with; the others are learned from them."""

    seeds: tuple[Address, ...]

    def __str__(self) -> str:
        servers = ",".join(seed.server for seed in self.seeds)
        return f"{'rediss' if self.seeds[0].tls else 'redis'}+cluster://{servers}"

    def client(
        self, timeout_s: float, *, connect_s: float | None = None, connections: int = 1, wait_s: float | None = None
    ) -> Redis:
        """A redis-py client of the first server: enough to publish and subscribe, which reaches all of them."""
        return self.seeds[0].client(timeout_s, connect_s=connect_s, connections=connections, wait_s=wait_s)


def parse(url: str) -> Address | Sentinels | Cluster:
    """Read redis://, rediss:// or unix:// with user, password, database and `ssl_` options, as redis-py does.

    Several servers: `redis+sentinel://[USER:PASSWORD@]HOST[:PORT],…/SERVICE[/DB]` and
    `redis+cluster://[USER:PASSWORD@]HOST[:PORT],…`, or `rediss+…` for TLS; Sentinels' own `sentinel_username` and
    `sentinel_password` are options. Raises ValueError, whose message repeats nothing of the URL but the names of
    options: the rest may be a password.
    """
    scheme, _, rest = url.partition("://")
    name, _, kind = scheme.lower().partition("+")
    if kind in KINDS and name in ("redis", "rediss"):
        return _several(name, kind, rest)
    return _single(url)


def _single(url: str) -> Address:
    scheme = url.partition(":")[0].lower()
    if scheme not in SCHEMES or "://" not in url:
        raise ValueError(
            "redis.url: must begin with redis://, rediss://, unix://, or redis+sentinel:// and the like "
            "(rediss+sentinel://, redis+cluster://, rediss+cluster://)"
        )
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
    context = _context(tls) if kind is SSLConnection else None
    return Address(**found, tls=context, tls_options=tuple(tls.items()))


def _several(name: str, kind: str, rest: str) -> Sentinels | Cluster:
    """Servers before the first slash, after the last @; what is said about one of them holds for all."""
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    login, at, servers = authority.rpartition("@")
    options = [option for option in query.split("&") if option]
    own = {part.partition("=")[0]: unquote(part.partition("=")[2]) for part in options}
    sentinel = {key: own[key] for key in SENTINEL_OPTIONS & own.keys()} if kind == "sentinel" else {}
    passed = "&".join(option for option in options if option.partition("=")[0] not in sentinel)
    service, _, db = path.partition("/")
    if kind == "cluster" and path.strip("/") not in ("", "0"):
        raise ValueError("redis.url: a Cluster has no databases")
    if kind == "sentinel" and (not service or not re.fullmatch(r"\d*", db)):
        raise ValueError("redis.url: redis+sentinel://HOST:PORT,…/SERVICE/DB names the service that Sentinels know")
    like = _single(f"{name}://{login}{at}server/{db if kind == 'sentinel' else ''}{'?' + passed if passed else ''}")
    hosts = [_HOST.fullmatch(server) for server in servers.split(",")]
    found = [(host["host"].strip("[]"), int(host["port"] or PORTS[kind])) for host in hosts if host is not None]
    if len(found) < len(hosts) or any(port > 65535 for _, port in found):
        raise ValueError("redis.url: the servers are HOST:PORT,HOST:PORT,…")
    addresses = tuple(dataclasses.replace(like, host=host, port=port) for host, port in found)
    if kind == "cluster":
        return Cluster(seeds=addresses)
    asked = tuple(
        dataclasses.replace(
            address,
            db=0,
            username=sentinel.get("sentinel_username"),
            password=sentinel.get("sentinel_password"),
        )
        for address in addresses
    )
    return Sentinels(service=unquote(service), sentinels=asked, master=like)


def _limits(timeout_s: float, connect_s: float | None) -> dict[str, Any]:
    """Time limits, and no retries: redis-py's own would stall for seconds."""
    connect_s = timeout_s if connect_s is None else connect_s
    return {"socket_timeout": timeout_s, "socket_connect_timeout": connect_s, "retry": Retry(NoBackoff(), 0)}


def _context(options: dict[str, Any]) -> ssl.SSLContext:
    try:
        return SSLConnection(**options).ssl_context.get()
    except (TypeError, ValueError, OSError, RedisError) as error:
        raise ValueError(f"redis.url: the ssl_ options do not work: {error}") from None
