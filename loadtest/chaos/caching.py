"""Promises 22 to 28: a Redis that breaks, and a cache that tells no lie and nobody else's answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory

from loadtest.chaos.figure import Figure, promise
from loadtest.chaos.load import Load, Reply, ask, chat
from loadtest.chaos.stage import Stage, Theatre
from loadtest.chaos.store import StoreServer
from loadtest.clock import SystemClock

CACHED = {"enabled": True}


@asynccontextmanager
async def _with_redis(
    theatre: Theatre, *words: str, fail_open: bool = True
) -> AsyncIterator[tuple[Stage, StoreServer]]:
    """A stage whose cache and limits live in a Redis."""
    with TemporaryDirectory(prefix="chaos-redis-") as folder:
        store = StoreServer(theatre.port(), Path(folder), *words)
        await store.start()
        settings = {
            "redis": {"url": store.url},
            "cache": CACHED,
            "limits": {"requests_per_minute": 100_000, "fail_open": fail_open},
        }
        try:
            async with theatre.stage(settings=settings) as stage:
                yield stage, store
        finally:
            with contextlib.suppress(ProcessLookupError):
                store.go_on()
            await store.end()


def _added_ms(replies: Sequence[Reply], before: Sequence[Reply]) -> float:
    """What the P99 of whole unary times grew by, in milliseconds."""

    def p99(some: Sequence[Reply]) -> float:
        return quantiles([reply.seconds for reply in some if not reply.stream], n=100)[98]

    return 1000.0 * (p99(replies) - p99(before))


async def _store_trouble(theatre: Theatre, trouble: str) -> Sequence[Figure]:
    words = ("--maxmemory", "2mb", "--maxmemory-policy", "noeviction") if trouble == "full" else ()
    async with _with_redis(theatre, *words) as (stage, store):
        load = Load(stage)
        clock = SystemClock()
        async with load:
            await load.run(3.0)
            happened_s = clock.now()
            if trouble == "frozen":
                store.stop()
            elif trouble == "killed":
                await store.kill()
            elif trouble == "full":
                with contextlib.suppress(Exception):
                    for number in range(200):
                        await store.client.set(f"filler:{number}", b"x" * 50_000)
            else:
                async for key in store.client.scan_iter("balancer:v1:*"):
                    await store.client.set(key, b"\x00soil")
            await load.run(5.0)
            back_s = clock.now()
            if trouble == "frozen":
                store.go_on()
            elif trouble == "killed":
                await store.start()
            elif trouble == "full":
                await store.client.flushall()

            async def used() -> bool:
                asked = chat(f"used again {clock.now()}", max_tokens=1)
                await ask(stage, asked)
                return (await ask(stage, asked)).headers.get("X-Balancer-Cache") == "hit"

            again_s = await stage.until(used) if trouble in ("frozen", "killed") else 0.0
            await load.end()
        before = [reply for reply in load.replies if reply.sent_s < happened_s - 0.5]
        after = [reply for reply in load.replies if happened_s + 1.0 <= reply.sent_s < back_s]
        return (
            Figure(name="requests that failed", value=load.failed(), bound=0),
            Figure(name="lies", value=load.lies(), bound=0),
            Figure(name="added at P99 after the first second", value=_added_ms(after, before), bound=50, unit=" ms"),
            Figure(name="in use again after", value=again_s, bound=5.0, unit=" s"),
        )


@promise(22, "Redis frozen (SIGSTOP) under load, then running again")
async def redis_frozen(theatre: Theatre) -> Sequence[Figure]:
    return await _store_trouble(theatre, "frozen")


@promise(22, "Redis killed under load, then started again")
async def redis_killed(theatre: Theatre) -> Sequence[Figure]:
    return await _store_trouble(theatre, "killed")


@promise(22, "Redis full, refusing every write")
async def redis_full(theatre: Theatre) -> Sequence[Figure]:
    return await _store_trouble(theatre, "full")


@promise(22, "every value in Redis overwritten with rubbish")
async def redis_soiled(theatre: Theatre) -> Sequence[Figure]:
    return await _store_trouble(theatre, "soiled")


@promise(23, "rate limits with Redis killed: open, then closed")
async def limits_without_redis(theatre: Theatre) -> Sequence[Figure]:
    served, unchecked = [], 0.0
    for fail_open in (True, False):
        async with _with_redis(theatre, fail_open=fail_open) as (stage, store):
            assert (await ask(stage, chat("warm"))).whole
            await store.kill()
            replies = [await ask(stage, chat(f"question {number}")) for number in range(10)]
            served.append(sum(reply.whole for reply in replies))
            unchecked += await stage.metric("balancer_limits_unchecked_total")
            unchecked += await stage.metric("balancer_shed_total", reason="limits_unavailable")
    return (
        Figure(name="of 10 served, failing open", value=served[0], bound=10, least=True),
        Figure(name="of 10 served, failing closed", value=served[1], bound=0),
        Figure(name="checks that a metric says were not made", value=unchecked, bound=20, least=True),
    )


@promise(24, "requests that differ in one field, header or tenant", quick=True)
async def keys_differ(theatre: Theatre) -> Sequence[Figure]:
    base = chat("the same question")
    others = (
        chat("the same question "),
        chat("the same question", max_tokens=25),
        chat("the same question", temperature=0.0),
        chat("the same question", seed=1),
        chat("the same question", unknown_field=1),
        chat("the same question", unknown_field=True),
        chat("the same question", unknown_field=1.0),
        chat("the same question", stop=["x"]),
    )
    async with theatre.stage(1, settings={"cache": CACHED}) as stage:
        await ask(stage, base)
        again = await ask(stage, dict(reversed(base.items())))
        shared = [await ask(stage, other) for other in others]
        query = await ask(stage, base, path="/v1/chat/completions?a=1")
        header = await ask(stage, base, headers={"openai-organization": "x"})
        hits = [reply.headers["X-Balancer-Cache"] == "hit" for reply in (*shared, query, header)]
        return (
            Figure(name="of 10: served another's answer", value=sum(hits), bound=0),
            Figure(
                name="the same in another order is a hit",
                value=again.headers["X-Balancer-Cache"] == "hit",
                bound=1,
                least=True,
            ),
        )


@promise(25, "answers that break, lie or fail, asked for again once mended", quick=True)
async def only_whole(theatre: Theatre) -> Sequence[Figure]:
    faults: Sequence[dict[str, object]] = (
        {"kind": "truncated", "size_bytes": 10},
        {"kind": "cut", "after_events": 4},
        {"kind": "reset", "after_events": 4},
        {"kind": "no_done"},
        {"kind": "no_finish"},
        {"kind": "bad_event", "after_events": 2},
        {"kind": "error_event", "after_events": 2},
        {"kind": "error_body"},
        {"kind": "status", "status": 500},
    )
    settings = {"cache": CACHED, "retry": {"max_attempts": 1}, "breaker": {"consecutive_failures": 1000}}
    async with theatre.stage(1, settings=settings) as stage:
        node, stored, broken = stage.nodes[0], 0, 0
        for number, fault in enumerate(faults):
            for stream in (False, True):
                body = chat(f"question {number}", stream=stream)
                await node.fault(**fault)  # type: ignore[arg-type]
                bad = not (await ask(stage, body)).whole
                await node.mend()
                again = await ask(stage, body)
                stored += bad and again.headers.get("X-Balancer-Cache") == "hit"
                broken += not again.whole
        return (
            Figure(name="bad answers that were stored", value=stored, bound=0),
            Figure(name="of 18: not whole the second time", value=broken, bound=0),
        )


@promise(26, "50 equal requests at once; then half of their clients leave")
async def coalesced(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(2, settings={"cache": CACHED}) as stage:
        replies = await asyncio.gather(*(ask(stage, chat("the one question", max_tokens=100)) for _ in range(50)))
        calls = sum([(await node.state())["requests"] for node in stage.nodes])
        asking = [asyncio.create_task(ask(stage, chat("another", max_tokens=200, stream=True))) for _ in range(20)]

        async def begun() -> bool:
            return any([(await node.state())["in_flight"] for node in stage.nodes])

        await stage.until(begun)
        for leaving in asking[:10]:
            leaving.cancel()
        stayed = await asyncio.gather(*asking[10:])
        more = sum([(await node.state())["requests"] for node in stage.nodes]) - calls
        asking = [asyncio.create_task(ask(stage, chat("a third", max_tokens=400))) for _ in range(10)]
        await stage.until(begun)
        for leaving in asking:
            leaving.cancel()

        async def quiet() -> bool:
            return not await begun()

        quiet_s = await stage.until(quiet)
        return (
            Figure(name="upstream calls for 50", value=calls, bound=1),
            Figure(name="answered well", value=sum(reply.whole for reply in replies), bound=50, least=True),
            Figure(name="upstream calls for 20 of which 10 left", value=more, bound=1),
            Figure(
                name="of the 10 that stayed, answered well", value=sum(r.whole for r in stayed), bound=10, least=True
            ),
            Figure(name="cancelled after its last client left", value=quiet_s, bound=0.1, unit=" s"),
        )


@promise(27, "what stands in Redis after traffic with keys")
async def in_redis(theatre: Theatre) -> Sequence[Figure]:
    async with _with_redis(theatre) as (stage, store):
        secret = {"Authorization": "Bearer sk-secret-key"}
        for number in range(20):
            await ask(stage, chat(f"a private question {number}", stream=number % 2 == 1), headers=secret)
        clock = SystemClock()
        await clock.sleep(0.3)
        forever = told = count = 0
        async for key in store.client.scan_iter("*"):
            count += 1
            forever += await store.client.pttl(key) < 0
            value = await store.client.get(key) if await store.client.type(key) == b"string" else b""
            told += b"sk-secret" in key + (value or b"") or b"a private question" in key + (value or b"")
        return (
            Figure(name="keys", value=count, bound=20, least=True),
            Figure(name="keys without an expiry", value=forever, bound=0),
            Figure(name="keys or values with a secret or a prompt", value=told, bound=0),
        )
