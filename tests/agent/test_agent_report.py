"""The report: golden files, and how its fields are derived from what was measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from agent_fakes import gpu_reading
from agent_scenarios import (
    NOW,
    SCENARIOS,
    EngineView,
    fresh,
    good,
    gpu_view,
    path,
    report,
    sample,
    seen,
    spec,
    text,
)

from node_agent.derive import Histories, Identity, host_report
from node_agent.engine_sample import EngineFacts, EngineSample
from node_agent.engine_state import EngineState, Visit
from node_agent.gpu import GpuReading, GpuSample
from node_agent.gpu_watch import GPU_STALE_S, GpuView
from node_agent.problems import GPU_HUNG_S
from node_agent.simulated import simulated_gpu

GIB = 1 << 30
CONTRACT = {
    "report": "version host boot_id seq age_s interval_s drain simulated nodes gpus",
    "node": "id url engine engine_version engine_boot_id models queue_depth running slots kv_usage_ratio "
    "kv_capacity_tokens kv_block_tokens context_tokens waiting_prompt_tokens prefix_hit_ratio avg_latency_seconds "
    "ttft_seconds itl_seconds prefill_seconds_total uncached_prompt_tokens_total generation_tokens_total "
    "preemptions_total gpu_memory_utilization gpus wedged healthy problems",
    "gpu": "uuid index name memory_used_bytes memory_total_bytes memory_used_by_others_bytes utilization_ratio "
    "temperature_celsius power_watts clock_sm_mhz throttle_reasons ecc_uncorrected_total remapped_rows_pending "
    "xid_recent pcie_width problems",
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_report_is_the_golden_one(name: str) -> None:
    assert text(SCENARIOS[name]()) == path(name).read_text()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_field_of_the_contract_is_there_in_its_order(name: str) -> None:
    made = json.loads(SCENARIOS[name]().to_json())
    assert list(made) == CONTRACT["report"].split()
    for node in made["nodes"]:
        assert list(node) == [*CONTRACT["node"].split(), "age_s"]
    for gpu in made["gpus"]:
        assert list(gpu) == [*CONTRACT["gpu"].split(), "age_s"]


def test_ages_grow_until_the_report_is_told() -> None:
    made = SCENARIOS["vllm"]().aged(1.5)
    assert made.age_s == pytest.approx(1.54)
    assert made.nodes[0].age_s == pytest.approx(1.54)
    assert made.gpus[0].age_s == pytest.approx(1.55)
    assert SCENARIOS["sick"]().aged(1.5).nodes[0].age_s is None


def engine(
    options: str = "", state: EngineState | None = None, pids: set[int] | None = None, name: str = "a"
) -> EngineView:
    known = None if pids is None else frozenset(pids)
    state = seen((NOW, Visit(health="ok")), name=name) if state is None else state
    return EngineView(spec=spec(f"http://127.0.0.1:8000,id={name}{options}"), state=state, pids=known)


# ---- which GPUs are a node's ----


def test_only_engine_has_all_gpus() -> None:
    assert report(engine(), gpus=gpu_view(fresh(0), fresh(1))).nodes[0].gpus == ("GPU-0", "GPU-1")


def test_configured_gpus_by_index_and_uuid() -> None:
    gpus = gpu_view(fresh(0), fresh(1), fresh(2))
    assert report(engine(",gpus=0+GPU-2"), gpus=gpus).nodes[0].gpus == ("GPU-0", "GPU-2")


def test_configured_gpu_that_is_not_there_is_lost() -> None:
    node = report(engine(",gpus=0+7"), gpus=gpu_view(fresh(0))).nodes[0]
    assert node.problems == ("gpu_lost",)
    assert not node.healthy


def test_configured_gpus_without_nvml_are_merely_unknown() -> None:
    node = report(engine(",gpus=0+7")).nodes[0]
    assert (node.gpus, node.problems, node.gpu_memory_utilization) == ((), (), None)


def test_several_engines_have_the_gpus_their_processes_run_on() -> None:
    gpus = gpu_view(fresh(0, process_memory_bytes={10: GIB}), fresh(1, process_memory_bytes={20: GIB}))
    one, other = engine(pids={10}), engine(pids={20}, name="b")
    assert [node.gpus for node in report(one, other, gpus=gpus).nodes] == [("GPU-0",), ("GPU-1",)]
    assert [node.gpus for node in report(engine(), engine(name="b"), gpus=gpus).nodes] == [(), ()]


# ---- memory ----


def test_memory_is_the_share_over_all_gpus_of_the_node() -> None:
    gpus = gpu_view(fresh(0, memory_used_bytes=80 * GIB), fresh(1, memory_used_bytes=20 * GIB))
    assert report(engine(), gpus=gpus).nodes[0].gpu_memory_utilization == 0.625


def test_memory_of_one_gpu_unknown_is_unknown_of_the_node() -> None:
    gpus = gpu_view(fresh(0), fresh(1, memory_used_bytes=None))
    assert report(engine(), gpus=gpus).nodes[0].gpu_memory_utilization is None


def test_memory_as_the_engine_tells_it_where_there_is_no_nvml() -> None:
    state = seen((NOW, good("triton", sample("triton"))), name="a")
    assert report(engine(state=state)).nodes[0].gpu_memory_utilization == 0.85


def test_memory_of_others_is_that_of_processes_that_are_no_engine_s() -> None:
    gpus = gpu_view(fresh(0, process_memory_bytes={10: 30 * GIB, 11: GIB, 99: 2 * GIB, 98: GIB}))
    assert report(engine(pids={10, 11}), gpus=gpus).gpus[0].memory_used_by_others_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("processes", "pids"),
    [
        ({99: GIB}, None),  # the engine's processes cannot be seen
        ({99: GIB}, {10}),  # NVML counts in other pids: in a container every engine would look foreign
        ({}, {10}),
        (None, {10}),  # the driver does not list processes
        ({10: GIB, 99: None}, {10}),  # it does not tell theirs
    ],
)
def test_memory_of_others_is_unknown_rather_than_wrong(
    processes: dict[int, int | None] | None, pids: set[int] | None
) -> None:
    gpus = gpu_view(fresh(0, process_memory_bytes=processes))
    assert report(engine(pids=pids), gpus=gpus).gpus[0].memory_used_by_others_bytes is None


def test_memory_of_the_engine_itself_may_stay_unknown() -> None:
    gpus = gpu_view(fresh(0, process_memory_bytes={10: None, 99: GIB}))
    assert report(engine(pids={10}), gpus=gpus).gpus[0].memory_used_by_others_bytes == GIB


def test_another_engine_of_ours_is_not_foreign() -> None:
    gpus = gpu_view(fresh(0, process_memory_bytes={10: GIB, 20: GIB}))
    made = report(engine(",gpus=0", pids={10}), engine(",gpus=0", pids={20}, name="b"), gpus=gpus)
    assert made.gpus[0].memory_used_by_others_bytes == 0
    made = report(engine(",gpus=0", pids={10}), engine(",gpus=0", name="b"), gpus=gpus)
    assert made.gpus[0].memory_used_by_others_bytes is None  # 20 may be the other engine


# ---- problems and health ----


def test_problem_of_a_gpu_is_one_of_its_node() -> None:
    node = report(engine(), gpus=gpu_view(fresh(0), fresh(1, ecc_uncorrected_total=1))).nodes[0]
    assert node.problems == ("ecc_uncorrected",)
    assert node.healthy


def test_gpu_whose_calls_hang_is_lost_and_only_then() -> None:
    hung = replace(fresh(0), stuck_for_s=GPU_HUNG_S)
    assert report(engine(), gpus=gpu_view(hung)).nodes[0].problems == ("gpu_lost",)
    slow = replace(fresh(0), stuck_for_s=GPU_HUNG_S - 0.1)
    assert report(engine(), gpus=gpu_view(slow)).nodes[0].problems == ()
    stale = GpuSample(reading=GpuReading(index=0, uuid="GPU-0"), age_s=GPU_STALE_S + 5)
    assert report(engine(), gpus=gpu_view(stale)).nodes[0].problems == ()  # it waits behind one that hangs


def test_engine_that_answers_its_health_check_with_an_error_is_not_healthy() -> None:
    state = seen((NOW, Visit(health="error", sample=EngineSample(running=0))), name="a")
    node = report(engine(state=state)).nodes[0]
    assert (node.problems, node.healthy, node.running) == (("engine_error",), False, 0)


def test_history_carries_from_report_to_report() -> None:
    identity = Identity(host="h", boot_id="b", interval_s=1.0)
    slow = gpu_view(fresh(0, clock_sm_mhz=500))
    histories, problems = Histories(), []
    for now in (0.0, 5.0, 10.0):
        made, histories = host_report(
            identity=identity, seq=1, drain=False, engines=[engine()], gpus=slow, histories=histories, now=now
        )
        problems.append(made.gpus[0].problems)
    assert problems == [(), (), ("clock_low",)]


# ---- ages ----


def test_age_is_that_of_the_oldest_load_figures() -> None:
    old = seen((NOW - 3, good("vllm", sample("vllm"))), name="a")
    new = seen((NOW - 1, good("vllm", sample("vllm"))), name="b")
    made = report(engine(state=old), engine(state=new, name="b"))
    assert made.age_s == pytest.approx(3.04)
    assert [node.age_s for node in made.nodes] == [pytest.approx(3.04), pytest.approx(1.04)]


def test_figures_that_are_too_old_are_unknown() -> None:
    old = seen((NOW - 11, good("vllm", sample("vllm"), EngineFacts(version="1"))), name="a")
    node = report(engine(state=old)).nodes[0]
    assert (node.running, node.age_s, node.engine_version) == (None, None, "1")
    assert report(engine(state=old)).age_s == 0.04


# ---- simulated nodes ----


def simulated_report(gpus: list[object], now: float = NOW, view: GpuView | None = None):  # type: ignore[no-untyped-def]
    visit = good("vllm", sample("vllm"), simulated=True, simulated_gpus=tuple(gpus))
    state = seen((NOW, visit), name="a")
    return report(engine(state=state), gpus=view or GpuView(), now=now)


def test_simulated_gpu_is_judged_like_a_real_one_and_believed_beyond_that() -> None:
    made = simulated_report([{"uuid": "S", "xid_recent": [79], "problems": ["power_brake"]}])
    assert made.simulated
    assert made.gpus[0].problems == ("power_brake", "xid_fatal")
    assert made.nodes[0].problems == ("power_brake", "xid_fatal")
    assert made.nodes[0].gpus == ("S",)


def test_simulated_node_does_not_claim_the_real_gpus() -> None:
    made = simulated_report([{"uuid": "S"}], view=gpu_view(fresh(0)))
    assert made.nodes[0].gpus == ("S",)
    assert [gpu.uuid for gpu in made.gpus] == ["GPU-0", "S"]


def test_simulated_gpu_of_a_node_that_fell_silent_keeps_only_its_identity() -> None:
    gpu = {"uuid": "S", "name": "Simulated", "memory_used_bytes": 1, "memory_total_bytes": 2}
    assert simulated_report([gpu]).gpus[0].memory_used_bytes == 1
    made = simulated_report([gpu], now=NOW + GPU_STALE_S + 1)
    assert (made.gpus[0].name, made.gpus[0].memory_used_bytes) == ("Simulated", None)


@pytest.mark.parametrize("item", [None, "S", {}, {"uuid": 3}, []])
def test_odd_simulated_gpu_is_passed_over(item: object) -> None:
    assert simulated_gpu(item, 0.0) is None


def test_odd_field_of_a_simulated_gpu_is_unknown() -> None:
    read = simulated_gpu(
        {"uuid": "S", "memory_used_bytes": "lots", "throttle_reasons": "hot", "xid_recent": [79, "x"]}, 0.0
    )
    assert read is not None
    assert (read[0].memory_used_bytes, read[0].throttle_reasons, read[0].xid_recent) == (None, None, (79,))


def test_reading_is_told_in_the_contract_s_units() -> None:
    gpu = report(engine(), gpus=gpu_view(fresh(0, event_reasons=0x1 | 0x20 | 0x100))).gpus[0]
    assert gpu.throttle_reasons == ("sw_thermal_slowdown", "display_clock_setting")  # idle is no throttling
    assert gpu.power_watts == gpu_reading().power_watts
