"""Every fault as a client sees it, and which requests it is for."""

from __future__ import annotations

import gzip
import json
import zlib
from random import Random

import aiohttp
import pytest
from fake_node_client import CHAT, RawClient, chat, sse

from loadtest.connection import Request
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault, Faults, fault_from_json

STREAM = chat(stream=True, max_tokens=8)
UNARY = chat(max_tokens=8)


@pytest.fixture
async def healthy(node: FakeNode) -> RawClient:
    """A second client, by which tests see that the node goes on."""
    return await RawClient.to(node)


async def broken(node: FakeNode, client: RawClient, fault: Fault, body: object = STREAM) -> tuple[bytes, bytes, str]:
    """Head, rest, and end of the connection after a request that meets a fault."""
    node.faults.add(fault)
    client.send(body)
    got, end = await client.rest()
    head, _, rest = got.partition(b"\r\n\r\n")
    return head, rest, end


@pytest.mark.parametrize(("kind", "end"), [("reset", "RST"), ("close", "FIN")])
@pytest.mark.parametrize("body", [STREAM, UNARY])
async def test_connections_break_before_the_head_after_it_and_within_the_body(
    node: FakeNode, kind: str, end: str, body: object
) -> None:
    seen = {}
    for after_events in (None, 0, 3):
        node.faults.clear()
        client = await RawClient.to(node)
        head, rest, how = await broken(node, client, Fault(kind, after_events=after_events), body)
        assert how == end
        assert node.requests[-1].state == "broken"
        seen[after_events] = (bool(head), rest)
    assert (seen[None], seen[0]) == ((False, b""), (True, b""))
    rest = seen[3][1]
    assert rest.count(b"data: ") == 3 if body is STREAM else rest.startswith(b'{"id":')
    assert b"0\r\n\r\n" not in rest


@pytest.mark.parametrize("after_events", [None, 0, 4])
async def test_a_hang_lasts_until_it_is_released_and_loses_nothing(
    node: FakeNode, client: RawClient, healthy: RawClient, after_events: int | None
) -> None:
    rule = node.faults.add(Fault("hang", after_events=after_events, first=1))
    client.send(STREAM)
    await node.wait_for(lambda: rule.hits == 1 and node.requests[0].events_sent == (after_events or 0))
    healthy.send(STREAM)
    _, whole = await healthy.answer()
    healthy.get("/health")
    await healthy.answer()
    assert node.in_flight == 1
    node.faults.release()
    _, late = await client.answer()
    assert sse(late)[1]["choices"] == sse(whole)[1]["choices"]
    assert len(sse(late)) == len(sse(whole))


async def test_a_hang_of_every_path_takes_the_health_check_along(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("hang", path="*"))
    client.get("/health")
    await node.wait_for(lambda: len(node.checks) == 1)
    assert node.checks[0].state == "open"


async def test_a_stream_that_just_ends_is_clean_and_not_done(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("cut", after_events=3, first=1))
    client.send(STREAM)
    _, body = await client.answer()
    assert len(sse(body)) == 3
    client.send(STREAM)
    assert sse((await client.answer())[1])[-1] == "[DONE]"


@pytest.mark.parametrize(("kind", "finishes", "done"), [("no_done", True, False), ("no_finish", False, True)])
async def test_half_of_a_good_end_can_be_missing(
    node: FakeNode, client: RawClient, kind: str, finishes: bool, done: bool
) -> None:
    node.faults.add(Fault(kind))
    client.send(STREAM)
    events = sse((await client.answer())[1])
    assert (events[-1] == "[DONE]") is done
    assert any(event["choices"][0]["finish_reason"] for event in events if event != "[DONE]") is finishes


async def test_an_error_event_ends_a_stream_in_its_dialects_form(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("error_event", after_events=2))
    client.send(STREAM)
    assert "error" in sse((await client.answer())[1])[-1]
    client.send({**STREAM, "max_tokens": 9}, "/v1/messages")
    _, body = await client.answer()
    assert b"event: error\n" in body
    assert sse(body)[-1]["type"] == "error"
    client.send({"inputs": "x"}, "/generate_stream")
    assert set(sse((await client.answer())[1])[-1]) == {"error", "error_type"}


async def test_an_event_may_be_no_json_and_the_stream_go_on(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("bad_event", after_events=2))
    client.send(STREAM)
    lines = (await client.answer())[1].split(b"\n\n")
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[2].removeprefix(b"data: "))
    assert lines[-2] == b"data: [DONE]"


async def test_a_status_comes_with_its_retry_after_and_body(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("status", status=429, retry_after_s=7, body="busy", first=1))
    node.faults.add(Fault("status", status=503))
    client.send(UNARY)
    head, body = await client.answer()
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    assert b"\r\nretry-after: 7\r\n" in head
    assert body == b"busy"
    client.send(UNARY)
    head, body = await client.answer()
    assert b"retry-after" not in head
    assert json.loads(body)["error"]["code"] == 503
    assert node.model.stats.prompt_tokens == 0


@pytest.mark.parametrize("kind", ["bad_json", "error_body", "empty_body"])
@pytest.mark.parametrize("request_body", [STREAM, UNARY])
async def test_200_may_carry_no_answer(node: FakeNode, client: RawClient, kind: str, request_body: object) -> None:
    node.faults.add(Fault(kind))
    client.send(request_body)
    head, body = await client.answer()
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    if kind == "error_body":
        assert "error" in json.loads(body)
    else:
        with pytest.raises(json.JSONDecodeError):
            json.loads(body)


async def test_bytes_that_are_no_http(node: FakeNode, client: RawClient) -> None:
    head, _, end = await broken(node, client, Fault("garbage"))
    assert (head[:2], end) == (b"\x00\xff", "FIN")


async def test_a_head_that_does_not_end(node: FakeNode, client: RawClient) -> None:
    head, rest, end = await broken(node, client, Fault("endless_head", size_bytes=200_000))
    assert len(head) >= 200_000
    assert (rest, end) == (b"", "FIN")


async def test_an_endless_head_goes_on_as_long_as_it_is_read(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("endless_head"))
    client.send(STREAM)
    await client.reader.readexactly(1 << 20)
    client.leave()
    await node.wait_for(lambda: node.cancelled == 1)


async def test_a_chunk_size_that_is_none(node: FakeNode, client: RawClient) -> None:
    _, rest, end = await broken(node, client, Fault("bad_chunk", after_events=2))
    assert rest.count(b"data: ") == 2
    assert rest.endswith(b"\r\nzz\r\nnot a chunk\r\n")
    assert end == "FIN"


@pytest.mark.parametrize("body", [STREAM, UNARY])
async def test_less_comes_than_the_length_in_the_head(node: FakeNode, client: RawClient, body: object) -> None:
    head, rest, end = await broken(node, client, Fault("truncated", size_bytes=5000), body)
    assert b"chunked" not in head
    assert len(rest) < int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    assert end == "FIN"


async def test_a_compressed_answer_is_compressed(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("gzip"))
    client.send(UNARY)
    head, body = await client.answer()
    assert b"\r\ncontent-encoding: gzip\r\n" in head
    assert json.loads(gzip.decompress(body))["object"] == "chat.completion"
    client.send(STREAM)
    _, body = await client.answer()
    assert sse(zlib.decompress(body, wbits=31))[-1] == "[DONE]"


async def test_an_informational_answer_comes_first(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("informational"))
    client.send(UNARY)
    assert (await client.head()).startswith(b"HTTP/1.1 103 ")
    assert (await client.answer())[0].startswith(b"HTTP/1.1 200 ")


async def test_unasked_bytes_follow_a_good_answer(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("extra_bytes"))
    client.send(UNARY)
    assert b'"chat.completion"' in (await client.answer())[1]
    assert (await client.answer())[1] == b"{}"


async def test_a_connection_ends_behind_an_answer_that_promised_more(node: FakeNode, client: RawClient) -> None:
    head, rest, end = await broken(node, client, Fault("hang_up"))
    assert b"connection: close" not in head
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert end == "FIN"


async def test_a_wrong_content_type_over_a_good_answer(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("content_type", content_type="text/html"))
    client.send(STREAM)
    head, body = await client.answer()
    assert b"\r\ncontent-type: text/html\r\n" in head
    assert sse(body)[-1] == "[DONE]"


@pytest.mark.parametrize("body", [STREAM, UNARY])
async def test_an_answer_is_huge_and_good(node: FakeNode, client: RawClient, body: object) -> None:
    node.faults.add(Fault("huge", size_bytes=3 << 20))
    client.send(body)
    _, answer = await client.answer()
    assert len(answer) > 3 << 20
    assert sse(answer)[-1] == "[DONE]" if body is STREAM else json.loads(answer)["object"] == "chat.completion"


async def test_slow_multiplies_the_engines_time() -> None:
    async with FakeNode(speed=100.0, itl_s=0.1) as node:
        node.faults.add(Fault("slow", factor=20.0))
        client = await RawClient.to(node)
        client.send(chat(max_tokens=5))
        await client.answer()
        # Four decode steps of 0.1 s, 20 times slower, on a clock 100 times faster.
        assert node.model.busy_s >= 4 * 0.1 * 20 / 100


async def test_a_delay_is_kept_before_head_and_events() -> None:
    class Clock:
        slept: list[float] = []

        def now(self) -> float:
            return 0.0

        def unix_s(self) -> int:
            return 1

        async def sleep(self, delay_s: float) -> None:
            self.slept.append(delay_s)

    async with FakeNode(instant=True, clock=Clock()) as node:
        node.faults.add(Fault("delay", delay_s=3.0, each_event=True))
        client = await RawClient.to(node)
        client.send(chat(stream=True, max_tokens=2))
        await client.answer()
    assert Clock.slept == [3.0] * 5  # head, role, two pieces, [DONE]


async def test_a_poisoned_prompt_kills_the_node_until_it_is_told_to_come_back(
    node: FakeNode, client: RawClient, healthy: RawClient
) -> None:
    node.faults.add(Fault("die", body_has="poison"))
    node.freeze()
    healthy.send(chat("harmless"))
    await node.wait_for(lambda: len(node.requests) == 1)
    client.send(chat("this is poison"))
    assert await client.rest() == (b"", "RST")
    assert await healthy.rest() == (b"", "RST")
    assert [request.state for request in node.requests] == ["aborted", "broken"]
    assert not node.listening
    node.thaw()
    await node.come_back()
    again = await RawClient.to(node)
    again.send(chat("harmless"))
    await again.answer()


async def test_a_refusing_fault_serves_what_is_under_way(node: FakeNode, client: RawClient) -> None:
    node.faults.add(Fault("refuse", first=1))
    client.send(UNARY)
    assert (await client.answer())[0].startswith(b"HTTP/1.1 200")
    with pytest.raises(ConnectionRefusedError):
        await RawClient.to(node)


def request(path: str = CHAT, body: bytes = b"", method: str = "POST") -> Request:
    return Request(method=method, target=path, headers=[], body=body)


def test_a_rule_is_for_the_requests_it_names() -> None:
    assert Fault("hang").concerns(request("/v1/embeddings"))
    assert not Fault("hang").concerns(request("/health", method="GET"))
    assert Fault("hang", path="*").concerns(request("/health", method="GET"))
    assert not Fault("hang", path=CHAT).concerns(request("/v1/embeddings"))
    assert Fault("hang", body_has="ö").concerns(request(body="x ö".encode()))
    assert not Fault("hang", body_has="ö").concerns(request(body=b"x"))


def test_a_rule_skips_hits_so_many_and_rests() -> None:
    faults = Faults(Random(0))
    faults.add(Fault("reset", skip=2, first=3))
    assert [faults.choose(request()) is not None for _ in range(7)] == [False] * 2 + [True] * 3 + [False] * 2
    assert faults.rules[0].hits == 3


def test_the_first_rule_that_applies_wins() -> None:
    faults = Faults(Random(0))
    faults.add(Fault("reset", body_has="x"))
    faults.add(Fault("hang"))
    assert [getattr(faults.choose(request(body=body)), "kind", None) for body in (b"x", b"y")] == ["reset", "hang"]


def test_chance_is_the_same_for_the_same_seed() -> None:
    def hits(seed: int) -> list[bool]:
        faults = Faults(Random(seed))
        faults.add(Fault("status", probability=0.3))
        return [faults.choose(request()) is not None for _ in range(1000)]

    assert hits(1) == hits(1) != hits(2)
    assert sum(hits(1)) == pytest.approx(300, abs=50)


@pytest.mark.parametrize(
    "value", [{}, {"kind": "sulk"}, {"kind": "reset", "after": 3}, {"kind": "status", "after_events": 3}]
)
def test_a_fault_that_makes_no_sense_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        fault_from_json(value)


async def test_faults_are_switched_over_http(node: FakeNode) -> None:
    async with aiohttp.ClientSession() as session:
        faults_url = node.url + "/sim/faults"
        async with session.post(faults_url, json=[{"kind": "status", "status": 418, "first": 1}]) as response:
            assert response.headers["x-simulated"] == "1"
        async with session.post(node.url + CHAT, json=chat()) as response:
            assert response.status == 418
        async with session.get(faults_url) as response:
            assert [(rule["fault"]["status"], rule["hits"]) for rule in await response.json()] == [(418, 1)]
        async with session.post(faults_url, json={"kind": "sulk"}) as response:
            assert response.status == 400
        async with session.delete(faults_url) as response:
            assert await response.json() == []
        assert node.faults.rules == []
        async with session.get(node.url + "/sim/state") as response:
            assert (await response.json())["requests_by_status"] == {"418": 1}
        async with session.get(node.url + "/sim/requests") as response:
            (told,) = await response.json()
        assert (told["target"], json.loads(told["body"])) == (CHAT, chat())
        async with session.post(node.url + "/sim/node", json={"speed": 0.1, "frozen": True}) as response:
            assert (node.speed, node.engine.frozen) == (0.1, True)
