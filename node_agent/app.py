"""The composition root: builds every object once, starts them, and takes them down in order."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import uuid

import aiohttp
import structlog
from aiohttp import web

from node_agent import __version__
from node_agent.clock import SystemClock
from node_agent.derive import Identity
from node_agent.engine import EngineWatch
from node_agent.engine_http import EngineHttp
from node_agent.failure import plain
from node_agent.gpu_watch import GpuWatch, NoGpus
from node_agent.metrics import registry
from node_agent.push import Pusher
from node_agent.sampler import Sampler
from node_agent.server import AgentServer
from node_agent.settings import Settings, address

log = structlog.get_logger()

# Answers under way when the agent is told to stop are small and local.
SHUTDOWN_S = 2.0


class CannotListen(Exception):
    """The agent port cannot be opened; the text says which and why."""


class Agent:
    """A running agent: `url` is where it answers."""

    def __init__(self, settings: Settings) -> None:
        self.url = ""
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen, then begin to look; raises CannotListen."""
        settings, clock = self._settings, SystemClock()
        session = await self._stack.enter_async_context(
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), connector=aiohttp.TCPConnector(limit=0))
        )
        engines = [
            EngineWatch(
                spec,
                EngineHttp(session, spec.url, timeout_s=settings.scrape.timeout_s, api_key=spec.api_key),
                clock,
                settings.scrape,
            )
            for spec in settings.engines
        ]
        identity = Identity(host=settings.host, boot_id=uuid.uuid4().hex, interval_s=settings.interval_s)
        gpus = GpuWatch(clock, settings.gpu) if settings.gpu.enabled else NoGpus()
        sampler = Sampler(identity, engines, gpus, clock)
        self._stack.push_async_callback(sampler.close)
        pushers = [
            Pusher(url, sampler, session, clock, settings.push, random.Random(), settings.balancer_token)
            for url in settings.balancers
        ]
        server = AgentServer(sampler, registry(sampler, pushers), settings.drain_token)
        self.url = await self._listen(server)
        self._begin(sampler, pushers)
        log.info(
            "agent.started",
            version=__version__,
            url=self.url,
            host=settings.host,
            boot_id=identity.boot_id,
            engines=[spec.id for spec in settings.engines],
            balancers=list(settings.balancers),
        )

    async def stop(self) -> None:
        """Stop looking, then close everything that `start` opened."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()
        log.info("agent.stopped", host=self._settings.host)

    async def _listen(self, server: AgentServer) -> str:
        host, port = address(self._settings.listen)
        runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await self._stack.aclose()
            raise CannotListen(f"cannot listen on {self._settings.listen}: {plain(error)}") from error
        bound = runner.addresses[0][1]
        return f"http://{f'[{host}]' if ':' in host else host}:{bound}"

    def _begin(self, sampler: Sampler, pushers: list[Pusher]) -> None:
        self._tasks = [asyncio.create_task(sampler.run(), name="sampler")]
        self._tasks += [asyncio.create_task(pusher.run(), name=f"push {pusher.url}") for pusher in pushers]


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT; raises CannotListen."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: log.info("settings.kept", reason="a restart applies new settings"))
    agent = Agent(settings)
    await agent.start()
    await stop.wait()
    await agent.stop()
