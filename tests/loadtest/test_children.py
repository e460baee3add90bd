"""Child processes and their ports."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loadtest.children import CannotRun, Child, Ports
from loadtest.clock import SystemClock

WITHIN_S = 20.0


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Child]:
    child = Child("node", "loadtest.fake_node", (), log=tmp_path / "node.log", environment={})
    await child.start()
    yield child
    await child.end()


async def has_spoken(child: Child) -> bool:
    return "http://" in child.log.read_text()


async def test_child_runs_until_it_is_ended_and_may_be_started_again(node: Child) -> None:
    await node.until(lambda: has_spoken(node), SystemClock(), WITHIN_S)
    first = node.pid
    await node.kill()
    assert not node.is_up
    await node.start()
    node.check()
    assert node.pid != first
    await node.end()
    assert not node.is_up


async def test_child_that_ends_by_itself_is_told_with_its_last_words(tmp_path: Path) -> None:
    child = Child("odd", "loadtest.not_there", (), log=tmp_path / "odd.log", environment={})
    await child.start()

    async def never() -> bool:
        return False

    with pytest.raises(CannotRun, match=r"odd has ended by itself\n.*No module named loadtest.not_there"):
        await child.until(never, SystemClock(), WITHIN_S)


async def test_child_that_takes_too_long_is_told(node: Child) -> None:
    async def never() -> bool:
        return False

    with pytest.raises(CannotRun, match=r"node was not ready within 0\.1 s"):
        await node.until(never, SystemClock(), 0.1)


def test_port_that_is_taken_gives_way_to_the_next_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = Ports()
        first, second = ports.take(port), ports.take(port)
        assert port < first < second
        with pytest.raises(CannotRun, match=f"no port of 127.0.0.1 from {port} to {port} is free"):
            Ports(reach=0).take(port)
