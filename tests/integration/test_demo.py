"""The demo as somebody runs it: real processes, one of them killed, and none left behind."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from tests.process import Process

# Eight programs start at once, on two cores that run other tests too.
STARTED_WITHIN_S = 60.0
ENDED_WITHIN_S = 120.0
MARK = "DEMO_TEST_MARK"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found in /proc")


class RunningDemo:
    """A demo in a process of its own; its children are known by a mark in their environment."""

    def __init__(self, process: Process, mark: str) -> None:
        self.process = process
        self._mark = f"{MARK}={mark}".encode()

    @property
    def said(self) -> str:
        return "\n".join(self.process.out)

    def children(self) -> dict[int, str]:
        """Every process that it started and that is still there, with its command line."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != self.process.pid:
                try:
                    if self._mark in (folder / "environ").read_bytes().split(b"\0"):
                        found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:  # it ended just now
                    continue
        return found

    async def traffic_begins(self) -> None:
        await self.process.until(lambda: "Traffic begins" in self.said, STARTED_WITHIN_S)


@asynccontextmanager
async def demo(folder: Path, *arguments: str) -> AsyncIterator[RunningDemo]:
    """Three nodes; `folder` takes what a demo that is killed leaves behind."""
    mark = uuid4().hex
    environment = {MARK: mark, "TMPDIR": str(folder)}
    async with await Process.start("balancer", "demo", "--nodes", "3", *arguments, environment=environment) as process:
        yield RunningDemo(process, mark)


async def gone(pid: int) -> None:
    """Until a process that is no child of ours has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


async def test_a_killed_node_costs_no_request_that_had_not_begun_to_answer(tmp_path: Path) -> None:
    async with demo(tmp_path, "--seconds", "12") as running:
        status = await running.process.ended(ENDED_WITHIN_S)
        assert (status, running.process.err) == (0, []), running.said
        killed = re.search(r"killed node (sim-\d) \(kill -9, pid (\d+)\) with (\d+) requests? running", running.said)
        assert killed, running.said
        name, pid, in_flight = killed.groups()
        assert int(in_flight) >= 1
        again = re.search(rf"started {name} again \(pid (\d+)\).* 0 failed before their first byte", running.said)
        assert again, running.said
        assert again[1] != pid
        assert f"{name} is back" in running.said
        assert re.search(r"in all: requests [1-9]\d*, failed 0,", running.said)
        assert running.children() == {}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
async def test_the_command_it_shows_gets_a_stream(tmp_path: Path) -> None:
    async with demo(tmp_path) as running:
        await running.traffic_begins()
        shown = next(line for line in running.process.out if line.strip().startswith("curl "))
        curl = await asyncio.create_subprocess_exec(*shlex.split(shown), stdout=asyncio.subprocess.PIPE)
        out, _ = await curl.communicate()
    assert out.startswith(b"data: {")
    assert out.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_told_to_end_it_takes_all_its_processes_along(tmp_path: Path, number: signal.Signals) -> None:
    async with demo(tmp_path) as running:
        await running.traffic_begins()
        assert len(running.children()) == 7
        running.process.send(number)
        assert await running.process.ended() == 0
        assert running.children() == {}
        assert running.process.err == []
        assert names_in(tmp_path) == []


async def test_killed_it_leaves_no_process_behind(tmp_path: Path) -> None:
    async with demo(tmp_path) as running:
        await running.traffic_begins()
        children = running.children()
        assert len(children) == 7
        running.process.kill()
        async with asyncio.timeout(STARTED_WITHIN_S):
            await asyncio.gather(*map(gone, children))


async def test_wrong_number_of_nodes_is_one_clear_line() -> None:
    async with await Process.start("balancer", "demo", "--nodes", "0") as process:
        assert await process.ended() == 2
        assert process.err == ["gpu-balancer: demo: --nodes and --seconds must be above 0"]
