"""Where trials play: simulated nodes and a balancer, each a process of its own, and hands to break them with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import yaml

from loadtest.children import Child, Ports
from loadtest.clock import SystemClock

MODEL = "sim-model"
START_WITHIN_S = 30.0
# What is waited for comes soon; a trial that waits this long has failed.
WITHIN_S = 20.0
ASK_EVERY_S = 0.01
# The settings that the promises' figures are for. The cache is off: it would answer in the nodes' place.
SETTINGS: Mapping[str, Any] = {
    "timeouts": {"connect_s": 1.0, "first_byte_s": 4.0, "unary_s": 4.0, "idle_s": 4.0},
    "retry": {"max_attempts": 3},
    "health": {"interval_s": 1.0},
    "cache": {"enabled": False},
    "log": {"level": "warning", "format": "json"},
}
# Some 0.1 to 0.3 s for an answer, so that there is always something in flight to lose.
NODE_OPTIONS = ("--itl-s", "0.005", "--ttft-s-per-token", "0.0005")


class SimNode:
    """One fake node in a process of its own, and what can be done to it."""

    def __init__(self, id_: str, child: Child, url: str, control_url: str, session: aiohttp.ClientSession) -> None:
        self.id = id_
        self.child = child
        self.url = url
        self._control_url = control_url
        self._session = session

    def __repr__(self) -> str:
        return f"<SimNode {self.id} {self.url}>"

    async def ready(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(aiohttp.ClientError, OSError):
            return bool(await self.state())
        return False

    async def state(self) -> Any:
        """The node in figures, as it tells them itself."""
        return await self._control("GET", "/sim/state")

    async def requests(self) -> list[Any]:
        """Every request that reached it."""
        told: list[Any] = await self._control("GET", "/sim/requests")
        return told

    async def fault(self, kind: str, **fields: Any) -> None:
        """Break it: a rule of `loadtest.faults`."""
        await self._control("POST", "/sim/faults", {"kind": kind, **fields})

    async def mend(self) -> None:
        """No faults any more."""
        await self._control("DELETE", "/sim/faults")

    async def set(self, **fields: Any) -> None:
        """`speed`, `frozen` (its engine, with the health check green) or `deaf` (its health check too)."""
        await self._control("POST", "/sim/node", fields)

    async def die(self) -> None:
        """Close its listener and every connection, but for the control's."""
        await self._control("POST", "/sim/die", {})

    async def come_back(self) -> None:
        """Listen again."""
        await self._control("POST", "/sim/come_back", {})

    async def kill(self) -> None:
        """SIGKILL."""
        await self.child.kill()

    def stop(self) -> None:
        """SIGSTOP: connections stand, nothing answers."""
        os.kill(self.child.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.child.pid, signal.SIGCONT)

    async def start(self) -> None:
        """Start its process, again after `kill`, and wait until it answers."""
        await self.child.start()
        await self.child.until(self.ready, SystemClock(), START_WITHIN_S)

    async def _control(self, method: str, path: str, value: object = None) -> Any:
        data = orjson.dumps(value) if value is not None else None
        async with self._session.request(method, self._control_url + path, data=data) as response:
            body = orjson.loads(await response.read())
            assert response.status == 200, body
            return body


class Stage:
    """A running balancer and its nodes."""

    def __init__(
        self, nodes: Sequence[SimNode], balancer: Child, data_url: str, ops_url: str, session: aiohttp.ClientSession
    ) -> None:
        self.nodes = nodes
        self.balancer = balancer
        self.data_url = data_url
        self.ops_url = ops_url
        self.session = session

    async def get(self, path: str) -> Any:
        """JSON from the operations port."""
        async with self.session.get(self.ops_url + path) as response:
            return orjson.loads(await response.read())

    async def put_node(self, id_: str, url: str) -> None:
        """Add a node while it runs."""
        body = orjson.dumps({"url": url, "models": [MODEL]})
        async with self.session.put(f"{self.ops_url}/admin/nodes/{id_}", data=body) as response:
            assert response.status in (200, 201), await response.text()

    async def remove_node(self, id_: str) -> None:
        """Remove a node while it runs."""
        async with self.session.delete(f"{self.ops_url}/admin/nodes/{id_}") as response:
            assert response.status in (200, 204), await response.text()

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels."""
        async with self.session.get(f"{self.ops_url}/metrics") as response:
            text = await response.text()
        total = 0.0
        for line in text.splitlines():
            found = line.partition("{")[0].partition(" ")[0] == name
            if found and all(f'{label}="{value}"' in line for label, value in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    async def until(self, condition: Any, within_s: float = WITHIN_S) -> float:
        """Ask `condition` (awaitable) until it is true; the seconds it took. Raises TimeoutError."""
        clock = SystemClock()
        begun_s = clock.now()
        while not await condition():
            if clock.now() - begun_s > within_s:
                raise TimeoutError(f"not true within {within_s:g} s")
            await clock.sleep(ASK_EVERY_S)
        return clock.now() - begun_s

    async def knows(self, id_: str, state: str) -> bool:
        """Whether the balancer has that word for a node."""
        return bool((await self.get(f"/admin/nodes/{id_}"))["state"] == state)

    async def healthy(self) -> bool:
        """Whether it answers, and has checked every node."""
        with contextlib.suppress(aiohttp.ClientError, OSError, ValueError, KeyError):
            told = await self.get("/admin/nodes")
            return all(node["check"]["up"] is not None for node in told["nodes"])
        return False

    def resident_bytes(self) -> int:
        """The balancer's memory."""
        with open(f"/proc/{self.balancer.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Theatre:
    """Builds stages: one set of processes after the other, all ended with it."""

    def __init__(self, folder: Path, session: aiohttp.ClientSession) -> None:
        self._folder = folder
        self.session = session
        self._ports = Ports(reach=20_000)

    def port(self) -> int:
        """A port of 127.0.0.1 that nobody has."""
        return self._ports.take(20_000)

    def node(self, id_: str, *options: str) -> SimNode:
        """A node that is not started yet."""
        port, control = self.port(), self.port()
        words = ("--port", str(port), "--control-port", str(control), *NODE_OPTIONS, *options)
        child = self._child(id_, "loadtest.fake_node", *words)
        return SimNode(id_, child, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{control}", self.session)

    @asynccontextmanager
    async def stage(
        self,
        nodes: int = 4,
        *,
        settings: Mapping[str, Any] | None = None,
        options: Sequence[Sequence[str]] = (),
        up: Sequence[bool] = (),
        wait: bool = True,
    ) -> AsyncIterator[Stage]:
        """A balancer over so many nodes `a`, `b`, …; `options` are each node's own, `up` says who is started at all."""
        made = [
            self.node("abcdefghij"[number], *(options[number] if number < len(options) else ()))
            for number in range(nodes)
        ]
        started = [node for number, node in enumerate(made) if not up or up[number]]
        data, ops = f"127.0.0.1:{self.port()}", f"127.0.0.1:{self.port()}"
        config = self._folder / f"balancer-{self.port()}.yaml"
        file = {
            **SETTINGS,
            **(settings or {}),
            "listen": data,
            "ops_listen": ops,
            "nodes": [{"url": node.url, "id": node.id, "models": [MODEL]} for node in made],
        }
        config.write_text(yaml.safe_dump(file))
        balancer = self._child("balancer", "balancer", "serve", "--config", str(config))
        stage = Stage(made, balancer, f"http://{data}", f"http://{ops}", self.session)
        try:
            await asyncio.gather(*(node.start() for node in started))
            await balancer.start()
            if wait:
                await balancer.until(stage.healthy, SystemClock(), START_WITHIN_S)
            yield stage
        finally:
            await balancer.end()
            await asyncio.gather(*(node.child.kill() for node in made))

    def _child(self, name: str, module: str, *words: str) -> Child:
        mine = ("BALANCER_", "NODE_AGENT_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        return Child(name, module, words, log=self._folder / f"{name}.log", environment=environment)


async def settled(stage: Stage) -> bool:
    """Whether nothing is in flight any more, as the balancer counts it."""
    told = await stage.get("/admin/nodes")
    return all(node["load"]["requests_in_flight"] == 0 for node in told["nodes"])


async def wait_settled(stage: Stage) -> None:
    """Return when nothing is in flight any more."""
    await stage.until(partial(settled, stage))
