"""Raw readings through the real pynvml, on a stub of the driver's library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from node_agent.nvml import Nvml, NvmlUnavailable

UUID = "GPU-00000000-0000-0000-0000-00000000000{}"
FUNCTION_NOT_FOUND, NOT_SUPPORTED, NO_PERMISSION, GPU_LOST, RESET_REQUIRED = 13, 3, 4, 15, 16

Tell = Callable[..., None]


@pytest.fixture
def tell(nvml_stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tell:
    """Set what the stub says; `gpu0_mem_used=1` is its key gpu0.mem_used."""
    ctypes.CDLL(str(nvml_stub / "libnvidia-ml.so.1"), mode=ctypes.RTLD_GLOBAL)
    state = tmp_path / "state"
    monkeypatch.setenv("NVML_STUB_STATE", str(state))
    monkeypatch.setenv("NVML_STUB_EVENTS", str(tmp_path / "events"))

    def say(values: dict[str, object]) -> None:
        state.write_text("".join(f"{key} {value}\n" for key, value in values.items()))

    say({})
    return say


def test_every_figure_of_a_gpu(tell: Tell) -> None:
    tell(
        {
            "count": 2,
            "gpu1.name": "NVIDIA-H200",
            "gpu1.mem_used": 1 << 30,
            "gpu1.mem_reserved": 600 << 20,
            "gpu1.util": 97,
            "gpu1.temp": 61,
            "gpu1.power_mw": 540500,
            "gpu1.clock_sm": 1755,
            "gpu1.throttle": 0x24,
            "gpu1.ecc_dbe": 2,
            "gpu1.ecc_dbe_ever": 9,
            "gpu1.remap_pending": 1,
            "gpu1.pcie_width": 8,
            "gpu1.recovery_action": 4,
            "gpu1.procs": 2,
            "gpu1.pid0": 4711,
            "gpu1.pidmem0": 12345,
            "gpu1.pidmem1": "none",
        }
    )
    nvml = Nvml.open()
    assert nvml.count() == 2
    reading = nvml.read(1)
    assert (reading.index, reading.uuid, reading.name) == (1, UUID.format(1), "NVIDIA-H200")
    assert reading.memory_used_bytes == 1 << 30  # version 2: without the driver's reserve
    assert reading.memory_total_bytes == 80 << 30
    assert reading.process_memory_bytes == {4711: 12345, 1001: None}
    assert (reading.utilization_ratio, reading.temperature_celsius, reading.power_watts) == (0.97, 61, 540.5)
    assert (reading.clock_sm_mhz, reading.clock_sm_max_mhz) == (1755, 1980)
    assert reading.event_reasons == 0x24
    assert reading.ecc_uncorrected_total == 2  # since the driver was loaded, not ever
    assert (reading.remapped_rows_pending, reading.remapped_rows_failed) == (True, False)
    assert (reading.pcie_width, reading.pcie_width_max) == (8, 16)
    assert reading.recovery_action == 4
    assert not reading.lost


@pytest.mark.parametrize("error", [FUNCTION_NOT_FOUND, NOT_SUPPORTED, NO_PERMISSION])
def test_what_the_driver_cannot_tell_is_unknown_and_not_sick(error: int, tell: Tell) -> None:
    calls = "memory memory_v2 procs utilization temperature power clock clock_max event_reasons throttle ecc remap pcie"
    tell({f"gpu0.error.{call}": error for call in (*calls.split(), "pcie_max", "fields")})
    reading = Nvml.open().read(0)
    assert reading.uuid == UUID.format(0)
    assert not reading.lost
    unknown = {name: getattr(reading, name) for name in type(reading).__dataclass_fields__}
    assert {name for name, value in unknown.items() if value is not None} == {"index", "uuid", "name", "lost"}


def test_old_driver_without_memory_version_two(tell: Tell) -> None:
    tell({"gpu0.error.memory_v2": FUNCTION_NOT_FOUND, "gpu0.mem_used": 1000, "gpu0.mem_reserved": 24})
    assert Nvml.open().read(0).memory_used_bytes == 1024


def test_old_driver_with_the_old_name_of_the_clock_events(tell: Tell) -> None:
    tell({"gpu0.error.event_reasons": FUNCTION_NOT_FOUND, "gpu0.throttle": 0x40})
    assert Nvml.open().read(0).event_reasons == 0x40


def test_driver_without_an_advice_leaves_it_unknown(tell: Tell) -> None:
    assert Nvml.open().read(0).recovery_action is None


@pytest.mark.parametrize("error", [GPU_LOST, RESET_REQUIRED])
def test_lost_gpu_keeps_its_identity_and_comes_back(error: int, tell: Tell) -> None:
    nvml = Nvml.open()
    assert not nvml.read(0).lost
    tell({"gpu0.error": error})
    reading = nvml.read(0)
    assert reading.lost
    assert reading.uuid == UUID.format(0)
    assert reading.memory_used_bytes is None
    tell({})
    assert not nvml.read(0).lost


def test_gpu_that_is_lost_from_the_start_takes_nobody_with_it(tell: Tell) -> None:
    tell({"count": 2, "gpu0.error": GPU_LOST})
    nvml = Nvml.open()
    assert (nvml.read(0).lost, nvml.read(0).uuid) == (True, None)
    assert nvml.read(1).memory_total_bytes == 80 << 30


def test_driver_that_is_not_loaded_is_unavailable(tell: Tell) -> None:
    tell({"init_error": 9})
    with pytest.raises(NvmlUnavailable, match="Driver Not Loaded"):
        Nvml.open()


def test_xid_errors_are_heard_with_their_gpu(tell: Tell, tmp_path: Path) -> None:
    tell({"count": 2})
    events = Nvml.open().xid_events([0, 1])
    assert events is not None
    assert events.indices == {0, 1}
    assert events.next(0) is None
    (tmp_path / "events").write_text("1 8 79\n0 1 5\n0 8 13\n")  # the middle one is no Xid
    assert events.next(1000) == (1, 79)
    assert events.next(1000) == (0, 13)
    assert events.next(0) is None


def test_gpu_that_reports_no_xids_is_not_among_them(tell: Tell) -> None:
    tell({"count": 2, "gpu1.error.register": NOT_SUPPORTED})
    events = Nvml.open().xid_events([0, 1])
    assert events is not None
    assert events.indices == {0}
    tell({"gpu0.error.register": NOT_SUPPORTED})
    assert Nvml.open().xid_events([0]) is None


def test_wait_for_xids_that_fails_says_so(tell: Tell) -> None:
    events = Nvml.open().xid_events([0])
    assert events is not None
    tell({"wait_error": GPU_LOST})
    with pytest.raises(NvmlUnavailable, match="GPU is lost"):
        events.next(1000)
