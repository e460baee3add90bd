"""Every metric of the agent, declared once; values come from the latest report when Prometheus asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from node_agent import __version__
from node_agent.push import Pusher
from node_agent.report import GpuReport, HostReport, NodeReport, Quantiles
from node_agent.sampler import Sampler

# Field of the report -> metric, factor to base units, help. A figure that is unknown gives no series.
NODE_GAUGES: Mapping[str, tuple[str, float, str]] = {
    "queue_depth": ("node_agent_node_queue_depth", 1, "Requests waiting in the engine."),
    "running": ("node_agent_node_running_requests", 1, "Requests the engine works on."),
    "slots": ("node_agent_node_slots", 1, "Requests the engine works on at once, at most."),
    "kv_usage_ratio": ("node_agent_node_kv_usage_ratio", 1, "Share of the KV cache in use, of the fullest rank."),
    "kv_capacity_tokens": ("node_agent_node_kv_capacity_tokens", 1, "Tokens that the KV cache holds."),
    "context_tokens": ("node_agent_node_context_tokens", 1, "Tokens held for running requests."),
    "waiting_prompt_tokens": ("node_agent_node_waiting_prompt_tokens", 1, "Prompt tokens of waiting requests."),
    "prefix_hit_ratio": ("node_agent_node_prefix_hit_ratio", 1, "Share of prompt tokens found in the prefix cache."),
    "avg_latency_seconds": ("node_agent_node_latency_seconds", 1, "Mean whole time of requests in the last 30 s."),
    "gpu_memory_utilization": ("node_agent_node_gpu_memory_ratio", 1, "Used share of the memory of the node's GPUs."),
    "healthy": ("node_agent_node_healthy", 1, "1 while no problem takes the node out of service."),
    "wedged": ("node_agent_node_wedged", 1, "1 while requests run and no token counter moves."),
    "age_s": ("node_agent_node_sample_age_seconds", 1, "Age of the node's load figures."),
}
NODE_COUNTERS: Mapping[str, tuple[str, str]] = {
    "prefill_seconds_total": ("node_agent_node_prefill_seconds_total", "Seconds spent on prompts."),
    "uncached_prompt_tokens_total": ("node_agent_node_uncached_prompt_tokens_total", "Prompt tokens computed."),
    "generation_tokens_total": ("node_agent_node_generation_tokens_total", "Tokens generated."),
    "preemptions_total": ("node_agent_node_preemptions_total", "Requests put back for want of KV cache."),
}
NODE_QUANTILES: Mapping[str, tuple[str, str]] = {
    "ttft_seconds": ("node_agent_node_ttft_seconds", "Time to first token in the engine, over the last 30 s."),
    "itl_seconds": ("node_agent_node_itl_seconds", "Time between tokens in the engine, over the last 30 s."),
}
GPU_GAUGES: Mapping[str, tuple[str, float, str]] = {
    "memory_used_bytes": ("node_agent_gpu_memory_used_bytes", 1, "Memory in use, without the driver's reserve."),
    "memory_total_bytes": ("node_agent_gpu_memory_total_bytes", 1, "Memory of the GPU."),
    "memory_used_by_others_bytes": (
        "node_agent_gpu_memory_used_by_others_bytes",
        1,
        "Memory of processes that are not the engine's.",
    ),
    "utilization_ratio": ("node_agent_gpu_utilization_ratio", 1, "Share of time in which a kernel ran."),
    "temperature_celsius": ("node_agent_gpu_temperature_celsius", 1, "Temperature of the GPU."),
    "power_watts": ("node_agent_gpu_power_watts", 1, "Power drawn."),
    "clock_sm_mhz": ("node_agent_gpu_clock_sm_hertz", 1e6, "Clock of the multiprocessors."),
    "remapped_rows_pending": ("node_agent_gpu_remapped_rows_pending", 1, "1 while a reset is needed to remap rows."),
    "pcie_width": ("node_agent_gpu_pcie_lanes", 1, "PCIe lanes in use."),
    "age_s": ("node_agent_gpu_sample_age_seconds", 1, "Age of the GPU's figures."),
}
GPU_COUNTERS: Mapping[str, tuple[str, str]] = {
    "ecc_uncorrected_total": (
        "node_agent_gpu_ecc_uncorrected_total",
        "Uncorrectable memory errors since the driver was loaded.",
    ),
}


class ReportCollector(Collector):
    """Turns the latest report into metrics."""

    def __init__(self, sampler: Sampler, pushers: Sequence[Pusher]) -> None:
        self._sampler, self._pushers = sampler, pushers

    def collect(self) -> Iterator[Metric]:
        yield _gauge("node_agent_info", "The agent.", ["version"], [((__version__,), 1)])
        report = self._sampler.report()
        if report is not None:
            yield from _host_metrics(report)
            yield from _node_metrics(report.nodes)
            yield from _gpu_metrics(report.gpus)
        yield from self._own_metrics()

    def _own_metrics(self) -> Iterator[Metric]:
        visits, seconds = (
            CounterMetricFamily("node_agent_visits", "Visits to an engine, by outcome.", labels=["node", "outcome"]),
            GaugeMetricFamily("node_agent_visit_seconds", "Duration of the last visit to an engine.", labels=["node"]),
        )
        for engine in self._sampler.engines:
            seconds.add_metric([engine.spec.id], engine.visit_s)
            for outcome, count in engine.visits.items():
                visits.add_metric([engine.spec.id, outcome], count)
        pushes = CounterMetricFamily(
            "node_agent_pushes", "Reports pushed to a balancer, by outcome.", labels=["balancer", "outcome"]
        )
        for pusher in self._pushers:
            for outcome, count in pusher.pushes.items():
                pushes.add_metric([pusher.url, outcome], count)
        yield from (visits, seconds, pushes)


def _host_metrics(report: HostReport) -> Iterator[Metric]:
    yield _gauge("node_agent_report_age_seconds", "Age of the oldest load figures.", [], [((), report.age_s)])
    yield _gauge("node_agent_drain", "1 while a drain is asked for.", [], [((), report.drain)])
    yield _gauge("node_agent_simulated", "1 if the nodes are simulated.", [], [((), report.simulated)])
    yield CounterMetricFamily("node_agent_reports", "Reports made since the agent started.", value=report.seq)


def _node_metrics(nodes: Sequence[NodeReport]) -> Iterator[Metric]:
    info = [((node.id, node.engine or "", node.engine_version or ""), 1.0) for node in nodes]
    yield _gauge("node_agent_node_info", "What serves as the node.", ["node", "engine", "engine_version"], info)
    for field, (name, factor, text) in NODE_GAUGES.items():
        yield _gauge(name, text, ["node"], [((node.id,), _scaled(getattr(node, field), factor)) for node in nodes])
    for field, (name, text) in NODE_COUNTERS.items():
        yield _counter(name, text, "node", [(node.id, getattr(node, field)) for node in nodes])
    for field, (name, text) in NODE_QUANTILES.items():
        read: list[tuple[str, Quantiles | None]] = [(node.id, getattr(node, field)) for node in nodes]
        samples = [((node, q), v) for node, both in read if both for q, v in (("0.5", both.p50), ("0.99", both.p99))]
        yield _gauge(name, text, ["node", "quantile"], samples)
    found = [((node.id, problem), 1.0) for node in nodes for problem in node.problems]
    yield _gauge("node_agent_node_problem", "1 for each problem the node has.", ["node", "problem"], found)


def _gpu_metrics(gpus: Sequence[GpuReport]) -> Iterator[Metric]:
    named = [(gpu.uuid or f"index-{gpu.index}", gpu) for gpu in gpus]
    info = [((uuid, str(gpu.index), gpu.name or ""), 1.0) for uuid, gpu in named]
    yield _gauge("node_agent_gpu_info", "The GPU.", ["gpu", "index", "name"], info)
    for field, (name, factor, text) in GPU_GAUGES.items():
        yield _gauge(name, text, ["gpu"], [((uuid,), _scaled(getattr(gpu, field), factor)) for uuid, gpu in named])
    for field, (name, text) in GPU_COUNTERS.items():
        yield _counter(name, text, "gpu", [(uuid, getattr(gpu, field)) for uuid, gpu in named])
    slowed = [((uuid, reason), 1.0) for uuid, gpu in named for reason in gpu.throttle_reasons or ()]
    yield _gauge("node_agent_gpu_throttle_reason", "1 for each reason the clock is held.", ["gpu", "reason"], slowed)
    xids = [
        ((uuid, str(code)), float(count))
        for uuid, gpu in named
        for code, count in Counter(gpu.xid_recent or ()).items()
    ]
    yield _gauge("node_agent_gpu_xid_recent", "Xid errors of the last hour, by code.", ["gpu", "xid"], xids)
    found = [((uuid, problem), 1.0) for uuid, gpu in named for problem in gpu.problems]
    yield _gauge("node_agent_gpu_problem", "1 for each problem the GPU has.", ["gpu", "problem"], found)


def _gauge(
    name: str, text: str, labels: list[str], samples: Sequence[tuple[tuple[str, ...], float | None]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        if value is not None:
            family.add_metric(values, float(value))
    return family


def _counter(name: str, text: str, label: str, samples: Sequence[tuple[str, float | None]]) -> CounterMetricFamily:
    family = CounterMetricFamily(name.removesuffix("_total"), text, labels=[label])
    for value, count in samples:
        if count is not None:
            family.add_metric([value], float(count))
    return family


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def registry(sampler: Sampler, pushers: Sequence[Pusher]) -> CollectorRegistry:
    """Return a registry that holds nothing but the agent's own metrics."""
    made = CollectorRegistry(auto_describe=False)
    made.register(ReportCollector(sampler, pushers))
    return made


def exposition(made: CollectorRegistry) -> bytes:
    """Return the metrics as Prometheus text."""
    return generate_latest(made)
