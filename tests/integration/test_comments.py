"""Comments that keep a waiting stream's connection alive: no commit, no second head, silence for who asks for it."""

from __future__ import annotations

import pytest

from balancer.relay import COMMENT
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import QUIET, Balancer
from tests.integration.asking import told
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Answer, Wire, ask, chat, payloads, post, text_of
from tests.integration.scripted_node import ScriptedNode, ok

SOON = {"comment_after_s": 0.1}
MESSAGES = {"model": MODEL, "max_tokens": 6, "messages": [{"role": "user", "content": "hello"}], "stream": True}


async def commented(balancer: Balancer, body: object, path: str = CHAT, count: int = 2) -> tuple[Wire, Answer]:
    """A request that was told so many times that it waits, and the head that came first."""
    wire = await Wire.to(balancer)
    wire.send(post(body, path))
    head = await wire.head()
    assert [await wire.chunk() for _ in range(count)] == [COMMENT] * count
    return wire, head


async def rest(wire: Wire) -> bytes:
    """What comes up to the clean end, without comments."""
    return b"".join([part async for part in wire.chunks() if part != COMMENT])


async def test_a_stream_that_waits_for_its_first_token_hears_so_and_then_gets_its_answer(
    node: FakeNode, serve: Serve
) -> None:
    node.faults.add(Fault("hang"))
    balancer = await serve(node, queue=SOON)
    wire, head = await commented(balancer, chat(stream=True), count=3)
    assert head.status == 200
    assert (head.header("content-type") or "").startswith("text/event-stream")
    assert {"x-request-id", "date", "cache-control"} <= {name for name, _ in head.headers}
    for absent in ("x-balancer-node", "x-balancer-attempts", "x-balancer-cache"):
        assert head.header(absent) is None
    node.faults.clear()
    node.faults.release()
    stream = await rest(wire)
    assert payloads(stream)[-1] == "[DONE]"
    assert text_of(payloads(stream)) == node.expected_text(chat(stream=True))
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    assert [(facts["status"], facts["code"], facts["attempts"]) for facts in balancer.requests] == [(200, "", 1)]
    again = await wire.ask(post(chat("on the same connection")))
    assert (again.status, again.header("x-balancer-attempts")) == (200, "1")


async def test_a_stream_that_waits_in_the_queue_hears_so(node: FakeNode, serve: Serve) -> None:
    node.faults.add(Fault("hang"))
    balancer = await serve({"url": node.url, "models": [MODEL], "max_in_flight": 1}, queue=SOON)
    first = await Wire.to(balancer)
    first.send(post(chat("first")))
    await node.wait_for(lambda: node.in_flight == 1)
    wire, _ = await commented(balancer, chat("second", stream=True))
    assert len(node.requests) == 1
    node.faults.clear()
    node.faults.release()
    assert (await first.answer()).status == 200
    assert payloads(await rest(wire))[-1] == "[DONE]"


async def test_comments_are_no_commit_and_retries_go_on(node: FakeNode, other: FakeNode, serve: Serve) -> None:
    for fake in (node, other):
        fake.faults.add(Fault("hang"))
    balancer = await serve(node, other, queue=SOON, **{k: v for k, v in QUIET.items() if k != "health"})
    wire, _ = await commented(balancer, chat(stream=True))
    sick, well = (node, other) if node.requests else (other, node)
    well.faults.clear()
    sick.die()
    stream = await rest(wire)
    assert text_of(payloads(stream)) == well.expected_text(chat(stream=True))
    assert payloads(stream)[-1] == "[DONE]"
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    assert balancer.requests[0]["attempts"] == 2


@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_failure_after_comments_is_the_dialects_error_event(node: FakeNode, serve: Serve, path: str) -> None:
    node.faults.add(Fault("hang"))
    config = {"url": node.url, "models": [MODEL], "max_in_flight": 1}
    balancer = await serve(config, queue={**SOON, "max_wait_s": 0.35}, cache={"enabled": False})
    first = await Wire.to(balancer)
    first.send(post(chat("first")))
    await node.wait_for(lambda: node.in_flight == 1)
    wire, head = await commented(balancer, MESSAGES if path == "/v1/messages" else chat(stream=True), path)
    stream = await rest(wire)
    assert (head.status, stream.count(b"data: ")) == (200, 1)
    assert payloads(stream)[0]["error"]["code"] == "queue_timeout"
    assert stream.startswith(b"event: error\n") == (path == "/v1/messages")
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    assert (balancer.requests[0]["status"], balancer.requests[0]["code"]) == (200, "queue_timeout")


async def test_a_nodes_own_refusal_after_comments_is_an_error_event_that_says_why(serve: Serve) -> None:
    async with FakeNode(instant=True) as slow:
        refusal = ok({"error": {"message": "the prompt is too long"}}, status="400 Bad Request")
        async with ScriptedNode(refusal) as refusing:
            slow.faults.add(Fault("hang"))
            balancer = await serve(
                {"url": slow.url, "models": [MODEL], "weight": 64.0, "id": "slow"},
                {"url": refusing.url, "models": [MODEL], "weight": 1.0},
                queue=SOON,
                routing={"policy": "least_outstanding"},
            )
            wire, _ = await commented(balancer, chat(stream=True))
            slow.die()
            (event,) = payloads(await rest(wire))
            assert event["error"]["message"] == "the prompt is too long"
            assert event["error"]["type"] == "invalid_request_error"


async def test_a_node_that_answers_a_stream_without_one_is_an_error_event(serve: Serve) -> None:
    async with FakeNode(instant=True) as slow, ScriptedNode(ok({"choices": [{}]})) as odd:
        slow.faults.add(Fault("hang"))
        balancer = await serve(
            {"url": slow.url, "models": [MODEL], "weight": 64.0},
            {"url": odd.url, "models": [MODEL], "weight": 1.0},
            queue=SOON,
            routing={"policy": "least_outstanding"},
        )
        wire, _ = await commented(balancer, chat(stream=True))
        slow.die()
        (event,) = payloads(await rest(wire))
        assert event["error"]["code"] == "upstream_bad_answer"


async def test_who_asks_for_silence_and_who_did_not_ask_for_a_stream_hears_nothing(
    node: FakeNode, serve: Serve
) -> None:
    node.faults.add(Fault("hang"))
    balancer = await serve(node, queue=SOON)
    silent, unary = await Wire.to(balancer), await Wire.to(balancer)
    silent.send(post(chat("silent", stream=True), CHAT, "X-Balancer-Comments: off"))
    unary.send(post(chat("unary")))
    await node.wait_for(lambda: node.in_flight == 2)
    heard, _ = await commented(balancer, chat("heard", stream=True), count=3)
    assert (silent.pending, unary.pending) == (b"", b"")
    node.faults.clear()
    node.faults.release()
    answer = await silent.answer()
    assert (answer.status, answer.header("x-balancer-attempts")) == (200, "1")
    assert (await unary.answer()).status == 200
    assert payloads(await rest(heard))[-1] == "[DONE]"


async def test_silence_is_asked_for_in_one_way(balancer: Balancer) -> None:
    assert told(await ask(balancer, chat(), CHAT, "X-Balancer-Comments: none")) == (400, "invalid_header")
    assert (await ask(balancer, chat(), CHAT, "X-Balancer-Comments: on")).status == 200


async def test_a_client_that_leaves_after_comments_is_felt_at_the_node(node: FakeNode, serve: Serve) -> None:
    node.faults.add(Fault("hang"))
    balancer = await serve(node, queue=SOON)
    wire, _ = await commented(balancer, chat(stream=True), count=1)
    wire.leave()
    await node.wait_for(lambda: node.cancelled == 1)
    await balancer.wait_for(lambda: len(balancer.requests) == 1)
    assert (balancer.requests[0]["status"], balancer.requests[0]["code"]) == (200, "client_left")
    assert balancer.app.buffered.bytes == 0


async def test_a_shutdown_after_comments_is_an_error_event(node: FakeNode, serve: Serve) -> None:
    node.faults.add(Fault("hang"))
    balancer = await serve(node, queue=SOON)
    wire, _ = await commented(balancer, chat(stream=True), count=1)
    balancer.app.port.cut_all()
    (event,) = payloads(await rest(wire))
    assert event["error"]["code"] == "draining"


async def test_a_reload_turns_comments_on(node: FakeNode, serve: Serve) -> None:
    node.faults.add(Fault("hang"))
    balancer = await serve(node)
    balancer.write_settings({**balancer.settings, "queue": SOON})
    await balancer.app.reload()
    wire, _ = await commented(balancer, chat(stream=True), count=1)
    node.faults.clear()
    node.faults.release()
    assert payloads(await rest(wire))[-1] == "[DONE]"
