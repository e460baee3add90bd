"""Reads the GPUs of our own simulated node, which it lists in the form that reports have."""

from __future__ import annotations

from node_agent.engine_sample import whole
from node_agent.gpu import Xid
from node_agent.problems import GpuFacts
from node_agent.report import GpuReport


def simulated_gpu(item: object, now: float) -> tuple[GpuReport, GpuFacts] | None:
    """Return one listed GPU with the facts to judge it by; None if it is none. A field of another type is unknown."""
    if not isinstance(item, dict) or not isinstance(item.get("uuid"), str):
        return None
    xids = _whole_list(item.get("xid_recent"))
    gpu = GpuReport(
        uuid=item["uuid"],
        index=whole(item.get("index")),
        name=_text(item.get("name")),
        memory_used_bytes=whole(item.get("memory_used_bytes")),
        memory_total_bytes=whole(item.get("memory_total_bytes")),
        memory_used_by_others_bytes=whole(item.get("memory_used_by_others_bytes")),
        utilization_ratio=_number(item.get("utilization_ratio")),
        temperature_celsius=whole(item.get("temperature_celsius")),
        power_watts=_number(item.get("power_watts")),
        clock_sm_mhz=whole(item.get("clock_sm_mhz")),
        throttle_reasons=_text_list(item.get("throttle_reasons")),
        ecc_uncorrected_total=whole(item.get("ecc_uncorrected_total")),
        remapped_rows_pending=_flag(item.get("remapped_rows_pending")),
        xid_recent=xids,
        pcie_width=whole(item.get("pcie_width")),
        problems=_text_list(item.get("problems")) or (),
        age_s=_number(item.get("age_s")) or 0.0,
    )
    facts = GpuFacts(
        xids=tuple(Xid(code, now) for code in xids or ()),  # listed means recent
        memory_used_bytes=gpu.memory_used_bytes,
        memory_total_bytes=gpu.memory_total_bytes,
        memory_used_by_others_bytes=gpu.memory_used_by_others_bytes,
        utilization_ratio=gpu.utilization_ratio,
        throttle_reasons=gpu.throttle_reasons,
        ecc_uncorrected_total=gpu.ecc_uncorrected_total,
        remapped_rows_pending=gpu.remapped_rows_pending,
    )
    return gpu, facts


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text_list(value: object) -> tuple[str, ...] | None:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else None


def _whole_list(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    return tuple(number for item in value if (number := whole(item)) is not None)
