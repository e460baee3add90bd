"""Where things are kept, and what balancers share: in this process, or in the Redis that `redis.url` names.

What needs a Redis is imported where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from balancer.cache import ResponseCache
from balancer.clock import Clock
from balancer.core.cache_entry import OVERHEAD_BYTES
from balancer.core.routing import Routing
from balancer.meeting import Meeting
from balancer.metrics import Metrics
from balancer.registry import Registry
from balancer.settings import Settings
from balancer.store import Store
from balancer.store.memory import MemoryStore
from balancer.verdicts import Verdicts

if TYPE_CHECKING:
    from balancer.gossip import Gossip
    from balancer.sharing import Sharing
    from balancer.store.address import Address, Sentinels
    from balancer.store.cluster import ClusterStore
    from balancer.store.redis import RedisStore

# In this process, beside the answers: buckets of rate limits, and what else is kept without a Redis.
FALLBACK_BYTES = 16 * 1024 * 1024
# Of `cache.memory_bytes`, beside it, for vectors of single inputs where there is no Redis.
VECTORS_SHARE = 0.25


def in_process(clock: Clock) -> MemoryStore:
    """What is kept where there is no Redis, and while it is away."""
    return MemoryStore(max_bytes=FALLBACK_BYTES, clock=clock)


def open_store(
    settings: Settings, memory: MemoryStore, metrics: Metrics, clock: Clock
) -> MemoryStore | RedisStore | ClusterStore:
    """The store that balancers share; without a Redis it is `memory`."""
    if settings.redis.url is None:
        return memory
    from balancer.store.address import Cluster, parse
    from balancer.store.cluster import ClusterStore
    from balancer.store.redis import RedisStore

    def open_one(address: Address | Sentinels, on_moved: Callable[[], None] | None = None) -> RedisStore:
        return RedisStore(
            address,
            timeout_s=settings.redis.timeout_s,
            clock=clock,
            on_error=lambda op: metrics.store_errors.of(op).inc(),
            on_moved=on_moved,
            max_value_bytes=settings.cache.max_entry_bytes + OVERHEAD_BYTES,
        )

    where = parse(settings.redis.url)
    if isinstance(where, Cluster):
        return ClusterStore(where, open_shard=open_one, clock=clock)
    return open_one(where)


def for_vectors(settings: Settings, store: Store, clock: Clock) -> Store:
    """Where vectors of single inputs are kept: not among the rate limits' buckets, which they would push out."""
    if not isinstance(store, MemoryStore):
        return store
    return MemoryStore(max_bytes=int(VECTORS_SHARE * settings.cache.memory_bytes), clock=clock)


def open_meeting(settings: Settings, store: Store, cache: ResponseCache, clock: Clock) -> Meeting | None:
    """Where calls are shared with other balancers; there has to be a Redis that they share, and no Cluster."""
    if settings.redis.url is None:
        return None
    from balancer.store.address import Cluster, parse
    from balancer.store.flights import Board
    from balancer.store.redis import RedisStore

    where = parse(settings.redis.url)
    if isinstance(where, Cluster) or not isinstance(store, RedisStore):
        return None
    return Meeting(Board(store, where, clock), cache, clock)


def open_neighbours(
    settings: Settings,
    *,
    registry: Registry,
    routing: Callable[[], Routing],
    cache: ResponseCache,
    verdicts: Verdicts,
    metrics: Metrics,
    clock: Clock,
    rng: Random,
) -> Sequence[Gossip | Sharing]:
    """What balancers tell each other needs a Redis between them. `routing` gives the one in force."""
    if settings.redis.url is None:
        return ()
    from balancer.gossip import Gossip
    from balancer.sharing import Sharing
    from balancer.store.channel import Channel, client_of

    channel = Channel(
        partial(client_of, settings.redis.url),
        clock=clock,
        rng=rng,
        on_event=lambda topic, what: metrics.channel_messages.of(topic, what).inc(),
    )
    gossip = Gossip(channel, cache, verdicts)
    if not settings.routing.share_interval_s:
        return (gossip,)
    interval_s = settings.routing.share_interval_s
    sharing = Sharing(channel, registry, routing, metrics, interval_s=interval_s, clock=clock, rng=rng)
    return gossip, sharing
