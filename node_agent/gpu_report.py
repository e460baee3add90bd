"""Which GPUs belong to which engine, who else uses them, and what is reported of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from node_agent import problems
from node_agent.engine_spec import EngineSpec
from node_agent.engine_state import EngineState
from node_agent.gpu import GpuReading, GpuSample, Xid, throttle_reasons
from node_agent.gpu_watch import GPU_STALE_S, GpuView
from node_agent.problems import GpuHistory, facts_of, judge_gpu, merged
from node_agent.report import GpuReport
from node_agent.simulated import simulated_gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineView:
    """One engine: as configured, as observed, and its processes if they can be seen."""

    spec: EngineSpec
    state: EngineState
    pids: frozenset[int] | None = None


def assigned_gpus(view: EngineView, engines: Sequence[EngineView], gpus: GpuView) -> tuple[set[int], bool]:
    """Say which GPUs an engine runs on, and whether one that was configured is not there.

    As configured; else all of them for the only engine; else those on which its processes are seen.
    """
    if not gpus.available:
        return set(), False
    if view.spec.gpus is not None:
        found = [_matching(name, gpus.samples) for name in view.spec.gpus]
        return {index for index in found if index is not None}, None in found
    if len(engines) == 1:
        return {sample.reading.index for sample in gpus.samples}, False
    return {sample.reading.index for sample in gpus.samples if _runs_on(sample.reading, view.pids)}, False


def _matching(name: str, samples: Iterable[GpuSample]) -> int | None:
    """The index of a GPU named by index or UUID; one whose UUID cannot be read may still be the one."""
    return next((one.reading.index for one in samples if name in (str(one.reading.index), one.reading.uuid)), None)


def _runs_on(reading: GpuReading, pids: frozenset[int] | None) -> bool:
    return pids is not None and not pids.isdisjoint(reading.process_memory_bytes or ())


def memory_of_others(reading: GpuReading, engines: Sequence[EngineView], gpus: GpuView) -> int | None:
    """Sum the memory of processes that belong to no engine of this GPU; None if that cannot be known.

    It can be known only if the processes of each engine on it are known, and NVML counts in the same pids:
    in a container without the host's pids it does not, and every engine would look foreign.
    """
    memory = reading.process_memory_bytes
    here = [view for view in engines if reading.index in assigned_gpus(view, engines, gpus)[0]]
    if memory is None or not here or any(view.pids is None for view in here):
        return None
    ours = frozenset(pid for view in engines for pid in view.pids or ())
    if not any(_runs_on(sample.reading, ours) for sample in gpus.samples):
        return None
    others = [used for pid, used in memory.items() if pid not in ours]
    return None if None in others else sum(used for used in others if used is not None)


def real_gpu(
    sample: GpuSample, gpus: GpuView, engines: Sequence[EngineView], history: GpuHistory, now: float
) -> tuple[GpuReport, GpuHistory]:
    """Report one GPU, and what judging it next time needs."""
    reading = sample.reading
    xids = gpus.xids.get(reading.index)
    recent = problems.recent(xids, now) if xids is not None else None
    others = memory_of_others(reading, engines, gpus)
    found, history = judge_gpu(facts_of(sample, recent or (), others), history, now)
    report = GpuReport(
        uuid=reading.uuid,
        index=reading.index,
        name=reading.name,
        memory_used_bytes=reading.memory_used_bytes,
        memory_total_bytes=reading.memory_total_bytes,
        memory_used_by_others_bytes=others,
        utilization_ratio=reading.utilization_ratio,
        temperature_celsius=reading.temperature_celsius,
        power_watts=reading.power_watts,
        clock_sm_mhz=reading.clock_sm_mhz,
        throttle_reasons=throttle_reasons(reading.event_reasons),
        ecc_uncorrected_total=reading.ecc_uncorrected_total,
        remapped_rows_pending=reading.remapped_rows_pending,
        xid_recent=_codes(recent),
        pcie_width=reading.pcie_width,
        problems=found,
        age_s=round(sample.age_s, 4),
    )
    return report, history


def simulated_gpus(view: EngineView, now: float) -> list[GpuReport]:
    """Report the GPUs that a simulated node lists: judged like real ones, and what it says of them itself stands."""
    age_s = now - view.state.answered_at if view.state.answered_at is not None else 0.0
    read = [pair for item in view.state.simulated_gpus if (pair := simulated_gpu(item, now)) is not None]
    if age_s > GPU_STALE_S:
        return [GpuReport(uuid=gpu.uuid, index=gpu.index, name=gpu.name, age_s=round(age_s, 4)) for gpu, _ in read]
    judged = [(gpu, judge_gpu(facts, GpuHistory(), now)[0]) for gpu, facts in read]
    return [replace(gpu, problems=merged(gpu.problems, found), age_s=round(age_s, 4)) for gpu, found in judged]


def _codes(xids: Iterable[Xid] | None) -> tuple[int, ...] | None:
    return None if xids is None else tuple(xid.code for xid in xids)
