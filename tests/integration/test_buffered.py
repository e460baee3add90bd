"""`limits.buffered_bytes` counts bodies, held answers and copies for the cache, and they give way in that order."""

from __future__ import annotations

import asyncio

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, Wire, ask, chat, payloads, post, text_of
from tests.integration.scripted_node import ScriptedNode, stream_head

MIB = 1024 * 1024
LARGE = chat("x" * 300_000)


def event(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % text.encode()


END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


def piece(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Paced:
    """A stream that comes when it is told to."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._go_on = asyncio.Event()

    async def __call__(self, node: ScriptedNode, writer: asyncio.StreamWriter) -> None:
        writer.write(stream_head() + piece(event("a" * 200_000)))
        self.begun.set()
        await self._go_on.wait()
        writer.write(piece(event("b") + END) + b"0\r\n\r\n")
        await writer.drain()

    def finish(self) -> None:
        self._go_on.set()


async def nothing_is_held(balancer: Balancer) -> None:
    await balancer.wait_for(lambda: balancer.app.buffered.bytes == 0)
    assert not balancer.app.buffered.collections


async def test_what_is_collected_for_the_cache_is_counted_until_it_is_stored(serve: Serve) -> None:
    stream = Paced()
    async with ScriptedNode(stream) as node:
        balancer = await serve(node)
        wire = await Wire.to(balancer)
        wire.send(post(chat(stream=True)))
        await wire.head()
        await wire.chunk()
        assert 200_000 <= balancer.app.buffered.bytes < 201_000
        stream.finish()
        assert [part async for part in wire.chunks()]
        await nothing_is_held(balancer)
        again = await ask(balancer, chat(stream=True))
        assert again.cache == "hit"


async def test_copies_for_the_cache_give_way_to_bodies_and_streams_go_on(serve: Serve) -> None:
    stream = Paced()
    async with ScriptedNode(stream) as node:
        balancer = await serve(node, limits={"buffered_bytes": MIB}, health={"interval_s": 1000.0})
        buffered = balancer.app.buffered
        wire = await Wire.to(balancer)
        wire.send(post(chat(stream=True)))
        await wire.head()
        first = await wire.chunk()
        assert buffered.bytes >= 200_000
        full = await Wire.to(balancer)
        half = post(b" " * MIB, CHAT)[: 900 * 1024]
        full.send(half)
        await balancer.wait_for(lambda: buffered.bytes > 850_000)
        await balancer.wait_for(lambda: not buffered.collections)
        assert buffered.bytes <= MIB
        stream.finish()
        rest = b"".join([part async for part in wire.chunks()])
        assert text_of(payloads(first + rest)) == "a" * 200_000 + "b", "the stream itself loses nothing"
        full.leave()
        await nothing_is_held(balancer)
        assert (await ask(balancer, chat(stream=True))).cache == "miss", "half a copy is not stored"


async def test_an_answer_held_back_is_counted_until_it_is_handed_on(serve: Serve) -> None:
    async def halting(node: ScriptedNode, writer: asyncio.StreamWriter) -> None:
        body = b'{"choices": [], "filler": "%b"}' % (b"x" * 100_000)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body[:-1])
        await held.wait()
        writer.write(body[-1:])

    held = asyncio.Event()
    async with ScriptedNode(halting) as node:
        balancer = await serve(node)
        wire = await Wire.to(balancer)
        wire.send(post(chat()))
        await balancer.wait_for(lambda: balancer.app.buffered.bytes > 100_000)
        held.set()
        assert (await wire.answer()).status == 200
        await nothing_is_held(balancer)


async def test_answers_that_fail_or_that_nobody_waits_for_leave_nothing_behind(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, retry={"max_attempts": 1})
    for fault in (Fault("close", after_events=1), Fault("reset", after_events=2), Fault("status", status=500)):
        node.faults.add(fault)
        for stream in (False, True):
            await ask(balancer, chat(f"{fault.kind} {stream}", stream=stream))
        node.faults.clear()
    node.faults.add(Fault("hang", after_events=1))
    for stream in (False, True):
        wire = await Wire.to(balancer)
        seen = len(node.requests)
        wire.send(post(chat(f"left {stream}", stream=stream)))
        await node.wait_for(lambda seen=seen: len(node.requests) > seen)
        wire.leave()
    await nothing_is_held(balancer)


async def test_the_body_of_a_stream_that_flows_is_held_no_longer(node: FakeNode, serve: Serve) -> None:
    node.faults.add(Fault("hang", after_events=2))
    balancer = await serve(node, cache={"enabled": False})
    wire = await Wire.to(balancer)
    wire.send(post({**LARGE, "stream": True}))
    await wire.head()
    await balancer.wait_for(lambda: balancer.app.buffered.bytes == 0)
