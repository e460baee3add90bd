"""The agent's own metrics."""

from __future__ import annotations

import random
import re

import aiohttp
import pytest
from agent_fakes import FakeGpus, ManualClock, fake_engine, gpu_reading, watching
from prometheus_client.parser import text_string_to_metric_families

from node_agent import metrics
from node_agent.derive import Identity
from node_agent.gpu_watch import GpuPolicy, GpuWatch, NoGpus
from node_agent.metrics import exposition, registry
from node_agent.push import Pusher, PushPolicy
from node_agent.report import GpuReport, NodeReport
from node_agent.sampler import Sampler

IDENTITY = Identity(host="h", boot_id="b", interval_s=1.0)
UNITS = "seconds bytes ratio celsius watts hertz tokens requests lanes info total"
PLAIN = "depth slots healthy wedged problem drain simulated pending reason recent"


async def page(clock: ManualClock, *, with_gpu: bool = True) -> str:
    gpu = gpu_reading(0, event_reasons=0x40, ecc_uncorrected_total=2, memory_used_bytes=None)
    gpus = GpuWatch(clock, GpuPolicy(deadline_s=10.0), lambda: FakeGpus(gpu)) if with_gpu else NoGpus()
    async with fake_engine("vllm") as engine, watching(engine, clock) as watch, aiohttp.ClientSession() as session:
        sampler = Sampler(IDENTITY, [watch], gpus, clock, patience_s=20.0)
        pusher = Pusher("http://b:8081", sampler, session, clock, PushPolicy(), random.Random(1))
        made = registry(sampler, [pusher])
        assert b"node_agent_info" in exposition(made)  # before the first report
        await sampler.look()
        text = exposition(made).decode()
        await sampler.close()
    return text


async def test_figures_are_there_in_base_units(clock: ManualClock) -> None:
    text = await page(clock)
    for line in (
        'node_agent_node_queue_depth{node="a"} 3.0',
        'node_agent_node_generation_tokens_total{node="a"} 912000.0',
        'node_agent_node_problem{node="a",problem="thermal_throttle"} 1.0',
        'node_agent_gpu_clock_sm_hertz{gpu="GPU-0"} 1.98e+09',
        'node_agent_gpu_temperature_celsius{gpu="GPU-0"} 61.0',
        'node_agent_gpu_ecc_uncorrected_total{gpu="GPU-0"} 2.0',
        'node_agent_gpu_throttle_reason{gpu="GPU-0",reason="hw_thermal_slowdown"} 1.0',
        'node_agent_visits_total{node="a",outcome="ok"} 1.0',
        'node_agent_pushes_total{balancer="http://b:8081",outcome="ok"} 0.0',
        "node_agent_reports_total 1.0",
    ):
        assert line in text.splitlines(), line


async def test_unknown_figure_has_no_series(clock: ManualClock) -> None:
    text = await page(clock)
    assert "\nnode_agent_gpu_memory_used_bytes{" not in text
    assert "\nnode_agent_node_slots{" not in text
    assert "\nnode_agent_gpu_temperature_celsius{" not in await page(clock, with_gpu=False)


async def test_names_carry_their_unit_and_the_page_is_well_formed(clock: ManualClock) -> None:
    families = list(text_string_to_metric_families(await page(clock)))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert re.fullmatch(r"node_agent_[a-z_]+", family.name), family.name
        assert family.documentation.endswith("."), family.name
        last = "total" if family.type == "counter" else family.name.rpartition("_")[2]
        assert last in f"{UNITS} {PLAIN}".split(), family.name


@pytest.mark.parametrize(
    ("table", "report"),
    [
        (metrics.NODE_GAUGES, NodeReport),
        (metrics.NODE_COUNTERS, NodeReport),
        (metrics.NODE_QUANTILES, NodeReport),
        (metrics.GPU_GAUGES, GpuReport),
        (metrics.GPU_COUNTERS, GpuReport),
    ],
)
def test_every_metric_is_read_from_a_field_that_exists(table: dict[str, object], report: type) -> None:
    assert set(table) <= set(report.__dataclass_fields__)
