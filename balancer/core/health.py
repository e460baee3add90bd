"""HostReport -> HealthState: what an agent measured, judged with hysteresis and by age.

The report's form is the contract's HostReport version 1; `tests/contract/golden` pins it for both programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from pydantic import Field

from balancer.errors import BadRequest

# Out at once: the GPU or the engine cannot give a right answer. (NVIDIA's XID catalogue; contract, `problems`.)
OUT_PROBLEMS = frozenset(
    {"xid_fatal", "gpu_lost", "row_remap_failed", "engine_unreachable", "engine_wedged", "engine_error"}
)
# A node with any other problem works, but slower or at risk: it keeps half of its weight.
DEGRADED_WEIGHT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthPolicy:
    """Active checks: how often, and how many in a row change the verdict."""

    path: str = "/health"
    interval_s: Annotated[float, Field(gt=0)] = 1.0
    timeout_s: Annotated[float, Field(gt=0)] = 1.0
    fall: Annotated[int, Field(ge=1)] = 3
    rise: Annotated[int, Field(ge=1)] = 1
    recover_after_s: Annotated[float, Field(ge=0)] = 3.0  # of good reports, before an agent's verdict improves


class Verdict(Enum):
    """What the evidence says of a node."""

    UNKNOWN = "unknown"
    OK = "ok"
    DEGRADED = "degraded"
    OUT = "out"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthState:
    """A verdict with its reasons, and since when better reports have been coming."""

    verdict: Verdict = Verdict.UNKNOWN
    reasons: tuple[str, ...] = ()
    improving_since_s: float | None = None

    @property
    def weight(self) -> float:
        """The share of its weight that a node in this state keeps."""
        return DEGRADED_WEIGHT if self.verdict is Verdict.DEGRADED else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node of a HostReport; None is "not known", never zero."""

    id: str
    url: str
    engine: str | None = None
    engine_boot_id: str | None = None
    models: tuple[str, ...] | None = None
    queue_depth: float | None = None
    running: float | None = None
    slots: float | None = None
    kv_usage_ratio: float | None = None
    kv_capacity_tokens: float | None = None
    kv_block_tokens: float | None = None
    context_tokens: float | None = None
    avg_latency_seconds: float | None = None
    prefill_seconds_total: float | None = None
    uncached_prompt_tokens_total: float | None = None
    generation_tokens_total: float | None = None
    gpu_memory_utilization: float | None = None
    healthy: bool | None = None
    wedged: bool | None = None
    problems: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What one agent says of its host; `age_s` is counted by the agent, so that clocks need not agree."""

    host: str
    boot_id: str
    seq: int
    age_s: float
    interval_s: float
    drain: bool
    nodes: tuple[NodeReport, ...]
    gpus: tuple[Mapping[str, Any], ...] = ()
    simulated: bool = False


_NUMBERS = (
    "queue_depth",
    "running",
    "slots",
    "kv_usage_ratio",
    "kv_capacity_tokens",
    "kv_block_tokens",
    "context_tokens",
    "avg_latency_seconds",
    "prefill_seconds_total",
    "uncached_prompt_tokens_total",
    "generation_tokens_total",
    "gpu_memory_utilization",
)


def parse_report(data: object) -> HostReport:
    """Read a HostReport; unknown fields are ignored. Raises BadRequest for a wrong version or a wrong type."""
    if not isinstance(data, Mapping) or data.get("version") != 1:
        raise BadRequest("not a HostReport of version 1")
    return HostReport(
        host=_text(data, "host") or "",
        boot_id=_text(data, "boot_id") or "",
        seq=int(_number(data, "seq") or 0),
        age_s=max(0.0, _number(data, "age_s") or 0.0),
        interval_s=_number(data, "interval_s") or 1.0,
        drain=_flag(data, "drain") is True,
        simulated=_flag(data, "simulated") is True,
        nodes=tuple(_parse_node(node) for node in _items(data, "nodes", Mapping) or ()),
        gpus=tuple(_items(data, "gpus", Mapping) or ()),
    )


def _parse_node(node: Mapping[str, Any]) -> NodeReport:
    numbers: dict[str, float | None] = {name: _number(node, name) for name in _NUMBERS}
    models = _items(node, "models", Mapping)
    return NodeReport(
        id=_text(node, "id") or "",
        url=_text(node, "url") or "",
        engine=_text(node, "engine"),
        engine_boot_id=_text(node, "engine_boot_id"),
        models=None if models is None else tuple(id_ for model in models if (id_ := _text(model, "id"))),
        healthy=_flag(node, "healthy"),
        wedged=_flag(node, "wedged"),
        problems=tuple(_items(node, "problems", str) or ()),
        raw=node,
        **numbers,
    )


def _number(data: Mapping[str, Any], name: str) -> float | None:
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name}: must be a number", param=name)
    return float(value)


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is None or isinstance(value, str):
        return value
    raise BadRequest(f"{name}: must be a string", param=name)


def _flag(data: Mapping[str, Any], name: str) -> bool | None:
    value = data.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise BadRequest(f"{name}: must be true or false", param=name)


def _items(data: Mapping[str, Any], name: str, kind: type) -> list[Any] | None:
    value = data.get(name)
    if value is None or (isinstance(value, list) and all(isinstance(item, kind) for item in value)):
        return value
    raise BadRequest(f"{name}: must be a list of {'strings' if kind is str else 'objects'}", param=name)


def assess(report: NodeReport, previous: HealthState, policy: HealthPolicy, now: float) -> HealthState:
    """Judge one report in the light of the last verdict.

    A verdict worsens at once and improves after `policy.recover_after_s` of good reports.
    """
    verdict, reasons = _judge(report)
    if _RANK[verdict] >= _RANK[previous.verdict]:
        return HealthState(verdict=verdict, reasons=reasons)
    since_s = previous.improving_since_s if previous.improving_since_s is not None else now
    if now - since_s >= policy.recover_after_s:
        return HealthState(verdict=verdict, reasons=reasons)
    return HealthState(verdict=previous.verdict, reasons=previous.reasons, improving_since_s=since_s)


_RANK = {Verdict.UNKNOWN: 0, Verdict.OK: 0, Verdict.DEGRADED: 1, Verdict.OUT: 2}


def _judge(report: NodeReport) -> tuple[Verdict, tuple[str, ...]]:
    out = tuple(problem for problem in report.problems if problem in OUT_PROBLEMS)
    if out:
        return Verdict.OUT, out
    if report.healthy is False:  # the agent's own sum, for reasons that may be newer than we are
        return Verdict.OUT, report.problems or ("unhealthy",)
    if report.problems:
        return Verdict.DEGRADED, report.problems
    return Verdict.OK, ()
