"""The data port as an HTTP/1.1 server: connections, pipelining, Expect, HTTP/1.0, and clients that take their time."""

from __future__ import annotations

import asyncio
import json

import pytest

from balancer.wire.inbound import PIPELINE_BYTES
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, Wire, ask, chat, get, post

BODY = json.dumps(chat()).encode()


# -- connections


async def test_connections_are_kept_alive_on_both_sides(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    for number in range(5):
        text = "word " * 10**number  # equal heads but for the length, in one read and in many
        answer = await wire.ask(post(chat(text)))
        assert answer.json["choices"][0]["message"]["content"] == node.expected_text(chat(text))
        assert answer.header("connection") is None
    assert [len(request.json()["messages"][0]["content"]) for request in node.requests] == [5, 50, 500, 5000, 50000]
    assert len({request.connection for request in node.requests}) == 1


async def test_close_is_said_and_done_when_the_client_asks_for_it(balancer: Balancer) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(chat(), CHAT, "Connection: close"))
    assert (answer.status, answer.header("connection")) == (200, "close")
    assert await wire.ends() == b""


async def test_pipelined_requests_are_answered_in_order_one_at_a_time(balancer: Balancer, node: FakeNode) -> None:
    hang = node.faults.add(Fault("hang", body_has="first"))
    wire = await Wire.to(balancer)
    wire.send(post(chat("first")) + get("/healthz") + post(chat("third"), CHAT, "Expect: 100-continue") + get("/x"))
    await node.wait_for(lambda: hang.hits == 1)
    assert (await ask(balancer, chat("meanwhile"))).status == 200
    assert len(node.requests) == 2  # the third waits for the first
    node.faults.release()
    answers = [await wire.answer() for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 200, 200, 404]
    assert answers[0].json["choices"][0]["message"]["content"] == node.expected_text(chat("first"))
    assert answers[1].json == {"status": "ok"}
    assert answers[2].json["choices"][0]["message"]["content"] == node.expected_text(chat("third"))
    assert await wire.ends() == b""


async def test_many_pipelined_requests_beyond_the_buffer_are_all_answered_in_order(
    balancer: Balancer, node: FakeNode
) -> None:
    texts = [f"{number} " + "word " * 3000 for number in range(20)]
    requests = [post(chat(text)) for text in texts]
    assert sum(map(len, requests)) > 4 * PIPELINE_BYTES
    wire = await Wire.to(balancer)
    for request in requests:
        wire.send(request)
    for text in texts:
        answer = await wire.answer()
        assert answer.json["choices"][0]["message"]["content"] == node.expected_text(chat(text))
    assert [request.json()["messages"][0]["content"] for request in node.requests] == texts


@pytest.mark.parametrize("late", [1, 3, 200])
async def test_answers_from_memory_do_not_strand_what_was_pipelined_behind_them(
    balancer: Balancer, node: FakeNode, late: int
) -> None:
    await ask(balancer, chat("stored"))
    hang = node.faults.add(Fault("hang", body_has="first"))
    wire = await Wire.to(balancer)
    wire.send(post(chat("first")) + post(chat("stored")) + get("/healthz"))
    await node.wait_for(lambda: hang.hits == 1)
    for number in range(late):  # these come in reads of their own
        wire.send(post(chat("stored" if number % 2 else f"late {number}")))
    await ask(balancer, chat("meanwhile"))
    node.faults.release()
    answers = [await wire.answer() for _ in range(late + 3)]
    assert [answer.status for answer in answers] == [200] * (late + 3)
    asked = ["first", "stored", "", *("stored" if number % 2 else f"late {number}" for number in range(late))]
    said = [
        answer.json["choices"][0]["message"]["content"] if text else ""
        for text, answer in zip(asked, answers, strict=True)
    ]
    assert said == [text and node.expected_text(chat(text)) for text in asked]


async def test_a_half_close_counts_as_leaving(balancer: Balancer, node: FakeNode) -> None:
    node.faults.add(Fault("hang"))
    wire = await Wire.to(balancer)
    wire.send(post(chat()))
    await node.wait_for(lambda: node.in_flight == 1)
    wire.half_close()
    await node.wait_for(lambda: node.cancelled == 1)
    assert await wire.breaks() == b""


# -- Expect


async def test_100_continue_comes_before_the_body_and_once(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    request = post(chat(), CHAT, "Expect: 100-Continue")
    wire.send(request[: -len(BODY)])
    assert await wire.interim() == 100
    assert node.requests == []
    wire.send(BODY)
    answer = await wire.answer()
    assert (answer.status, answer.interim) == (200, [])
    assert node.requests[0].header("expect") is None


async def test_100_continue_comes_when_it_is_the_requests_turn(balancer: Balancer, node: FakeNode) -> None:
    hang = node.faults.add(Fault("hang", first=1))
    wire = await Wire.to(balancer)
    second = post(chat("second"), CHAT, "Expect: 100-continue")
    size = len(json.dumps(chat("second")))
    wire.send(post(chat("first")) + second[:-size])
    await node.wait_for(lambda: hang.hits == 1)
    node.faults.release()
    first = await wire.answer()
    assert (first.status, first.interim) == (200, [])
    assert await wire.interim() == 100
    wire.send(second[-size:])
    assert (await wire.answer()).status == 200


@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (["Expect: 100-continue", "Content-Length: 999999999"], b"", 413),
        (["Expect: 100-continue", "Content-Encoding: gzip", "Content-Length: 5"], b"", 415),
        (["Expect: 100-continue, 200-maybe", "Content-Length: 5"], b"", 417),
        (["Expect: 200-ok", "Content-Length: 5"], b"", 417),
        (["Expect: 200-ok"], BODY, 417),
    ],
)
async def test_nothing_is_continued_that_will_be_refused(
    balancer: Balancer, node: FakeNode, lines: list[str], body: bytes, status: int
) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(body, CHAT, *lines))
    assert (answer.status, answer.interim) == (status, [])
    assert await wire.ends() == b""
    assert node.requests == []


async def test_an_unknown_path_gets_no_100_continue(balancer: Balancer) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(b"", "/v1/nothing", "Expect: 100-continue", "Content-Length: 5"))
    assert (answer.status, answer.interim) == (404, [])


# -- HTTP/1.0


async def test_http_1_0_is_answered_with_a_length_and_closed(balancer: Balancer, node: FakeNode) -> None:
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(chat(), version="HTTP/1.0"))
    assert answer.status == 200
    assert answer.header("content-length") == str(len(answer.body))
    assert await wire.ends() == b""
    assert len(node.requests) == 1


@pytest.mark.parametrize(
    "data",
    [
        post(chat(stream=True), version="HTTP/1.0"),
        b"POST /v1/chat/completions HTTP/1.0\r\nHost: balancer\r\n\r\n" + BODY,
    ],
    ids=["a stream", "no length"],
)
async def test_http_1_0_cannot_stream_nor_send_without_a_length(
    balancer: Balancer, node: FakeNode, data: bytes
) -> None:
    answer = await (await Wire.to(balancer)).ask(data)
    assert answer.status == 400
    assert node.requests == []


async def test_a_node_that_streams_to_an_http_1_0_client_is_read_to_the_end(balancer: Balancer, node: FakeNode) -> None:
    speech = {"model": "sim-model", "input": "one two three", "voice": "x"}
    whole = (await ask(balancer, speech, "/v1/audio/speech")).body
    wire = await Wire.to(balancer)
    wire.send(post(speech, "/v1/audio/speech", version="HTTP/1.0"))
    head = await wire.head()
    assert (head.status, head.all("transfer-encoding"), head.header("connection")) == (200, [], "close")
    assert await wire.ends() == whole


# -- time


async def test_a_slow_head_is_408(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, limits={"head_timeout_s": 0.3})
    wire = await Wire.to(balancer)
    answer = await wire.ask(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-")
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert await wire.ends() == b""


async def test_a_head_that_drips_is_408_on_a_kept_connection_too(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, limits={"head_timeout_s": 0.5})
    wire = await Wire.to(balancer)
    assert (await wire.ask(post(chat()))).status == 200
    wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nX-Drip: ")
    answering = asyncio.ensure_future(wire.answer())
    while not answering.done():
        wire.send(b"x")  # never a pause
        await asyncio.wait([answering], timeout=0.01)
    assert (answering.result().status, answering.result().code) == (408, "request_timeout")


@pytest.mark.parametrize("part", [20, -5], ids=["head", "body"])
async def test_half_a_request_behind_another_is_408_as_well(node: FakeNode, serve: Serve, part: int) -> None:
    balancer = await serve(node, limits={"head_timeout_s": 0.3, "body_idle_s": 0.3})
    hang = node.faults.add(Fault("hang", first=1))
    wire = await Wire.to(balancer)
    wire.send(post(chat("first")) + post(chat("second"))[:part])
    await node.wait_for(lambda: hang.hits == 1)
    node.faults.release()
    assert (await wire.answer()).status == 200
    late = await wire.answer()
    assert (late.status, late.code) == (408, "request_timeout")
    assert len(node.requests) == 1


async def test_a_connection_that_says_nothing_is_closed(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, limits={"head_timeout_s": 0.05})
    wire = await Wire.to(balancer)
    assert await wire.ends() == b""


@pytest.mark.parametrize("line", [f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"])
async def test_a_body_that_pauses_is_408_and_holds_no_node(node: FakeNode, serve: Serve, line: str) -> None:
    balancer = await serve(node, limits={"body_idle_s": 0.05})
    wire = await Wire.to(balancer)
    answer = await wire.ask(post(b"5\r\n", CHAT, line))
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert await wire.ends() == b""
    assert node.requests == []
    assert balancer.app.port.buffered.bytes == 0


async def test_a_body_that_drips_is_408(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, limits={"body_idle_s": 0.5})
    wire = await Wire.to(balancer)
    wire.send(post(b"", CHAT, "Content-Length: 100000"))
    answering = asyncio.ensure_future(wire.answer())
    while not answering.done():
        wire.send(b"x")  # never a pause, and far under 16 KiB/s
        await asyncio.wait([answering], timeout=0.02)
    answer = answering.result()
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert node.requests == []
