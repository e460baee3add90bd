"""Agents' reports: polled on real sockets, pushed, matched to nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from random import Random
from typing import Any

import pytest
from structlog.testing import capture_logs

from balancer.clock import SystemClock
from balancer.core.health import NodeReport, Verdict
from balancer.errors import BadRequest
from balancer.health_feed import MAX_BYTES, UNMATCHED_SOURCES, HealthFeed, match
from balancer.settings import AgentsConfig
from tests.answering import SILENT, Answering, Fleet, dead_url
from tests.fakes import ManualClock

REPORT = "/v1/report"
# The interval, and with it the time-out of a poll, where a slow machine must not make an agent look silent.
PATIENT_S = 0.3


def report(*nodes: dict[str, Any], seq: int = 1, boot_id: str = "boot", **fields: Any) -> dict[str, Any]:
    return {"version": 1, "host": "gpu-7", "boot_id": boot_id, "seq": seq, "age_s": 0.0, "nodes": list(nodes), **fields}


def sampled(*nodes: dict[str, Any], **fields: Any) -> tuple[int, Callable[[], dict[str, Any]]]:
    """What an agent that samples all the time answers: each report newer than the one before."""
    seqs = count(1)
    return 200, lambda: report(*nodes, seq=next(seqs), **fields)


@asynccontextmanager
async def feeding(fleet: Fleet, stale_s: float = 5.0, interval_s: float = 0.04) -> AsyncIterator[HealthFeed]:
    feed = new_feed(fleet, stale_s, interval_s)
    await feed.start()
    try:
        yield feed
    finally:
        await feed.close()


def new_feed(fleet: Fleet, stale_s: float = 5.0, interval_s: float = 0.04, clock: Any = None) -> HealthFeed:
    agents = AgentsConfig(interval_s=interval_s, stale_s=stale_s)
    return HealthFeed(fleet.registry, agents, clock or SystemClock(), Random(1), fleet.metrics)


# -- whose report it is


def test_reports_belong_by_id_then_by_url_then_one_to_one() -> None:
    fleet = Fleet()
    a, b = fleet.put("http://10.0.0.7:8000", id="a"), fleet.put("http://10.0.0.7:8001/", id="b")
    by_id = NodeReport(id="a", url="http://10.0.0.7:8001")
    by_url = NodeReport(id="x", url="http://10.0.0.7:8001")
    stranger = NodeReport(id="y", url="http://127.0.0.1:8000")
    found = match([by_url, stranger, by_id], [a, b])
    assert dict(found.pairs) == {a: by_id, b: by_url}
    assert found.unmatched == (stranger,)
    assert match([stranger], [a]).pairs == ((a, stranger),)
    assert match([stranger], [a, b]).pairs == ()
    assert match([stranger, by_id], [a]).pairs == ((a, by_id),)


def test_two_reports_never_fall_to_one_node() -> None:
    fleet = Fleet()
    a = fleet.put("http://10.0.0.7:8000", id="a")
    first, second = NodeReport(id="a", url=""), NodeReport(id="a", url="http://10.0.0.7:8000")
    found = match([first, second], [a])
    assert found.pairs == ((a, first),)
    assert found.unmatched == (second,)


def test_a_node_without_an_agent_of_its_own_is_found_by_name_and_never_by_exclusion() -> None:
    fleet = Fleet()
    own, other = fleet.put("http://10.0.0.7:8000", id="a"), fleet.put("http://10.0.0.7:8001", id="b")
    named, stranger = NodeReport(id="b", url=""), NodeReport(id="y", url="")
    assert match([named], [own], [other]).pairs == ((other, named),)
    assert match([stranger], [own], [other]).pairs == ((own, stranger),)
    assert match([stranger], [], [other]).pairs == ()


# -- polling


async def test_one_poll_of_an_agent_feeds_all_its_nodes() -> None:
    fleet = Fleet()
    hot = {"id": "b", "url": "", "problems": ["thermal_throttle"]}
    async with Answering({REPORT: sampled({"id": "a", "queue_depth": 3}, hot)}) as agent:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=agent.url)
        b = fleet.put("http://10.0.0.7:8001", id="b", agent=f"{agent.url}/")
        with capture_logs() as logs:
            async with feeding(fleet):
                await fleet.until(lambda: a.health.verdict is Verdict.OK and b.health.verdict is Verdict.DEGRADED)
                await agent.asked_for(REPORT, 4)
        assert a.report is not None
        assert a.report.queue_depth == 3
        assert [log["agent"] for log in logs if log["event"] == "agent.reached"] == [agent.url]
        assert len({asked.path for asked in agent.asked}) == 1


async def test_an_agent_of_another_host_cannot_take_a_node_by_its_name() -> None:
    fleet = Fleet()
    async with Answering({REPORT: sampled({"id": "a"}, {"id": "b"})}) as one, Answering() as two:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=one.url)
        b = fleet.put("http://10.0.0.8:8000", id="b", agent=two.url)
        async with feeding(fleet) as feed:
            await fleet.until(lambda: a.report is not None)
            await one.asked_for(REPORT, 2)
            assert b.report is None
            assert feed.unmatched == [{"source": one.url, "host": "gpu-7", "id": "b", "url": ""}]


async def test_unmatched_reports_are_shown_while_they_last_and_counted() -> None:
    fleet = Fleet()
    known, stranger = {"id": "a"}, {"id": "z", "url": "http://127.0.0.1:1"}
    async with Answering({REPORT: sampled(known, stranger)}) as agent:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=agent.url)
        async with feeding(fleet) as feed:
            await fleet.until(lambda: a.report is not None)
            await agent.asked_for(REPORT, 3)
            assert feed.unmatched == [{"source": agent.url, "host": "gpu-7", "id": "z", "url": "http://127.0.0.1:1"}]
            assert b"balancer_unmatched_report_nodes_total 0.0" not in fleet.metrics.exposition()
            agent.answers[REPORT] = sampled(known)
            await agent.asked_for(REPORT, 2)
            assert feed.unmatched == []
            agent.answers[REPORT] = sampled(known, stranger)
            await agent.asked_for(REPORT, 2)
            fleet.registry.remove(a.id)
            other = Answering({REPORT: sampled({"id": "c"})})
            async with other:
                fleet.put("http://10.0.0.9:8000", id="c", agent=other.url)
                await other.asked_for(REPORT, 2)
                assert feed.unmatched == [], "nobody names that agent any more"


async def test_a_silent_agent_makes_its_nodes_unknown_and_never_down() -> None:
    fleet = Fleet(stale_s=0.6)
    async with Answering({REPORT: sampled({"id": "a", "problems": ["gpu_lost"]})}) as agent:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=agent.url)
        with capture_logs() as logs:
            async with feeding(fleet, stale_s=0.6, interval_s=PATIENT_S):
                await fleet.until(lambda: a.known_down)
                agent.answers[REPORT] = SILENT
                await fleet.until(lambda: a.report is None)
                assert a.health.verdict is Verdict.UNKNOWN
                assert not a.known_down
                await agent.asked_for(REPORT, 3)
                agent.answers[REPORT] = sampled({"id": "a"}, boot_id="next")
                await fleet.until(lambda: a.health.verdict is Verdict.OK)
        events = [log["event"] for log in logs if log.get("agent") == agent.url]
        assert events == ["agent.reached", "agent.lost", "agent.reached"]
        lost = [log for log in logs if log["event"] == "agent.lost"]
        assert [log.get("node") for log in lost if "node" in log] == ["a"], "once, on the edge"
        assert [log["reason"] for log in lost if "agent" in log] == ["timeout"]


async def test_a_missed_poll_is_not_worth_a_line() -> None:
    fleet = Fleet()
    async with Answering({REPORT: sampled({"id": "a"})}) as agent:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=agent.url)
        with capture_logs() as logs:
            async with feeding(fleet):
                await fleet.until(lambda: a.report is not None)
                seen = len(logs)
                agent.answers[REPORT] = 503
                await agent.asked_for(REPORT, 2)
                agent.answers[REPORT] = sampled({"id": "a", "problems": ["clock_low"]}, boot_id="next")
                await fleet.until(lambda: a.health.verdict is Verdict.DEGRADED)
        assert [log["event"] for log in logs[seen:]] == ["node.judged"]


async def test_a_sampler_that_hangs_is_a_silent_agent() -> None:
    fleet = Fleet(stale_s=0.2)
    async with Answering({REPORT: (200, report({"id": "a"}, seq=7))}) as agent:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=agent.url)
        async with feeding(fleet, stale_s=0.2):
            await fleet.until(lambda: a.report is not None)
            await fleet.until(lambda: a.report is None)
            await agent.asked_for(REPORT, 3)
            assert a.report is None, "the same report again is no news"


async def test_an_answer_that_is_no_report_is_an_unreachable_agent_said_once() -> None:
    answers = {
        "status_500": 500,
        "status_302": 302,
        "too_large": (200, b" " * (MAX_BYTES + 1)),
        "bad_report: unexpected": (200, b"<html>"),
        "bad_report: not a HostReport of version 1": (200, {"version": 2}),
        "bad_report: gpus": (200, {"version": 1, "gpus": 5}),
        "bad_report: queue_depth": (200, {"version": 1, "nodes": [{"queue_depth": "3"}]}),
    }
    fleet = Fleet()
    async with AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(Answering({REPORT: answer})) for answer in answers.values()]
        nodes = [fleet.put(f"http://10.0.0.7:{agent.port}", agent=agent.url) for agent in agents]
        logs = stack.enter_context(capture_logs())
        await stack.enter_async_context(feeding(fleet, interval_s=PATIENT_S))
        await asyncio.gather(*(agent.asked_for(REPORT, 3) for agent in agents))
        for agent in agents:
            agent.answers[REPORT] = sampled({"id": "a"})
        await fleet.until(lambda: all(node.report is not None for node in nodes))
    for agent, reason in zip(agents, answers, strict=True):
        told = [log for log in logs if log.get("agent") == agent.url]
        assert [log["event"] for log in told] == ["agent.unreachable", "agent.reached"]
        assert told[0]["reason"].startswith(reason)


async def test_an_agent_that_never_listened_changes_nothing() -> None:
    fleet = Fleet()
    async with Answering({REPORT: sampled({"id": "b"})}) as agent:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=dead_url())
        fleet.put("http://10.0.0.8:8000", id="b", agent=agent.url)
        async with feeding(fleet):
            await agent.asked_for(REPORT, 4)
        assert a.health.verdict is Verdict.UNKNOWN
        assert not a.judged


async def test_an_agents_drain_drains_its_nodes() -> None:
    fleet = Fleet()
    async with Answering({REPORT: sampled({"id": "a"}, drain=True)}) as agent:
        a = fleet.put("http://10.0.0.7:8000", id="a", agent=agent.url)
        async with feeding(fleet):
            await fleet.until(lambda: a.drained)
            agent.answers[REPORT] = sampled({"id": "a"}, boot_id="next")
            await fleet.until(lambda: not a.drained)


# -- pushes


def test_a_push_is_matched_over_the_whole_fleet_and_adds_no_node() -> None:
    fleet = Fleet()
    a, b = fleet.put("http://10.0.0.7:8000", id="a"), fleet.put("http://10.0.0.8:8000", id="b")
    feed = new_feed(fleet)
    assert feed.accept_push(report({"id": "a"}, {"id": "", "url": "http://10.0.0.8:8000/"}, {"id": "z"})) == 2
    assert a.report is not None
    assert b.report is not None
    assert set(fleet.registry.nodes) == {"a", "b"}
    assert [entry["source"] for entry in feed.unmatched] == ["push from gpu-7"]


def test_older_and_equal_reports_of_one_life_are_dropped_and_a_new_life_begins_anew() -> None:
    clock = ManualClock()
    fleet = Fleet(now=clock.now)
    a = fleet.put("http://10.0.0.7:8000", id="a")
    feed = new_feed(fleet, clock=clock)

    def depth_after(depth: int, **fields: Any) -> float | None:
        assert feed.accept_push(report({"id": "a", "queue_depth": depth}, **fields)) == 1
        return a.report.queue_depth if a.report else None

    assert depth_after(1, seq=5) == 1
    assert depth_after(2, seq=5) == 1
    assert depth_after(3, seq=4) == 1
    assert depth_after(4, seq=6) == 4
    assert depth_after(5, seq=1, boot_id="next") == 5
    assert depth_after(6, seq=1, boot_id="") == 6
    assert depth_after(7, seq=1, boot_id="") == 7, "an agent that does not say which life it is in is believed"


def test_a_reports_age_is_the_agents_own_count() -> None:
    clock = ManualClock()
    fleet = Fleet(now=clock.now)
    a = fleet.put("http://10.0.0.7:8000", id="a")
    new_feed(fleet, clock=clock).accept_push(report({"id": "a"}, age_s=2.5))
    assert a.report_at_s == clock.now() - 2.5


@pytest.mark.parametrize("data", [None, [], {}, {"version": 1, "nodes": 3}, {"version": 1, "nodes": [{"problems": 5}]}])
def test_a_push_that_is_no_report_is_refused(data: object) -> None:
    with pytest.raises(BadRequest):
        new_feed(Fleet()).accept_push(data)


def test_what_pushes_leave_to_be_seen_is_bounded() -> None:
    fleet = Fleet()
    feed = new_feed(fleet)
    for number in range(UNMATCHED_SOURCES + 10):
        feed.accept_push(report(*({"id": "z" * 1000} for _ in range(100)), host=f"h{number}"))
    assert len({entry["source"] for entry in feed.unmatched}) == UNMATCHED_SOURCES
    assert max(len(entry["id"]) for entry in feed.unmatched) == 256


async def test_a_pushing_agent_that_falls_silent_is_unknown_too() -> None:
    fleet = Fleet(stale_s=0.1)
    a = fleet.put("http://10.0.0.7:8000", id="a")
    async with feeding(fleet, stale_s=0.1) as feed:
        feed.accept_push(report({"id": "a"}))
        assert a.health.verdict is Verdict.OK
        await fleet.until(lambda: a.report is None)
