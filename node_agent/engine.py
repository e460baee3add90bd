"""Watches one inference server: is it there, what does it queue and run, did it restart, does it move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from node_agent import processes
from node_agent.clock import Clock
from node_agent.engine_http import EngineHttp
from node_agent.engine_spec import EngineSpec
from node_agent.engine_state import EngineState, Visit, is_restart, observe
from node_agent.engine_visit import EngineVisitor, ScrapePolicy
from node_agent.processes import EngineProcesses

log = structlog.get_logger()

# Walking /proc costs some milliseconds of CPU, and processes change only when the engine restarts.
PROCESSES_EVERY_S = 10.0


class EngineWatch:
    """One engine and what is held true of it; at most one visit is under way."""

    def __init__(
        self,
        spec: EngineSpec,
        http: EngineHttp,
        clock: Clock,
        policy: ScrapePolicy,
        find_processes: Callable[[str], EngineProcesses | None] = processes.find,
    ) -> None:
        self.spec = spec
        self.state = EngineState()
        self.processes: EngineProcesses | None = None
        self.visits = {"ok": 0, "error": 0, "refused": 0, "silent": 0}
        self.visit_s = 0.0
        self._clock, self._policy, self._find = clock, policy, find_processes
        self._visitor = EngineVisitor(spec, http, clock, policy)
        self._task: asyncio.Task[None] | None = None
        self._processes_due = float("-inf")

    def __repr__(self) -> str:
        return f"<EngineWatch {self.spec.id} {self.state!r}>"

    def begin_visit(self) -> asyncio.Task[None]:
        """Start a visit, or return the one that is still under way."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._visit(), name=f"visit {self.spec.id}")
        return self._task

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _visit(self) -> None:
        begun = self._clock.now()
        try:
            await self._look_for_processes(begun)
            visit = await self._visitor.visit(self.state)
            unseen = self.state.boot is None and self.processes is None
            if visit.health == "ok" and (unseen or not self.state.reachable):
                await self._look_for_processes(begun, again=True)  # it may have begun to listen just now
        except Exception as error:  # the edge of a background loop: one odd answer must not end the watch
            log.exception("engine.visit_failed", node=self.spec.id)
            visit = Visit(health="refused", detail=f"visit failed: {error!r}")
        now = self._clock.now()
        self.visit_s = now - begun
        self.visits[visit.health] += 1
        self._take_in(visit, now)

    def _take_in(self, visit: Visit, now: float) -> None:
        before = self.state
        identity = self.processes.identity if self.processes else None
        self.state = observe(
            before, visit, now, name=self.spec.id, process=identity, wedge_after_s=self._policy.wedge_after_s
        )
        came_back = self.state.reachable and not before.reachable
        if came_back or is_restart(before.boot, self.state.boot):  # another start may serve other models
            self._visitor.forget_facts()
            self._processes_due = float("-inf")  # and what was seen of its processes is of the old one
        _log_changes(self.spec.id, before, self.state)

    async def _look_for_processes(self, now: float, *, again: bool = False) -> None:
        if again or now >= self._processes_due:
            self._processes_due = now + PROCESSES_EVERY_S
            self.processes = await asyncio.to_thread(self._find, self.spec.url)


def _log_changes(node: str, before: EngineState, after: EngineState) -> None:
    """One line on each edge, none in between."""
    if after.kind != before.kind:
        log.info("engine.detected", node=node, engine=after.kind, simulated=after.simulated)
    if before.reachable and not after.reachable:
        log.warning("engine.lost", node=node, reason=after.detail)
    if after.reachable and not before.reachable:
        log.info("engine.recovered", node=node)
    if after.health == "error" and before.health != "error":
        log.warning("engine.failed", node=node, reason=after.detail)
    if before.health == "error" and after.health == "ok":
        log.info("engine.recovered", node=node)
    if is_restart(before.boot, after.boot):
        log.info("engine.restarted", node=node, engine_boot_id=after.boot.id if after.boot else None)
    if after.wedged and not before.wedged:
        log.warning("engine.wedged", node=node, running=after.sample.running if after.sample else None)
    if before.wedged and after.wedged is False:
        log.info("engine.unwedged", node=node)
