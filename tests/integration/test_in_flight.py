"""How many requests run at once, and who goes first when there is no room."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.harness import Balancer
from tests.integration.asking import auth, bearer, different, key
from tests.integration.conftest import Serve
from tests.integration.raw_http import CHAT, MODEL, Wire, ask, chat, post


async def statuses(balancer: Balancer, count: int, *lines: str) -> Counter[int]:
    """How many of `count` requests at once got which status."""
    answers = await asyncio.gather(*(ask(balancer, different(n), CHAT, *lines) for n in range(count)))
    return Counter(answer.status for answer in answers)


# -- in flight


async def test_max_in_flight_of_a_key_is_exact_and_freed(node: FakeNode, serve: Serve) -> None:
    balancer = await serve(node, **auth(key("k", max_in_flight=3), key("other")))
    node.faults.add(Fault("hang", first=3))
    wires = [await Wire.to(balancer) for _ in range(3)]
    for number, wire in enumerate(wires):
        wire.send(post(different(number), CHAT, bearer("k")))
    await node.wait_for(lambda: node.in_flight == 3)
    refused = await ask(balancer, different(3), CHAT, bearer("k"))
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert int(refused.header("retry-after") or 0) >= 1
    assert (await ask(balancer, different(3), CHAT, bearer("other"))).status == 200
    wires[0].leave()
    await node.wait_for(lambda: node.cancelled == 1)
    await balancer.wait_for(lambda: balancer.app.admission.tenants()["k"]["in_flight"] == 2)
    assert (await ask(balancer, different(4), CHAT, bearer("k"))).status == 200
    node.faults.release()
    assert [(await wire.answer()).status for wire in wires[1:]] == [200, 200]
    assert await statuses(balancer, 3, bearer("k")) == {200: 3}


async def held(node: FakeNode, balancer: Balancer, count: int) -> list[Wire]:
    """So many requests that hang at the node."""
    hang = node.faults.add(Fault("hang", first=count))
    wires = [await Wire.to(balancer) for _ in range(count)]
    for number, wire in enumerate(wires):
        wire.send(post(chat(f"held {number}")))
    await node.wait_for(lambda: hang.hits == count)
    return wires


@pytest.mark.parametrize("bound", ["node", "model"])
async def test_a_full_queue_is_503_and_a_place_in_it_is_bounded_in_time(
    node: FakeNode, serve: Serve, bound: str
) -> None:
    limit = {"max_in_flight": 2} if bound == "node" else {}
    models = [{"name": MODEL, "max_in_flight": 2}] if bound == "model" else []
    balancer = await serve(
        {"url": node.url, "models": [MODEL], **limit}, models=models, queue={"max_waiting": 1, "max_wait_s": 0.5}
    )
    wires = await held(node, balancer, 2)
    waiting = await Wire.to(balancer)
    waiting.send(post(different(1)))
    await balancer.wait_for(lambda: len(balancer.app.port.working()) == 3)
    full = await ask(balancer, different(2))
    assert (full.status, full.code, full.header("x-balancer-attempts")) == (503, "queue_full", "0")
    assert int(full.header("retry-after") or 0) >= 1
    late = await waiting.answer()
    assert (late.status, late.code) == (503, "queue_timeout")
    assert int(late.header("retry-after") or 0) >= 1
    assert len(node.requests) == 2
    node.faults.release()
    assert [(await wire.answer()).status for wire in wires] == [200, 200]
    assert (await ask(balancer, different(3))).status == 200


async def test_a_deadline_that_passes_in_the_queue_is_504(node: FakeNode, serve: Serve) -> None:
    balancer = await serve({"url": node.url, "models": [MODEL], "max_in_flight": 1})
    await held(node, balancer, 1)
    answer = await ask(balancer, different(), CHAT, "X-Balancer-Timeout-S: 0.1")
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    assert len(node.requests) == 1


async def test_who_waits_goes_by_priority_and_then_by_turn(node: FakeNode, serve: Serve) -> None:
    balancer = await serve({"url": node.url, "models": [MODEL], "max_in_flight": 1})
    first = (await held(node, balancer, 1))[0]
    wires = []
    order = ["low", "normal", "high", "", "low", "High"]
    for number, priority in enumerate(order):
        wires.append(await Wire.to(balancer))
        lines = [f"X-Balancer-Priority: {priority}"] if priority else []
        wires[-1].send(post(chat(f"{number}"), CHAT, *lines))
        await balancer.wait_for(lambda number=number: len(balancer.app.port.working()) == number + 2)  # type: ignore[misc]
    node.faults.release()
    assert (await first.answer()).status == 200
    assert [(await wire.answer()).status for wire in wires] == [200] * len(wires)
    asked = [request.json()["messages"][0]["content"] for request in node.requests]
    assert asked == ["held 0", "2", "5", "1", "3", "0", "4"]


async def test_a_nodes_max_in_flight_is_never_passed(serve: Serve) -> None:
    async with FakeNode(ttft_s_per_token=0.0, itl_s=0.001, slots=2) as node:
        balancer = await serve({"url": node.url, "models": [MODEL], "max_in_flight": 2})
        seen: set[int] = set()
        watching = asyncio.create_task(node.wait_for(lambda: seen.add(node.in_flight) or False, 60.0))
        assert await statuses(balancer, 20) == {200: 20}
        watching.cancel()
        assert max(seen) == 2
        assert len(node.requests) == 20
