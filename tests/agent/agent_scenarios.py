"""Hosts in known states, and the reports they give: the golden files that agent and balancer both parse.

`python tests/agent/agent_scenarios.py` writes the golden files anew; do so only when the contract changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from agent_fakes import golden, gpu_reading, moved, observed

from node_agent.derive import Histories, Identity, host_report
from node_agent.engine_sample import EngineFacts, EngineSample, Model, from_metrics, with_llamacpp_slots
from node_agent.engine_spec import parse as spec
from node_agent.engine_state import EngineState, Visit, observe
from node_agent.exposition import parse
from node_agent.gpu import GpuSample, Xid
from node_agent.gpu_report import EngineView
from node_agent.gpu_watch import GpuView
from node_agent.report import HostReport
from node_agent.signals import SIGNALS, normal, wanted

FOLDER = Path(__file__).parents[1] / "contract" / "golden"
NOW = 1000.0
IDENTITY = Identity(host="gpu-7", boot_id="0c9fb1e2d3a44c0f8f0e6a1b2c3d4e5f", interval_s=1.0)
NO_GPUS = GpuView()


def sample(kind: str, page: str | None = None) -> EngineSample:
    return from_metrics(SIGNALS[kind], normal(parse(golden(kind) if page is None else page, wanted)))


def seen(*visits: tuple[float, Visit], name: str, process: str | None = None) -> EngineState:
    state = EngineState()
    for at, visit in visits:
        state = observe(state, visit, at, name=name, process=process)
    return state


def good(kind: str, load: EngineSample | None, facts: EngineFacts | None = None, **more: object) -> Visit:
    return Visit(health="ok", kind=kind, sample=load, facts=facts, **more)  # type: ignore[arg-type]


def report(
    *engines: EngineView, gpus: GpuView = NO_GPUS, drain: bool = False, seq: int = 8812, now: float = NOW
) -> HostReport:
    made, _ = host_report(
        identity=IDENTITY, seq=seq, drain=drain, engines=engines, gpus=gpus, histories=Histories(), now=now
    )
    return made.aged(0.04)


def gpu_view(*samples: GpuSample, xids: Mapping[int, tuple[Xid, ...]] | None = None) -> GpuView:
    heard = dict.fromkeys(range(len(samples)), ()) if xids is None else xids
    return GpuView(available=True, samples=samples, xids=heard)


def fresh(index: int = 0, **figures: object) -> GpuSample:
    return GpuSample(reading=gpu_reading(index, **figures), age_s=0.01)


def later_vllm_page() -> str:
    """The golden page after four more requests: 0.2, 0.3, 0.3 and 0.9 s to the first token."""
    page = golden("vllm")
    for first_token, whole in ((0.2, 2.2), (0.3, 2.4), (0.3, 2.6), (0.9, 3.6)):
        page = observed(page, "vllm:time_to_first_token_seconds", first_token)
        page = observed(page, "vllm:e2e_request_latency_seconds", whole)
        page = observed(page, "vllm:request_prefill_time_seconds", first_token)
    page = observed(page, "vllm:inter_token_latency_seconds", 0.02, times=800)
    for name, by in {
        "vllm:generation_tokens_total": 804,
        "vllm:prompt_tokens_total": 4000,
        "vllm:prompt_tokens_cached_total": 1000,
        "vllm:prefix_cache_queries_total": 4000,
        "vllm:prefix_cache_hits_total": 1000,
    }.items():
        page = moved(page, name, by)
    return page


def vllm() -> HostReport:
    """A healthy vLLM with two data-parallel ranks on two GPUs."""
    facts = EngineFacts(version="0.11.0", models=(Model(id="qwen2.5-7b", loaded=True, max_context_tokens=32768),))
    state = seen(
        (NOW - 10, good("vllm", sample("vllm"), facts)),
        (NOW, good("vllm", sample("vllm", later_vllm_page()))),
        name="a100-0",
    )
    engine = EngineView(
        spec=spec("http://127.0.0.1:8000,id=a100-0,advertise=http://10.0.0.7:8000"), state=state, pids=frozenset({4711})
    )
    mine = {4711: 39 << 30}
    gpus = gpu_view(fresh(0, process_memory_bytes=mine), fresh(1, process_memory_bytes=mine, event_reasons=0x4))
    return report(engine, gpus=gpus)


def no_gpu() -> HostReport:
    """A llama.cpp server on a machine without a GPU: everything about GPUs is null or empty."""
    idle = {"id": 1, "n_ctx": 1024, "is_processing": False}
    busy = {"id": 0, "n_ctx": 1024, "is_processing": True, "n_prompt_tokens": 879, "next_token": [{"n_decoded": 867}]}
    load = with_llamacpp_slots(sample("llamacpp"), [busy, {**busy, "id": 1}, {**idle, "id": 2}, {**idle, "id": 3}])
    facts = EngineFacts(version="b6000", models=(Model(id="tiny", loaded=True, max_context_tokens=1024),), slots=4)
    state = seen((NOW, good("llamacpp", load, facts)), name="cpu-0")
    return report(EngineView(spec=spec("http://127.0.0.1:8080,id=cpu-0"), state=state))


def sick() -> HostReport:
    """Two engines: one died with its GPU, the other runs requests and makes no token; its GPU is hot."""
    dead = seen(
        (NOW - 2, good("vllm", sample("vllm"), EngineFacts(version="0.11.0"))),
        (NOW, Visit(health="refused", detail="connection refused")),
        name="a100-0",
    )
    wedged = seen(*((NOW - 10 + second, good("vllm", sample("vllm"))) for second in range(0, 11, 2)), name="a100-1")
    lost = replace(fresh(0).reading, lost=True)
    identity = type(lost)(index=0, uuid=lost.uuid, name=lost.name, lost=True)
    hot = fresh(1, event_reasons=0x8 | 0x40, temperature_celsius=91, ecc_uncorrected_total=2, clock_sm_mhz=700)
    xids = {0: (Xid(13, NOW - 600), Xid(79, NOW - 3)), 1: (Xid(31, NOW - 20),)}
    return report(
        EngineView(spec=spec("http://10.0.0.7:8000,id=a100-0,gpus=0"), state=dead),
        EngineView(spec=spec("http://10.0.0.7:8001,id=a100-1,gpus=1"), state=wedged),
        gpus=gpu_view(GpuSample(reading=identity, age_s=0.2), hot, xids=xids),
    )


def draining() -> HostReport:
    """An Ollama and an SGLang on one GPU each, asked to drain; a forgotten process holds memory; no Xids are heard."""
    ollama_facts = EngineFacts(
        version="0.12.3",
        models=(Model(id="llama3:8b", loaded=True, max_context_tokens=8192), Model(id="qwen3:4b", loaded=False)),
    )
    ollama = seen((NOW, good("ollama", None, ollama_facts)), name="ollama")
    sglang_facts = EngineFacts(version="0.5.4", models=(Model(id="glm", loaded=True, max_context_tokens=131072),))
    sglang = seen((NOW, good("sglang", sample("sglang"), sglang_facts)), name="sglang")
    foreign = fresh(1, process_memory_bytes={20: 30 << 30, 999: 9 << 30}, remapped_rows_pending=True)
    return report(
        EngineView(spec=spec("http://127.0.0.1:11434,id=ollama"), state=ollama, pids=frozenset({10, 11})),
        EngineView(spec=spec("http://127.0.0.1:30000,id=sglang"), state=sglang, pids=frozenset({20})),
        gpus=gpu_view(fresh(0, process_memory_bytes={11: 6 << 30}), foreign, xids={}),
        drain=True,
    )


def unknown() -> HostReport:
    """An engine that is there and tells nothing, on a GPU with a driver that tells next to nothing."""
    state = seen((NOW, Visit(health="ok")), name="10.0.0.7:9000")
    bare = GpuSample(reading=type(gpu_reading())(index=0, uuid="GPU-0", name="NVIDIA A10"), age_s=0.01)
    return report(EngineView(spec=spec("http://10.0.0.7:9000"), state=state), gpus=gpu_view(bare, xids={}), seq=1)


def simulated() -> HostReport:
    """A simulated node with a GPU of its own making."""
    gpu = {
        "uuid": "GPU-sim-0",
        "index": 0,
        "name": "Simulated H200",
        "memory_used_bytes": 60 << 30,
        "memory_total_bytes": 80 << 30,
        "memory_used_by_others_bytes": 0,
        "utilization_ratio": 0.8,
        "temperature_celsius": 70,
        "power_watts": 500.0,
        "clock_sm_mhz": 1980,
        "throttle_reasons": ["sw_thermal_slowdown"],
        "ecc_uncorrected_total": 0,
        "remapped_rows_pending": False,
        "xid_recent": [],
        "pcie_width": 16,
        "problems": [],
    }
    facts = EngineFacts(version="0.11.0", models=(Model(id="demo", loaded=True, max_context_tokens=8192),))
    visit = good("vllm", sample("vllm"), facts, simulated=True, simulated_gpus=(gpu,))
    state = seen((NOW, visit), name="demo-0")
    return report(EngineView(spec=spec("http://127.0.0.1:9001,id=demo-0"), state=state))


SCENARIOS: Mapping[str, Callable[[], HostReport]] = {
    "vllm": vllm,
    "no_gpu": no_gpu,
    "sick": sick,
    "draining": draining,
    "unknown": unknown,
    "simulated": simulated,
}


def path(name: str) -> Path:
    return FOLDER / f"host_report_{name}.json"


def text(made: HostReport) -> str:
    return json.dumps(json.loads(made.to_json()), indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, scenario in SCENARIOS.items():
        path(name).write_text(text(scenario()))
