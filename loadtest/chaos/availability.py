"""Promises 5 to 20: nodes that die, hang, lie, come and go; clients that leave; more work than there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from loadtest.chaos.figure import Figure, promise
from loadtest.chaos.load import Load, ask, chat
from loadtest.chaos.stage import SimNode, Theatre, wait_settled
from loadtest.clock import SystemClock

# Traffic before and after what happens, in seconds.
BEFORE_S, AFTER_S = 2.0, 5.0
# The balancer is told of nothing: no breaker that stays open, so that it is the retries that are tried.
NO_CACHE = {"cache": {"enabled": False}}

Hurt = Callable[[SimNode], Awaitable[None]]


async def _stopped(node: SimNode) -> None:
    node.stop()


async def _one_node(theatre: Theatre, hurt: Hurt) -> Sequence[Figure]:
    """Traffic; something happens to one node of four; traffic goes on."""
    async with theatre.stage() as stage:
        victim = stage.nodes[0]
        load = Load(stage)
        async with load:
            await load.run(BEFORE_S)
            happened_s = load.now()
            await hurt(victim)
            await load.run(AFTER_S)
            await load.end()
        return (
            Figure(name="failed unary requests", value=load.failed(stream=False), bound=0),
            Figure(
                name="failed streams that began after it",
                value=load.failed(stream=True, since_s=happened_s + 0.01),
                bound=0,
            ),
            Figure(name="lies", value=load.lies(), bound=0),
        )


@promise(5, "one node of four killed (SIGKILL) under load", quick=True)
async def killed(theatre: Theatre) -> Sequence[Figure]:
    return await _one_node(theatre, lambda node: node.kill())


@promise(5, "one node hung, its health check green")
async def hung_green(theatre: Theatre) -> Sequence[Figure]:
    return await _one_node(theatre, lambda node: node.set(frozen=True))


@promise(5, "one node hung as a whole (SIGSTOP)")
async def hung_whole(theatre: Theatre) -> Sequence[Figure]:
    return await _one_node(theatre, _stopped)


@promise(5, "one node resets every connection")
async def resetting(theatre: Theatre) -> Sequence[Figure]:
    return await _one_node(theatre, lambda node: node.fault("reset"))


@promise(5, "one node answers 500 to everything")
async def failing(theatre: Theatre) -> Sequence[Figure]:
    return await _one_node(theatre, lambda node: node.fault("status", status=500))


@promise(6, "three of four nodes killed at once", quick=True)
async def three_killed(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        load = Load(stage)
        async with load:
            await load.run(BEFORE_S)
            happened_s = load.now()
            await asyncio.gather(*(node.kill() for node in stage.nodes[:3]))
            await load.run(AFTER_S)
            await load.end()
        return (
            Figure(name="failed unary requests", value=load.failed(stream=False), bound=0),
            Figure(
                name="failed streams that began after it",
                value=load.failed(stream=True, since_s=happened_s + 0.01),
                bound=0,
            ),
        )


@promise(6, "started with three of four nodes dead")
async def started_with_dead(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(up=(False, False, False, True), wait=False) as stage:
        clock = SystemClock()
        begun_s = clock.now()

        async def serves() -> bool:
            return (await ask(stage, chat("are you there"))).whole

        await stage.until(serves)
        ready_s = clock.now() - begun_s
        load = Load(stage)
        async with load:
            await load.run(AFTER_S)
            await load.end()
        return (
            Figure(name="first answer after the start", value=ready_s, bound=2.0, unit=" s"),
            Figure(name="failed requests after that", value=load.failed(), bound=0),
        )


@promise(7, "every node answers 500 to 30 % of requests at random")
async def thirty_percent(theatre: Theatre) -> Sequence[Figure]:
    return await _random_errors(theatre, 0.3, 0.95)


@promise(7, "every node answers 500 to 50 % of requests at random")
async def fifty_percent(theatre: Theatre) -> Sequence[Figure]:
    return await _random_errors(theatre, 0.5, 0.65)


async def _random_errors(theatre: Theatre, share: float, least: float) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        for node in stage.nodes:
            await node.fault("status", status=500, probability=share)
        load = Load(stage)
        fewest = len(stage.nodes)
        async with load:
            for _ in range(16):
                await load.run(0.5)
                told = await stage.get("/admin/nodes")
                fewest = min(fewest, sum(node["eligible"] is not None for node in told["nodes"]))
            await load.end()
        reached = [len(await node.requests()) for node in stage.nodes]
        return (
            Figure(name="share that succeeded", value=load.good_share(), bound=least, least=True),
            Figure(name="upstream requests per request", value=sum(reached) / load.sent, bound=1.5),
            Figure(name="fewest nodes eligible", value=fewest, bound=2, least=True),
        )


@promise(8, "a prompt that kills every node that reads it, among good ones", quick=True)
async def poison(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        for node in stage.nodes:
            await node.fault("die", body_has="poison")
        load = Load(stage)
        async with load:
            await load.run(BEFORE_S)
            first = await ask(stage, chat("a poison"))
            happened_s = load.now()
            again = [await ask(stage, chat("a poison")) for _ in range(3)]
            await load.run(BEFORE_S)
            await load.end()
        states = [await node.state() for node in stage.nodes]
        return (
            Figure(name="nodes it killed, sent four times", value=sum(not s["listening"] for s in states), bound=2),
            Figure(name="good unary requests lost", value=load.failed(stream=False), bound=0),
            Figure(
                name="good streams lost that began after", value=load.failed(stream=True, since_s=happened_s), bound=0
            ),
            Figure(
                name="refused with the stored verdict",
                value=sum(reply.code == "upstream_bad_answer" and reply.status == 502 for reply in again),
                bound=3,
                least=True,
            ),
            Figure(name="poison answered as if good", value=first.whole, bound=0),
        )


@promise(8, "a prompt that hangs every engine that reads it, among good ones")
async def hanging_prompt(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        for node in stage.nodes:
            await node.fault("freeze", body_has="poison")
        load = Load(stage, body=lambda number: chat(f"question {number}"))
        async with load:
            await load.run(BEFORE_S)
            await ask(stage, chat("a poison"))
            again = await ask(stage, chat("a poison"))
            await load.end()
        states = [await node.state() for node in stage.nodes]
        return (
            Figure(name="nodes it hung, sent twice", value=sum(s["frozen"] for s in states), bound=2),
            Figure(name="good unary requests lost", value=load.failed(), bound=0),
            Figure(name="refused the second time", value=again.status == 502, bound=1, least=True),
        )


@promise(9, "a node that answers 404 to everything")
async def not_found(theatre: Theatre) -> Sequence[Figure]:
    return await _draws(theatre, lambda node: node.fault("status", status=404), 0.01, 0.0)


@promise(9, "the requests' own 400s and clients that leave, half of all traffic")
async def own_faults(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        for node in stage.nodes:
            await node.fault("status", status=400, body_has="malformed")
        load = Load(stage, body=lambda number: chat(f"{'malformed' if number % 2 else 'good'} {number}"))
        async with load:
            await load.run(AFTER_S)
            await load.end()
        told = await stage.get("/admin/nodes")
        good = [reply for reply in load.replies if "good" in str(reply.body)]
        return (
            Figure(
                name="nodes with a breaker not closed",
                value=sum(n["breaker"] != "closed" for n in told["nodes"]),
                bound=0,
            ),
            Figure(name="good requests that failed", value=sum(not reply.whole for reply in good), bound=0),
        )


@promise(9, "a node that answers 401 to everything")
async def misconfigured(theatre: Theatre) -> Sequence[Figure]:
    return await _draws(theatre, lambda node: node.fault("status", status=401), 0.01, 0.0)


@promise(9, "a node that breaks every stream in the middle")
async def breaks_streams(theatre: Theatre) -> Sequence[Figure]:
    return await _draws(theatre, lambda node: node.fault("reset", after_events=4), 0.05, 3.0, stream=True)


@promise(13, "a node ten times slower than the others")
async def ten_times_slower(theatre: Theatre) -> Sequence[Figure]:
    return await _draws(theatre, lambda node: node.set(speed=0.1), 0.05, 3.0)


@promise(13, "a black hole: a node that fails everything at once")
async def black_hole(theatre: Theatre) -> Sequence[Figure]:
    return await _draws(theatre, lambda node: node.fault("status", status=500), 0.01, 0.0)


async def _draws(
    theatre: Theatre, hurt: Hurt, most: float, after_s: float, *, stream: bool = False
) -> Sequence[Figure]:
    """The share of attempts that a bad node gets, counted from `after_s` on for 12 s."""
    async with theatre.stage() as stage:
        bad = stage.nodes[0]
        load = Load(stage, body=(lambda number: chat(f"question {number}", stream=True)) if stream else None)
        async with load:
            await load.run(BEFORE_S)
            await hurt(bad)
            await load.run(after_s)
            before = [len(await node.requests()) for node in stage.nodes]
            await load.run(12.0)
            after = [len(await node.requests()) for node in stage.nodes]
            await load.end()
        got = [late - early for early, late in zip(before, after, strict=True)]
        return (Figure(name="its share of attempts", value=got[0] / max(1, sum(got)), bound=most),)


@promise(10, "every node fails everything")
async def all_fail(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        for node in stage.nodes:
            await node.fault("status", status=500)
        # More than the ten retries a second that are free, so that the share shows.
        load = Load(stage, rate_per_s=100.0)
        async with load:
            await load.run(15.0)
            await load.end()
        reached = sum([len(await node.requests()) for node in stage.nodes])
        return (Figure(name="upstream requests per request", value=reached / load.sent, bound=1.3),)


@promise(11, "every node answers 429 with Retry-After 7", quick=True)
async def all_busy(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        for number, node in enumerate(stage.nodes):
            await node.fault("status", status=429, retry_after_s=7 + number)
        replies = [await ask(stage, chat(f"question {number}")) for number in range(10)]
        reached = [len(await node.requests()) for node in stage.nodes]
        return (
            Figure(
                name="answers that are 429", value=sum(reply.status == 429 for reply in replies), bound=10, least=True
            ),
            Figure(
                name="largest Retry-After told",
                value=max(int(reply.headers.get("Retry-After", "99")) for reply in replies),
                bound=7,
                unit=" s",
            ),
            Figure(name="requests a node got while it rests", value=max(reached), bound=1),
        )


@promise(12, "a node that was down comes back")
async def comes_back(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        node = stage.nodes[0]
        load = Load(stage)
        async with load:
            await load.run(BEFORE_S)
            await node.die()
            await stage.until(partial(stage.knows, node.id, "down"))
            await load.run(1.0)
            before = len(await node.requests())
            sent = load.sent
            await node.come_back()
            await stage.until(partial(stage.knows, node.id, "ready"))
            back_s = load.now()
            await load.run(0.5)
            first_half = [reply for reply in load.replies if back_s <= reply.sent_s < back_s + 0.5]
            await load.run(6.0)
            await load.end()
        share = sum(reply.node == node.id for reply in first_half) / max(1, len(first_half))
        got = len(await node.requests()) - before
        return (
            Figure(name="its share in the first half second", value=share, bound=0.25),
            Figure(name="requests that failed", value=load.failed(), bound=0),
            Figure(name="its share in the 6 s after", value=got / max(1, load.sent - sent), bound=0.1, least=True),
        )


@promise(14, "all nodes refuse, then are back", quick=True)
async def all_refuse(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        assert (await ask(stage, chat("warm"))).whole
        for node in stage.nodes:
            await node.die()
        replies = [await ask(stage, chat(f"question {number}")) for number in range(20)]
        addresses = sum("127.0.0.1" in str(dict(reply.headers)) for reply in replies)
        clock = SystemClock()
        for node in stage.nodes:
            await node.come_back()
        begun_s = clock.now()
        first_s, row = float("inf"), 0
        while row < 20 and clock.now() - begun_s < 10.0:
            reply = await ask(stage, chat(f"again {clock.now()}", max_tokens=1))
            row = row + 1 if reply.whole else 0
            if reply.whole and first_s == float("inf"):
                first_s = clock.now() - begun_s
        return (
            Figure(
                name="503 no_eligible_node with Retry-After",
                value=sum(
                    (reply.status, reply.code) == (503, "no_eligible_node") and "Retry-After" in reply.headers
                    for reply in replies
                ),
                bound=20,
                least=True,
            ),
            Figure(
                name="slowest of these refusals", value=max(r.seconds for r in replies) * 1000, bound=50, unit=" ms"
            ),
            Figure(name="inside addresses told", value=addresses, bound=0),
            Figure(name="first success after they are back", value=first_s, bound=1.0, unit=" s"),
            Figure(name="twenty in a row", value=clock.now() - begun_s, bound=2.0, unit=" s"),
        )


@promise(15, "a caller's deadline of 0.5 s, all nodes slow or hung")
async def deadline(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        for node in stage.nodes:
            await node.set(frozen=True)
        headers = {"X-Balancer-Timeout-S": "0.5"}
        asked = [ask(stage, chat(f"question {number}", stream=number % 2 == 1), headers=headers) for number in range(8)]
        replies = await asyncio.gather(*asked)
        return (
            Figure(name="latest answer", value=max(reply.seconds for reply in replies), bound=0.75, unit=" s"),
            Figure(
                name="told as deadline_exceeded",
                value=sum(reply.code == "deadline_exceeded" for reply in replies),
                bound=8,
                least=True,
            ),
        )


@promise(16, "clients leave: unary, stream, before the first token", quick=True)
async def clients_leave(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(1, options=[("--itl-s", "0.2", "--ttft-s-per-token", "0.02")]) as stage:
        slowest_ms = 0.0
        for body, begun in (
            (chat("unary"), False),
            (chat("stream", stream=True), True),
            (chat("s", stream=True), False),
        ):
            node = stage.nodes[0]
            asking = asyncio.create_task(ask(stage, body))
            already = (await node.state())["cancelled"]

            async def at_node(begun: bool = begun, node: SimNode = node) -> bool:
                state = await node.state()
                told = (await node.requests())[-1:] if begun else []
                return state["in_flight"] == 1 and (not begun or bool(told and told[0]["events_sent"]))

            await stage.until(at_node)
            asking.cancel()

            async def felt(already: int = already, node: SimNode = node) -> bool:
                return bool((await node.state())["cancelled"] > already)

            slowest_ms = max(slowest_ms, 1000.0 * await stage.until(felt))
        await wait_settled(stage)
        return (Figure(name="felt at the node after", value=slowest_ms, bound=100, unit=" ms"),)


@promise(19, "SIGTERM under load, then a start")
async def terminated(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        load = Load(stage)
        clock = SystemClock()
        async with load:
            await load.run(BEFORE_S)
            asked_s = load.now()
            await stage.balancer.end()
            await load.end()
        lost = [reply for reply in load.replies if reply.sent_s < asked_s and not reply.whole]
        again_s = clock.now()
        await stage.balancer.start()

        async def serves() -> bool:
            return (await ask(stage, chat("are you there", max_tokens=1))).whole

        await stage.until(serves)
        return (
            Figure(name="lost of what came before it", value=len(lost), bound=0),
            Figure(name="restart to first answer", value=clock.now() - again_s, bound=1.0, unit=" s"),
        )


@promise(20, "a node is added and another removed under load")
async def comes_and_goes(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage() as stage:
        new = theatre.node("new")
        await new.start()
        try:
            load = Load(stage)
            async with load:
                await load.run(BEFORE_S)
                await stage.put_node("new", new.url)

                async def used() -> bool:
                    return bool((await new.state())["requests"])

                used_s = await stage.until(used)
                await stage.remove_node("a")
                await load.run(BEFORE_S)
                await load.end()
        finally:
            await new.kill()
        return (
            Figure(name="the new one is used after", value=used_s, bound=0.5, unit=" s"),
            Figure(name="requests that failed", value=load.failed(), bound=0),
        )
