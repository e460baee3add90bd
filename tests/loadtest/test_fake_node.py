"""The node itself: HTTP, what it records, who left, how it dies and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import aiohttp
import pytest
import uvloop
from fake_node_client import CHAT, RawClient, chat, sse

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from loadtest.node_spec import spec_from_args


async def test_requests_are_recorded_as_they_came_and_checks_apart(node: FakeNode, client: RawClient) -> None:
    client.get("/health")
    await client.answer()
    client.send(chat(), CHAT + "?x=1", "x-odd: Value")
    await client.answer()
    (request,) = node.requests
    assert (request.method, request.target, request.path) == ("POST", CHAT + "?x=1", CHAT)
    assert request.headers[-1] == ("x-odd", "Value")
    assert request.header("X-ODD") == "Value"
    assert request.json() == chat()
    assert (request.state, request.status, request.connection, request.index) == ("done", 200, 1, 2)
    assert [check.path for check in node.checks] == ["/health"]


async def test_one_connection_carries_pipelined_requests_in_order(node: FakeNode, client: RawClient) -> None:
    for number in range(3):
        client.send(chat(f"question {number}", max_tokens=2))
    texts = [(await client.answer())[1] for _ in range(3)]
    assert len(set(texts)) == 3
    assert [request.json()["messages"][0]["content"][-1] for request in node.requests] == ["0", "1", "2"]
    assert node.connections_made == 1


async def test_chunked_bodies_and_expect_are_understood(node: FakeNode, client: RawClient) -> None:
    payload = json.dumps(chat()).encode()
    parts = payload[:5], payload[5:40], payload[40:]
    body = b"".join(b"%x;name=value\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\ntrailer: 1\r\n\r\n"
    client.send(body, CHAT, "transfer-encoding: chunked", "expect: 100-continue")
    assert await client.head() == b"HTTP/1.1 100 Continue\r\n\r\n"
    head, _ = await client.answer()
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert node.requests[0].json() == chat()


async def test_an_old_client_gets_its_stream_up_to_the_end_of_the_connection(client: RawClient) -> None:
    client.send(chat(stream=True, max_tokens=3), version="HTTP/1.0")
    got, end = await client.rest()
    assert b"chunked" not in got.partition(b"\r\n\r\n")[0]
    assert sse(got.partition(b"\r\n\r\n")[2])[-1] == "[DONE]"
    assert end == "FIN"


async def test_connection_close_is_kept(client: RawClient) -> None:
    client.send(chat(), CHAT, "connection: close")
    got, end = await client.rest()
    assert b"\r\nconnection: close\r\n" in got
    assert end == "FIN"


async def test_what_is_no_http_gets_400_and_a_close(client: RawClient) -> None:
    client.writer.write(b"EHLO\r\n\r\n")
    got, end = await client.rest()
    assert got.startswith(b"HTTP/1.1 400 ")
    assert end == "FIN"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token_frees_its_slot(stream: bool) -> None:
    async with FakeNode(slots=1) as node:
        node.freeze()
        client = await RawClient.to(node)
        client.send(chat(stream=stream))
        await node.wait_for(lambda: len(node.requests) == 1)
        assert node.in_flight == 1
        client.leave()
        await node.wait_for(lambda: node.cancelled == 1)
        assert node.requests[0].state == "left"
        assert (node.in_flight, list(node.model.running), list(node.model.waiting)) == (0, [], [])
        assert node.model.stats.finished["abort"] == 1


async def test_a_client_that_leaves_in_the_middle_of_a_stream_is_counted(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("hang", after_events=3))
    client.send(chat(stream=True))
    await node.wait_for(lambda: bool(node.requests) and node.requests[0].events_sent == 3)
    client.leave()
    await node.wait_for(lambda: node.cancelled == 1)
    assert not node.model.running


async def test_a_half_close_counts_as_leaving(node: FakeNode, client: RawClient) -> None:
    node.freeze()
    client.send(chat())
    await node.wait_for(lambda: len(node.requests) == 1)
    client.writer.write_eof()
    await node.wait_for(lambda: node.cancelled == 1)


async def test_a_frozen_engine_takes_requests_and_is_healthy_and_goes_on_when_thawed() -> None:
    async with FakeNode(speed=1000.0) as node:
        node.freeze()
        client, other = await RawClient.to(node), await RawClient.to(node)
        client.send(chat(max_tokens=4))
        await node.wait_for(lambda: node.in_flight == 1)
        other.get("/health")
        assert (await other.answer())[0].startswith(b"HTTP/1.1 200 OK")
        assert node.model.stats.generation_tokens == 0
        node.thaw()
        await client.answer()
        assert node.model.stats.generation_tokens == 4


async def test_refusing_leaves_open_connections_alone_and_ends_on_the_same_port(node: FakeNode) -> None:
    client = await RawClient.to(node)
    await node.wait_for(lambda: len(node.connections) == 1)
    port = node.port
    node.refuse()
    with pytest.raises(ConnectionRefusedError):
        await RawClient.to(node)
    client.send(chat())
    assert (await client.answer())[0].startswith(b"HTTP/1.1 200")
    await node.come_back()
    assert node.port == port
    again = await RawClient.to(node)
    again.send(chat())
    await again.answer()


async def test_dying_resets_every_connection_and_may_end_by_itself(node: FakeNode) -> None:
    clients = [await RawClient.to(node) for _ in range(3)]
    await node.wait_for(lambda: len(node.connections) == 3)
    node.die(back_after_s=0.0)
    assert not node.listening
    assert {(await client.rest())[1] for client in clients} == {"RST"}
    await node.wait_for(lambda: node.listening)
    (await RawClient.to(node)).send(chat())
    await node.wait_for(lambda: len(node.requests) == 1)


async def test_a_deaf_node_accepts_and_reads_nothing(node: FakeNode) -> None:
    node.deaf = True
    client = await RawClient.to(node)
    client.send(b"x" * (32 << 20))
    await node.wait_for(lambda: len(node.connections) == 1)
    assert client.writer.transport.get_write_buffer_size() > 1 << 20
    node.deaf = False
    other = await RawClient.to(node)
    other.send(chat())
    await other.answer()
    assert len(node.requests) == 1


async def test_requests_beyond_the_slots_can_be_waited_for() -> None:
    async with FakeNode(slots=1, itl_s=1000.0) as node:
        clients = [await RawClient.to(node) for _ in range(3)]
        for client in clients:
            client.send(chat())
        await node.wait_for(lambda: len(node.model.running) + len(node.model.waiting) == 3)
        clients[0].leave()
        await node.wait_for(lambda: len(node.model.running) + len(node.model.waiting) == 2)


async def test_a_condition_that_fails_fails_in_the_test_and_not_in_the_node(node: FakeNode, client: RawClient) -> None:
    waiting = asyncio.create_task(node.wait_for(lambda: node.requests != [] and node.requests[5] is not None))
    await asyncio.sleep(0)
    client.send(chat())
    await client.answer()
    with pytest.raises(IndexError):
        await waiting


async def test_waiting_in_vain_tells_the_nodes_state(node: FakeNode) -> None:
    with pytest.raises(TimeoutError, match="requests=0"):
        await node.wait_for(lambda: False, timeout_s=0.01)


async def test_a_thousand_streams_at_once_all_end_well() -> None:
    async with FakeNode(speed=50.0, slots=2000, kv_tokens=2_000_000, itl_growth=0.0) as node:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def one(number: int) -> bool:
                body = chat(f"question {number}", stream=True, max_tokens=5)
                async with session.post(node.url + CHAT, json=body) as response:
                    return (await response.read()).endswith(b"data: [DONE]\n\n")

            assert all(await asyncio.gather(*(one(number) for number in range(1000))))
        assert node.model.stats.generation_tokens == 5000
        assert node.model.pool.used == 0


def test_on_uvloop_it_breaks_and_comes_back_as_well() -> None:
    async def scenario() -> None:
        async with FakeNode(instant=True) as node:
            for kind, end in (("reset", "RST"), ("close", "FIN"), ("die", "RST")) * 5:
                node.faults.clear()
                node.faults.add(Fault(kind, after_events=2))
                client = await RawClient.to(node)
                client.send(chat(stream=True))
                got, how = await client.rest()
                assert (got.count(b"data: "), how) == (2, end)
                await node.come_back()
        await RawClient.close_all()

    uvloop.run(scenario())


async def test_as_a_program_it_says_where_it_listens_and_ends_on_sigterm() -> None:
    arguments = ("-m", "loadtest.fake_node", "--instant", "--model", "a", "--model", "b", "--control-port", "0")
    program = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, cwd=os.getcwd()
    )
    assert program.stdout is not None
    url = (await program.stdout.readline()).decode().strip()
    control_url = (await program.stdout.readline()).decode().split()[1]
    async with aiohttp.ClientSession() as session:
        async with session.get(url + "/v1/models") as response:
            assert [card["id"] for card in (await response.json())["data"]] == ["a", "b"]
        async with session.post(control_url + "/sim/die") as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(url + "/health")
        async with session.post(control_url + "/sim/come_back") as response:
            assert (await response.json())["listening"]
        async with session.get(url + "/health") as response:
            assert response.status == 200
    program.send_signal(signal.SIGTERM)
    assert await program.wait() == 0


def test_the_command_line_sets_every_field() -> None:
    line = "--port 7 --ttft-s-per-token 0.1 --itl-s 0.2 --slots 3 --kv-tokens 99 --speed 2 --seed 5 --api-key k"
    spec = spec_from_args(line.split())
    assert (spec.port, spec.ttft_s_per_token, spec.itl_s, spec.slots) == (7, 0.1, 0.2, 3)
    assert (spec.kv_tokens, spec.speed, spec.seed, spec.api_key) == (99, 2.0, 5, "k")
    assert (spec.models, spec.instant, spec.control_port) == (("sim-model",), False, None)
