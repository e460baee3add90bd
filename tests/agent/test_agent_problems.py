"""Which figures of a GPU are called a problem, and which are not."""

from __future__ import annotations

import pytest

from node_agent import problems
from node_agent.gpu import Xid
from node_agent.problems import GpuFacts, GpuHistory, is_healthy, judge_gpu, recent

FINE = {
    "memory_used_bytes": 72 << 30,
    "memory_total_bytes": 80 << 30,
    "memory_used_by_others_bytes": 0,
    "utilization_ratio": 0.97,
    "throttle_reasons": (),
    "ecc_uncorrected_total": 0,
    "remapped_rows_pending": False,
    "remapped_rows_failed": False,
    "clock_sm_mhz": 1980,
    "clock_sm_max_mhz": 1980,
    "pcie_width": 16,
    "pcie_width_max": 16,
    "recovery_action": 0,
}


def found(now: float = 0.0, **changed: object) -> tuple[str, ...]:
    return judge_gpu(GpuFacts(**{**FINE, **changed}), GpuHistory(), now)[0]  # type: ignore[arg-type]


def after(seconds: float, **changed: object) -> tuple[str, ...]:
    """What is found when the figures have been so for some seconds."""
    facts = GpuFacts(**{**FINE, **changed})  # type: ignore[arg-type]
    _, history = judge_gpu(facts, GpuHistory(), 0.0)
    return judge_gpu(facts, history, seconds)[0]


def test_healthy_gpu_has_no_problem() -> None:
    assert found() == ()


def test_nothing_known_is_no_problem() -> None:
    assert judge_gpu(GpuFacts(), GpuHistory(), 0.0)[0] == ()


@pytest.mark.parametrize("code", [46, 48, 64, 74, 79, 95, 119, 120])
def test_fatal_xid_takes_the_gpu_out(code: int) -> None:
    result = found(xids=(Xid(code, 0.0),), recovery_action=None)
    assert problems.XID_FATAL in result
    assert not is_healthy(result)


@pytest.mark.parametrize("code", [13, 31, 43, 45, 68])
def test_application_xid_is_told_for_a_minute_and_the_gpu_is_fine(code: int) -> None:
    assert found(now=60.0, xids=(Xid(code, 0.0),)) == (problems.XID_APPLICATION,)
    assert found(now=61.0, xids=(Xid(code, 0.0),)) == ()
    assert is_healthy(found(xids=(Xid(code, 0.0),)))


@pytest.mark.parametrize("code", [63, 94])
def test_xid_that_asks_for_a_drain_lets_running_work_end(code: int) -> None:
    result = found(xids=(Xid(code, 0.0),))
    assert result == (problems.ROW_REMAP_PENDING,)
    assert is_healthy(result)


@pytest.mark.parametrize("code", [92, 154, 0])
def test_xid_to_watch_is_no_problem(code: int) -> None:
    assert found(xids=(Xid(code, 0.0),)) == ()


def test_fatal_xid_stands_an_hour_where_the_driver_gives_no_advice() -> None:
    xids = (Xid(119, 0.0),)
    assert found(now=3600.0, xids=xids, recovery_action=None) == (problems.XID_FATAL,)
    assert found(now=3601.0, xids=xids, recovery_action=None) == ()


def test_fatal_xid_is_forgiven_when_the_driver_says_that_the_gpu_needs_nothing() -> None:
    xids = (Xid(119, 0.0),)
    assert found(now=60.0, xids=xids, recovery_action=0) == (problems.XID_FATAL,)
    assert found(now=61.0, xids=xids, recovery_action=0) == ()


@pytest.mark.parametrize("action", [1, 2, 6, 7])
def test_driver_that_asks_for_a_reset_takes_the_gpu_out(action: int) -> None:
    assert found(recovery_action=action) == (problems.GPU_LOST,)


@pytest.mark.parametrize("action", [3, 4])
def test_driver_that_asks_for_a_drain_gets_one(action: int) -> None:
    assert found(recovery_action=action) == (problems.ROW_REMAP_PENDING,)


def test_recovery_action_of_a_later_driver_is_no_problem() -> None:
    assert found(recovery_action=5) == ()
    assert found(recovery_action=99) == ()


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"lost": True}, problems.GPU_LOST),
        ({"ecc_uncorrected_total": 1}, problems.ECC_UNCORRECTED),
        ({"remapped_rows_pending": True}, problems.ROW_REMAP_PENDING),
        ({"remapped_rows_failed": True}, problems.ROW_REMAP_FAILED),
        ({"throttle_reasons": ("sw_thermal_slowdown",)}, problems.THERMAL_THROTTLE),
        ({"throttle_reasons": ("hw_slowdown", "hw_thermal_slowdown")}, problems.THERMAL_THROTTLE),
        ({"throttle_reasons": ("hw_slowdown", "hw_power_brake_slowdown")}, problems.POWER_BRAKE),
        ({"throttle_reasons": ("hw_slowdown",)}, problems.CLOCK_LOW),
        ({"memory_used_bytes": 79 << 30}, problems.MEMORY_PRESSURE),
        ({"memory_used_by_others_bytes": 4 << 30}, problems.FOREIGN_MEMORY),
    ],
)
def test_figure_that_is_a_problem(changed: dict[str, object], code: str) -> None:
    assert found(**changed) == (code,)


@pytest.mark.parametrize(
    "changed",
    [
        {"throttle_reasons": ("sw_power_cap",)},
        {"memory_used_bytes": 76 << 30},  # an engine that was given 95 %
        {"memory_used_by_others_bytes": 300 << 20},  # a display server
        {"memory_used_by_others_bytes": None},
        {"pcie_width": 8, "pcie_width_max": 8},
    ],
)
def test_figure_that_is_normal(changed: dict[str, object]) -> None:
    assert after(60.0, **changed) == ()


def test_row_remap_that_failed_takes_the_gpu_out() -> None:
    assert not is_healthy(found(remapped_rows_failed=True))
    assert problems.ROW_REMAP_FAILED in found(xids=(Xid(64, 0.0),))


def test_low_clock_counts_under_load_and_only_when_it_lasts() -> None:
    low = {"clock_sm_mhz": 600}
    assert after(9.9, **low) == ()
    assert after(10.0, **low) == (problems.CLOCK_LOW,)
    assert after(60.0, **low, utilization_ratio=0.1) == ()
    assert after(60.0, **low, throttle_reasons=("sw_power_cap",)) == ()
    assert after(60.0, **low, throttle_reasons=None) == ()


def test_low_clock_that_recovers_in_between_counts_anew() -> None:
    low, fine = GpuFacts(**{**FINE, "clock_sm_mhz": 600}), GpuFacts(**FINE)  # type: ignore[arg-type]
    history = GpuHistory()
    for now, facts in ((0.0, low), (6.0, fine), (7.0, low)):
        _, history = judge_gpu(facts, history, now)
    assert judge_gpu(low, history, 12.0)[0] == ()
    assert judge_gpu(low, history, 17.0)[0] == (problems.CLOCK_LOW,)


def test_lost_lanes_count_when_it_lasts() -> None:
    assert after(5.0, pcie_width=4) == ()
    assert after(10.0, pcie_width=4) == (problems.PCIE_DEGRADED,)


def test_recent_xids_are_those_of_the_last_hour() -> None:
    assert recent([Xid(13, 0.0), Xid(31, 3000.0)], 3601.0) == (Xid(31, 3000.0),)


def test_every_code_is_one_of_the_contract() -> None:
    codes = {value for name, value in vars(problems).items() if name.isupper() and isinstance(value, str)}
    assert codes == {
        *("xid_fatal", "xid_application", "gpu_lost", "ecc_uncorrected", "row_remap_pending", "row_remap_failed"),
        *("thermal_throttle", "power_brake", "clock_low", "pcie_degraded", "memory_pressure", "foreign_memory"),
        *("engine_unreachable", "engine_wedged", "engine_error"),
    }
