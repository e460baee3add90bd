"""The command as an operator starts and stops it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from agent_fakes import FakeBalancer, fake_engine

from node_agent.push import PATH

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("NODE_AGENT_")}
NO_GPUS = {"NODE_AGENT_GPU__ENABLED": "false"}


async def started(*arguments: str, **environment: str) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "node_agent", *arguments, stdout=PIPE, stderr=PIPE, env={**ENVIRONMENT, **environment}
    )


async def ended(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run a command that ends by itself; returns its exit code and what it said on stderr."""
    process = await started(*arguments, **environment)
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, (err or out).decode()


@asynccontextmanager
async def serving(*arguments: str, **environment: str) -> AsyncIterator[tuple[Process, dict[str, Any]]]:
    """A running agent on a free port, and its `agent.started` line."""
    process = await started("serve", "--listen", "127.0.0.1:0", *arguments, **environment)
    try:
        yield process, await event(process, "agent.started")
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def event(process: Process, name: str) -> dict[str, Any]:
    """Read log lines until that event."""
    assert process.stderr is not None
    async for line in process.stderr:
        entry = json.loads(line)
        if entry["event"] == name:
            return dict(entry)
    raise AssertionError(f"the agent ended without {name}")


@asynccontextmanager
async def fake_balancer() -> AsyncIterator[FakeBalancer]:
    balancer = FakeBalancer()
    balancer.answer(PATH, b"", status=204)
    await balancer.start()
    try:
        yield balancer
    finally:
        await balancer.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_agent_serves_pushes_and_stops_cleanly(number: signal.Signals) -> None:
    async with (
        fake_engine("vllm") as engine,
        fake_balancer() as balancer,
        serving("--engine", f"{engine.url},id=a", "--balancer", balancer.url, **NO_GPUS) as (process, line),
    ):
        assert (line["level"], line["engines"]) == ("info", ["a"])
        pushed = await balancer.reports.get()
        assert (pushed["nodes"][0]["id"], pushed["nodes"][0]["running"], pushed["gpus"]) == ("a", 14, [])
        assert pushed["nodes"][0]["gpu_memory_utilization"] is None
        async with aiohttp.ClientSession() as session, session.get(f"{line['url']}/v1/report") as response:
            report = await response.json()
        assert report["boot_id"] == pushed["boot_id"] == line["boot_id"]
        process.send_signal(number)
        await event(process, "agent.stopped")
        assert await process.wait() == 0


async def test_engine_s_processes_are_found_and_its_gpu_read_through_nvml(nvml_stub: Path, tmp_path: Path) -> None:
    # The fake engine runs in this very process: to the stub it holds 5 GB of GPU 0, and somebody else 10 GB.
    state = tmp_path / "state"
    state.write_text(
        f"count 2\ngpu0.mem_used {20 << 30}\ngpu0.temp 55\ngpu0.procs 2\ngpu0.pid0 {os.getpid()}\n"
        f"gpu0.pidmem0 {5 << 30}\ngpu0.pid1 999999\ngpu0.pidmem1 {10 << 30}\ngpu1.error 15\n"
    )
    driver = {"LD_LIBRARY_PATH": str(nvml_stub), "NVML_STUB_STATE": str(state), "NODE_AGENT_GPU__DEADLINE_S": "10"}
    async with (
        fake_engine("vllm") as engine,
        fake_balancer() as balancer,
        serving("--engine", f"{engine.url},id=a,gpus=0", "--balancer", balancer.url, **driver),
    ):
        report = await balancer.reports.get()
    one, lost = report["gpus"]
    assert (one["temperature_celsius"], one["memory_used_by_others_bytes"]) == (55, 10 << 30)
    assert one["problems"] == ["foreign_memory"]
    assert lost["problems"] == ["gpu_lost"]
    assert report["nodes"][0]["gpu_memory_utilization"] == 0.25
    assert report["nodes"][0]["problems"] == ["foreign_memory"]


async def test_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = await ended("serve", "--engine", "http://127.0.0.1:1", "--listen", listen, **NO_GPUS)
    assert (code, said) == (1, f"gpu-node-agent: cannot listen on {listen}: address already in use\n")


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--engine", "foo"], {}, "engines: engine 'foo': its URL must look like http://HOST:PORT"),
        ([], {}, "engines: none given; name at least one, such as --engine http://127.0.0.1:8000"),
        (
            ["--engine", "http://127.0.0.1:1"],
            {"NODE_AGENT_INTERVL_S": "1"},
            "unknown setting NODE_AGENT_INTERVL_S; did you mean NODE_AGENT_INTERVAL_S?",
        ),
    ],
)
async def test_what_cannot_be_used_stops_the_start_with_its_name(
    arguments: list[str], environment: dict[str, str], said: str
) -> None:
    assert await ended("serve", *arguments, **environment) == (2, f"gpu-node-agent: {said}\n")


async def test_misuse_of_the_command_line_is_explained() -> None:
    code, said = await ended("serve", "--enginee", "http://127.0.0.1:1")
    assert code == 2
    assert "unrecognized arguments: --enginee" in said


async def test_help_names_every_option() -> None:
    code, said = await ended("serve", "--help")
    assert code == 0
    assert all(option in said for option in ("--engine", "--listen", "--balancer", "--config", "gpus=0+1"))
