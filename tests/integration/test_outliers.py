"""Nodes that are worse than their peers, on real requests: ejected, shown, and let back; and counts that drift."""

from __future__ import annotations

from collections import Counter
from typing import Any

from structlog.testing import capture_logs

from balancer.core.health import HostReport, NodeReport
from balancer.core.node import Node
from loadtest.faults import Fault
from tests.client import chat, client_of, fleet, instant_nodes
from tests.harness import QUIET, Balancer, running

# Everybody in turn, and no breaker: what leaves a node alone here is the comparison.
SETTINGS: dict[str, Any] = {
    **QUIET,
    "routing": {"policy": "round_robin"},
    "breaker": {"consecutive_failures": 10_000, "min_requests": 1_000_000},
    "retry": {"base_s": 0.001, "min_retries_per_s": 10_000.0},
}


def ejected(balancer: Balancer, id_: str) -> bool:
    return balancer.node(id_).ejections > 0


async def test_a_node_that_breaks_streams_is_ejected_shown_and_let_back() -> None:
    async with instant_nodes(4) as nodes:
        bad = nodes[0]
        bad.faults.add(Fault("reset", after_events=3, body_has='"stream": true', probability=0.5))
        outlier = {"eject_s": 2.0}
        async with running(*fleet(*nodes), **SETTINGS, outlier=outlier) as balancer, client_of(balancer.url) as client:
            with capture_logs() as logs:
                sent = 0
                while not ejected(balancer, "a"):
                    assert sent < 20_000
                    await client.many(80, lambda number: chat(f"{number}", stream=number % 3 == 0))
                    sent += 80
                shown = (await client.get(f"{balancer.ops_url}/admin/nodes/a")).json
                metrics = (await client.get(f"{balancer.ops_url}/metrics")).body
                before = len(bad.requests)
                assert all(reply.is_whole for reply in await client.many(40))
                assert len(bad.requests) == before, "it is left alone"
                bad.faults.clear()
                await balancer.wait_for(lambda: balancer.node("a").ejected_by == "")
                assert "a" in Counter(reply.node for reply in await client.many(40))
        assert (shown["state"], shown["eligible"], shown["ejected"]["by"]) == ("ejected", None, "broken_streams")
        assert b'balancer_node_state{node="a",state="ejected"} 1.0' in metrics
        events = [log for log in logs if log["event"] in ("node.ejected", "node.readmitted")]
        assert [log["event"] for log in events] == ["node.ejected", "node.readmitted"]
        assert events[0]["value"] > events[0]["others"] + 0.1


async def test_it_can_be_turned_off() -> None:
    async with instant_nodes(2) as nodes:
        nodes[0].faults.add(Fault("status", status=500))
        off = {"enabled": False}
        async with running(*fleet(*nodes), **SETTINGS, outlier=off) as balancer, client_of(balancer.url) as client:
            await client.many(60)
            balancer.app.registry.compare(balancer.node("a").answered_s + 1000.0)
            assert not ejected(balancer, "a")


def told(node: Node, running_: float, waiting: float) -> tuple[HostReport, NodeReport]:
    report = NodeReport(id=node.id, url=node.config.url, running=running_, queue_depth=waiting)
    host = HostReport(host="h", boot_id="b", seq=1, age_s=0.0, interval_s=1.0, drain=False, nodes=(report,))
    return host, report


async def test_drift_is_what_the_engine_does_not_know_of() -> None:
    async with instant_nodes(1) as (node,):
        node.faults.add(Fault("hang", body_has="held"))
        async with running(*fleet(node), **QUIET) as balancer, client_of(balancer.url) as client:
            held = [client.begin(chat(f"held {number}")) for number in range(3)]
            await node.wait_for(lambda: node.in_flight == 3)
            live = balancer.node("a")
            now = balancer.app.registry.started_s + 1.0
            balancer.app.registry.observe(live, *told(live, 1.0, 0.0), now)
            metrics = (await client.get(f"{balancer.ops_url}/metrics")).body
            assert b'balancer_node_in_flight_drift{node="a"} 2.0' in metrics
            node.faults.release()
            assert all([(await reply).is_whole for reply in held])


async def test_counts_that_nobody_stands_for_are_taken_off_and_the_room_is_given_away() -> None:
    async with (
        instant_nodes(1) as (node,),
        running(*fleet(node, max_in_flight=1), **QUIET) as balancer,
        client_of(balancer.url) as client,
    ):
        live, registry = balancer.node("a"), balancer.app.registry
        live.load.begin()  # as if its end had been lost
        waiting = client.begin(chat("waits"))
        await balancer.wait_for(lambda: len(balancer.app.port.working()) == 1)
        with capture_logs() as logs:
            for second in range(32):
                registry.true_up(live.answered_s + second if live.answered_s > 0 else 1e6 + second)
        assert (await waiting).is_whole
        assert [log["event"] for log in logs] == ["node.count_repaired"]
        assert live.load.rif == 0
