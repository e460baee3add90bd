"""HostReport version 1, where balancer and agent meet: both sides read the same golden files."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from balancer.core.health import HealthPolicy, HealthState, HostReport, NodeReport, Verdict, assess, parse_report
from balancer.errors import BadRequest
from node_agent import report as agent

FOLDER = Path(__file__).parent / "golden"
GOLDEN = {path.stem.removeprefix("host_report_"): path for path in sorted(FOLDER.glob("host_report_*.json"))}
NAMES = sorted(GOLDEN)

# What the balancer has to make of each file: of the host, of each node in order, and the verdict on it.
HOSTS: dict[str, dict[str, Any]] = {
    "draining": {"seq": 8812, "drain": True, "simulated": False},
    "no_gpu": {"seq": 8812, "drain": False, "simulated": False},
    "sick": {"seq": 8812, "drain": False, "simulated": False},
    "simulated": {"seq": 8812, "drain": False, "simulated": True},
    "unknown": {"seq": 1, "drain": False, "simulated": False},
    "vllm": {"seq": 8812, "drain": False, "simulated": False},
}
GPUS = {"draining": 2, "no_gpu": 0, "sick": 2, "simulated": 1, "unknown": 1, "vllm": 2}
NODES: dict[str, list[dict[str, Any]]] = {
    "draining": [
        {
            "id": "ollama",
            "url": "http://127.0.0.1:11434",
            "engine": "ollama",
            "models": ("llama3:8b", "qwen3:4b"),
            "queue_depth": None,
            "running": None,
            "gpu_memory_utilization": 0.5,
            "wedged": None,
            "healthy": True,
            "problems": (),
        },
        {
            "id": "sglang",
            "engine": "sglang",
            "models": ("glm",),
            "queue_depth": 4.0,
            "running": 8.0,
            "kv_usage_ratio": 0.41,
            "kv_capacity_tokens": 200000.0,
            "kv_block_tokens": 1.0,
            "context_tokens": 69000.0,
            "uncached_prompt_tokens_total": 1800.0,
            "generation_tokens_total": 10000.0,
            "healthy": True,
            "problems": ("row_remap_pending", "foreign_memory"),
        },
    ],
    "no_gpu": [
        {
            "id": "cpu-0",
            "engine": "llamacpp",
            "models": ("tiny",),
            "queue_depth": 1.0,
            "running": 2.0,
            "slots": 4.0,
            "kv_usage_ratio": 0.5,
            "kv_capacity_tokens": None,
            "context_tokens": 1758.0,
            "prefill_seconds_total": 2.5,
            "gpu_memory_utilization": None,
            "wedged": False,
            "healthy": True,
            "problems": (),
        }
    ],
    "sick": [
        {
            "id": "a100-0",
            "engine_boot_id": "60ebfda6b9b11a89",
            "models": None,
            "queue_depth": None,
            "gpu_memory_utilization": None,
            "wedged": None,
            "healthy": False,
            "problems": ("engine_unreachable", "xid_fatal", "gpu_lost"),
        },
        {
            "id": "a100-1",
            "engine_boot_id": "4df48a5b431841ac",
            "queue_depth": 3.0,
            "running": 14.0,
            "gpu_memory_utilization": 0.5,
            "wedged": True,
            "healthy": False,
            "problems": ("engine_wedged", "xid_application", "ecc_uncorrected", "thermal_throttle"),
        },
    ],
    "simulated": [
        {
            "id": "demo-0",
            "engine": "vllm",
            "models": ("demo",),
            "queue_depth": 3.0,
            "gpu_memory_utilization": 0.75,
            "healthy": True,
            "problems": ("thermal_throttle",),
        }
    ],
    "unknown": [
        {
            "id": "10.0.0.7:9000",
            "url": "http://10.0.0.7:9000",
            "engine": None,
            "models": None,
            "queue_depth": None,
            "running": None,
            "kv_usage_ratio": None,
            "avg_latency_seconds": None,
            "gpu_memory_utilization": None,
            "wedged": None,
            "healthy": True,
            "problems": (),
        }
    ],
    "vllm": [
        {
            "id": "a100-0",
            "url": "http://10.0.0.7:8000",
            "engine": "vllm",
            "engine_boot_id": "60ebfda6b9b11a89",
            "models": ("qwen2.5-7b",),
            "queue_depth": 3.0,
            "running": 14.0,
            "slots": None,
            "kv_usage_ratio": 0.612345,
            "kv_capacity_tokens": 414976.0,
            "kv_block_tokens": 16.0,
            "context_tokens": None,
            "avg_latency_seconds": 2.7,
            "prefill_seconds_total": 33.471034,
            "uncached_prompt_tokens_total": 3914200.0,
            "generation_tokens_total": 912804.0,
            "gpu_memory_utilization": 0.5,
            "wedged": False,
            "healthy": True,
            "problems": (),
        }
    ],
}
VERDICTS = {
    "draining": [Verdict.OK, Verdict.DEGRADED],
    "no_gpu": [Verdict.OK],
    "sick": [Verdict.OUT, Verdict.OUT],
    "simulated": [Verdict.DEGRADED],
    "unknown": [Verdict.OK],
    "vllm": [Verdict.OK],
}


def golden(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(GOLDEN[name].read_text())
    return data


def parsed(name: str) -> HostReport:
    return parse_report(golden(name))


def rebuilt(data: dict[str, Any]) -> agent.HostReport:
    """The agent's own report with the figures of a file; fails for a field that the agent does not have."""

    def quantiles(value: dict[str, Any] | None) -> agent.Quantiles | None:
        return None if value is None else agent.Quantiles(**value)

    def node(told: dict[str, Any]) -> agent.NodeReport:
        models = None if told["models"] is None else tuple(agent.ModelReport(**model) for model in told["models"])
        latencies = {name: quantiles(told[name]) for name in ("ttft_seconds", "itl_seconds")}
        return agent.NodeReport(**{**told, **latencies, "models": models})

    nodes = tuple(node(told) for told in data["nodes"])
    return agent.HostReport(**{**data, "nodes": nodes, "gpus": tuple(agent.GpuReport(**gpu) for gpu in data["gpus"])})


def test_every_golden_report_is_expected() -> None:
    assert NAMES == sorted(HOSTS) == sorted(GPUS) == sorted(NODES) == sorted(VERDICTS)


@pytest.mark.parametrize("name", NAMES)
def test_balancer_reads_the_host(name: str) -> None:
    report = parsed(name)
    assert (report.host, report.boot_id) == ("gpu-7", "0c9fb1e2d3a44c0f8f0e6a1b2c3d4e5f")
    assert (report.age_s, report.interval_s) == (0.04, 1.0)
    assert {field: getattr(report, field) for field in HOSTS[name]} == HOSTS[name]
    assert len(report.gpus) == GPUS[name]


@pytest.mark.parametrize("name", NAMES)
def test_balancer_reads_every_node(name: str) -> None:
    nodes = parsed(name).nodes
    assert len(nodes) == len(NODES[name])
    for node, expected in zip(nodes, NODES[name], strict=True):
        assert {field: getattr(node, field) for field in expected} == expected


@pytest.mark.parametrize("name", NAMES)
def test_what_is_unknown_is_none_and_never_zero(name: str) -> None:
    for node, told in zip(parsed(name).nodes, golden(name)["nodes"], strict=True):
        for field in fields(NodeReport):
            if field.name in told and told[field.name] is None:
                assert getattr(node, field.name) is None, field.name


@pytest.mark.parametrize("name", NAMES)
def test_balancer_judges_every_node(name: str) -> None:
    states = [assess(node, HealthState(), HealthPolicy(), 0.0) for node in parsed(name).nodes]
    assert [state.verdict for state in states] == VERDICTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_agents_own_report_has_the_same_keys_in_the_same_order(name: str) -> None:
    text = rebuilt(golden(name)).to_json()
    assert json.dumps(json.loads(text)) == json.dumps(golden(name))


def test_unknown_fields_are_ignored() -> None:
    data = golden("vllm")
    data["weather"] = {"rain": True}
    data["nodes"][0]["mood"] = ["good"]
    data["gpus"][0]["colour"] = "green"
    report = parse_report(data)
    assert (report.nodes[0].id, report.nodes[0].queue_depth) == ("a100-0", 3.0)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_version_is_refused(version: Any) -> None:
    with pytest.raises(BadRequest):
        parse_report({**golden("vllm"), "version": version})
