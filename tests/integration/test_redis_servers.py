"""More than one Redis: a master that Sentinels name, and a Cluster; with real servers that fail over and move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs

from balancer.clock import SystemClock
from balancer.core.cache_key import answer_name
from balancer.metrics import Metrics
from balancer.store import Store
from balancer.store.address import Address, Cluster, Sentinels, parse
from balancer.store.cluster import ClusterStore
from balancer.store.redis import RedisStore
from balancer.store.watch import StoreWatch
from loadtest.fake_node import FakeNode
from tests.client import chat, client_of, fleet
from tests.fakes import ManualClock
from tests.harness import running
from tests.redis_server import RedisServer, Sentinel, new_server, redis_server

__all__ = ["redis_server"]  # a fixture is found by its name

pytestmark = pytest.mark.real("redis")

PATIENT_S = 5.0
WITHIN_S = 30.0


async def until(condition: Callable[[], Any]) -> None:
    """Until `condition` holds: other processes have to come to it."""
    async with asyncio.timeout(WITHIN_S):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def until_used(store: Store, keys: list[str]) -> None:
    """Until every one of these names keeps what it is given."""
    async with asyncio.timeout(WITHIN_S):
        for key in keys:
            while await store.get(key) != b"kept":
                store.put(key, b"kept", 60.0)
                await asyncio.sleep(0.01)


def names(count: int) -> list[str]:
    return [answer_name("t", "m", f"digest-{number}") for number in range(count)]


# -- addresses


def test_sentinels_are_read_from_a_url() -> None:
    found = parse("redis+sentinel://u:p%2F@h:1,i/main/2?sentinel_username=s&sentinel_password=t")
    assert isinstance(found, Sentinels)
    assert (found.service, found.master.db, found.master.username, found.master.password) == ("main", 2, "u", "p/")
    assert [sentinel.server for sentinel in found.sentinels] == ["h:1", "i:26379"]
    assert {(sentinel.username, sentinel.password) for sentinel in found.sentinels} == {("s", "t")}


def test_a_cluster_is_read_from_a_url_and_may_use_tls() -> None:
    found = parse("rediss+cluster://u:p@h:1,[::1]:2?ssl_cert_reqs=none")
    assert isinstance(found, Cluster)
    assert [seed.server for seed in found.seeds] == ["h:1", "[::1]:2"]
    assert all(seed.tls is not None and seed.password == "p" for seed in found.seeds)
    plain = parse("redis+cluster://h")
    assert isinstance(plain, Cluster)
    assert plain.seeds == (Address(host="h"),)


# -- Sentinel


@pytest.fixture
def pair() -> Iterator[tuple[RedisServer, RedisServer, Sentinel]]:
    """A master, its replica, and a Sentinel that knows both."""
    with ExitStack() as stack:
        master = stack.enter_context(new_server("--repl-diskless-sync-delay", "0"))
        replica = stack.enter_context(new_server("--replicaof", "127.0.0.1", str(master.port)))
        try:
            sentinel = stack.enter_context(Sentinel("mymaster", master))
        except OSError as error:
            pytest.skip(f"this server is no Sentinel: {error}")
        yield master, replica, sentinel


def role_of(server: RedisServer) -> str:
    with server.client() as client:
        return str(client.info("replication")["role"])


def replicas_known(sentinel: Sentinel) -> int:
    with sentinel.client() as client:
        return int(client.sentinel_master("mymaster")["num-slaves"])


def link_of(replica: RedisServer) -> str:
    with replica.client() as client:
        return str(client.info("replication")["master_link_status"])


async def test_the_store_follows_the_master_that_sentinels_name(
    pair: tuple[RedisServer, RedisServer, Sentinel],
) -> None:
    master, replica, sentinel = pair
    await until(lambda: link_of(replica) == "up" and replicas_known(sentinel) == 1)
    url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/mymaster/0"
    async with (
        FakeNode(instant=True) as node,
        running(
            *fleet(node),
            redis={"url": url, "timeout_s": 0.03},
            cache={"memory_bytes": 0},
            health={"interval_s": 1000.0},
        ) as balancer,
        client_of(balancer.url) as client,
    ):
        await until_used(balancer.app.store, names(1))
        with master.client() as inside:
            assert inside.get(names(1)[0]) == b"kept"
        master.kill()
        await until(lambda: role_of(replica) == "master")
        assert (await client.post(chat())).is_whole, "requests are served meanwhile"
        await until_used(balancer.app.store, ["balancer:v1:cache:t:m:{after}"])
        with replica.client() as inside:
            assert inside.get("balancer:v1:cache:t:m:{after}") == b"kept"
        found = None
        async with asyncio.timeout(WITHIN_S):
            while found is None:  # a Sentinel's list still has the old master until the failover is over
                with suppress(redis.RedisError):
                    async with parse(url).client(PATIENT_S, connections=2) as aside:
                        found = await aside.get("balancer:v1:cache:t:m:{after}")
                await asyncio.sleep(0.05)
        assert found == b"kept"


# -- Cluster


@pytest.fixture
def cluster() -> Iterator[list[RedisServer]]:
    """Three masters with a third of the slots each."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(new_server("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"))
            for _ in range(3)
        ]
        for number, server in enumerate(servers):
            with server.client() as client:
                try:
                    client.execute_command("CLUSTER", "ADDSLOTSRANGE", *bounds(number))
                except redis.ResponseError as error:
                    pytest.skip(f"this server makes no Cluster of itself: {error}")
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", str(servers[0].port))
        yield servers


def bounds(number: int) -> tuple[int, int]:
    return number * 16384 // 3, (number + 1) * 16384 // 3 - 1


def agrees(servers: list[RedisServer]) -> bool:
    for server in servers:
        with server.client() as client:
            if b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO") or len(_slots(client)) < 3:
                return False
    return True


def _slots(client: redis.Redis) -> list[Any]:
    found: list[Any] = client.execute_command("CLUSTER", "SLOTS")
    return found


@asynccontextmanager
async def cluster_store(servers: list[RedisServer]) -> AsyncIterator[tuple[ClusterStore, list[str]]]:
    """The store, and the errors that its shards met."""
    await until(lambda: agrees(servers))
    errors: list[str] = []
    where = parse(f"redis+cluster://127.0.0.1:1,127.0.0.1:{servers[0].port}")
    assert isinstance(where, Cluster)

    def open_shard(address: Address, on_moved: Callable[[], None]) -> RedisStore:
        return RedisStore(
            address,
            timeout_s=PATIENT_S,
            clock=SystemClock(),
            on_error=errors.append,
            on_moved=on_moved,
            probe_s=0.05,
        )

    store = ClusterStore(where, open_shard=open_shard, clock=SystemClock())
    await store.start()
    try:
        yield store, errors
    finally:
        await store.close()


async def test_a_cluster_keeps_each_name_where_it_belongs(cluster: list[RedisServer]) -> None:
    async with cluster_store(cluster) as (store, errors):
        assert store.state() == "ready"
        for name in names(60):
            store.put(name, name.encode(), 60.0)
        await store.written()
        assert [await store.get(name) for name in names(60)] == [name.encode() for name in names(60)]
        sizes = []
        for server in cluster:
            with server.client() as client:
                sizes.append(client.dbsize())
        assert sum(sizes) == 60
        assert min(sizes) > 0
        taken = await store.take("balancer:v1:limit:{t}", rate_per_s=1e-6, burst=2, cost=2)
        assert taken is not None
        assert taken.wait_s == 0.0
        refused = await store.take("balancer:v1:limit:{t}", rate_per_s=1e-6, burst=2, cost=1)
        assert refused is not None
        assert refused.wait_s > 0.0
        assert len(await store.facts()) == 3
        async with parse(f"redis+cluster://127.0.0.1:{cluster[0].port}").client(PATIENT_S) as aside:
            assert await aside.publish("balancer:v1:topic", b"x") == 0
        assert await store.delete(tenant="t", model=None, digest="digest-1") == 1
        assert await store.delete(tenant="t", model=None, digest=None) == 59
        assert errors == []


async def test_a_slot_that_moved_is_found_again(cluster: list[RedisServer]) -> None:
    async with cluster_store(cluster) as (store, errors):
        await until_used(store, names(40))
        with cluster[0].client() as one, cluster[1].client() as two:
            one.flushall()  # a slot with keys would have to be emptied first
            receiver = two.execute_command("CLUSTER", "MYID")
            first, last = bounds(0)
            for server in cluster:
                with server.client() as client:
                    moves = client.pipeline(transaction=False)
                    for slot in range(first, last + 1):
                        moves.execute_command("CLUSTER", "SETSLOT", str(slot), "NODE", receiver)
                    moves.execute()
        await until_used(store, names(40))
        assert "get" in errors or "put" in errors, "it was told that keys had moved"


async def test_a_master_that_is_away_costs_its_share_and_no_more(cluster: list[RedisServer]) -> None:
    async with cluster_store(cluster) as (store, _):
        await until_used(store, names(40))
        for server in cluster:  # the others serve on without it
            with server.client() as client:
                client.config_set("cluster-require-full-coverage", "no")
        cluster[2].kill()
        async with asyncio.timeout(WITHIN_S):
            while store.state() != "partial":
                await store.get(names(1)[0])
                for name in names(40):
                    await store.get(name)
                await asyncio.sleep(0.01)
        found = [await store.get(name) for name in names(40)]
        assert 0 < found.count(b"kept") < 40
        cluster[2].start()


async def test_a_balancer_serves_from_a_cluster(cluster: list[RedisServer]) -> None:
    await until(lambda: agrees(cluster))
    url = f"redis+cluster://127.0.0.1:{cluster[1].port}"
    async with (
        FakeNode(instant=True) as node,
        running(*fleet(node), redis={"url": url, "timeout_s": 0.03}, cache={"memory_bytes": 0}) as balancer,
        client_of(balancer.url) as client,
    ):
        async with asyncio.timeout(WITHIN_S):
            while (await client.post(chat("kept"))).headers["X-Balancer-Cache"] != "hit":  # noqa: ASYNC110
                await asyncio.sleep(0)


# -- what servers say of themselves


async def test_memory_and_policy_are_measured_and_noeviction_is_warned_of_once(redis_server: RedisServer) -> None:
    metrics, clock = Metrics(), ManualClock()
    store = RedisStore(redis_server.url, timeout_s=PATIENT_S, clock=SystemClock(), on_error=lambda _: None)
    await store.start()
    watch = StoreWatch(store, metrics, clock)
    server = f"127.0.0.1:{redis_server.port}"
    with capture_logs() as logs:
        await watch.look()
        await watch.look()
        with redis_server.client() as inside:
            inside.config_set("maxmemory", 100_000_000)
            inside.config_set("maxmemory-policy", "allkeys-lru")
        await watch.look()
    await store.close()
    (warning,) = [line for line in logs if line["event"] == "redis.never_evicts"]
    assert (warning["log_level"], warning["server"]) == ("warning", server)
    assert "allkeys-lru" in warning["advice"]
    assert dict(metrics.redis_max.read()) == {(server,): 100_000_000.0}
    assert dict(metrics.redis_policy.read()) == {(server, "allkeys-lru"): 1.0}
    assert dict(metrics.redis_used.read())[server,] > 100_000
    assert dict(metrics.redis_peak.read())[server,] >= dict(metrics.redis_used.read())[server,]
    assert dict(metrics.redis_evicted.children())[server,].value == 0.0


async def test_a_server_that_is_away_has_no_figures() -> None:
    metrics = Metrics()
    store = RedisStore("redis://127.0.0.1:1", timeout_s=0.02, clock=SystemClock(), on_error=lambda _: None)
    await store.start()
    await StoreWatch(store, metrics, ManualClock()).look()
    await store.close()
    assert list(metrics.redis_used.read()) == []
