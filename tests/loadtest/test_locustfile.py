"""The locustfile against a fake node, in a process of its own because locust patches the standard library."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from loadtest.fake_node import FakeNode
from loadtest.faults import Fault

OPTIONS = "--headless --users 3 --spawn-rate 3 --run-time 1s --stop-timeout 5 --json"


async def locust(node: FakeNode) -> dict[str, dict[str, Any]]:
    """Run three users for a second; the statistics by name of event."""
    settings = {"LOADTEST_HOST": node.url, "LOADTEST_MODEL": "sim-model", "LOADTEST_THINK_S": "0.05"}
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", *OPTIONS.split()),
        env={**os.environ, **settings},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    output, _ = await program.communicate()
    return {row["name"]: row for row in json.loads(output)}


def streamed(node: FakeNode) -> int:
    return sum(request.json().get("stream", False) for request in node.requests)


async def test_tokens_gaps_and_whole_answers_are_events_of_their_own() -> None:
    async with FakeNode(speed=10.0) as node:
        rows = await locust(node)
        assert rows["first token"]["num_requests"] == streamed(node) > 0
        assert rows["whole answer"]["num_requests"] == len(node.requests)
        assert sum(row["num_failures"] for row in rows.values()) == 0
        assert rows["token gap (mean)"]["max_response_time"] < rows["whole answer"]["min_response_time"]
        assert node.connections_made == 3


async def test_a_stream_that_just_ends_is_a_failure() -> None:
    async with FakeNode(instant=True) as node:
        node.faults.add(Fault("no_done"))
        rows = await locust(node)
        assert rows["whole answer"]["num_failures"] == streamed(node) > 0
