"""How each field of a report is derived from what was measured: a pure function of the measurements and `now`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from node_agent import problems
from node_agent.engine_sample import EngineSample
from node_agent.engine_state import EngineState, fresh_sample
from node_agent.gpu_report import EngineView, assigned_gpus, real_gpu, simulated_gpus
from node_agent.gpu_watch import GpuView
from node_agent.problems import GpuHistory, merged
from node_agent.report import GpuReport, HostReport, ModelReport, NodeReport, Quantiles
from node_agent.window import Point, quantile, ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who reports: the host's name, this start of the agent, and how often it looks."""

    host: str
    boot_id: str
    interval_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Histories:
    """What judging the next report needs from this one, by GPU uuid."""

    gpus: Mapping[str, GpuHistory] = field(default_factory=dict)


def host_report(
    *,
    identity: Identity,
    seq: int,
    drain: bool,
    engines: Sequence[EngineView],
    gpus: GpuView,
    histories: Histories,
    now: float,
) -> tuple[HostReport, Histories]:
    """Put one report together; a figure that is too old or was never there is None."""
    kept: dict[str, GpuHistory] = {}
    real = []
    for sample in gpus.samples:
        key = sample.reading.uuid or str(sample.reading.index)
        gpu, kept[key] = real_gpu(sample, gpus, engines, histories.gpus.get(key, GpuHistory()), now)
        real.append(gpu)
    simulated = {view.spec.id: simulated_gpus(view, now) for view in engines if view.state.simulated}
    nodes = tuple(_node(view, engines, gpus, real, simulated.get(view.spec.id), now) for view in engines)
    report = HostReport(
        host=identity.host,
        boot_id=identity.boot_id,
        seq=seq,
        age_s=max((node.age_s for node in nodes if node.age_s is not None), default=0.0),
        interval_s=identity.interval_s,
        drain=drain,
        simulated=bool(simulated),
        nodes=nodes,
        gpus=(*real, *(gpu for group in simulated.values() for gpu in group)),
    )
    return report, Histories(gpus=kept)


def _node(
    view: EngineView,
    engines: Sequence[EngineView],
    gpus: GpuView,
    real: Sequence[GpuReport],
    simulated: Sequence[GpuReport] | None,
    now: float,
) -> NodeReport:
    spec, state = view.spec, view.state
    indices, missing = assigned_gpus(view, engines, gpus) if simulated is None else (set(), False)
    own = [gpu for gpu in real if gpu.index in indices] if simulated is None else list(simulated)
    sample = fresh_sample(state, now)
    wedged = state.wedged if sample is not None else (state.wedged or None)
    found = merged(
        _engine_problems(state, wedged),
        [problems.GPU_LOST] if missing else [],
        *(gpu.problems for gpu in own),
    )
    node = NodeReport(
        id=spec.id,
        url=spec.advertise,
        engine=state.kind or (spec.kind if spec.kind != "auto" else None),
        engine_version=state.facts.version,
        engine_boot_id=state.boot.id if state.boot else None,
        models=_models(state),
        gpu_memory_utilization=_memory_ratio(own, sample),
        gpus=tuple(gpu.uuid for gpu in own if gpu.uuid),
        wedged=wedged,
        healthy=problems.is_healthy(found),
        problems=found,
    )
    return node if sample is None else _with_load(node, sample, state, now)


def _with_load(node: NodeReport, sample: EngineSample, state: EngineState, now: float) -> NodeReport:
    facts, counters, points = state.facts, sample.counters, state.points
    return replace(
        node,
        queue_depth=sample.queue_depth,
        running=sample.running,
        slots=_first(sample.slots, facts.slots),
        kv_usage_ratio=_rounded(sample.kv_usage_ratio),
        kv_capacity_tokens=_first(sample.kv_capacity_tokens, facts.kv_capacity_tokens),
        kv_block_tokens=_first(sample.kv_block_tokens, facts.kv_block_tokens),
        context_tokens=sample.context_tokens,
        waiting_prompt_tokens=sample.waiting_prompt_tokens,
        prefix_hit_ratio=_rounded(_prefix_hits(sample, points)),
        avg_latency_seconds=_rounded(ratio(points, "latency_seconds", "latency_count")),
        ttft_seconds=_quantiles(points, "ttft"),
        itl_seconds=_quantiles(points, "itl"),
        prefill_seconds_total=_rounded(counters.get("prefill_seconds")),
        uncached_prompt_tokens_total=_whole(state.uncached_tokens),
        generation_tokens_total=_whole(counters.get("generation_tokens")),
        preemptions_total=_whole(counters.get("preemptions")),
        age_s=_rounded(now - state.sampled_at) if state.sampled_at is not None else None,
    )


def _prefix_hits(sample: EngineSample, points: tuple[Point, ...]) -> float | None:
    """Share of the prompt tokens of the window that were found in the prefix cache; else the engine's own figure."""
    if "prefix_queries" in sample.counters and "prefix_hits" in sample.counters:
        return ratio(points, "prefix_hits", "prefix_queries")
    return sample.prefix_hit_ratio


def _quantiles(points: tuple[Point, ...], name: str) -> Quantiles | None:
    p50, p99 = quantile(points, name, 0.5), quantile(points, name, 0.99)
    return None if p50 is None or p99 is None else Quantiles(p50=round(p50, 6), p99=round(p99, 6))


def _engine_problems(state: EngineState, wedged: bool | None) -> list[str]:
    found = {
        problems.ENGINE_UNREACHABLE: not state.reachable,
        problems.ENGINE_WEDGED: bool(wedged),
        problems.ENGINE_ERROR: state.reachable and state.health == "error",
    }
    return [code for code, there in found.items() if there]


def _models(state: EngineState) -> tuple[ModelReport, ...] | None:
    if state.facts.models is None:
        return None
    return tuple(
        ModelReport(id=model.id, loaded=model.loaded, max_context_tokens=model.max_context_tokens)
        for model in state.facts.models
    )


def _memory_ratio(gpus: Sequence[GpuReport], sample: EngineSample | None) -> float | None:
    """Σ used / Σ total over the node's GPUs; where none can be read, what the engine itself says of them."""
    if not gpus:
        return _rounded(sample.gpu_memory_ratio) if sample is not None else None
    used = [gpu.memory_used_bytes for gpu in gpus]
    total = [gpu.memory_total_bytes for gpu in gpus]
    if None in used or None in total:
        return None
    whole = sum(size for size in total if size is not None)
    return _rounded(sum(size for size in used if size is not None) / whole) if whole else None


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
