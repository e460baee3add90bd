"""The store that all balancers share. Never in the way: what Redis does not do in time is a miss, None, or dropped.

Two connections (`link.Link`): one for calls that somebody waits for, one for writes, so that a large value being
written holds up no read. While a connection is not there, calls return at once; bringing it back is the business
of one background task. Three failures in a row open the breaker: then the task tries once a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any

from hiredis import ReplyError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from balancer.clock import Clock
from balancer.core.cache_entry import LINE_BYTES, is_older
from balancer.core.cache_key import answer_pattern
from balancer.log import get_logger
from balancer.store import MAX_TTL_S, Taken
from balancer.store.address import Address, Cluster, Sentinels, parse
from balancer.store.link import Link, Reply, pack

# Failures in a row that open the breaker: a call that was too late, a connection lost or not made.
FAILURES = 3
# Between tries while the breaker is open. Doubled up to the second each time it opens again before any call was
# answered (a Redis that greets in time and answers too late); Redis has to be in use 5 s after it is back.
PROBE_S, MAX_PROBE_S = 1.0, 4.0
# Making a connection may take this long: names are looked up and TLS agreed on, and no request waits for it.
CONNECT_S = 0.25
# Nobody waits for a write: its limit only tells a slow Redis from a dead one.
WRITE_S = 1.0
# Writes that wait to be sent or answered: a second's worth at 1000 answers a second, and 16 of the largest.
MAX_WRITES, MAX_WRITE_BYTES = 1024, 16 * 1024 * 1024
# How long `close` waits for writes under way.
CLOSE_S = 0.25
# Names asked for in one step of a scan: about 0.2 ms of the server's time.
SCAN_COUNT = 500
SCAN_TIMEOUT_S = 1.0

# Error replies that say that this connection, or this server, is no use now; any other is about one key or one call.
USELESS = frozenset({"LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN", "MOVED", "READONLY", "NOAUTH"})
# Error replies that say that another server of a Cluster has the key now.
ELSEWHERE = frozenset({"MOVED", "ASK"})

log = get_logger()


class Unusable(ConnectionError):
    """It answered, and said that it is of no use to us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one server says of itself."""

    server: str  # host:port
    used_bytes: int
    peak_bytes: int
    max_bytes: int  # 0: no limit
    policy: str  # what it does when it is full
    evicted: int  # keys, since it started


class RedisStore:
    """One Redis (6 or newer, or Valkey) behind the Store protocol: a server, or the master that Sentinels name.

    `on_error` is told of each call that failed: `get`, `take`, `put`, `charge`, `delete`, `claim` or `publish`; calls
    refused because the breaker is open count only where something is lost, a write. `on_change` is told the new state
    on its edges. `on_moved` makes it one server of a Cluster, and is told when a key was not there but elsewhere.
    """

    def __init__(
        self,
        where: str | Address | Sentinels | Cluster,
        *,
        timeout_s: float,
        clock: Clock,
        on_error: Callable[[str], None],
        on_change: Callable[[str], None] | None = None,
        on_moved: Callable[[], None] | None = None,
        max_value_bytes: int = 8 * 1024 * 1024,
        probe_s: float = PROBE_S,
    ) -> None:
        found = parse(where) if isinstance(where, str) else where
        if isinstance(found, Cluster):
            raise ValueError("a Cluster is more than one server: store.cluster")
        self._address = found
        self._server = found if isinstance(found, Address) else None  # connected to last
        self._on_moved = on_moved
        self._timeout_s = timeout_s
        self._clock = clock
        self._on_error = on_error
        self._on_change = on_change
        self._max_value_bytes = max_value_bytes
        self._least_probe_s = self._probe_s = probe_s
        self._use_script(files("balancer.store").joinpath("scripts/take.lua").read_text())
        self._reads: Link | None = None
        self._writes: Link | None = None
        self._write_bytes = 0
        self._failures = FAILURES - 1  # at the start one is enough, so that start() is short
        self._open = False
        self._opened_s = self._next_drop_s = float("-inf")
        self._broken = asyncio.Event()
        self._settled = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<RedisStore {self._address} {self.state()} failures={self._failures}>"

    # -- the store

    async def get(self, key: str) -> bytes | None:
        """The value, or None: not there, not ours, larger than any of ours, or not answered in time."""
        link = self._reads
        if link is None:
            return None
        # GETRANGE, so that a value that is not ours cannot be larger than memory.
        reply = await link.ask(pack((b"GETRANGE", key, 0, self._max_value_bytes)))
        if type(reply) is bytes:
            self._failures = 0
            if len(reply) <= self._max_value_bytes:
                return reply or None
        self._failed("get", link, reply)
        return None

    def put(self, key: str, value: bytes, ttl_s: float) -> None:
        """Keep `value` for `ttl_s` seconds; dropped and counted when too many writes wait, or one too large."""
        if not value or not ttl_s > 0:
            return
        if len(value) > self._max_value_bytes or not self._may_write(len(value)):
            self._on_error("put")
            return
        expiry_ms = max(1, int(min(ttl_s, MAX_TTL_S) * 1000))
        self._write("put", pack((b"SET", key, value, b"PX", expiry_ms)))

    async def take(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> Taken | None:
        """Take tokens in one atomic step, by the server's clock; None when it did not answer in time."""
        link = self._reads
        if link is None:
            return None
        reply = await link.ask(self._evalsha(key, rate_per_s, burst, cost, force=False))
        if _code(reply) == "NOSCRIPT":
            reply = await link.ask(self._eval(key, rate_per_s, burst, cost, force=False))
        if type(reply) is list and len(reply) == 3:
            with contextlib.suppress(TypeError, ValueError):
                wait_s, remaining, reset_s = map(float, reply)
                self._failures = 0
                return Taken(wait_s=wait_s, remaining=remaining, reset_s=reset_s)
        self._failed("take", link, reply)
        return None

    def charge(self, key: str, *, rate_per_s: float, burst: float, cost: float) -> None:
        """Take tokens whether they are there or not; dropped and counted when too many writes wait."""
        command = self._evalsha(key, rate_per_s, burst, cost, force=True)
        if self._may_write(len(command)):
            again = partial(self._eval, key, rate_per_s, burst, cost, force=True)
            self._write("charge", command, again)
        else:
            self._on_error("charge")

    async def delete(
        self, *, tenant: str | None, model: str | None, digest: str | None, before_wall_s: float | None = None
    ) -> int:
        """Remove cached answers that match all that is given, in steps; how many went before it ended or failed."""
        gone = 0
        if self._writes is None or self._server is None:
            self._on_error("delete")
            return gone
        await self.written()  # or they would come back
        scanner = self._server.client(SCAN_TIMEOUT_S)  # for what is not in the way of requests, redis-py
        try:
            cursor, pattern = 0, answer_pattern(tenant, model, digest)
            while True:
                keys: list[Any]
                cursor, keys = await scanner.scan(cursor, match=pattern, count=SCAN_COUNT)
                if keys and before_wall_s is not None:
                    keys = await _older(scanner, keys, before_wall_s)
                if keys:
                    gone += await _unlink(scanner, keys)
                if not cursor:
                    return gone
        except (RedisError, OSError) as error:
            log.warning("store.delete_failed", address=str(self._address), reason=_reason(error), deleted=gone)
            self._on_error("delete")
            return gone
        finally:
            await scanner.aclose()

    async def facts(self) -> list[Facts]:
        """How the server is doing, by itself; nothing while it is away."""
        link, server = self._writes, self._server
        if link is None or server is None:
            return []
        memory, stats = await asyncio.gather(*(link.ask(pack((b"INFO", part))) for part in (b"memory", b"stats")))
        found = {**_fields(memory), **_fields(stats)}
        try:
            return [
                Facts(
                    server=server.server,
                    used_bytes=int(found["used_memory"]),
                    peak_bytes=int(found["used_memory_peak"]),
                    max_bytes=int(found["maxmemory"]),
                    policy=found["maxmemory_policy"],
                    evicted=int(found["evicted_keys"]),
                )
            ]
        except (KeyError, ValueError):
            return []  # users may not be let

    async def ask(self, op: str, command: bytes, within_s: float) -> Reply:
        """The reply to a packed command that somebody waits for; None: away, refused, or not in time."""
        link = self._reads
        if link is None:
            return None
        try:
            async with asyncio.timeout(within_s):
                reply = await link.ask(command)
        except TimeoutError:
            self._on_error(op)
            return None
        if reply is None or isinstance(reply, ReplyError):
            self._failed(op, link, reply)
            return None
        self._failures = 0
        return reply

    def tell(self, op: str, command: bytes, then: Callable[[Reply], None] | None = None) -> None:
        """Send a packed command that nobody waits for; dropped and counted when too many writes wait.

        `then` gets the reply, an error reply as a value, or None.
        """
        if not self._may_write(len(command)):
            self._on_error(op)
            return
        future = self._write(op, command)
        if then is not None:
            future.add_done_callback(lambda done: then(done.result()))

    def state(self) -> str:
        """`ready`, or `unreachable` while the breaker is open."""
        return "unreachable" if self._open else "ready"

    async def start(self) -> None:
        """Connect, and keep connected from now on; returns within half a second, whether Redis is there or not."""
        self._broken.set()
        self._keeper = asyncio.create_task(self._keep(), name="store")
        await self._settled.wait()

    async def written(self) -> None:
        """Return when every write so far has been answered or given up."""
        if self._writes is not None:
            await self._writes.drained()

    async def close(self) -> None:
        """Give writes under way a moment, then let go of everything."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.written(), CLOSE_S)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        self._drop_links("closed")

    # -- commands

    def _use_script(self, script: str) -> None:
        self._script = script
        self._sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()

    def _evalsha(self, key: str, rate_per_s: float, burst: float, cost: float, *, force: bool) -> bytes:
        return pack((b"EVALSHA", self._sha, 1, key, rate_per_s, burst, cost, int(force)))

    def _eval(self, key: str, rate_per_s: float, burst: float, cost: float, *, force: bool) -> bytes:
        return pack((b"EVAL", self._script, 1, key, rate_per_s, burst, cost, int(force)))

    def _may_write(self, size: int) -> bool:
        link = self._writes
        return link is not None and len(link) < MAX_WRITES and self._write_bytes + size <= MAX_WRITE_BYTES

    def _write(self, op: str, command: bytes, again: Callable[[], bytes] | None = None) -> asyncio.Future[Reply]:
        assert self._writes is not None
        self._write_bytes += len(command)
        future = self._writes.ask(command)
        future.add_done_callback(partial(self._written, op, self._writes, len(command), again))
        return future

    def _written(
        self, op: str, link: Link, size: int, again: Callable[[], bytes] | None, future: asyncio.Future[Reply]
    ) -> None:
        self._write_bytes -= size
        reply = future.result()
        if again is not None and _code(reply) == "NOSCRIPT" and link is self._writes:
            self._write(op, again())
        elif reply is None or isinstance(reply, ReplyError):
            self._failed(op, link, reply)
        else:
            self._failures = 0

    def _failed(self, op: str, link: Link, reply: Reply) -> None:
        """Count a call that brought nothing; an error reply may mean that the whole connection is no use."""
        self._on_error(op)
        code = _code(reply)
        if self._on_moved is not None and code in ELSEWHERE:
            self._on_moved()
        elif code in USELESS and self._clock.now() >= self._next_drop_s:
            self._next_drop_s = self._clock.now() + self._least_probe_s  # a new one may be no better
            link.end(code)

    # -- the connections and the breaker

    async def _keep(self) -> None:
        while True:
            await self._broken.wait()
            self._broken.clear()
            if self._open:
                await self._clock.sleep(self._probe_s)
            try:
                await self._connect()
            except (OSError, UnicodeError) as error:
                self._count_failure(_reason(error))
                self._broken.set()
            except Exception:
                log.exception("store.probe_failed", address=str(self._address))
                self._count_failure("bug")
                self._broken.set()
            else:
                self._connected()

    async def _connect(self) -> None:
        if self._reads is None:
            self._reads = await self._new_link(self._timeout_s)
        if self._writes is None:
            self._writes = await self._new_link(max(WRITE_S, self._timeout_s))

    async def _new_link(self, timeout_s: float) -> Link:
        """A connection that has greeted within the time limit of a call; raises OSError."""
        link = Link(timeout_s=timeout_s, clock=self._clock, on_end=self._ended)
        try:
            server = await self._address.resolve()
            async with asyncio.timeout(max(CONNECT_S, self._timeout_s)):
                await server.connect(link)
                await self._greet(link, server)
        except BaseException:
            link.end("not greeted")
            raise
        if link.ended:
            raise Unusable("lost")
        self._server = server
        return link

    async def _greet(self, link: Link, address: Address) -> None:
        asked = []
        if address.password is not None:
            names = (address.username,) if address.username is not None else ()
            asked.append(link.ask(pack((b"AUTH", *names, address.password))))
        if address.db:
            asked.append(link.ask(pack((b"SELECT", address.db))))
        asked.append(link.ask(pack((b"PING",))))
        hello = link.ask(pack((b"HELLO",)))
        load = link.ask(self._load())
        for future in asked:
            reply = await future
            if isinstance(reply, ReplyError):
                raise Unusable(_code(reply))
            if reply is None:
                raise TimeoutError
        # From here on an error is no matter: users may not be let, and a script that is missed is sent again.
        facts = await hello
        if isinstance(facts, list):
            about = dict(zip(facts[::2], facts[1::2], strict=False))
            if about.get(b"role") in (b"replica", b"slave"):
                raise Unusable("replica")
            if about.get(b"mode") == b"cluster" and self._on_moved is None:
                raise Unusable("cluster")
        if "compil" in str(await load) and self._script.startswith("#!"):
            self._use_script(self._script.partition("\n")[2])  # Redis 6 does not know the first line
            await link.ask(self._load())

    def _load(self) -> bytes:
        return pack((b"SCRIPT", b"LOAD", self._script))

    def _ended(self, link: Link, reason: str, waited_for: bool) -> None:
        if link is self._reads:
            self._reads = None
        elif link is self._writes:
            self._writes = None
        else:
            return  # not in use yet, or not any more
        # A server may close an idle connection without anything being wrong, but not a new one.
        if waited_for or reason != "lost" or self._clock.now() - link.since_s < self._least_probe_s:
            self._count_failure(reason)
        self._broken.set()

    def _count_failure(self, reason: str) -> None:
        if self._open:
            return
        self._failures += 1
        if self._failures < FAILURES:
            return
        unproven = self._failures > FAILURES  # nothing was answered since it was last closed
        self._probe_s = min(MAX_PROBE_S, self._probe_s * 2) if unproven else self._least_probe_s
        self._open = True
        self._opened_s = self._clock.now()
        self._drop_links("breaker open")
        self._settled.set()
        log.warning("store.unreachable", address=str(self._address), reason=reason, probe_s=self._probe_s)
        if self._on_change is not None:
            self._on_change("unreachable")

    def _connected(self) -> None:
        if self._reads is None or self._writes is None:
            return  # gone again meanwhile, and counted
        if not self._settled.is_set():
            self._failures = 0
            self._settled.set()
        if self._open:
            self._open = False
            self._failures = FAILURES  # the first call decides
            log.warning("store.recovered", address=str(self._address), away_s=self._clock.now() - self._opened_s)
            if self._on_change is not None:
                self._on_change("ready")

    def _drop_links(self, reason: str) -> None:
        links, self._reads, self._writes = (self._reads, self._writes), None, None
        for link in links:
            if link is not None:
                link.end(reason)


def _code(reply: Reply) -> str:
    """The first word of an error reply: its kind. Empty for any other."""
    return str(reply).partition(" ")[0] if isinstance(reply, ReplyError) else ""


def _fields(reply: Reply) -> dict[str, str]:
    """The `name:value` lines of an INFO."""
    lines = reply.decode("utf-8", "replace").splitlines() if isinstance(reply, bytes) else []
    return {name: value for name, _, value in (line.partition(":") for line in lines)}


async def _older(scanner: Redis, keys: list[Any], before_wall_s: float) -> list[Any]:
    """Those whose answers were stored before then."""
    pipeline = scanner.pipeline(transaction=False)
    for key in keys:
        pipeline.getrange(key, 0, LINE_BYTES - 1)
    beginnings = await pipeline.execute(raise_on_error=False)
    return [
        key
        for key, beginning in zip(keys, beginnings, strict=True)
        if not isinstance(beginning, bytes) or is_older(beginning, before_wall_s)
    ]


async def _unlink(scanner: Redis, keys: list[Any]) -> int:
    """Remove keys one by one, as a Cluster wants it, in one round trip; how many were there."""
    pipeline = scanner.pipeline(transaction=False)
    for key in keys:
        pipeline.unlink(key)
    return sum(await pipeline.execute())


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
