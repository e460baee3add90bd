"""Why a request went where it went: by the admin API, and by `gpu-balancer explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from balancer.cli import main
from balancer.core.cost import PRICES
from loadtest.fake_node import FakeNode
from loadtest.faults import Fault
from tests.answering import dead_url
from tests.client import Client, chat, client_of, fleet, instant_nodes
from tests.harness import Balancer, running
from tests.integration.test_routing_in_action import DEFAULT, equal, ready
from tests.process import Process


async def told_of(balancer: Balancer, client: Client, id_: str) -> Any:
    reply = await client.get(f"{balancer.ops_url}/admin/requests/{id_}")
    assert reply.status == 200
    return reply.json


async def test_every_attempt_tells_its_candidates_their_prices_and_the_choice() -> None:
    async with instant_nodes(3) as nodes, ready(*fleet(*nodes)) as (balancer, client):
        await client.many(20)
        nodes[0].faults.add(Fault("status", status=500, first=1, path="/v1/chat/completions"))
        reply = await client.post(chat("explain me"), headers={"X-Request-Id": "r"})
        assert (reply.node, reply.attempts) == ("b", 2)

        first, second = (await told_of(balancer, client, "r"))["choices"]
        assert [(choice["node"], choice["outcome"]) for choice in (first, second)] == [
            ("a", "server_error"),
            ("b", "ok"),
        ]
        assert first["at_s"] <= second["at_s"]
        assert {node["node"]: node["chosen"] for node in first["candidates"]} == {"a": True, "b": False, "c": False}
        for node in first["candidates"]:
            assert set(PRICES) <= set(node["terms_s"])
            assert node["cost_s"] == pytest.approx(sum(node["terms_s"].values()), abs=1e-5)
            assert node["ages_s"]["pace"] is None or node["ages_s"]["pace"] >= 0.0
            assert node["inputs"]["uncached_tokens"] >= 1.0
        assert second["dropped"] == {"a": "tried"}
        assert {node["node"] for node in second["candidates"]} == {"b", "c"}


async def test_every_other_node_says_what_dropped_it() -> None:
    async with instant_nodes(4) as nodes:
        sick = [
            {"id": "gone", "url": dead_url(), "models": ["sim-model"]},
            {"id": "other", "url": nodes[0].url, "models": ["other-model"]},
        ]
        async with (
            running(*equal(*nodes), *sick, **{**DEFAULT, "breaker": {"open_s": 1000.0}}) as balancer,
            client_of(balancer.url) as client,
        ):
            await balancer.wait_for(lambda: balancer.node("gone").check_up is False)
            registry, now = balancer.app.registry, balancer.app._clock.now()
            registry.drain(balancer.node("b").id, drained=True)
            registry.blocked(balancer.node("c"), 1000.0, 429, now)
            breaker = balancer.node("d").breaker
            for _ in range(5):
                breaker.record(breaker.unguarded(), False, now)
            registry.touch()
            reply = await client.post(chat(), headers={"X-Request-Id": "r"})
            (choice,) = (await told_of(balancer, client, "r"))["choices"]
            assert choice["dropped"]["b"] == "drained"
            assert choice["dropped"]["c"] == "blocked"
            assert choice["dropped"]["gone"] == "down"
            assert choice["dropped"]["other"] == "other_model"
            assert choice["panic"] is True, "one of five is left, so breakers are ignored"
            assert reply.node in ("a", "d")


async def test_a_request_that_nobody_could_take_says_why() -> None:
    async with FakeNode(instant=True) as node, ready(*equal(node)) as (balancer, client):
        balancer.app.registry.drain(balancer.node("a").id, drained=True)
        reply = await client.post(chat(), headers={"X-Request-Id": "r"})
        assert reply.status == 503
        (choice,) = (await told_of(balancer, client, "r"))["choices"]
        assert (choice["node"], choice["candidates"], choice["dropped"]) == (None, [], {"a": "drained"})


async def test_a_full_node_is_named_as_such() -> None:
    async with instant_nodes(2) as nodes:
        for node in nodes:
            node.faults.add(Fault("hang", path="/v1/chat/completions"))
        async with ready(*fleet(*nodes, max_in_flight=1)) as (balancer, client):
            tasks = []
            for at, node in enumerate(nodes):
                tasks.append(client.begin(chat(f"{at}"), headers={"X-Request-Id": f"r{at}"}))
                await node.wait_for(lambda node=node: node.in_flight == 1)
            for node in nodes:
                node.faults.release()
            for task in tasks:
                assert (await task).is_whole
            (choice,) = (await told_of(balancer, client, "r1"))["choices"]
            assert (choice["node"], choice["dropped"]) == ("b", {"a": "full"})


async def test_nodes_show_what_a_nominal_request_would_cost_there() -> None:
    async with instant_nodes(2) as nodes, ready(*fleet(*nodes)) as (balancer, client):
        await client.many(20)
        shown = (await client.get(f"{balancer.ops_url}/admin/nodes")).json["nodes"]
        for node in shown:
            assert set(PRICES) <= set(node["prices"]["terms_s"])
            assert node["prices"]["cost_s"] == pytest.approx(sum(node["prices"]["terms_s"].values()), abs=1e-5)
            assert node["prices"]["ages_s"]["report"] is None
        one = (await client.get(f"{balancer.ops_url}/admin/nodes/a")).json
        assert one["prices"]["node"] == "a"
    async with (
        instant_nodes(2) as nodes,
        ready(*equal(*nodes), routing={"policy": "round_robin"}) as (balancer, client),
    ):
        assert (await client.get(f"{balancer.ops_url}/admin/nodes/a")).json["prices"] is None


# -- the command


async def explain(balancer: Balancer, *arguments: str) -> tuple[int, list[str], list[str]]:
    ops = balancer.ops_url.removeprefix("http://")
    async with await Process.start("balancer", "explain", *arguments, "--ops", ops) as process:
        status = await process.ended()
        return status, process.out, process.err


async def test_the_command_prints_a_table_for_each_attempt() -> None:
    async with instant_nodes(3) as nodes, ready(*fleet(*nodes)) as (balancer, client):
        nodes[0].faults.add(Fault("status", status=500, first=1, path="/v1/chat/completions"))
        await client.post(chat(), headers={"X-Request-Id": "a/strange id?".replace(" ", "-")})
        status, out, _ = await explain(balancer, "a/strange-id?")
        assert status == 0
        assert out[0].startswith("a/strange-id?: chat sim-model, tenant anonymous")
        heads = [line for line in out if line.startswith("attempt ")]
        assert [head.split(",")[0] for head in heads] == ["attempt 1: a", "attempt 2: b"]
        assert "server_error" in heads[0]
        rows = out[out.index(heads[1]) + 1 :]
        assert rows[0].split()[:2] == ["node", "cost"]
        assert rows[1].startswith("*  b")
        assert "tried" in rows[-1]
        widths = {len(line) for line in rows[:3]}
        assert len(widths) == 1, "columns are aligned"


async def test_the_command_prints_json_as_the_admin_api_tells_it() -> None:
    async with instant_nodes(2) as nodes, ready(*equal(*nodes), routing={"policy": "weighted"}) as (balancer, client):
        await client.post(chat(), headers={"X-Request-Id": "r"})
        status, out, _ = await explain(balancer, "r", "--json")
        assert status == 0
        assert json.loads("\n".join(out)) == await told_of(balancer, client, "r")
        status, out, _ = await explain(balancer, "r")
        assert status == 0
        assert any(line.split()[:3] == ["node", "in", "flight"] for line in out)


async def test_an_unknown_request_is_told_in_a_line(tmp_path: Path) -> None:
    async with FakeNode(instant=True) as node, ready(*equal(node)) as (balancer, _):
        status, out, err = await explain(balancer, "nobody")
        assert (status, out) == (1, [])
        assert err == ["gpu-balancer: nobody: this request is not, or no longer, remembered"]


def test_a_port_where_nobody_listens_is_told_in_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    address = dead_url().removeprefix("http://")
    with pytest.raises(SystemExit) as ended:
        main(["explain", "r", "--ops", address])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(f"gpu-balancer: {address}: ")
    with pytest.raises(SystemExit) as ended:
        main(["explain", "r", "--key-file", str(tmp_path / "absent")])
    assert ended.value.code == 2
