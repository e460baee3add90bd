"""Looks at everything on a timer and keeps the latest report; answers never wait for an engine or a GPU."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import structlog

from node_agent.clock import Clock
from node_agent.derive import Histories, Identity, host_report
from node_agent.engine import EngineWatch
from node_agent.gpu_report import EngineView
from node_agent.gpu_watch import GpuView
from node_agent.problems import ENGINE_PROBLEMS
from node_agent.report import HostReport

log = structlog.get_logger()

# A report waits this long for engines that are slow to answer, then goes without: theirs comes with the next one.
PATIENCE_S = 0.5
# The first report waits longer, so that it says something.
FIRST_PATIENCE_S = 3.0


class GpuSource(Protocol):
    """Where GPU readings come from: NVML, or nowhere."""

    async def refresh(self) -> None: ...

    def view(self) -> GpuView: ...

    def stop(self) -> None: ...


class Sampler:
    """The only writer of the report."""

    def __init__(
        self,
        identity: Identity,
        engines: Sequence[EngineWatch],
        gpus: GpuSource,
        clock: Clock,
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.engines = tuple(engines)
        self._identity, self._gpus, self._clock, self._patience_s = identity, gpus, clock, patience_s
        self._drain = False
        self._latest: HostReport | None = None
        self._made_at = clock.now()
        self._histories = Histories()
        self._newer = asyncio.Condition()

    def __repr__(self) -> str:
        seq = self._latest.seq if self._latest else 0
        return f"<Sampler seq={seq} drain={self._drain} engines={len(self.engines)}>"

    @property
    def interval_s(self) -> float:
        return self._identity.interval_s

    def report(self) -> HostReport | None:
        """Return the latest report with its ages as of now; None before the first one."""
        return self._latest.aged(self.silence_s()) if self._latest is not None else None

    def silence_s(self) -> float:
        """Return for how long no report was made."""
        return self._clock.now() - self._made_at

    async def run(self) -> None:
        """Look again and again, once per interval; looks that were missed are not made up for."""
        due = self._clock.now()
        while True:
            try:
                await self.look()
            except Exception:  # the edge of a background loop
                log.exception("sample.failed")
            now, due = self._clock.now(), due + self._identity.interval_s
            if now - due > self._identity.interval_s:
                due = now + self._identity.interval_s
            await self._clock.sleep(due - now)

    async def look(self) -> None:
        """Visit all engines and GPUs at once, and make a report of what came back in time."""
        patience_s = self._patience_s if self._latest else max(self._patience_s, FIRST_PATIENCE_S)
        gpus = asyncio.create_task(self._gpus.refresh(), name="gpus")
        await asyncio.wait({gpus, *(engine.begin_visit() for engine in self.engines)}, timeout=patience_s)
        await self._make()

    async def set_drain(self, drain: bool) -> None:
        """Ask for a drain, or take it back; it is reported at once."""
        if drain != self._drain:
            log.info("host.drained" if drain else "host.undrained", host=self._identity.host)
        self._drain = drain
        await self._make()

    async def newer_than(self, seq: int) -> HostReport:
        """Wait for a report after `seq`; returns the latest, with its ages as of now."""
        async with self._newer:
            await self._newer.wait_for(lambda: self._latest is not None and self._latest.seq > seq)
        report = self.report()
        assert report is not None
        return report

    async def close(self) -> None:
        self._gpus.stop()
        for engine in self.engines:
            await engine.close()

    async def _make(self) -> None:
        now, before = self._clock.now(), self._latest
        self._latest, self._histories = host_report(
            identity=self._identity,
            seq=self._latest.seq + 1 if self._latest else 1,
            drain=self._drain,
            engines=[_view(engine) for engine in self.engines],
            gpus=self._gpus.view(),
            histories=self._histories,
            now=now,
        )
        self._made_at = now
        _log_problems(before, self._latest)
        async with self._newer:
            self._newer.notify_all()


def _view(engine: EngineWatch) -> EngineView:
    return EngineView(
        spec=engine.spec, state=engine.state, pids=engine.processes.pids if engine.processes is not None else None
    )


def _log_problems(before: HostReport | None, after: HostReport) -> None:
    """One line for each GPU, and each node that lacks one, whose problems changed; EngineWatch logs its own."""
    had, has = _by_source(before) if before else {}, _by_source(after)
    for source, problems in has.items():
        if problems != had.get(source, ()):
            event = "gpu.problems_changed" if source[0] == "gpu" else "node.problems_changed"
            level = logging.WARNING if problems else logging.INFO
            log.log(level, event, **{source[0]: source[1]}, problems=list(problems))


def _by_source(report: HostReport) -> dict[tuple[str, str], tuple[str, ...]]:
    gpus = {("gpu", gpu.uuid or str(gpu.index)): gpu.problems for gpu in report.gpus}
    told = {code for problems in gpus.values() for code in problems} | ENGINE_PROBLEMS
    nodes = {("node", one.id): tuple(code for code in one.problems if code not in told) for one in report.nodes}
    return {**gpus, **nodes}
