"""One visit to an engine: health, metrics page, what its kind tells beside it, and now and then the rare facts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field

from node_agent.clock import Clock
from node_agent.engine_facts import detect, facts
from node_agent.engine_http import Answer, EngineHttp, Refused, Silent
from node_agent.engine_sample import EngineSample, from_metrics, with_llamacpp_slots, with_sglang_loads
from node_agent.engine_spec import EngineSpec
from node_agent.engine_state import EngineState, Health, Visit
from node_agent.exposition import parse
from node_agent.signals import SIGNALS, UNKNOWN, kind_of, normal, wanted

# A page that takes long costs the engine's own CPU: read it for at most a third of the time.
SLOW_REST = 2.0
# The longest pause between two reads of a slow page.
MAX_REST_S = 10.0
# Triton serves its metrics on a port of their own.
TRITON_METRICS_PORT = 8002
# Our own simulated node marks its answers so, and lists its GPUs beside them.
SIMULATED_HEADER, SIMULATED_GPUS_PATH = "x-simulated", "/sim/gpus"
# llama.cpp tells its start in a header instead of a series.
START_TIME_HEADER = "Process-Start-Time-Unix"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrapePolicy:
    """How engines are read."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    timeout_s: Annotated[float, Field(gt=0, le=30)] = 1.0  # of each single question
    facts_every_s: Annotated[float, Field(gt=0)] = 10.0  # models, version, limits
    wedge_after_s: Annotated[float, Field(gt=0)] = 5.0  # longer than any single step of a healthy engine


def rest_s(took_s: float) -> float:
    """Return how long to leave a metrics page alone that took so long to read."""
    return min(MAX_REST_S, took_s * SLOW_REST)


def page_urls(spec: EngineSpec, kind: str | None) -> tuple[str, ...]:
    """Return where an engine of that kind has its metrics page, the likeliest place first."""
    if spec.metrics:
        return (spec.metrics,)
    if kind is None:
        return ("/metrics", SIGNALS["trtllm"].metrics_path)
    if kind == "triton":
        return (f"{_with_port(spec.url, TRITON_METRICS_PORT)}/metrics", "/metrics")
    path = SIGNALS[kind].metrics_path
    return (path,) if path else ()


class EngineVisitor:
    """Visits one engine; remembers only when which question is due again."""

    def __init__(self, spec: EngineSpec, http: EngineHttp, clock: Clock, policy: ScrapePolicy) -> None:
        self._spec, self._http, self._clock, self._policy = spec, http, clock, policy
        self._page_url: str | None = None  # the one that answered last
        self._page_due = self._facts_due = float("-inf")

    def forget_facts(self) -> None:
        """Ask for the rare facts again on the next visit."""
        self._facts_due = float("-inf")

    async def visit(self, state: EngineState) -> Visit:
        """Ask the engine everything that is due. Never raises for what an engine does or fails to do."""
        kind = state.kind if self._spec.kind == "auto" else self._spec.kind
        due = self._clock.now() >= self._page_due
        (health, detail), page = await asyncio.gather(self._health(kind), self._page(kind) if due else _nothing())
        if page is not None and health in ("refused", "silent"):
            health = "ok"  # it did answer
        visit = Visit(health=health, detail="" if health == "ok" else detail, kind=kind)
        if health in ("refused", "silent"):
            return visit
        try:
            visit = self._read_page(visit, page)
            visit = await self._simulated(visit)
            if due:
                visit = replace(visit, sample=await self._beside(visit.kind, visit.sample))
            return await self._read_rare(visit)
        except Silent:
            return visit  # with what came before the silence

    async def _health(self, kind: str | None) -> tuple[Health, str]:
        path = SIGNALS.get(kind or "", UNKNOWN).health_path
        try:
            answer = await self._http.fetch(path)
        except Refused as error:
            return "refused", str(error)
        except Silent as error:
            return "silent", str(error)
        return ("error", f"{path} answered {answer.status}") if answer.status >= 500 else ("ok", "")

    async def _page(self, kind: str | None) -> Answer | None:
        """Read the metrics page; None if there is none, or it does not come."""
        begun, page = self._clock.now(), None
        for url in (self._page_url,) if self._page_url else page_urls(self._spec, kind):
            page = await self._good_answer(url)
            self._page_url = url if page is not None else None
            if page is not None:
                break
        now = self._clock.now()
        self._page_due = now + rest_s(now - begun)
        return page

    async def _good_answer(self, url: str) -> Answer | None:
        try:
            answer = await self._http.fetch(url)
        except (Refused, Silent):
            return None
        return answer if answer.is_good else None

    def _read_page(self, visit: Visit, page: Answer | None) -> Visit:
        if page is None:
            return visit
        text = page.text()
        kind = (kind_of(text) if self._spec.kind == "auto" else None) or visit.kind
        sample = from_metrics(SIGNALS.get(kind or "", UNKNOWN), normal(parse(text, wanted)))
        if sample.start_time is None:
            sample = replace(sample, start_time=_number(page.headers.get(START_TIME_HEADER)))
        simulated = page.headers.get(SIMULATED_HEADER) == "1"
        return replace(visit, kind=kind, sample=sample, simulated=simulated)

    async def _simulated(self, visit: Visit) -> Visit:
        if not visit.simulated:
            return visit
        gpus = await self._http.ask(SIMULATED_GPUS_PATH)
        return replace(visit, simulated_gpus=tuple(gpus) if isinstance(gpus, list) else ())

    async def _read_rare(self, visit: Visit) -> Visit:
        now = self._clock.now()
        if now < self._facts_due:
            return visit
        self._facts_due = now + self._policy.facts_every_s
        if visit.kind is None:
            visit = replace(visit, kind=await detect(self._http.ask))
        return replace(visit, facts=await facts(visit.kind, self._http.ask))

    async def _beside(self, kind: str | None, sample: EngineSample | None) -> EngineSample | None:
        """Add what stands beside the metrics page, or in its place where the engine was started without one."""
        if kind == "llamacpp" and isinstance(slots := await self._http.ask("/slots"), list):
            return with_llamacpp_slots(sample or EngineSample(), slots)
        if kind == "sglang" and (loads := await self._http.ask("/v1/loads?include=core")) is not None:
            return with_sglang_loads(sample or EngineSample(), loads)
        return sample


async def _nothing() -> None:
    return None


def _with_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}:{port}"


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None
