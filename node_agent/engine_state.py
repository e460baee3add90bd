"""What is held true of one engine, visit after visit: a pure function of (previous, visit, now)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

from node_agent.engine_sample import EngineFacts, EngineSample
from node_agent.window import Point, extend, was_reset

# An engine that merely does not answer may be busy for a moment; one that refuses is gone at once.
SILENT_S = 2.5
# Load figures older than this say nothing about now.
SAMPLE_STALE_S = 10.0

Health = Literal["ok", "error", "refused", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one visit to an engine brought home. `sample` None: its metrics were not read this time."""

    health: Health
    detail: str = ""
    kind: str | None = None
    simulated: bool | None = None
    sample: EngineSample | None = None
    facts: EngineFacts | None = None
    simulated_gpus: tuple[object, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """Which start of the engine this is; `id` changes exactly when a restart was seen."""

    id: str
    resets: int = 0
    start_time: float | None = None
    process: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """The last value of the engine's progress, and since when it has not moved while requests ran."""

    progress: float
    since: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """Everything known of one engine."""

    kind: str | None = None
    simulated: bool = False
    health: Health | None = None
    detail: str = ""
    reachable: bool = True
    answered_at: float | None = None
    facts: EngineFacts = field(default_factory=EngineFacts)
    sample: EngineSample | None = None
    sampled_at: float | None = None
    points: tuple[Point, ...] = ()
    uncached_tokens: float | None = None
    boot: Boot | None = None
    standstill: Standstill | None = None
    wedged: bool | None = None
    simulated_gpus: tuple[object, ...] = ()

    def __repr__(self) -> str:
        return f"<EngineState {self.kind} {self.health} reachable={self.reachable} wedged={self.wedged}>"


def observe(
    previous: EngineState,
    visit: Visit,
    now: float,
    *,
    name: str,
    process: str | None = None,
    wedge_after_s: float = 5.0,
) -> EngineState:
    """Take a visit in. A failed visit keeps what changes rarely and drops the load, which is unknown then."""
    state = _reached(previous, visit, now)
    if not state.reachable:
        return replace(state, sample=None, sampled_at=None, standstill=None, wedged=None)
    state = replace(
        state,
        kind=visit.kind or state.kind,
        simulated=state.simulated if visit.simulated is None else visit.simulated,
        facts=_kept_facts(state.facts, visit.facts),
        simulated_gpus=state.simulated_gpus if visit.simulated_gpus is None else visit.simulated_gpus,
    )
    if visit.sample is None:
        return replace(state, boot=_boot(state, visit, None, name, process))
    point = Point(at=now, counters=visit.sample.counters, histograms=visit.sample.histograms)
    boot = _boot(state, visit, point, name, process)
    restarted = is_restart(state.boot, boot)
    standstill = _standstill(None if restarted else state.standstill, visit.sample, now)
    return replace(
        state,
        boot=boot,
        sample=visit.sample,
        sampled_at=now,
        points=(point,) if restarted else extend(state.points, point),
        uncached_tokens=_uncached(None if restarted else state.uncached_tokens, visit.sample),
        standstill=standstill,
        wedged=_wedged(standstill, now, wedge_after_s),
    )


def is_restart(before: Boot | None, after: Boot | None) -> bool:
    """True if the engine is known to have restarted between the two."""
    return before is not None and after is not None and before.id != after.id


def fresh_sample(state: EngineState, now: float) -> EngineSample | None:
    """Return the load, unless it is too old to be true."""
    if state.sample is None or state.sampled_at is None or now - state.sampled_at > SAMPLE_STALE_S:
        return None
    return state.sample


def _reached(previous: EngineState, visit: Visit, now: float) -> EngineState:
    answered = visit.health in ("ok", "error")
    answered_at = now if answered else previous.answered_at
    patient = visit.health == "silent" and answered_at is not None and now - answered_at < SILENT_S
    return replace(
        previous,
        health=visit.health,
        detail=visit.detail,
        reachable=answered or (patient and previous.reachable),
        answered_at=answered_at,
    )


def _kept_facts(before: EngineFacts, after: EngineFacts | None) -> EngineFacts:
    """A model list once known is kept when a later question for it goes unanswered."""
    if after is None:
        return before
    return replace(
        after,
        models=before.models if after.models is None else after.models,
        version=before.version if after.version is None else after.version,
    )


def _boot(state: EngineState, visit: Visit, point: Point | None, name: str, process: str | None) -> Boot | None:
    """Three witnesses of a restart: the start time it publishes, its process, and counters that went backwards.

    What a witness said before a restart that another one saw is forgotten, so that one restart is one change.
    """
    start_time = visit.sample.start_time if visit.sample is not None else None
    before = state.boot
    if before is None:
        if visit.sample is None and visit.health != "ok":  # still loading: its figures will say more
            return None
        return Boot(id=_boot_id(name, start_time, process, 0), start_time=start_time, process=process)
    new_start, new_process = _differs(before.start_time, start_time), _differs(before.process, process)
    reset = point is not None and bool(state.points) and was_reset(state.points[-1], point)
    if not (new_start or new_process or reset):
        start_time = before.start_time if start_time is None else start_time
        return replace(before, start_time=start_time, process=before.process if process is None else process)
    process = process if new_process else None
    resets = 0
    if _boot_id(name, start_time, process, 0) == before.id or not (new_start or new_process):
        resets = before.resets + 1
    return Boot(id=_boot_id(name, start_time, process, resets), resets=resets, start_time=start_time, process=process)


def _differs(before: object, after: object) -> bool:
    return before is not None and after is not None and before != after


def _boot_id(name: str, start_time: float | None, process: str | None, resets: int) -> str:
    """Equal for equal evidence, so that an agent that is restarted does not report a restart of the engine."""
    evidence = start_time if start_time is not None else process
    return hashlib.sha256(repr((name, evidence, resets)).encode()).hexdigest()[:16]


def _uncached(before: float | None, sample: EngineSample) -> float | None:
    """Prompt tokens computed; never less than before, although cached ones are counted a moment before the others."""
    value = sample.counters.get("uncached_tokens")
    if value is None and "prompt_tokens" in sample.counters and "cached_tokens" in sample.counters:
        value = sample.counters["prompt_tokens"] - sample.counters["cached_tokens"]
    return before if value is None else max(value, before or 0.0)


def _standstill(before: Standstill | None, sample: EngineSample, now: float) -> Standstill | None:
    if sample.progress is None or sample.running is None:
        return None
    if sample.running == 0:
        return Standstill(progress=sample.progress, since=None)
    if before is None or before.progress != sample.progress or before.since is None:
        return Standstill(progress=sample.progress, since=now)
    return before


def _wedged(standstill: Standstill | None, now: float, after_s: float) -> bool | None:
    if standstill is None:
        return None
    return standstill.since is not None and now - standstill.since >= after_s
