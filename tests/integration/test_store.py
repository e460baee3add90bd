"""The stores keep what they are given, count exactly, and a Redis that is away, sick or soiled is never in the way."""

from __future__ import annotations

import asyncio
import contextlib
import select
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import hiredis
import pytest
import structlog
import uvloop

from balancer.clock import Clock, SystemClock
from balancer.core.cache_key import answer_name, limit_name
from balancer.store import Store, Taken
from balancer.store.address import parse
from balancer.store.link import HOLD_CALLS, Link, pack
from balancer.store.memory import ENTRY_OVERHEAD_BYTES, MemoryStore
from balancer.store.redis import FAILURES, MAX_WRITE_BYTES, MAX_WRITES, RedisStore
from tests.fakes import ManualClock
from tests.redis_server import RedisServer, new_server, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

# For calls that are to be answered, however busy the machine; and for those that are not to be.
PATIENT_S, HASTY_S = 5.0, 0.02
PROBE_S = 0.05
# What is waited for comes in milliseconds; a test that waits this long has failed.
WITHIN_S = 20.0
# So slow that nothing comes back while a test runs.
SLOW = 1e-6


class Watch:
    """What a store told of itself."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.states: list[str] = []
        self._changed = asyncio.Event()

    def on_change(self, state: str) -> None:
        self.states.append(state)
        self._changed.set()

    async def until(self, state: str) -> None:
        async with asyncio.timeout(WITHIN_S):
            while not self.states or self.states[-1] != state:
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def store_at(
    url: str, *, timeout_s: float = PATIENT_S, **options: Any
) -> AsyncIterator[tuple[RedisStore, Watch]]:
    watch = Watch()
    store = RedisStore(
        url,
        timeout_s=timeout_s,
        clock=options.pop("clock", SystemClock()),
        on_error=watch.errors.append,
        on_change=watch.on_change,
        probe_s=options.pop("probe_s", PROBE_S),
        **options,
    )
    await store.start()
    try:
        yield store, watch
    finally:
        await store.close()


def at_once(call: Coroutine[Any, Any, Any]) -> Any:
    """The result of a call that must not wait for anything."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    call.close()
    raise AssertionError("it waits")


async def in_use(store: RedisStore) -> bool:
    """Whether a value comes back."""
    store.put("balancer:v1:cache:t:m:{in-use}", b"yes", 60.0)
    await store.written()
    return await store.get("balancer:v1:cache:t:m:{in-use}") == b"yes"


async def until_in_use(store: RedisStore) -> None:
    """Return when the store works; a hasty one may lose a call or two on a busy machine."""
    async with asyncio.timeout(WITHIN_S):
        while not await in_use(store):  # noqa: ASYNC110
            await asyncio.sleep(0)  # there is nothing else to wait for between two tries


# -- both stores


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One server for all tests that do it no harm; each finds it empty."""
    with new_server() as started:
        yield started


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.real("redis"))])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield MemoryStore(1 << 22, ManualClock())
        return
    server = request.getfixturevalue("server")
    with server.client() as client:
        client.flushall()
    async with store_at(server.url) as (redis_store, _):
        yield redis_store


async def settle(store: Store) -> None:
    if isinstance(store, RedisStore):
        await store.written()


KEY = answer_name("acme", "m", "ab" * 32)


async def test_value_comes_back_as_it_was_put(store: Store) -> None:
    value = bytes(range(256)) * 5000
    store.put(KEY, value, 60.0)
    await settle(store)
    assert await store.get(KEY) == value
    assert await store.get(KEY + "x") is None
    store.put(KEY, b"newer", 60.0)
    await settle(store)
    assert await store.get(KEY) == b"newer"
    assert store.state() == "ready"


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan")])
async def test_value_whose_time_is_over_is_not_kept(store: Store, ttl_s: float) -> None:
    store.put(KEY, b"v", ttl_s)
    await settle(store)
    assert await store.get(KEY) is None


@pytest.mark.parametrize("ttl_s", [0.0001, 1e18, float("inf")])
async def test_no_lifetime_is_too_strange_to_be_taken(store: Store, ttl_s: float) -> None:
    store.put(KEY, b"v", ttl_s)
    await settle(store)
    assert await store.get(KEY) in (b"v", None)


async def test_empty_value_is_not_kept(store: Store) -> None:
    store.put(KEY, b"", 60.0)
    await settle(store)
    assert await store.get(KEY) is None


async def test_burst_is_exact_under_concurrency(store: Store) -> None:
    took = await asyncio.gather(*[store.take("b", rate_per_s=SLOW, burst=50.0, cost=1.0) for _ in range(130)])
    assert sum(taken is not None and taken.wait_s == 0.0 for taken in took) == 50


async def test_refused_take_costs_nothing_and_tells_how_it_stands(store: Store) -> None:
    assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=3.0) == about(0.0, 2.0, 3000.0)
    assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=3.0) == about(1000.0, 2.0, 3000.0)
    assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=2.0) == about(0.0, 0.0, 5000.0)


async def test_cost_above_the_burst_is_never_granted(store: Store) -> None:
    assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=6.0) == about(1000.0, 5.0, 0.0)


async def test_charge_may_leave_a_debt_and_tokens_can_be_given_back(store: Store) -> None:
    store.charge("b", rate_per_s=0.001, burst=5.0, cost=8.0)
    await settle(store)
    assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=1.0) == about(4000.0, -3.0, 8000.0)
    assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=-5.0) == about(0.0, 2.0, 3000.0)
    store.charge("b", rate_per_s=0.001, burst=5.0, cost=-100.0)
    await settle(store)
    assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=0.0) == about(0.0, 5.0, 0.0)


async def test_new_limits_hold_from_the_next_call(store: Store) -> None:
    await store.take("b", rate_per_s=SLOW, burst=100.0, cost=10.0)
    assert await store.take("b", rate_per_s=0.001, burst=20.0, cost=1.0) == about(0.0, 19.0, 1000.0)
    await store.take("b", rate_per_s=0.001, burst=20.0, cost=19.0)
    assert await store.take("b", rate_per_s=0.01, burst=100.0, cost=1.0) == about(100.0, 0.0, 10000.0)


async def test_buckets_are_apart(store: Store) -> None:
    for tenant in ("a", "b"):
        taken = await store.take(limit_name(tenant), rate_per_s=SLOW, burst=1.0, cost=1.0)
        assert taken is not None
        assert taken.wait_s == 0.0


def about(wait_s: float, remaining: float, reset_s: float) -> Any:
    """Equal but for what comes back while a test runs (0.001 tokens a second)."""

    class About:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Taken) and (
                other.wait_s == pytest.approx(wait_s, abs=40)
                and other.remaining == pytest.approx(remaining, abs=0.04)
                and other.reset_s == pytest.approx(reset_s, abs=40)
                and (other.wait_s == 0.0) is (wait_s == 0.0)
            )

        def __repr__(self) -> str:
            return f"about(wait_s={wait_s}, remaining={remaining}, reset_s={reset_s})"

        __hash__ = None  # type: ignore[assignment]

    return About()


ANSWERS = [
    (tenant, model, digest) for tenant in ("a", "b:c", None) for model in ("m", "org/m*") for digest in ("d1", "d2")
]


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"tenant": "a"},
        {"tenant": "b:c"},
        {"tenant": "shared"},
        {"model": "m"},
        {"model": "org/m*"},
        {"digest": "d1"},
        {"tenant": "a", "model": "m", "digest": "d2"},
        {"tenant": "*"},
        {"digest": "d?"},
        {"model": "[m]"},
    ],
)
async def test_delete_removes_what_matches_all_that_is_given(store: Store, wanted: dict[str, str]) -> None:
    for answer in ANSWERS:
        store.put(answer_name(*answer), b"v", 60.0)
    store.charge(limit_name("a"), rate_per_s=SLOW, burst=5.0, cost=1.0)

    def matches(answer: tuple[str | None, str, str]) -> bool:
        tenant, model, digest = answer
        found = {"tenant": tenant or "shared", "model": model, "digest": digest}
        return all(found[name] == value for name, value in wanted.items())

    parts = {"tenant": None, "model": None, "digest": None} | wanted
    assert await store.delete(**parts) == sum(map(matches, ANSWERS))
    for answer in ANSWERS:
        assert (await store.get(answer_name(*answer)) is None) is matches(answer)
    taken = await store.take(limit_name("a"), rate_per_s=SLOW, burst=5.0, cost=5.0)
    assert taken is not None
    assert taken.wait_s > 0.0  # a bucket is no answer


# -- memory


async def test_memory_forgets_what_is_over() -> None:
    clock = ManualClock()
    store = MemoryStore(1 << 20, clock)
    store.put(KEY, b"v", 10.0)
    clock.advance(9.9)
    assert await store.get(KEY) == b"v"
    clock.advance(0.1)
    assert await store.get(KEY) is None
    assert store.size_bytes == 0


async def test_memory_drops_the_least_recently_used_first_and_never_holds_more_than_it_may() -> None:
    room = 3 * (ENTRY_OVERHEAD_BYTES + 1 + 100)
    store = MemoryStore(room, ManualClock())
    for key in "abc":
        store.put(key, b"x" * 100, 60.0)
    assert await store.get("a") is not None
    store.put("d", b"x" * 100, 60.0)
    assert [key for key in "abcd" if await store.get(key)] == ["a", "c", "d"]
    assert store.size_bytes <= room
    store.put("e", b"x" * (room - ENTRY_OVERHEAD_BYTES - 1), 60.0)
    assert [key for key in "abcde" if await store.get(key)] == ["e"]


async def test_memory_value_that_cannot_fit_still_removes_the_old_one() -> None:
    store = MemoryStore(1000, ManualClock())
    store.put("a", b"old", 60.0)
    store.put("a", b"x" * 1000, 60.0)
    assert await store.get("a") is None
    assert store.size_bytes == 0


async def test_memory_keeps_no_bucket_that_is_full() -> None:
    clock = ManualClock()
    store = MemoryStore(1000, clock)
    for tenant in range(50):
        await store.take(f"t{tenant}", rate_per_s=1.0, burst=5.0, cost=5.0)
    assert store.buckets == 50
    clock.advance(5.0)
    for _ in range(30):
        await store.take("busy", rate_per_s=1.0, burst=100.0, cost=1.0)
    assert store.buckets == 1


async def test_memory_refills_by_its_clock() -> None:
    clock = ManualClock()
    store = MemoryStore(1000, clock)
    await store.take("b", rate_per_s=2.0, burst=4.0, cost=4.0)
    clock.advance(1.5)
    taken = await store.take("b", rate_per_s=2.0, burst=4.0, cost=4.0)
    assert taken == Taken(wait_s=0.5, remaining=3.0, reset_s=0.5)


# -- Redis at its best

real_redis = pytest.mark.real("redis")


@real_redis
async def test_every_key_in_redis_expires_and_none_is_a_secret(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()
        async with store_at(server.url) as (store, _):
            store.put(KEY, b"v", 30.0)
            await store.take(limit_name("a"), rate_per_s=1.0, burst=5.0, cost=5.0)
            store.charge(limit_name("b"), rate_per_s=1.0, burst=5.0, cost=50.0)
            await store.take(limit_name("full"), rate_per_s=1.0, burst=5.0, cost=0.0)
            store.charge(limit_name("debt"), rate_per_s=1e-9, burst=5.0, cost=1e12)
            await store.written()
        lives = {name.decode(): client.pttl(name) / 1000 for name in client.scan_iter()}
    assert set(lives) == {KEY, *map(limit_name, ("a", "b", "debt"))}  # a full bucket needs no key
    assert 10 < lives[KEY] <= 30
    assert 0 < lives[limit_name("a")] <= 5
    assert 30 < lives[limit_name("b")] <= 50
    assert 86400 < lives[limit_name("debt")] <= 30 * 86400


@real_redis
async def test_two_balancers_share_one_burst(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()
    async with store_at(server.url) as (one, _), store_at(server.url) as (other, _):
        calls = [s.take("b", rate_per_s=SLOW, burst=40.0, cost=1.0) for _ in range(60) for s in (one, other)]
        assert sum(taken.wait_s == 0.0 for taken in await asyncio.gather(*calls) if taken) == 40


@real_redis
async def test_bucket_refills_by_the_servers_clock(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()
    async with store_at(server.url, clock=ManualClock()) as (store, _), asyncio.timeout(WITHIN_S):
        await store.take("b", rate_per_s=100.0, burst=2.0, cost=2.0)
        while (taken := await store.take("b", rate_per_s=100.0, burst=2.0, cost=1.0)) and taken.wait_s > 0.0:
            pass
        assert taken is not None


@real_redis
async def test_script_that_redis_forgot_is_sent_again(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()
        async with store_at(server.url) as (store, watch):
            client.script_flush()
            assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=1.0) == about(0.0, 4.0, 1000.0)
            client.script_flush()
            store.charge("b", rate_per_s=0.001, burst=5.0, cost=1.0)
            await store.written()  # found missing, sent again
            await store.written()
            assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=0.0) == about(0.0, 3.0, 2000.0)
            assert watch.errors == []


@real_redis
async def test_other_ways_to_reach_a_redis(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()
        client.acl_setuser("lb", enabled=True, passwords=["+p@ss:w/rd#"], keys=["*"], commands=["+@all", "-@dangerous"])
        for url in (
            f"redis://lb:p%40ss%3Aw%2Frd%23@127.0.0.1:{server.port}",
            f"redis://localhost:{server.port}/3",
            f"unix://{server.unix_path}?db=4",
        ):
            async with store_at(url) as (store, watch):
                assert await in_use(store)
                assert await store.take("b", rate_per_s=SLOW, burst=9.0, cost=1.0) is not None
                assert await store.delete(tenant="t", model=None, digest=None) == 1
                assert (watch.errors, watch.states) == ([], [])
        assert set(client.info("keyspace")) == {"db0", "db3", "db4"}
        client.acl_deluser("lb")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A certificate for `localhost` that is its own authority, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*words, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return certificate, key


@real_redis
async def test_tls_with_its_own_authority(server: RedisServer, certificate: tuple[str, str]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
            sink.close()

        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async with await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context) as front:
        port = front.sockets[0].getsockname()[1]
        async with store_at(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate[0]}") as (store, _):
            assert await in_use(store)
        with structlog.testing.capture_logs() as logs:
            async with store_at(f"rediss://localhost:{port}/0") as (store, _):
                assert store.state() == "unreachable"
        assert "CERTIFICATE" in logs[0]["reason"]


# -- Redis in trouble


@real_redis
async def test_absent_at_the_start_then_there_then_killed_then_back() -> None:
    with new_server() as server, structlog.testing.capture_logs() as logs:
        server.kill()
        async with store_at(server.url) as (store, watch):
            assert store.state() == "unreachable"
            assert at_once(store.get(KEY)) is None
            assert at_once(store.take("b", rate_per_s=1.0, burst=1.0, cost=1.0)) is None
            assert await store.delete(tenant=None, model=None, digest=None) == 0
            store.put(KEY, b"v", 60.0)
            store.charge("b", rate_per_s=1.0, burst=1.0, cost=1.0)
            assert watch.errors == ["delete", "put", "charge"]
            server.start()
            await watch.until("ready")
            assert await in_use(store)
            server.kill()
            await watch.until("unreachable")
            assert at_once(store.get(KEY)) is None
            server.start()
            await watch.until("ready")
            assert await in_use(store)
            assert store.state() == "ready"
    events = [(line["event"], line["log_level"]) for line in logs]
    assert events == [("store.unreachable", "warning"), ("store.recovered", "warning")] * 2
    assert logs[0]["address"] == f"redis://127.0.0.1:{server.port}/0"


@real_redis
async def test_restart_that_nobody_waited_for_is_no_event(redis_server: RedisServer) -> None:
    """A connection that was closed is made again at once; only if that fails is there something to tell."""
    async with store_at(redis_server.url) as (store, watch):
        assert await in_use(store)
        with redis_server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
        await until_in_use(store)
        assert watch.states == []


@real_redis
async def test_frozen_redis_costs_each_caller_one_time_limit_and_opens_the_breaker(redis_server: RedisServer) -> None:
    async with store_at(redis_server.url, timeout_s=HASTY_S) as (store, watch):
        await until_in_use(store)
        redis_server.freeze()
        watch.errors.clear()
        takes = [store.take("b", rate_per_s=1.0, burst=1.0, cost=1.0) for _ in range(10)]
        async with asyncio.timeout(WITHIN_S):
            answers = await asyncio.gather(*[store.get(KEY) for _ in range(90)], *takes)
        assert answers == [None] * 100
        assert sorted(watch.errors) == ["get"] * 90 + ["take"] * 10
        await watch.until("unreachable")
        assert at_once(store.get(KEY)) is None
        redis_server.thaw()
        await watch.until("ready")
        await until_in_use(store)


@real_redis
async def test_writes_to_a_frozen_redis_are_bounded_and_the_rest_is_counted(redis_server: RedisServer) -> None:
    async with store_at(redis_server.url, timeout_s=60.0) as (store, watch):
        redis_server.freeze()
        for number in range(MAX_WRITES + 100):
            store.put(f"k{number}", b"v", 60.0)
        assert watch.errors == ["put"] * 100
        store.charge("b", rate_per_s=1.0, burst=1.0, cost=1.0)
        assert watch.errors[100:] == ["charge"]
        redis_server.thaw()
        await store.written()
        watch.errors.clear()
        redis_server.freeze()
        value = b"x" * (MAX_WRITE_BYTES // 4)
        for number in range(6):
            store.put(f"large{number}", value, 60.0)
        assert watch.errors == ["put"] * 3  # the fourth does not fit beside what a command needs
        redis_server.thaw()
        for _ in range(8):  # what was answered makes room
            await store.written()
            await asyncio.sleep(0)  # the callbacks of what was written
            store.put("large", value, 60.0)
        assert watch.errors == ["put"] * 3
        assert await in_use(store)


@real_redis
async def test_full_redis_drops_writes_and_goes_on_reading_and_counting(redis_server: RedisServer) -> None:
    with redis_server.client() as client:
        async with store_at(redis_server.url) as (store, watch):
            store.put(KEY, b"kept", 600.0)
            await store.written()
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            store.put(KEY + "2", b"x" * 1000, 60.0)
            await store.written()
            await asyncio.sleep(0)  # the callbacks of what was written
            assert watch.errors == ["put"]
            assert await store.get(KEY) == b"kept"
            took = [await store.take("b", rate_per_s=SLOW, burst=2.0, cost=1.0) for _ in range(3)]
            assert [taken.wait_s == 0.0 for taken in took if taken] == [True, True, False]
            client.config_set("maxmemory", 0)
            assert await in_use(store)
            assert watch.states == []


@real_redis
@pytest.mark.parametrize("soil", ["rubbish", "nan 1", "-inf 5", "-1e300 5", "1e999 99999999999999999999", "5", "", " "])
async def test_soiled_bucket_counts_as_full_and_is_made_good(server: RedisServer, soil: str) -> None:
    with server.client() as client:
        client.flushall()
        client.set("b", soil)
        async with store_at(server.url) as (store, watch):
            assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=5.0) == about(0.0, 0.0, 5000.0)
            assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=5.0) == about(5000.0, 0.0, 5000.0)
            assert watch.errors == []
        assert client.pttl("b") > 0


@real_redis
async def test_wrong_types_and_values_that_are_too_large_are_misses(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()
        client.rpush("b", "not a bucket")
        client.rpush(KEY, "not an answer")
        client.set("large", b"x" * 2000)
        async with store_at(server.url, max_value_bytes=1000) as (store, watch):
            assert await store.take("b", rate_per_s=0.001, burst=5.0, cost=1.0) == about(0.0, 4.0, 1000.0)
            assert await store.get(KEY) is None
            assert await store.get("large") is None
            store.put("larger", b"x" * 1001, 60.0)
            assert watch.errors == ["get", "get", "put"]
            store.put(KEY, b"x" * 1000, 60.0)  # over whatever it was
            await store.written()
            assert await store.get(KEY) == b"x" * 1000
            assert store.state() == "ready"


@real_redis
async def test_caller_that_leaves_does_not_shift_the_answers_of_others(server: RedisServer) -> None:
    async with store_at(server.url) as (store, _):
        for number in range(20):
            store.put(f"k{number}", b"%d" % number, 60.0)
        await store.written()
        calls = [asyncio.create_task(store.get(f"k{number}")) for number in range(20)]
        await asyncio.sleep(0)
        for call in calls[::3]:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [answer for answer in answers if isinstance(answer, bytes)] == [b"%d" % n for n in range(20) if n % 3]


@real_redis
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_answer_that_came_while_the_event_loop_was_busy_is_not_late(
    server: RedisServer, run: Callable[..., Any]
) -> None:
    async def main() -> None:
        async with store_at(server.url, timeout_s=HASTY_S) as (store, _):
            await until_in_use(store)
            assert store._reads is not None and store._reads._transport is not None  # noqa: PT018
            socket = store._reads._transport.get_extra_info("socket")
            call = asyncio.create_task(store.get("balancer:v1:cache:t:m:{in-use}"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # sent; from here on the event loop is busy
            assert select.select([socket.fileno()], [], [], WITHIN_S)[0]
            time.sleep(3 * HASTY_S)  # noqa: ASYNC251
            assert await call == b"yes"

    run(main())


@real_redis
async def test_wrong_password_is_told_without_telling_it(redis_server: RedisServer) -> None:
    with redis_server.client() as client, structlog.testing.capture_logs() as logs:
        client.config_set("requirepass", "right-secret")
        async with store_at(f"redis://default:wrong-secret@127.0.0.1:{redis_server.port}") as (store, watch):
            assert store.state() == "unreachable"
            assert "secret" not in repr(store) + repr(vars(store)["_address"])
            client.config_set("requirepass", "wrong-secret")
            await watch.until("ready")
            assert await in_use(store)
    assert logs[0]["reason"] == "WRONGPASS"
    assert "secret" not in repr(logs)


# -- a Redis that misbehaves in ways that a real one does not on demand

GREETING = {b"PING": b"+PONG\r\n", b"HELLO": b"*0\r\n", b"SCRIPT": b"+sha\r\n"}


class Scripted:
    """Answers each command by a function from its words to bytes; None keeps silent. Remembers what came together."""

    def __init__(self, answer: Callable[[list[bytes]], bytes | None]) -> None:
        self._answer = answer
        self.reads: list[list[list[bytes]]] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 20):
                parser.feed(data)
                commands = []
                while command := parser.gets():
                    commands.append(command)
                    writer.write(GREETING.get(command[0]) or self._answer(command) or b"")
                self.reads.append(commands)
        writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as listening:
            yield f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def test_calls_of_one_moment_go_out_together() -> None:
    redis = Scripted(lambda command: b"$1\r\nx\r\n")
    async with redis.running() as url, store_at(url) as (store, _):
        redis.reads.clear()
        assert await asyncio.gather(*[store.get(f"k{n}") for n in range(200)]) == [b"x"] * 200
        assert len(redis.reads) <= 2  # one, unless the kernel cut it
        assert sum(map(len, redis.reads)) == 200


@contextlib.asynccontextmanager
async def link_to_silence(
    clock: Clock,
) -> AsyncIterator[tuple[Link, asyncio.Queue[list[bytes]], Callable[[int], None]]]:
    """A link, what arrives at its other end, and a way to answer so many calls from there."""
    arrived: asyncio.Queue[list[bytes]] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        parser = hiredis.Reader()
        while data := await reader.read(1 << 20):
            parser.feed(data)
            commands = []
            while command := parser.gets():
                commands.append(command[1])
            arrived.put_nowait(commands)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening, asyncio.timeout(WITHIN_S):
        link = Link(timeout_s=PATIENT_S, clock=clock, on_end=lambda *_: None)
        await asyncio.get_running_loop().create_connection(lambda: link, *listening.sockets[0].getsockname())
        yield link, arrived, lambda count: writers[0].write(b"+OK\r\n" * count)
        link.end("done")


async def test_calls_made_while_a_batch_is_under_way_go_together_when_they_are_many() -> None:
    async with link_to_silence(SystemClock()) as (link, arrived, answer):
        first = link.ask(pack((b"GET", b"1")))
        assert await arrived.get() == [b"1"]
        later = [link.ask(pack((b"GET", b"%d" % n))) for n in range(2, 2 + HOLD_CALLS)]
        assert await arrived.get() == [b"%d" % n for n in range(2, 2 + HOLD_CALLS)]
        answer(1 + HOLD_CALLS)
        assert await asyncio.gather(first, *later) == [b"OK"] * (1 + HOLD_CALLS)


async def test_call_made_while_a_batch_is_under_way_does_not_wait_for_its_answer() -> None:
    async with link_to_silence(SystemClock()) as (link, arrived, answer):
        first = link.ask(pack((b"GET", b"1")))
        assert await arrived.get() == [b"1"]
        second = link.ask(pack((b"GET", b"2")))
        assert await arrived.get() == [b"2"]
        assert not first.done()
        answer(2)
        assert await asyncio.gather(first, second) == [b"OK", b"OK"]


async def test_late_answer_gets_one_more_look_and_no_more() -> None:
    clock = ManualClock()
    async with link_to_silence(clock) as (link, arrived, answer):
        calls = [link.ask(pack((b"GET", b"%d" % n))) for n in range(2)]
        await arrived.get()
        clock.advance(PATIENT_S)
        link._look()
        answer(1)
        assert await calls[0] == b"OK"
        link._look()  # the first time for this one
        assert not link.ended
        link._look()
        assert link.ended
        assert await calls[1] is None
        assert await link.ask(b"") is None


async def test_redis_that_greets_and_then_answers_too_late_opens_the_breaker_and_is_asked_ever_more_rarely() -> None:
    redis = Scripted(lambda command: None)
    with structlog.testing.capture_logs() as logs:
        async with redis.running() as url, store_at(url, timeout_s=HASTY_S, probe_s=0.01) as (store, watch):
            async with asyncio.timeout(WITHIN_S):
                while len(watch.states) < 5:
                    assert await store.get(KEY) is None
                    await asyncio.sleep(0)
    assert watch.states[:4] == ["unreachable", "ready", "unreachable", "ready"]
    assert "get" in watch.errors
    assert [line["probe_s"] for line in logs if line["event"] == "store.unreachable"][:3] == [0.01, 0.02, 0.04]
    assert {line["reason"] for line in logs if "reason" in line} == {"timeout"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "LOADING"),
        (b"-READONLY You can't write against a read only replica.\r\n", "READONLY"),
        (b"rubbish\r\n", "protocol"),
        (b"$1\r\nx\r\n$1\r\nx\r\n$1\r\nx\r\n", "unasked"),
        (b"*1\r\n$1\r\nx\r\n", None),
        (b":5\r\n", None),
        (b"$3\r\n123\r\n", None),
        (b"*3\r\n$1\r\n1\r\n$3\r\nlot\r\n*0\r\n", None),
        (b"$-1\r\n", None),
        (b"-ERR whatever\r\n", None),
    ],
)
async def test_answers_that_make_no_sense_harm_nobody(answer: bytes, reason: str | None) -> None:
    redis = Scripted(lambda command: answer)
    with structlog.testing.capture_logs() as logs:
        async with redis.running() as url, store_at(url, probe_s=1e-6) as (store, watch), asyncio.timeout(WITHIN_S):
            for _ in range(FAILURES if reason else 1):
                assert await store.take("b", rate_per_s=1.0, burst=1.0, cost=1.0) is None
                store.put(KEY, b"v", 60.0)
                store.charge("b", rate_per_s=1.0, burst=1.0, cost=1.0)
                await store.written()
            while reason and "unreachable" not in watch.states:
                await store.take("b", rate_per_s=1.0, burst=1.0, cost=1.0)
                await asyncio.sleep(0)
    assert "take" in watch.errors
    assert [line["reason"] for line in logs if line["event"] == "store.unreachable"][:1] == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (b"*4\r\n$4\r\nrole\r\n$7\r\nreplica\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n", "replica"),
        (b"*4\r\n$4\r\nrole\r\n$6\r\nmaster\r\n$4\r\nmode\r\n$7\r\ncluster\r\n", "cluster"),
    ],
)
async def test_redis_that_cannot_serve_us_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, hello: bytes, reason: str
) -> None:
    monkeypatch.setitem(GREETING, b"HELLO", hello)
    with structlog.testing.capture_logs() as logs:
        async with Scripted(lambda command: None).running() as url, store_at(url) as (store, _):
            assert store.state() == "unreachable"
    assert logs[0]["reason"] == reason


async def test_server_that_drops_every_connection_is_tried_once_a_probe() -> None:
    connections: asyncio.Queue[None] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.put_nowait(None)
        await reader.read(1 << 16)
        writer.write(b"+PONG\r\n*0\r\n+sha\r\n")
        writer.close()

    clock = ManualClock()

    async def asleep() -> None:
        async with asyncio.timeout(WITHIN_S):
            while not clock.sleepers:  # noqa: ASYNC110
                await asyncio.sleep(0)  # the event loop has to get to it

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        url = f"redis://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with store_at(url, probe_s=1.0, clock=clock) as (_, watch):
            await watch.until("unreachable")
            await asleep()
            assert connections.qsize() <= 2 * FAILURES
            tried = connections.qsize()
            for probe in range(1, 4):
                clock.advance(1.0)
                await asleep()
                assert connections.qsize() <= tried + 2 * probe  # one for reads, and one for writes if that held


# -- addresses


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h:26379",
        "redis+sentinel://h:26379//1",
        "redis+sentinel://h:26379/mymaster/one",
        "redis+sentinel://h:99999/mymaster",
        "redis+sentinel://u:s3cret@h:1:2/mymaster",
        "redis+sentinel://h,,i/mymaster",
        "redis+sentinel://h/mymaster?pasword=s3cret",
        "redis+cluster://h/1",
        "redis+cluster://",
        "redis+cluster://h?sentinel_password=s3cret",
        "unix+cluster:///run/r.sock",
        "redis-cluster://h",
        "http://h",
        "h:6379",
        "redis://:s3cret#x@h",
        "redis://u:s3cret?x@h",
        "redis://u:s3cret/x@h",
        "redis://h:99999",
        "redis://h/one",
        "redis://h/1/2",
        "redis://h/-1",
        "redis://h?socket_timeout=1",
        "redis://h?pasword=s3cret",
        "redis://h?ssl_cert_reqs=none",
        "redis://h?db=x",
        "rediss://h?ssl_cert_reqs=maybe",
        "rediss://h?ssl_ca_certs=/does/not/exist",
        "rediss://h?ssl_strange=1",
        "unix://",
    ],
)
def test_address_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"^redis\.url: ") as caught:
        parse(url)
    assert "s3cret" not in str(caught.value)


def test_text_of_an_address_names_neither_user_nor_password() -> None:
    for url in ("redis+sentinel://u:s3cret@h/m?sentinel_password=s3cret", "rediss+cluster://u:s3cret@h,i"):
        address = parse(url)
        assert "s3cret" not in str(address) + repr(address)
    assert str(parse("redis+sentinel://u:s3cret@h:1,[::1]/mymaster/2")) == "redis+sentinel://h:1,[::1]:26379/mymaster/2"
    assert str(parse("rediss+cluster://u:s3cret@h:1,i")) == "rediss+cluster://h:1,i:6379"
    for url in ("redis://u:s3cret@h:1/2", "rediss://:s3cret@[::1]", "unix://u:s3cret@/run/r.sock?db=1", "redis://"):
        address = parse(url)
        assert "s3cret" not in str(address) + repr(address)
    assert str(parse("redis://u:s3cret@h:1/2")) == "redis://h:1/2"
    assert str(parse("rediss://:s3cret@[::1]")) == "rediss://[::1]:6379/0"
    assert str(parse("unix://u:s3cret@/run/r.sock?db=1")) == "unix:///run/r.sock?db=1"
