"""The problem codes of a report: what each one means, and the figure it stands on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from node_agent.gpu import (
    APPLICATION_XIDS,
    DRAIN_XIDS,
    FATAL_XIDS,
    ROW_REMAP_FAILED_XID,
    GpuSample,
    Xid,
    throttle_reasons,
)

XID_FATAL = "xid_fatal"  # a fatal Xid error: the GPU needs a reset
XID_APPLICATION = "xid_application"  # an application's own fault lately; the GPU is fine
GPU_LOST = "gpu_lost"  # NVML lost it, it hangs, the driver asks for a reset, or a configured GPU is not there
ECC_UNCORRECTED = "ecc_uncorrected"  # uncorrectable memory errors since the driver was loaded
ROW_REMAP_PENDING = "row_remap_pending"  # let running work end, then reset
ROW_REMAP_FAILED = "row_remap_failed"  # no spare rows left: the board must be replaced
THERMAL_THROTTLE = "thermal_throttle"  # slowed down by its temperature
POWER_BRAKE = "power_brake"  # slowed down by the power supply of the machine
CLOCK_LOW = "clock_low"  # slower than it should be under load, for another reason
PCIE_DEGRADED = "pcie_degraded"  # fewer PCIe lanes than card and slot have
MEMORY_PRESSURE = "memory_pressure"  # its memory is all but full
FOREIGN_MEMORY = "foreign_memory"  # processes that are not the engine's hold memory
ENGINE_UNREACHABLE = "engine_unreachable"  # the engine refuses connections or does not answer
ENGINE_WEDGED = "engine_wedged"  # requests run and no token counter moves
ENGINE_ERROR = "engine_error"  # the engine answers its health check with an error, or is still loading

# A node with one of these cannot serve: `healthy` is false. The others ask for less work, or for a drain.
OUT = frozenset({XID_FATAL, GPU_LOST, ROW_REMAP_FAILED, ENGINE_UNREACHABLE, ENGINE_WEDGED, ENGINE_ERROR})

ENGINE_PROBLEMS = frozenset({ENGINE_UNREACHABLE, ENGINE_WEDGED, ENGINE_ERROR})

# How long an Xid stays in `xid_recent`, and a fatal one is held against the GPU where the driver gives no advice of
# its own: long enough for an operator to see it.
XID_RECENT_S = 3600.0
# A fatal Xid after which the driver itself keeps saying that the GPU needs nothing is held against it this long.
XID_UNCONFIRMED_S = 60.0
# An application's fault says something about its requests, and little about the next minute.
XID_APPLICATION_S = 60.0
# NVML calls that have not come back after this long will hardly do so: slow drivers take one to three seconds.
GPU_HUNG_S = 10.0
# Engines take a fixed share at start, usually 0.90 to 0.95; above this the next allocation may fail.
MEMORY_PRESSURE_RATIO = 0.98
# A display server or a monitoring agent holds a few hundred MB; a forgotten process holds gigabytes.
FOREIGN_MEMORY_RATIO = 0.05
# Boards under their power cap run at 60 to 80 % of their maximum clock; the cap itself is normal and excused.
CLOCK_LOW_RATIO = 0.5
# Only a busy GPU has reason to clock up.
CLOCK_BUSY_RATIO = 0.5
# Clocks and lanes change for moments when load begins or ends.
SUSTAINED_S = 10.0

_THERMAL = frozenset({"sw_thermal_slowdown", "hw_thermal_slowdown"})
_EXCUSES = frozenset({"sw_power_cap", "applications_clocks_setting", "sync_boost", "display_clock_setting"})
# The driver's own advice: 1 reset the GPU, 2 reboot, 6 reset the bus, 7 reboot the system; 3, 4 drain first.
_RECOVERY_NEEDS_RESET = frozenset({1, 2, 6, 7})
_RECOVERY_NEEDS_DRAIN = frozenset({3, 4})


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What problems are judged by, the same for a real and for a simulated GPU; None is unknown."""

    lost: bool = False
    xids: tuple[Xid, ...] = ()
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    memory_used_by_others_bytes: int | None = None
    utilization_ratio: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    ecc_uncorrected_total: int | None = None
    remapped_rows_pending: bool | None = None
    remapped_rows_failed: bool | None = None
    clock_sm_mhz: int | None = None
    clock_sm_max_mhz: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    recovery_action: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHistory:
    """Since when a GPU's clock has been low and its lanes too few; None: they are not."""

    clock_low_since: float | None = None
    pcie_low_since: float | None = None


def facts_of(sample: GpuSample, xids: Iterable[Xid], others_bytes: int | None) -> GpuFacts:
    """Turn a reading into the facts that problems are judged by."""
    reading = sample.reading
    return GpuFacts(
        lost=reading.lost or sample.stuck_for_s >= GPU_HUNG_S,
        xids=tuple(xids),
        memory_used_bytes=reading.memory_used_bytes,
        memory_total_bytes=reading.memory_total_bytes,
        memory_used_by_others_bytes=others_bytes,
        utilization_ratio=reading.utilization_ratio,
        throttle_reasons=throttle_reasons(reading.event_reasons),
        ecc_uncorrected_total=reading.ecc_uncorrected_total,
        remapped_rows_pending=reading.remapped_rows_pending,
        remapped_rows_failed=reading.remapped_rows_failed,
        clock_sm_mhz=reading.clock_sm_mhz,
        clock_sm_max_mhz=reading.clock_sm_max_mhz,
        pcie_width=reading.pcie_width,
        pcie_width_max=reading.pcie_width_max,
        recovery_action=reading.recovery_action,
    )


def judge_gpu(facts: GpuFacts, history: GpuHistory, now: float) -> tuple[tuple[str, ...], GpuHistory]:
    """Name the problems of one GPU; clocks and lanes count only when they stayed low for a while."""
    history = replace(
        history,
        clock_low_since=_since(history.clock_low_since, _clock_is_low(facts), now),
        pcie_low_since=_since(history.pcie_low_since, _below(facts.pcie_width, facts.pcie_width_max), now),
    )
    reasons = frozenset(facts.throttle_reasons or ())
    found = {
        XID_FATAL: _fatal(facts, now),
        XID_APPLICATION: _heard(facts.xids, APPLICATION_XIDS, now, XID_APPLICATION_S),
        GPU_LOST: facts.lost or facts.recovery_action in _RECOVERY_NEEDS_RESET,
        ECC_UNCORRECTED: (facts.ecc_uncorrected_total or 0) > 0,
        ROW_REMAP_PENDING: bool(facts.remapped_rows_pending)
        or facts.recovery_action in _RECOVERY_NEEDS_DRAIN
        or _heard(facts.xids, DRAIN_XIDS, now, XID_RECENT_S),
        ROW_REMAP_FAILED: bool(facts.remapped_rows_failed)
        or _heard(facts.xids, frozenset({ROW_REMAP_FAILED_XID}), now, XID_RECENT_S),
        THERMAL_THROTTLE: bool(reasons & _THERMAL),
        POWER_BRAKE: "hw_power_brake_slowdown" in reasons,
        CLOCK_LOW: _sustained(history.clock_low_since, now) or _slowed_unsaid(reasons),
        PCIE_DEGRADED: _sustained(history.pcie_low_since, now),
        MEMORY_PRESSURE: _share(facts.memory_used_bytes, facts.memory_total_bytes) >= MEMORY_PRESSURE_RATIO,
        FOREIGN_MEMORY: _share(facts.memory_used_by_others_bytes, facts.memory_total_bytes) >= FOREIGN_MEMORY_RATIO,
    }
    return tuple(code for code, there in found.items() if there), history


def is_healthy(problems: Iterable[str]) -> bool:
    """True if no problem takes the node out of service."""
    return OUT.isdisjoint(problems)


def merged(*groups: Iterable[str]) -> tuple[str, ...]:
    """Every code once, in order of appearance."""
    return tuple(dict.fromkeys(code for group in groups for code in group))


def recent(xids: Sequence[Xid], now: float) -> tuple[Xid, ...]:
    """Drop what is older than XID_RECENT_S."""
    return tuple(xid for xid in xids if now - xid.at <= XID_RECENT_S)


def _fatal(facts: GpuFacts, now: float) -> bool:
    """A fatal Xid stands until it is forgotten, or the driver has said for a while that the GPU needs nothing."""
    fatal = [xid for xid in facts.xids if xid.code in FATAL_XIDS and now - xid.at <= XID_RECENT_S]
    if facts.recovery_action == 0:
        return any(now - xid.at <= XID_UNCONFIRMED_S for xid in fatal)
    return bool(fatal)


def _heard(xids: Iterable[Xid], codes: frozenset[int], now: float, within_s: float) -> bool:
    return any(xid.code in codes and now - xid.at <= within_s for xid in xids)


def _slowed_unsaid(reasons: frozenset[str]) -> bool:
    """The hardware slowed the clock down and names neither heat nor power."""
    return "hw_slowdown" in reasons and not reasons & {*_THERMAL, "hw_power_brake_slowdown"}


def _clock_is_low(facts: GpuFacts) -> bool:
    if facts.clock_sm_mhz is None or not facts.clock_sm_max_mhz or facts.throttle_reasons is None:
        return False
    busy = (facts.utilization_ratio or 0.0) >= CLOCK_BUSY_RATIO
    low = facts.clock_sm_mhz < CLOCK_LOW_RATIO * facts.clock_sm_max_mhz
    return busy and low and _EXCUSES.isdisjoint(facts.throttle_reasons)


def _below(value: int | None, maximum: int | None) -> bool:
    return value is not None and maximum is not None and 0 < value < maximum


def _since(since: float | None, there: bool, now: float) -> float | None:
    if not there:
        return None
    return now if since is None else since


def _sustained(since: float | None, now: float) -> bool:
    return since is not None and now - since >= SUSTAINED_S


def _share(part: int | None, whole: int | None) -> float:
    return part / whole if part is not None and whole else 0.0
