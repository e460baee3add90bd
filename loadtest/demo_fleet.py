"""The demo's processes: simulated nodes, an agent beside each, and the balancer in front of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from loadtest.children import Child, Ports
from loadtest.clock import Clock
from loadtest.demo_table import NodeRow
from loadtest.demo_traffic import Traffic

# Where everybody expects them; the next free port where one is taken.
DATA_PORT, OPS_PORT, AGENT_PORT, NODE_PORT = 8080, 8081, 9477, 8101
# So few at once that a queue shows now and then.
SLOTS = 6
# Python starts in half a second, and far slower on a machine where all of them start at once.
START_WITHIN_S = 30.0
# A look at everything waits no longer than this for whoever does not answer.
LOOK_S = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One simulated host: its node and its agent."""

    name: str
    url: str
    agent_url: str
    node: Child
    agent: Child


class Fleet:
    """All children. `places` are the hosts in order; `logs` is the folder that their output goes to."""

    def __init__(self, count: int, session: aiohttp.ClientSession, clock: Clock, logs: Path) -> None:
        self._session = session
        self._clock = clock
        self._logs = logs
        # Settings of the user's own are meant for another balancer.
        mine = ("BALANCER_", "NODE_AGENT_")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        ports = Ports()
        data, ops = (f"127.0.0.1:{ports.take(port)}" for port in (DATA_PORT, OPS_PORT))
        self.data_url, self.ops_url = f"http://{data}", f"http://{ops}"
        self.places = [self._place(number, ports) for number in range(1, count + 1)]
        words = [word for place in self.places for word in ("--node", _node_spec(place))]
        self.balancer = self._child("balancer", "balancer", "serve", "--listen", data, "--ops-listen", ops, *words)

    def _place(self, number: int, ports: Ports) -> Place:
        name, node, agent = f"sim-{number}", ports.take(NODE_PORT), ports.take(AGENT_PORT)
        url, listen = f"http://127.0.0.1:{node}", f"127.0.0.1:{agent}"
        options = ("--port", str(node), "--seed", str(number), "--slots", str(SLOTS))
        return Place(
            name=name,
            url=url,
            agent_url=f"http://{listen}",
            node=self._child(name, "loadtest.fake_node", *options),
            agent=self._child(
                f"agent-{number}", "node_agent", "serve", "--engine", f"{url},id={name}", "--listen", listen
            ),
        )

    def _child(self, name: str, module: str, *words: str) -> Child:
        # The GPUs are the node's own, simulated ones; what this machine has is none of the demo's business.
        environment = {**self._environment, "NODE_AGENT_GPU__ENABLED": "false"}
        return Child(name, module, words, log=self._logs / f"{name}.log", environment=environment)

    @property
    def children(self) -> list[Child]:
        """Every process, in the order of their start."""
        return [*(place.node for place in self.places), *(place.agent for place in self.places), self.balancer]

    async def start(self) -> None:
        """Start everything, and wait until the balancer has heard of every node and its agent. Raises CannotRun."""
        for child in self.children[:-1]:
            await child.start()
        for place in self.places:
            await place.agent.until(partial(self._answers, f"{place.agent_url}/v1/report"), self._clock, START_WITHIN_S)
        await self.balancer.start()
        await self.balancer.until(self._all_known, self._clock, START_WITHIN_S)

    async def end(self) -> None:
        """End everything, the balancer first, so that nothing is missed by anybody."""
        try:
            await self.balancer.end()
        finally:
            await asyncio.gather(*(child.end() for child in self.children))

    def check(self, but: Child | None = None) -> None:
        """Raises CannotRun if a process has ended by itself; `but` may have."""
        for child in self.children:
            if child is not but:
                child.check()

    async def in_flight(self) -> Mapping[str, int]:
        """The balancer's count of requests at each node."""
        nodes = await self._nodes()
        return {name: node["load"]["requests_in_flight"] for name, node in nodes.items()}

    async def look(self, traffic: Traffic) -> list[NodeRow]:
        """What balancer, agents and clients know of each node now."""
        nodes, *reports = await asyncio.gather(
            self._nodes(), *(self._get(f"{place.agent_url}/v1/report") for place in self.places)
        )
        shares = traffic.shares()
        return [
            _row(place.name, nodes.get(place.name), report, shares.get(place.name, 0.0), traffic.ttft_s(place.name))
            for place, report in zip(self.places, reports, strict=True)
        ]

    async def has_dashboard(self) -> bool:
        """Whether the balancer has a page to look at."""
        return await self._answers(f"{self.ops_url}/dashboard")

    async def _all_known(self) -> bool:
        nodes = await self._nodes()
        return bool(nodes) and all(node["state"] == "ready" and node["report"] for node in nodes.values())

    async def _nodes(self) -> Mapping[str, Any]:
        answer = await self._get(f"{self.ops_url}/admin/nodes")
        return {node["id"]: node for node in answer["nodes"]} if answer else {}

    async def _answers(self, url: str) -> bool:
        return await self._get(url, parse=False) is not None

    async def _get(self, url: str, *, parse: bool = True) -> Any:
        """What stands there; None when nobody answers well in time."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=LOOK_S)) as response:
                if response.status == 200:
                    body = await response.read()
                    return orjson.loads(body) if parse else body
        return None


def _node_spec(place: Place) -> str:
    return f"{place.url},agent={place.agent_url},id={place.name}"


def _row(name: str, node: Any, report: Any, share: float, ttft_s: float | None) -> NodeRow:
    engine = report["nodes"][0] if report and report["nodes"] else {}
    gpu = report["gpus"][0] if report and report["gpus"] else {}
    return NodeRow(
        name=name,
        state=node["state"] if node else "?",
        in_flight=node["load"]["requests_in_flight"] if node else 0,
        share=share,
        queue=engine.get("queue_depth"),
        ttft_s=ttft_s,
        memory_used_bytes=gpu.get("memory_used_bytes"),
        memory_total_bytes=gpu.get("memory_total_bytes"),
        temperature_celsius=gpu.get("temperature_celsius"),
    )
