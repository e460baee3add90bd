"""A whole balancer in this process, on free ports of 127.0.0.1, for tests that speak HTTP to it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import yaml

from balancer.app import App
from balancer.clock import Clock
from balancer.core.node import Node
from balancer.core.request import NodeId
from balancer.settings import Settings, load

# Short limits, so that what has to time out does so within a test; the checks are as quick as their clock allows.
QUICK: Mapping[str, Any] = {
    "timeouts": {"connect_s": 1.0, "first_byte_s": 4.0, "unary_s": 4.0, "idle_s": 4.0},
    "health": {"interval_s": 0.2, "timeout_s": 0.5},
    "retry": {"base_s": 0.001},
}
# No checks after the first one, no cache, and picks that are known beforehand: what a test sees, its requests did.
QUIET: Mapping[str, Any] = {
    "health": {"interval_s": 1000.0, "timeout_s": 1000.0},  # the first decides, so a busy machine must not fail it
    "cache": {"enabled": False},
    "routing": {"policy": "least_outstanding"},
}


class Balancer:
    """A running balancer. `requests` are its `request.finished` facts, newest last."""

    def __init__(self, settings: Mapping[str, Any], clock: Clock | None = None) -> None:
        self.settings = dict(settings)
        self._folder = tempfile.TemporaryDirectory(prefix="balancer-test-")
        self._file = Path(self._folder.name, "settings.yaml")
        self.write_settings(settings)
        self.requests: list[dict[str, Any]] = []
        self._finished = asyncio.Condition()
        self.app = App(self._load(), self._load, write_event=self._record, clock=clock, rng=Random(7))

    def write_settings(self, settings: Mapping[str, Any] | str) -> None:
        """What a reload will read; a text goes into the file as it is."""
        text = settings if isinstance(settings, str) else yaml.safe_dump(dict(settings))
        self._file.write_text(text, encoding="utf-8")

    def _load(self) -> Settings:
        return load(str(self._file), {})

    def _record(self, event: str, wall_s: float, facts: dict[str, Any]) -> None:
        self.requests.append(facts)
        task = asyncio.get_running_loop().create_task(self._tell())
        task.add_done_callback(lambda _: None)

    async def _tell(self) -> None:
        async with self._finished:
            self._finished.notify_all()

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Until `condition` holds, looked at whenever a request has finished (and a few times in between)."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                try:
                    async with asyncio.timeout(0.02), self._finished:
                        await self._finished.wait()
                except TimeoutError:
                    continue

    def counts(self, metric: str) -> dict[tuple[str, ...], int]:
        """A counter's series by their label values, without those at 0; `metric` is its name in `Metrics`."""
        children = getattr(self.app.metrics, metric).children()
        return {values: int(child.value) for values, child in children if child.value}

    def node(self, id_: str) -> Node:
        """A node's live state."""
        return self.app.registry.nodes[NodeId(id_)]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the data port."""
        host, port = self.app.port.address.rsplit(":", 1)
        return host, int(port)

    @property
    def url(self) -> str:
        """The data port."""
        return f"http://{self.app.port.address}"

    @property
    def ops_url(self) -> str:
        """The operations port."""
        return f"http://{self.app.ops.address}"

    async def start(self) -> None:
        """Listen on both ports."""
        await self.app.start()

    async def stop(self) -> None:
        """Close at once; what is in flight is cut."""
        self.app.port.close_listener()
        tasks = self.app.port.cut_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.app.port.close_connections()
        await self.app.stop()
        self._folder.cleanup()


@asynccontextmanager
async def running(
    *nodes: str | Mapping[str, Any], clock: Clock | None = None, **settings: Any
) -> AsyncIterator[Balancer]:
    """A balancer in front of `nodes` (URLs, or node settings), with `settings` over QUICK, section by section."""
    merged: dict[str, Any] = {name: dict(section) for name, section in QUICK.items()}
    for name, value in settings.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, Mapping) else value
    merged["nodes"] = [{"url": node} if isinstance(node, str) else dict(node) for node in nodes]
    merged.setdefault("listen", "127.0.0.1:0")
    merged.setdefault("ops_listen", "127.0.0.1:0")
    balancer = Balancer(merged, clock)
    await balancer.start()
    try:
        yield balancer
    finally:
        await balancer.stop()
