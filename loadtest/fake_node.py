"""A GPU node to break on purpose: an inference server without a GPU, in-process for tests or as a program.

`async with FakeNode(instant=True) as node:` serves at `node.url`; `python -m loadtest.fake_node --help` says the rest.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from types import TracebackType
from typing import Any

from loadtest.call import ModelHost
from loadtest.clock import Clock, SystemClock
from loadtest.connection import BadRequest, Connection, Request
from loadtest.control import control
from loadtest.dialects import answer, expected_text, is_check
from loadtest.engine import Engine
from loadtest.engine_model import EngineModel
from loadtest.faults import Fault, Faults
from loadtest.faulty_reply import FaultyReply
from loadtest.gpus import SimulatedGpus
from loadtest.listener import Listener
from loadtest.node_spec import NodeSpec, spec_from_args
from loadtest.reply import Reply, Stopped
from loadtest.watch import Watch


class FakeNode:
    """An inference server with vLLM's manners and any faults you like. Its keyword arguments are NodeSpec's fields."""

    def __init__(self, spec: NodeSpec | None = None, *, clock: Clock | None = None, **changes: Any) -> None:
        self.spec = replace(spec or NodeSpec(), **changes)
        self.clock = clock or SystemClock()
        self.rng = Random(self.spec.seed)
        self.faults = Faults(self.rng)
        self.model = EngineModel(self.spec, speed=self.spec.speed)
        self._watch = Watch()
        self.engine = Engine(self.model, self.clock, self._watch.changed)
        self.gpus = SimulatedGpus(self.spec.gpus, self.clock.now())
        self.requests: list[Request] = []  # every POST outside /sim, from when its body is whole
        self.checks: list[Request] = []  # everything else outside /sim: health checks, scrapes, model lists
        self.cancelled = 0  # of `requests`: those whose client left before the end of the answer
        self.connections: set[Connection] = set()
        self.connections_made = 0
        self.deaf = False  # connections made from now on are accepted and never read
        self.answer_headers: list[tuple[str, str]] = []  # added to every answer outside /sim
        self._control_connections: set[Connection] = set()
        self._listener = Listener(self.spec.host, self.spec.port, lambda: self._accept(self.connections))
        self._control: Listener | None = None
        self._comeback: asyncio.TimerHandle | None = None
        self._returning: asyncio.Task[None] | None = None
        self._arrivals = 0

    def __repr__(self) -> str:
        return f"<FakeNode {self._listener!r} requests={len(self.requests)} cancelled={self.cancelled} {self.engine!r}>"

    async def __aenter__(self) -> FakeNode:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def url(self) -> str:
        return f"http://{self.spec.host}:{self.port}"

    @property
    def control_url(self) -> str:
        """Where /sim answers whatever the node does; the node itself when there is no control port."""
        return self.url if self._control is None else f"http://{self.spec.host}:{self._control.port}"

    @property
    def speed(self) -> float:
        """Divides all times of the engine; may be set at any moment, 0.1 for a node ten times slower."""
        return self.model.speed

    @speed.setter
    def speed(self, speed: float) -> None:
        if speed <= 0:
            raise ValueError("speed must be above 0")
        self.model.speed = speed

    @property
    def listening(self) -> bool:
        return self._listener.is_open

    @property
    def in_flight(self) -> int:
        """Recorded requests that are not answered yet."""
        return sum(request.state == "open" for request in self.requests)

    @property
    def host(self) -> ModelHost:
        """The node as its dialects see it."""
        spec = self.spec
        return ModelHost(
            models=spec.models,
            owned_by=spec.owned_by,
            max_context_tokens=min(spec.max_context_tokens, spec.kv_tokens),
            answer_words=(spec.shortest_answer, spec.longest_answer),
            embedding_dimensions=spec.embedding_dimensions,
            api_key=spec.api_key,
            engine=self.engine,
            clock=self.clock,
            rng=self.rng,
        )

    async def start(self) -> None:
        """Listen. The port stays bound, and so ours, while the node refuses connections."""
        self._listener.bind()
        self.gpus.node_number = self.port
        self.engine.start()
        if self.spec.control_port is not None:
            self._control = Listener(
                self.spec.host, self.spec.control_port, lambda: self._accept(self._control_connections)
            )
            self._control.bind()
            await self._control.open()
        await self.come_back()

    async def stop(self) -> None:
        """End everything; requests under way are cut."""
        self.refuse()
        for listener in (self._listener, self._control):
            if listener is not None:
                listener.release()
        connections = self.connections | self._control_connections
        for connection in connections:
            connection.reset()
        await asyncio.gather(*(connection.ended() for connection in connections))
        await self.engine.stop()

    def refuse(self, back_after_s: float | None = None) -> None:
        """Close the listening socket: new connections are refused, those there are go on."""
        if self._comeback is not None:
            self._comeback.cancel()
            self._comeback = None
        self._listener.close()
        if back_after_s is not None:
            loop = asyncio.get_running_loop()
            self._comeback = loop.call_later(back_after_s, self._begin_comeback)
        self._watch.changed()

    def _begin_comeback(self) -> None:
        self._returning = asyncio.get_running_loop().create_task(self.come_back())

    def die(self, back_after_s: float | None = None) -> None:
        """Refuse, and reset every connection."""
        self.refuse(back_after_s)
        for connection in list(self.connections):
            connection.reset()

    async def come_back(self) -> None:
        """Listen again on the same port."""
        await self._listener.open()
        self._watch.changed()

    def freeze(self) -> None:
        """Wedge the engine: requests are taken, /health is well, no token is made, counters stand still."""
        self.engine.freeze()

    def thaw(self) -> None:
        """End a freeze; requests go on where they were."""
        self.engine.thaw()

    def forget(self) -> None:
        """Drop all that was recorded."""
        self.requests.clear()
        self.checks.clear()
        self.cancelled = 0

    def expected_text(self, body: Mapping[str, Any], path: str = "/v1/chat/completions") -> str:
        """The whole text that a healthy node answers to a body that leaves nothing to chance; the first choice's."""
        return expected_text(self.host, path, body)

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until something the node does makes `condition` true; raises TimeoutError with the node's state.

        It is looked at when a connection comes or goes, a request comes or ends, a fault is chosen, the engine takes a
        sequence or lets it go, a head or an event of a stream is sent, a hang begins, the node refuses or comes back.
        """
        try:
            await self._watch.wait_for(condition, timeout_s)
        except TimeoutError as error:
            raise TimeoutError(repr(self)) from error

    def _accept(self, kept: set[Connection]) -> Connection:
        self.connections_made += kept is self.connections
        connection = Connection(self.connections_made, self._serve)
        kept.add(connection)
        return connection

    async def _serve(self, connection: Connection) -> None:
        """All requests of one connection, one after the other."""
        self._watch.changed()
        try:
            if self.deaf and connection in self.connections:
                await connection.ignore()
            while await self._serve_one(connection):
                pass
        except BadRequest:
            connection.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        finally:
            self.connections.discard(connection)
            self._control_connections.discard(connection)
            connection.close()
            self._watch.changed()

    async def _serve_one(self, connection: Connection) -> bool:
        """One request; whether the connection may carry another."""
        request = await connection.read_request()
        request.connection = connection.number
        self._record(request)
        try:
            await self._answer(connection, request)
            request.state = "done"
        except Stopped:
            request.state = "broken"
        except asyncio.CancelledError:
            request.state = "aborted" if connection.ended_by_us else "left"
            self.cancelled += request.state == "left" and not is_check(request)
            raise
        finally:
            self._watch.changed()
        return request.keep_alive and not connection.ended_by_us

    def _record(self, request: Request) -> None:
        if request.path.startswith("/sim/"):
            return
        self._arrivals += 1
        request.index = self._arrivals
        kept = self.checks if is_check(request) else self.requests
        kept.append(request)
        if len(kept) > self.spec.keep_requests:
            del kept[: len(kept) // 2 + 1]

    async def _answer(self, connection: Connection, request: Request) -> None:
        if request.path.startswith("/sim/"):
            await control(self, request, Reply(connection, request, changed=self._watch.changed))
            return
        fault = self.faults.choose(request)
        self._watch.changed()
        if fault is None:
            reply = Reply(connection, request, changed=self._watch.changed, headers=self.answer_headers)
            await answer(self.host, request, reply)
        else:
            await self._answer_badly(connection, request, fault)

    async def _answer_badly(self, connection: Connection, request: Request, fault: Fault) -> None:
        reply = FaultyReply(
            connection,
            request,
            fault,
            faults=self.faults,
            clock=self.clock,
            changed=self._watch.changed,
            crash=self._crash,
            headers=self.answer_headers,
        )
        await reply.before_work()
        await answer(self.host, request, reply)

    def _crash(self, fault: Fault) -> None:
        if fault.kind == "die":
            self.die(fault.back_after_s)
        elif fault.kind == "freeze":
            self.freeze()
        else:
            self.refuse(fault.back_after_s)


async def run(spec: NodeSpec) -> None:
    """Serve until SIGTERM or SIGINT; say where, on standard output."""
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    async with FakeNode(spec) as node:
        print(node.url, flush=True)
        if spec.control_port is not None:
            print("control", node.control_url, flush=True)
        await ending.wait()


if __name__ == "__main__":
    asyncio.run(run(spec_from_args()))
