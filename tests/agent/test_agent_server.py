"""The agent port over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from agent_fakes import ManualClock, fake_engine, watching
from aiohttp import web

from node_agent.derive import Identity
from node_agent.engine import EngineWatch
from node_agent.gpu_watch import NoGpus
from node_agent.metrics import registry
from node_agent.sampler import Sampler
from node_agent.server import AgentServer, _is_loopback


class Port:
    """A running agent port, and a client of it."""

    def __init__(self, url: str, sampler: Sampler, session: aiohttp.ClientSession) -> None:
        self.url, self.sampler, self._session = url, sampler, session

    async def ask(self, method: str, path: str, **more: Any) -> tuple[int, Any, Any]:
        async with self._session.request(method, self.url + path, **more) as response:
            is_json = response.content_type == "application/json"
            return response.status, await response.json() if is_json else await response.text(), response.headers


@asynccontextmanager
async def port(clock: ManualClock, *engines: EngineWatch, drain_token: str | None = None) -> AsyncIterator[Port]:
    sampler = Sampler(Identity(host="h", boot_id="b", interval_s=1.0), engines, NoGpus(), clock, patience_s=20.0)
    runner = web.AppRunner(AgentServer(sampler, registry(sampler, []), drain_token).app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Port(f"http://127.0.0.1:{runner.addresses[0][1]}", sampler, session)
    finally:
        await runner.cleanup()
        await sampler.close()


async def test_report_is_the_latest_with_its_age_as_of_the_answer(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch, port(clock, watch) as agent:
        await agent.sampler.look()
        asked = len(engine.asked)
        clock.advance(0.25)
        status, report, headers = await agent.ask("GET", "/v1/report")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert (report["version"], report["age_s"], report["nodes"][0]["running"]) == (1, 0.25, 14)
        assert len(engine.asked) == asked  # nothing is scraped on request


async def test_report_before_the_first_look_is_not_made_up(clock: ManualClock) -> None:
    async with port(clock) as agent:
        status, body, headers = await agent.ask("GET", "/v1/report")
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "first look" in body["error"]


async def test_drain_and_undrain(clock: ManualClock) -> None:
    async with port(clock) as agent:
        assert (await agent.ask("POST", "/v1/drain"))[:2] == (200, {"drain": True})
        assert (await agent.ask("GET", "/v1/report"))[1]["drain"] is True
        assert (await agent.ask("POST", "/v1/drain"))[:2] == (200, {"drain": True})
        assert (await agent.ask("POST", "/v1/undrain"))[:2] == (200, {"drain": False})
        assert (await agent.ask("GET", "/v1/report"))[1]["drain"] is False


async def test_drain_needs_the_token_where_one_is_set(clock: ManualClock) -> None:
    async with port(clock, drain_token="s3cret") as agent:
        await agent.sampler.look()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            status, body, answer = await agent.ask("POST", "/v1/drain", headers=headers)
            assert (status, answer["WWW-Authenticate"]) == (401, "Bearer")
            assert "s3cret" not in body["error"]
        assert (await agent.ask("GET", "/v1/report"))[1]["drain"] is False
        assert (await agent.ask("POST", "/v1/drain", headers={"Authorization": "Bearer s3cret"}))[0] == 200


@pytest.mark.parametrize(
    ("remote", "local"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.7", False),
        ("fe80::1%eth0", False),
        (None, False),
    ],
)
def test_only_callers_of_this_machine_drain_without_a_token(remote: str | None, local: bool) -> None:
    assert _is_loopback(remote) is local


async def test_healthz_is_good_while_reports_are_made(clock: ManualClock) -> None:
    async with port(clock) as agent:
        await agent.sampler.look()
        assert (await agent.ask("GET", "/healthz"))[:2] == (200, {"status": "ok"})
        clock.advance(30.5)
        assert (await agent.ask("GET", "/healthz"))[:2] == (503, {"status": "stalled", "silence_s": 30.5})
        await agent.sampler.look()
        assert (await agent.ask("GET", "/healthz"))[0] == 200


async def test_unknown_paths_and_methods_are_json_errors(clock: ManualClock) -> None:
    async with port(clock) as agent:
        assert (await agent.ask("GET", "/nope"))[:2] == (404, {"error": "Not Found"})
        status, body, headers = await agent.ask("GET", "/v1/drain")
        assert (status, body, headers["Allow"]) == (405, {"error": "Method Not Allowed"}, "POST")


async def test_metrics_are_prometheus_text(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch, port(clock, watch) as agent:
        await agent.sampler.look()
        status, text, headers = await agent.ask("GET", "/metrics")
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain")
        assert 'node_agent_node_running_requests{node="a"} 14.0' in text


async def test_answers_do_not_wait_for_an_engine(clock: ManualClock) -> None:
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch, port(clock, watch) as agent:
        await agent.sampler.look()
        engine.held = {"/metrics": asyncio.Event(), "/health": asyncio.Event()}
        watch.begin_visit()
        assert (await agent.ask("GET", "/v1/report"))[0] == 200
        assert (await agent.ask("GET", "/metrics"))[0] == 200
