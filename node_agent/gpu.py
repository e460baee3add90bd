"""What is known of one GPU: the raw reading, and the tables that give its numbers a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# NVML's clock event reasons. Idle (0x1) is no throttling and is left out.
EVENT_REASONS: Mapping[int, str] = {
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}

# Xid errors after which the GPU serves nothing more until it was reset: 46 stopped processing, 48 double-bit ECC,
# 64 row remap failed, 74 NVLink, 79 fell off the bus, 95 uncontained ECC, 119 and 120 GSP.
FATAL_XIDS = frozenset({46, 48, 64, 74, 79, 95, 119, 120})
# The running work may end, then the GPU needs a reset: 63 row remap recorded, 94 contained ECC.
DRAIN_XIDS = frozenset({63, 94})
# An application's own fault, the GPU is fine: 13, 31, 43, 45, 68.
APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68})
ROW_REMAP_FAILED_XID = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """One round of raw NVML readings of one GPU; None is unknown. `lost`: NVML says that it is gone."""

    index: int
    uuid: str | None = None
    name: str | None = None
    lost: bool = False
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    process_memory_bytes: Mapping[int, int | None] | None = None  # by pid; a None value: that process's is unknown
    utilization_ratio: float | None = None
    temperature_celsius: int | None = None
    power_watts: float | None = None
    clock_sm_mhz: int | None = None
    clock_sm_max_mhz: int | None = None
    event_reasons: int | None = None
    ecc_uncorrected_total: int | None = None
    remapped_rows_pending: bool | None = None
    remapped_rows_failed: bool | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    recovery_action: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """A reading with its age, and for how long the next one has been stuck in the driver."""

    reading: GpuReading
    age_s: float
    stuck_for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Xid:
    """One Xid error, when the agent heard of it."""

    code: int
    at: float


def throttle_reasons(mask: int | None) -> tuple[str, ...] | None:
    """Name the bits of a clock event mask; None if there is none."""
    return None if mask is None else tuple(name for bit, name in EVENT_REASONS.items() if mask & bit)
