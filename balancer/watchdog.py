"""Looks for nodes that stopped moving, takes their work away, and asks them whether they are back.

The decision is `core/wedge.py`. This shell looks four times a second, and only at nodes that have been silent: it costs
a request nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from balancer.ask import Answer, NoAnswer, OpenSession, ask, open_session
from balancer.clock import Clock
from balancer.core.books import DEFAULT_SLOTS
from balancer.core.node import Node
from balancer.core.wedge import EARLY, Finding, Probe, judge
from balancer.log import get_logger
from balancer.metrics import Metrics
from balancer.registry import Registry

if TYPE_CHECKING:
    import aiohttp

TICK_S = 0.25
# Nodes are compared with each other, and counts with what they count, this often.
COMPARE_S = 1.0
# A look that comes later than this found us standing still, not the nodes: what they sent lies unread.
LATE_S = 2.0 * TICK_S
# The pause before a further probe doubles with each: while nothing but unary requests is suspicious, and while wedged.
MOST_PAUSE_S = 30.0
WEDGED_PAUSE_S = 0.5
MOST_WEDGED_PAUSE_S = 4.0
# An answer to a probe is one token, or an embedding.
MAX_BYTES = 1024 * 1024
# A wedged node that cannot be asked is tried again after this long: its next silence speaks for itself.
UNCLEAR_S = 10.0
# Statuses of a node that understood and refused: they come from the front end and say nothing of the engine.
_UNCLEAR = frozenset({400, 401, 403, 404, 405, 408, 413, 415, 422, 425, 429, 501, 503})

log = get_logger()


@dataclass(slots=True)
class _Watch:
    """What is remembered of one node while it is suspected or wedged."""

    pause_s: float
    probe: Probe | None = None
    task: asyncio.Task[None] | None = None
    next_probe_s: float = 0.0
    answered_s: float = float("-inf")
    failed_s: float = float("-inf")  # a probe begun after the last sign of life got no answer


class Watchdog:
    """Watches every node of the registry."""

    def __init__(
        self,
        registry: Registry,
        stall_s: float,
        health_path: str,
        clock: Clock,
        metrics: Metrics,
        session_factory: OpenSession = open_session,
        on_wedged: Callable[[Node, float], None] = lambda node, now: None,
    ) -> None:
        self._registry = registry
        self._stall_s = stall_s
        self._health_path = health_path
        self._clock = clock
        self._metrics = metrics
        self._session_factory = session_factory
        self._on_wedged = on_wedged  # told before anything is taken away from the node
        self._session: aiohttp.ClientSession | None = None
        self._watches: dict[Node, _Watch] = {}
        self._task: asyncio.Task[None] | None = None
        self._looked_s = self._awake_s = self._compared_s = clock.now()

    def configure(self, stall_s: float) -> None:
        """New settings."""
        self._stall_s = stall_s

    async def start(self) -> None:
        """Begin looking."""
        self._session = self._session_factory()
        self._looked_s = self._awake_s = self._clock.now()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="watchdog")

    async def close(self) -> None:
        """Stop; verdicts stay as they are."""
        tasks = [watch.task for watch in self._watches.values() if watch.task is not None]
        if self._task is not None:
            tasks.append(self._task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(TICK_S)
            try:
                self.look(self._clock.now())
            except Exception:
                log.exception("sweep.failed", of="watchdog")

    def look(self, now: float) -> None:
        """Judge every node that has been silent with work in flight, and ask those that are wedged."""
        if now - self._looked_s > LATE_S:
            self._awake_s = now
        self._looked_s = now
        early_s = EARLY * self._stall_s
        for node in self._registry.nodes.values():
            if node.is_wedged:
                self._look_at_wedged(node, now)
            elif node.live and now - node.heard_s >= early_s:
                self._look_at(node, now)
        self._forget(now)
        if now - self._compared_s >= COMPARE_S:
            self._compared_s = now
            self._registry.compare(now)
            self._registry.true_up(now)

    def _look_at(self, node: Node, now: float) -> None:
        heard_s = _last_byte_s(node, now - EARLY * self._stall_s)
        if heard_s > node.heard_s:
            node.heard_s = heard_s
        watch = self._watches.get(node)
        heard_s = max(node.heard_s, node.moved_s, self._awake_s)
        if watch is not None:
            heard_s = max(heard_s, watch.answered_s)
        if now - heard_s < EARLY * self._stall_s:
            return
        seen = [one for attempt in node.live if (one := attempt.seen()) is not None]
        failed = watch is not None and watch.failed_s > heard_s
        finding = judge(seen, heard_s=heard_s, probe_failed=failed, stall_s=self._stall_s, now=now)
        if finding is Finding.FINE:
            return
        if watch is None:
            watch = self._watches[node] = _Watch(self._stall_s)
        watch.probe = next((probe for attempt in node.live if (probe := attempt.probe()) is not None), watch.probe)
        if finding.is_wedged:
            watch.next_probe_s, watch.pause_s = now, WEDGED_PAUSE_S
            self._registry.wedged(node, finding.value, now)
            self._on_wedged(node, now)
            self._look_at_wedged(node, now)
            return
        # While a stream may accuse, each silence is settled anew; a long unary answer is asked about ever less.
        due = finding is Finding.SUSPECT or now >= watch.next_probe_s
        if due and watch.task is None and watch.probe is not None and _has_room(node):
            self._begin_probe(node, watch, MOST_PAUSE_S, now)

    def _look_at_wedged(self, node: Node, now: float) -> None:
        watch = self._watches.get(node)
        if watch is None:
            watch = self._watches[node] = _Watch(WEDGED_PAUSE_S)
        since_s = node.wedged_since_s
        assert since_s is not None
        heard_s = max(_last_byte_s(node, since_s), watch.answered_s)
        if heard_s > since_s:
            node.heard_s = max(node.heard_s, heard_s)
            self._registry.unwedged(node, now)
            return
        for attempt in list(node.live):
            seen = attempt.seen()
            if seen is not None and not seen.paused and now - seen.resumed_s >= self._stall_s:
                attempt.give_up()
        if watch.task is None and now >= watch.next_probe_s:
            self._begin_probe(node, watch, MOST_WEDGED_PAUSE_S, now)

    def _forget(self, now: float) -> None:
        """Drop what was remembered of nodes that are gone, or that have long been well."""
        for node, watch in list(self._watches.items()):
            gone = self._registry.nodes.get(node.id) is not node
            well = not node.is_wedged and watch.task is None and node.heard_s > max(watch.answered_s, watch.failed_s)
            if gone and watch.task is not None:
                watch.task.cancel()
            if gone or well:
                del self._watches[node]

    # -- probes

    def _begin_probe(self, node: Node, watch: _Watch, most_pause_s: float, now: float) -> None:
        watch.next_probe_s = now + watch.pause_s
        watch.pause_s = min(most_pause_s, 2.0 * watch.pause_s)
        watch.task = asyncio.get_running_loop().create_task(self._probe(node, watch))

    async def _probe(self, node: Node, watch: _Watch) -> None:
        begun_s = self._clock.now()
        answered: bool | None = False
        try:
            answered = _judge_answer(await self._ask(node, watch), watch.probe is not None)
        except NoAnswer:
            pass
        finally:
            watch.task = None
        now = self._clock.now()
        word = "unclear" if answered is None else "answered" if answered else "failed"
        self._metrics.probes.of(word).inc()
        log.debug("node.probed", node=node.id, outcome=word, seconds=round(now - begun_s, 3))
        if answered is None and node.wedged_since_s is not None and now - node.wedged_since_s > UNCLEAR_S:
            answered = True
        if answered:
            watch.answered_s = now
        elif answered is False:
            watch.failed_s = begun_s

    async def _ask(self, node: Node, watch: _Watch) -> Answer:
        assert self._session is not None
        base, key = node.config.url.rstrip("/"), node.config.api_key
        timeout_s = max(self._stall_s, 3.0 * node.load.ttft_s)
        if watch.probe is None:
            return await ask(self._session, base + self._health_path, timeout_s=timeout_s, api_key=key)
        body = orjson.dumps(watch.probe.body)
        url = base + watch.probe.path
        return await ask(self._session, url, timeout_s=timeout_s, max_bytes=MAX_BYTES, api_key=key, body=body)


def _last_byte_s(node: Node, enough_s: float) -> float:
    """The last byte of anything under way at a node; any one after `enough_s` will do."""
    last_s = float("-inf")
    for attempt in node.live:
        heard_s = attempt.heard_s
        if heard_s > last_s:
            last_s = heard_s
            if last_s > enough_s:
                break
    return last_s


def _has_room(node: Node) -> bool:
    """Whether the engine would take a probe up at once; one that waits for a slot says nothing."""
    slots = node.report.slots if node.report is not None and node.report.slots else DEFAULT_SLOTS
    return node.has_room() and node.load.rif < slots


def _judge_answer(answer: Answer, asked_engine: bool) -> bool | None:
    """Whether the engine worked; None where the answer leaves that open."""
    if answer.is_good:
        return True if asked_engine else None
    return None if answer.status in _UNCLEAR else False
