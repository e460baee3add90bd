"""Promises 29 to 35: framing, headers, paths, slow and large senders, keys, limits."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import orjson

from loadtest.chaos.figure import Figure, promise
from loadtest.chaos.load import ask, chat
from loadtest.chaos.stage import Stage, Theatre
from loadtest.chaos.wire import post, wire
from loadtest.clock import SystemClock

BODY = orjson.dumps(chat("hello"))
SIZE = b"Content-Length: %d\r\n" % len(BODY)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
# RFC 9112 allows none of these; each is a way to make two servers see two different requests.
BAD_FRAMING: Sequence[bytes] = (
    HEAD + SIZE + b"Transfer-Encoding: chunked\r\n\r\n" + BODY,
    HEAD + SIZE + b"Content-Length: 1\r\n\r\n" + BODY,
    HEAD + b"Content-Length: +5\r\n\r\nabcde",
    HEAD + b"Content-Length: 5, 6\r\n\r\nabcde",
    HEAD + b"Content-Length: 0x5\r\n\r\nabcde",
    HEAD + b"Content-Length : 5\r\n\r\nabcde",
    HEAD + b"X-A: b\r\n folded: c\r\n" + SIZE + b"\r\n" + BODY,
    HEAD + b"X-A: b\0c\r\n" + SIZE + b"\r\n" + BODY,
    HEAD.replace(b"\r\n", b"\n") + SIZE.replace(b"\r\n", b"\n") + b"\n" + BODY,
    HEAD + b"X-A: b\rc\r\n" + SIZE + b"\r\n" + BODY,
    HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdeXX0\r\n\r\n",
)


async def _reached(stage: Stage) -> int:
    return sum([(await node.state())["requests"] for node in stage.nodes])


@promise(29, "requests whose framing RFC 9112 forbids", quick=True)
async def framing(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(1) as stage:
        accepted = 0
        for data in BAD_FRAMING:
            async with wire(stage) as connection:
                await connection.send(data)
                accepted += await connection.status() == 200
        return (
            Figure(name="of 14: answered as if good", value=accepted, bound=0),
            Figure(name="reached a node", value=await _reached(stage), bound=0),
        )


@promise(30, "headers that must not pass, both ways", quick=True)
async def headers(theatre: Theatre) -> Sequence[Figure]:
    sent = {
        "Authorization": "Bearer secret",
        "Cookie": "a=b",
        "X-Forwarded-For": "1.2.3.4",
        "Connection": "X-Custom, keep-alive",
        "X-Custom": "1",
        "Proxy-Authorization": "Basic x",
        "TE": "trailers",
        "X-Internal": "1",
    }
    async with theatre.stage(1) as stage:
        reply = await ask(stage, chat("hello"), headers=sent)
        (request,) = await stage.nodes[0].requests()
        passed = {name.lower() for name, _ in request["headers"]} & {
            name.lower() for name in sent if name != "Connection"
        }
        returned = {name.lower() for name in reply.headers} & {"set-cookie", "server", "connection", "keep-alive"}
        return (
            Figure(name="of 7: reached the node", value=len(passed), bound=0),
            Figure(name="node's own that reached the client", value=len(returned), bound=0),
        )


@promise(31, "other paths, methods and targets", quick=True)
async def paths(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(1) as stage:
        tried = 0
        for method in (b"GET", b"PUT", b"DELETE", b"CONNECT", b"TRACE", b"POST"):
            for target in (
                b"/sim/die",
                b"/v1/../sim/die",
                b"/v1/chat%2fcompletions",
                b"//v1/chat/completions",
                b"/metrics",
            ):
                async with wire(stage) as connection:
                    await connection.send(b"%b %b HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % (method, target))
                    tried += await connection.status() == 200
        async with wire(stage) as connection:
            await connection.send(
                b"POST http://127.0.0.1:9/v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + SIZE + b"\r\n" + BODY
            )
            tried += await connection.status() == 200
        return (
            Figure(name="of 31: answered with 200", value=tried, bound=0),
            Figure(name="reached a node", value=await _reached(stage), bound=0),
        )


@promise(32, "slow heads, pausing bodies, heads without end")
async def slow_senders(theatre: Theatre) -> Sequence[Figure]:
    limits = {"limits": {"head_timeout_s": 1.0, "body_idle_s": 1.0}}
    async with theatre.stage(1, settings=limits) as stage:
        statuses = []
        async with wire(stage) as connection:
            await connection.send(HEAD)
            statuses.append(await connection.status() == 408)
        async with wire(stage) as connection:
            await connection.send(HEAD + b"Content-Length: 1000\r\n\r\n{")
            statuses.append(await connection.status() == 408)
        async with wire(stage) as connection:
            await connection.send(HEAD + b"X: " + b"y" * 70_000 + b"\r\n\r\n")
            statuses.append(await connection.status() == 431)
        return (
            Figure(name="of 3: told 408, 408, 431", value=sum(statuses), bound=3, least=True),
            Figure(name="reached a node", value=await _reached(stage), bound=0),
        )


@promise(33, "bodies made to break parsers", quick=True)
async def bodies(theatre: Theatre) -> Sequence[Figure]:
    model = b'"model":"sim-model"'
    cruel = (
        b"",
        b"[]",
        b"null",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{%b,"n":%b}' % (model, b"9" * 100_000),
        b'{%b,"x":"\\ud800"}' % model,
        b'{%b,"x":NaN}' % model,
        b'{%b,"model":"other"}' % model,
        b'{"model":["a"]}',
        b'{%b,"stream":"yes"}' % model,
        b'{%b,"messages":5,"n":-1,"max_tokens":"x"}' % model,
        b"\xff\xfe",
        b'{%b,"messages":[[[[]]]],"stop":{}}' % model,
    )
    async with theatre.stage(1) as stage:
        ours = 0
        for body in cruel:
            async with wire(stage) as connection:
                await connection.send(post(body))
                ours += await connection.status() in (0, *range(500, 600))
        async with wire(stage) as connection:
            await connection.send(post(b"x", b"Content-Encoding: gzip"))
            encoded = await connection.status()
        return (
            Figure(name="of 14: a 5xx, or none", value=ours, bound=0),
            Figure(name="a Content-Encoding is told 415", value=encoded == 415, bound=1, least=True),
        )


KEYS = {"acme": "sk-acme", "other": "sk-other"}


def _keys(**fields: object) -> dict[str, object]:
    return {
        "auth": {
            "keys": [
                {"tenant": tenant, "sha256": hashlib.sha256(key.encode()).hexdigest(), **fields}
                for tenant, key in KEYS.items()
            ]
        }
    }


@promise(34, "keys: none, wrong, right; the operations port", quick=True)
async def keys(theatre: Theatre) -> Sequence[Figure]:
    async with theatre.stage(1, settings=_keys()) as stage:
        replies = [
            await ask(stage, chat("hello"), headers=headers)
            for headers in ({}, {"Authorization": "Bearer sk-acm"}, {"Authorization": "Basic sk-acme"})
        ]
        right = await ask(stage, chat("hello"), headers={"Authorization": "Bearer sk-acme"})
        seen = 0
        for path in ("/metrics", "/admin/nodes", "/admin/config"):
            async with stage.session.get(
                stage.data_url + path, headers={"Authorization": "Bearer sk-acme"}
            ) as response:
                seen += response.status == 200
        (request,) = await stage.nodes[0].requests()
        told = str(await stage.get("/admin/config")) + str(request)
        return (
            Figure(name="of 3: told 401", value=sum(r.status == 401 for r in replies), bound=3, least=True),
            Figure(name="the right key works", value=right.whole, bound=1, least=True),
            Figure(name="operations seen on the data port", value=seen, bound=0),
            Figure(name="the key in settings shown or at the node", value="sk-acme" in told, bound=0),
        )


@promise(35, "a burst of 200 against a limit of 20, beside another tenant")
async def limits(theatre: Theatre) -> Sequence[Figure]:
    settings = _keys(requests_per_minute=60, burst=20)
    async with theatre.stage(2, settings=settings) as stage:
        clock = SystemClock()
        begun_s = clock.now()
        burst = [
            ask(
                stage,
                chat(f"question {number}", max_tokens=1),
                headers={"Authorization": "Bearer sk-acme", "X-Forwarded-For": f"10.0.0.{number}"},
            )
            for number in range(200)
        ]
        beside = ask(stage, chat("me too", max_tokens=1), headers={"Authorization": "Bearer sk-other"})
        *replies, other = await asyncio.gather(*burst, beside)
        refilled = clock.now() - begun_s
        served = sum(reply.whole for reply in replies)
        return (
            Figure(name="served beyond burst and refill", value=max(0.0, served - 20 - refilled), bound=0),
            Figure(name="served", value=served, bound=20, least=True),
            Figure(
                name="refusals with Retry-After",
                value=sum(r.status == 429 and "Retry-After" in r.headers for r in replies),
                bound=200 - served,
                least=True,
            ),
            Figure(name="the other tenant is served", value=other.whole, bound=1, least=True),
        )
