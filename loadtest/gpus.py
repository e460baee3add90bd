"""Simulated GPUs: their readings follow the engine's load, unless a test says otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loadtest.engine_model import EngineModel

MEMORY_TOTAL_BYTES = 143_771 << 20  # an H200
WEIGHTS_RATIO = 0.35  # share of the memory that model and runtime take
CACHE_RATIO = 0.55  # share that a full KV cache takes
IDLE_CELSIUS, FULL_CELSIUS = 34.0, 74.0
IDLE_WATTS, FULL_WATTS = 75.0, 650.0
CLOCK_SM_MHZ = 1980
# Time constant of a heat sink: seconds until a new load shows by two thirds.
HEAT_S = 12.0
# Utilization is averaged over at least so long, as NVML does.
SAMPLE_S = 0.5


class SimulatedGpus:
    """Readings in the form of a HostReport's `gpus`. `patch` overrides fields of one GPU or of all."""

    def __init__(self, count: int, now: float) -> None:
        self.patches: list[dict[str, Any]] = [{} for _ in range(count)]
        self.node_number = 0  # makes the identities of several nodes differ
        self._sampled_s = now
        self._busy_s = 0.0
        self._utilization_ratio = 0.0
        self._temperature_celsius = IDLE_CELSIUS

    def patch(self, fields: Mapping[str, Any], index: int | None = None) -> None:
        """Readings that stay as they are told; raises ValueError for a field that is no reading."""
        if unknown := set(fields) - set(self._reading(0, 0.0)):
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        for patch in self.patches if index is None else [self.patches[index]]:
            patch.update(fields)

    def clear(self) -> None:
        """Let all readings follow the load again."""
        for patch in self.patches:
            patch.clear()

    def read(self, model: EngineModel, now: float) -> list[dict[str, Any]]:
        """All GPUs now; they share the load evenly."""
        self._sample(model, now)
        usage_ratio = model.pool.usage_ratio
        return [{**self._reading(index, usage_ratio), **patch} for index, patch in enumerate(self.patches)]

    def _sample(self, model: EngineModel, now: float) -> None:
        passed_s = now - self._sampled_s
        if passed_s < SAMPLE_S:
            return
        self._utilization_ratio = min(1.0, max(0.0, (model.busy_s - self._busy_s) / passed_s))
        aim = IDLE_CELSIUS + (FULL_CELSIUS - IDLE_CELSIUS) * self._utilization_ratio
        self._temperature_celsius = aim + (self._temperature_celsius - aim) * math.exp(-passed_s / HEAT_S)
        self._sampled_s, self._busy_s = now, model.busy_s

    def _reading(self, index: int, usage_ratio: float) -> dict[str, Any]:
        load = self._utilization_ratio
        return {
            "uuid": f"GPU-00000000-0000-0000-{index:04d}-{self.node_number:012d}",
            "index": index,
            "name": "NVIDIA H200 (simulated)",
            "memory_used_bytes": round(MEMORY_TOTAL_BYTES * (WEIGHTS_RATIO + CACHE_RATIO * usage_ratio)),
            "memory_total_bytes": MEMORY_TOTAL_BYTES,
            "memory_used_by_others_bytes": 0,
            "utilization_ratio": round(load, 3),
            "temperature_celsius": round(self._temperature_celsius),
            "power_watts": round(IDLE_WATTS + (FULL_WATTS - IDLE_WATTS) * load, 1),
            "clock_sm_mhz": CLOCK_SM_MHZ,
            "throttle_reasons": [],
            "ecc_uncorrected_total": 0,
            "remapped_rows_pending": False,
            "xid_recent": [],
            "pcie_width": 16,
            "problems": [],
        }
