"""Composition root: builds every object once, starts and stops them in order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from balancer import stores
from balancer.admission import Admission
from balancer.attempts import Attempts
from balancer.auth import Auth
from balancer.cache import ResponseCache
from balancer.clock import Clock, SystemClock
from balancer.core.local_answers import LocalAnswers
from balancer.core.node import NodeConfig
from balancer.core.request import NodeId
from balancer.core.routing import Routing, routing_of
from balancer.explain import Ring
from balancer.flights import Flights
from balancer.health_feed import HealthFeed
from balancer.hedging import Hedging
from balancer.intake import Intake
from balancer.log import EventWriter, get_logger
from balancer.metrics import Metrics
from balancer.ops import OpsServer
from balancer.pools import Pools
from balancer.proxy import Journal, Proxy
from balancer.registry import Registry
from balancer.restart import needs_restart
from balancer.resume import Resumes
from balancer.server import DataPort
from balancer.settings import Settings, SettingsError, masked
from balancer.store.memory import MemoryStore
from balancer.verdicts import Verdicts
from balancer.wire.answer import AnswerLimits
from balancer.wire.buffered import Buffered
from balancer.wire.framing import DateHeader
from balancer.wire.inbound import InboundLimits
from balancer.wire.timers import TimerWheel

if TYPE_CHECKING:
    from balancer.semantic.service import SemanticCache
    from balancer.watchdog import Watchdog

log = get_logger()

# How often the event loop's lateness is measured, and idle node connections are looked through.
TICK_S = 0.5
# What lay in the sockets when a signal came is read within this time, and counts as having come before it.
SETTLE_S = 0.1
# After drain_s, what is cut gets this long to have its error event written out.
CUT_S = 1.0

# Requests leave next to no cycles behind; CPython's 700 would look for them 30 times more often than they pay for.
GC_THRESHOLD = 20_000

Load = Callable[[], Settings]


class Watcher(Protocol):
    """Something that runs beside the data port."""

    async def start(self) -> None: ...
    async def close(self) -> None: ...


class App:
    """One balancer process. `run` serves until a signal ends it."""

    def __init__(
        self,
        settings: Settings,
        load: Load,
        *,
        write_event: EventWriter | None = None,
        clock: Clock | None = None,
        rng: Random | None = None,
    ) -> None:
        self._write_event = write_event
        self._started_with = settings
        self._settings = settings
        self._load = load
        self._clock = clock or SystemClock()
        self._rng = rng or Random()
        self._tasks: list[asyncio.Task[None]] = []
        self._watchers: tuple[Watcher, ...] = ()
        self.watchdog: Watchdog | None = None  # once it runs
        self._lag_s = 0.0
        self._build()

    def _build(self) -> None:
        settings, clock = self._settings, self._clock
        self.metrics = Metrics()
        self.buffered = Buffered(settings.limits.buffered_bytes)
        self.ring = Ring()
        self.wheel = TimerWheel(clock.now, asyncio.get_running_loop())
        self.registry = Registry(
            routing=settings.routing,
            breaker=settings.breaker,
            health=settings.health,
            outlier=settings.outlier,
            stale_s=settings.agents.stale_s,
            metrics=self.metrics,
            now=clock.now,
            rng=self._rng,
        )
        self.registry.configure(settings.routing, settings.outlier, adaptive=settings.queue.adaptive)
        self.memory = stores.in_process(clock)
        self.store = stores.open_store(settings, self.memory, self.metrics, clock)
        self.auth = Auth(settings.auth)
        self.intake = Intake(settings, self.registry, self.auth)
        self.cache = ResponseCache(
            settings.cache,
            local=LocalAnswers(settings.cache.memory_bytes),
            store=None if settings.redis.url is None else self.store,
            vectors=stores.for_vectors(settings, self.store, clock),
            models=self.intake.rules,
            metrics=self.metrics,
            clock=clock,
            rng=self._rng,
        )
        self.admission = Admission(
            limits=settings.limits,
            queue=settings.queue,
            models=self.intake.rules,
            store=self.memory if settings.limits.store == "memory" else self.store,
            fallback=self.memory,
            registry=self.registry,
            metrics=self.metrics,
            clock=clock,
        )
        self.verdicts = Verdicts(
            registry=self.registry,
            store=self.store,
            metrics=self.metrics,
            clock=clock,
            verdict_s=settings.retry.verdict_s,
            stall_s=settings.timeouts.stall_s,
        )
        self.hedging = Hedging(settings.hedge, self.intake.rules, self.metrics)
        self.pools = Pools(settings.upstream.max_connections_per_node, clock.now)
        self.attempts = Attempts(
            registry=self.registry,
            admission=self.admission,
            routing=routing_of(settings.routing),
            verdicts=self.verdicts,
            hedging=self.hedging,
            retry=settings.retry,
            limits=_answer_limits(settings, self.buffered),
            pools=self.pools,
            connect_s=settings.timeouts.connect_s,
            metrics=self.metrics,
            clock=clock,
            wheel=self.wheel,
            rng=self._rng,
        )
        self._follow_fleet()
        self.semantic = self._make_semantic()
        date = DateHeader()
        self.resumes = Resumes(self.attempts, self.metrics, self.buffered, enabled=settings.resume.enabled)
        self.flights = Flights(
            self.admission,
            self.attempts,
            self.cache,
            self.resumes,
            clock,
            self.buffered,
            settings.cache.coalesce,
            stores.open_meeting(settings, self.store, self.cache, clock),
        )
        self.proxy = Proxy(
            cache=self.cache,
            verdicts=self.verdicts,
            flights=self.flights,
            clock=clock,
            date=date,
            comment_after_s=settings.queue.comment_after_s,
            semantic=self.semantic,
        )
        self.port = DataPort(
            address=settings.listen,
            intake=self.intake,
            proxy=self.proxy,
            journal=Journal(self.metrics, self.ring, self.registry, clock, self._write_event),
            registry=self.registry,
            limits=_inbound_limits(settings),
            buffered=self.buffered,
            wheel=self.wheel,
            clock=clock,
            date=date,
            origins=frozenset(origin.encode() for origin in settings.cors.allow_origins),
        )
        self.neighbours = stores.open_neighbours(
            settings,
            registry=self.registry,
            routing=lambda: self.attempts.routing,
            cache=self.cache,
            verdicts=self.verdicts,
            metrics=self.metrics,
            clock=clock,
            rng=self._rng,
        )
        self.feed = HealthFeed(self.registry, settings.agents, clock, self._rng, self.metrics)
        self.ops = OpsServer(
            settings.ops_listen,
            registry=self.registry,
            metrics=self.metrics,
            clock=clock,
            ring=self.ring,
            feed=self.feed,
            cache=self.cache,
            tenants=self.admission.tenants,
            semantic=self.semantic,
            settings_view=self.effective,
            reload=self.reload,
            drain_state=lambda: self.port.draining or self.port.closing,
            ops_config=settings.ops,
            put_node=self.put_node,
            remove_node=self.remove_node,
            prices=lambda nodes, now: self.attempts.routing.prices(nodes, now),
        )
        self.metrics.event_loop_lag.read = lambda: [((), self._lag_s)]
        self.metrics.connections.read = lambda: [((), float(self.port.connections))]
        self.metrics.buffered.read = lambda: [((), float(self.buffered.bytes))]

    def _follow_fleet(self) -> None:
        """What agents say, and nodes' going, reach the routing in force."""
        attempts = self.attempts
        self.registry.on_report = lambda node, report, at_s, now: attempts.routing.reported(node, report, at_s, now)

        def gone(id_: NodeId) -> None:
            attempts.routing.forget(id_)
            self.verdicts.forget(id_)

        self.registry.on_gone = gone

    def _routing_of(self, old: Settings, new: Settings) -> Routing:
        """What was learned stays, unless another policy is asked for."""
        if old.routing.policy != new.routing.policy:
            return routing_of(new.routing)
        self.attempts.routing.configure(new.routing)
        return self.attempts.routing

    def _make_semantic(self) -> SemanticCache | None:
        """The semantic cache, where it is asked for. Raises SettingsError for what it cannot work with."""
        settings = self._settings
        if not settings.uses_semantic:
            return None
        try:
            from balancer.semantic.build import build
        except ImportError as error:
            raise SettingsError("cache.semantic: needs NumPy; install gpu-balancer[semantic]") from error
        return build(
            settings, cache=self.cache, models=self.intake.rules, metrics=self.metrics, clock=self._clock, rng=self._rng
        )

    # -- life

    async def start(self) -> None:
        """Listen, then begin watching the fleet. Raises OSError when a port cannot be had."""
        self.port.bind()
        self.ops.bind()
        for node in self._settings.nodes:
            self.registry.put(node)
        await self.port.start()
        log.info("data.listening", address=self.port.address, nodes=len(self.registry.nodes))
        await self.store.start()
        if self.semantic is not None:
            await self.semantic.start()
        await self._start_watching()
        self._tasks.append(asyncio.create_task(self._tick()))
        if self._settings.cache.warmup_file is not None:
            self._tasks.append(asyncio.create_task(self._warm_up(self._settings.cache.warmup_file)))
        gc.collect()
        gc.freeze()  # what lives as long as the process is not looked through again
        gc.set_threshold(GC_THRESHOLD, 20, 50)

    async def _start_watching(self) -> None:
        """Checks, model lists, agents and the operations port; aiohttp comes with them, after the data port serves."""
        from balancer.health_check import HealthChecker
        from balancer.model_list import ModelLister
        from balancer.watchdog import Watchdog

        settings, registry, clock, rng = self._settings, self.registry, self._clock, self._rng
        self.watchdog = Watchdog(
            registry,
            settings.timeouts.stall_s,
            settings.health.path,
            clock,
            self.metrics,
            on_wedged=self.verdicts.wedged,
        )
        self._watchers = (
            *self.neighbours,
            self.watchdog,
            HealthChecker(registry, settings.health, clock, rng),
            ModelLister(registry, clock, rng),
            self.feed,
            self.ops,
        )
        if not isinstance(self.store, MemoryStore):
            from balancer.store.watch import StoreWatch

            self._watchers += (StoreWatch(self.store, self.metrics, clock),)
        for watcher in self._watchers:
            await watcher.start()
        log.info("ops.listening", address=self.ops.address)

    async def _warm_up(self, path: str) -> None:
        """Fill the cache from a file once a node is there; whatever goes wrong is only logged."""
        from balancer.warmup import own_url, warm_up

        while self.registry.ready(self._clock.now()) is not None:
            await self._clock.sleep(TICK_S)
        config = self._settings.cache
        url = own_url(self.port.address)
        try:
            summary = await warm_up(path, url=url, concurrency=config.warmup_concurrency, key=config.warmup_key)
        except (ValueError, OSError) as error:
            log.error("warmup.failed", file=path, reason=str(error))
        else:
            log.info("warmup.finished", **summary.results, total=summary.total, first_failure=summary.first_failure)

    async def stop(self) -> None:
        """Let go of everything; nothing may be in flight any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for watcher in reversed(self._watchers):
            await watcher.close()
        await self.flights.close()
        self.pools.close()
        if self.semantic is not None:
            await self.semantic.close()
        await self.store.close()
        self.wheel.close()

    async def run(self) -> None:
        """Start, serve until SIGTERM or SIGINT, drain, stop."""
        loop = asyncio.get_running_loop()
        ending = asyncio.Event()
        at_once = asyncio.Event()

        def end() -> None:
            (at_once if ending.is_set() else ending).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        await self.start()
        await ending.wait()
        await self.drain(at_once)
        await self.stop()

    async def drain(self, at_once: asyncio.Event) -> None:
        """Stop taking requests as the contract says, and let what runs end; `at_once` cuts it short."""
        timeouts = self._settings.timeouts
        log.info("drain.begun", in_flight=len(self.port.working()), grace_s=timeouts.drain_grace_s)
        self.port.begin_drain()
        await _wait_for(at_once, max(timeouts.drain_grace_s, SETTLE_S))
        self.port.close_listener()
        await _wait_for(at_once, SETTLE_S)  # the last connections get to send their request
        deadline_s = self._clock.now() + timeouts.drain_s
        while (
            (self.port.working() or self.flights.is_wanted) and not at_once.is_set() and self._clock.now() < deadline_s
        ):
            await _wait_for(at_once, 0.02)
        cut = self.port.cut_all()
        if cut:
            await asyncio.wait_for(asyncio.gather(*cut, return_exceptions=True), CUT_S)
        self.port.close_connections()
        log.info("drain.finished", cut=len(cut))

    # -- changes at run time

    def _hang_up(self) -> None:
        self._tasks.append(asyncio.create_task(self._reload_logged()))

    async def _reload_logged(self) -> None:
        with contextlib.suppress(Exception):  # reload() has logged it
            await self.reload()

    async def reload(self) -> list[str]:
        """Read the settings again and apply what can change at run time; the names of what needs a restart.

        Raises SettingsError, having changed nothing, when they are wrong.
        """
        old = self._settings
        try:
            new = self._load()
            if not new.nodes:
                raise SettingsError("nodes: none are configured")
        except Exception as error:
            log.error("settings.rejected", reason=str(error))
            raise
        auth = Auth(new.auth)
        self.intake.configure(new, auth)
        self.port.revision += 1
        self.cache.configure(new.cache, self.intake.rules)
        self.flights.configure(new.cache.coalesce)
        if self.semantic is not None:
            self.semantic.configure(new.cache, self.intake.rules)
        self.admission.configure(new.limits, new.queue, self.intake.rules)
        self.attempts.configure(
            self._routing_of(old, new), new.retry, _answer_limits(new, self.buffered), new.timeouts.connect_s
        )
        self.hedging.configure(new.hedge, self.intake.rules)
        self.verdicts.configure(new.retry.verdict_s, new.timeouts.stall_s)
        self.resumes.enabled = new.resume.enabled
        self.proxy.comment_after_s = new.queue.comment_after_s
        self.registry.configure(new.routing, new.outlier, adaptive=new.queue.adaptive)
        if self.watchdog is not None:
            self.watchdog.configure(new.timeouts.stall_s)
        self.registry.replace_all(new.nodes)
        self.pools.follow(self.registry.nodes)
        self._settings = new
        fixed = needs_restart(self._started_with, new)
        log.info("settings.reloaded", nodes=len(self.registry.nodes), needs_restart=fixed)
        return fixed

    def put_node(self, config: NodeConfig) -> None:
        """Add or replace a node (admin API)."""
        self.registry.put(config, at_run_time=True)
        self.pools.follow(self.registry.nodes)

    def remove_node(self, id_: NodeId) -> bool:
        """Remove a node (admin API); running requests finish."""
        removed = self.registry.remove(id_) is not None
        self.pools.follow(self.registry.nodes)
        return removed

    def effective(self) -> dict[str, Any]:
        """The settings as last read, secrets masked, and which of them wait for a restart."""
        return {**masked(self._settings), "needs_restart": needs_restart(self._started_with, self._settings)}

    async def _tick(self) -> None:
        """Housekeeping, and how late the loop runs it."""
        while True:
            before_s = self._clock.now()
            await self._clock.sleep(TICK_S)
            now = self._clock.now()
            self._lag_s = max(0.0, now - before_s - TICK_S)
            self.pools.sweep(now)
            self.admission.look_again()  # a node's rest or a breaker's time may be over, which nobody tells
            self.cache.purge(now)


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    if seconds > 0:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), seconds)


def _answer_limits(settings: Settings, buffered: Buffered) -> AnswerLimits:
    timeouts = settings.timeouts
    return AnswerLimits(
        first_byte_s=timeouts.first_byte_s,
        idle_s=timeouts.idle_s,
        unary_s=timeouts.unary_s,
        commit_s=timeouts.commit_s,
        check_bytes=settings.upstream.check_bytes,
        buffered=buffered,
        stall_s=timeouts.stall_s,
        return_headers=frozenset(name.lower().encode() for name in settings.upstream.return_headers),
    )


def _inbound_limits(settings: Settings) -> InboundLimits:
    limits = settings.limits
    return InboundLimits(
        head_bytes=limits.head_bytes,
        body_bytes=limits.body_bytes,
        head_timeout_s=limits.head_timeout_s,
        body_idle_s=limits.body_idle_s,
    )


def serve(settings: Settings, load: Load, write_event: EventWriter | None) -> None:
    """Run one balancer to its end. Raises OSError when a port cannot be had."""

    async def main() -> None:
        await App(settings, load, write_event=write_event).run()

    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
