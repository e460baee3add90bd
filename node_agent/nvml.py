"""The only importer of pynvml: raw readings of each GPU, where anything but a lost GPU is at worst unknown.

Calls on a sick GPU can block for seconds: only gpu_watch and xid_watch call this, in threads of theirs.
"""

from __future__ import annotations

import ctypes
from typing import Any

from node_agent.gpu import GpuReading

# NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: the driver's own advice on what brings a GPU back; 0 is nothing.
_FIELD_RECOVERY_ACTION = 230


class NvmlUnavailable(Exception):
    """There is no NVML to ask: no library, or no driver behind it. The text says which."""


class _Lost(Exception):
    """NVML answered that the GPU is lost or waits for a reset."""


class Nvml:
    """An opened NVML. One thread at a time, except for XidEvents, which has a thread of its own."""

    def __init__(self, library: Any) -> None:
        self._nvml = library
        self._lost_codes = (library.NVML_ERROR_GPU_IS_LOST, library.NVML_ERROR_RESET_REQUIRED)
        self._handles: dict[int, Any] = {}
        self._identities: dict[int, tuple[str | None, str | None]] = {}

    @classmethod
    def open(cls) -> Nvml:
        """Load and initialise the library; raises NvmlUnavailable."""
        try:
            import pynvml
        except ImportError as error:
            raise NvmlUnavailable("the Python package nvidia-ml-py is not installed") from error
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(str(error)) from error
        return cls(pynvml)

    def count(self) -> int:
        """Return how many GPUs the driver lists; raises NvmlUnavailable if it does not answer."""
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError as error:
            raise NvmlUnavailable(str(error)) from error

    def read(self, index: int) -> GpuReading:
        """Read everything about one GPU; one that is lost keeps its identity and nothing else."""
        try:
            handle = self._handle(index)
            return self._read(index, handle) if handle is not None else self._identity_only(index, lost=False)
        except _Lost:
            return self._identity_only(index, lost=True)

    def _handle(self, index: int) -> Any:
        if index not in self._handles:
            handle = self._ask("nvmlDeviceGetHandleByIndex", index)
            if handle is None:
                return None
            self._handles[index] = handle
        return self._handles[index]

    def _identity_only(self, index: int, *, lost: bool) -> GpuReading:
        uuid, name = self._identities.get(index, (None, None))
        return GpuReading(index=index, uuid=uuid, name=name, lost=lost)

    def _read(self, index: int, handle: Any) -> GpuReading:
        uuid, name = self._identities.get(index, (None, None))
        if uuid is None or name is None:
            uuid, name = self._ask("nvmlDeviceGetUUID", handle), self._ask("nvmlDeviceGetName", handle)
            self._identities[index] = (uuid, name)
        used, total = self._memory(handle)
        remapped = self._ask("nvmlDeviceGetRemappedRows", handle)
        utilization = self._ask("nvmlDeviceGetUtilizationRates", handle)
        power = self._ask("nvmlDeviceGetPowerUsage", handle)
        return GpuReading(
            index=index,
            uuid=uuid,
            name=name,
            memory_used_bytes=used,
            memory_total_bytes=total,
            process_memory_bytes=self._process_memory(handle),
            utilization_ratio=None if utilization is None else utilization.gpu / 100,
            temperature_celsius=self._ask("nvmlDeviceGetTemperature", handle, self._nvml.NVML_TEMPERATURE_GPU),
            power_watts=None if power is None else power / 1000,
            clock_sm_mhz=self._ask("nvmlDeviceGetClockInfo", handle, self._nvml.NVML_CLOCK_SM),
            clock_sm_max_mhz=self._ask("nvmlDeviceGetMaxClockInfo", handle, self._nvml.NVML_CLOCK_SM),
            event_reasons=self._event_reasons(handle),
            ecc_uncorrected_total=self._ask(
                "nvmlDeviceGetTotalEccErrors",
                handle,
                self._nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                self._nvml.NVML_VOLATILE_ECC,
            ),
            remapped_rows_pending=None if remapped is None else bool(remapped[2]),
            remapped_rows_failed=None if remapped is None else bool(remapped[3]),
            pcie_width=self._ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
            pcie_width_max=self._ask("nvmlDeviceGetMaxPcieLinkWidth", handle),
            recovery_action=self._recovery_action(handle),
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Call NVML; what it cannot answer is None. Raises _Lost if the GPU is gone."""
        call = getattr(self._nvml, function, None)
        try:
            return None if call is None else call(*arguments)
        except self._nvml.NVMLError as error:
            if error.value in self._lost_codes:
                raise _Lost from error
            return None

    def _memory(self, handle: Any) -> tuple[int | None, int | None]:
        """Used and total bytes. Version 2 leaves the driver's own reserve out of `used`; old drivers lack it."""
        memory = self._ask("nvmlDeviceGetMemoryInfo", handle, self._nvml.nvmlMemory_v2)
        if memory is None:
            memory = self._ask("nvmlDeviceGetMemoryInfo", handle)
        return (None, None) if memory is None else (int(memory.used), int(memory.total))

    def _process_memory(self, handle: Any) -> dict[int, int | None] | None:
        """Bytes by pid over compute, graphics and MPS clients; None if compute processes cannot be listed."""
        compute = self._processes("Compute", handle)
        if compute is None:
            return None
        others = [*(self._processes("Graphics", handle) or ()), *(self._processes("MPSCompute", handle) or ())]
        return {int(one.pid): one.usedGpuMemory for one in (*others, *compute)}

    def _processes(self, kind: str, handle: Any) -> list[Any] | None:
        """Ask by version, newest first: the unversioned functions refuse to run with an older driver."""
        answers = (self._ask(f"nvmlDeviceGet{kind}RunningProcesses_{version}", handle) for version in ("v3", "v2"))
        return next((answer for answer in answers if answer is not None), None)

    def _event_reasons(self, handle: Any) -> int | None:
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if mask is None:
            mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return mask if mask is None else int(mask)

    def _recovery_action(self, handle: Any) -> int | None:
        values = self._ask("nvmlDeviceGetFieldValues", handle, [_FIELD_RECOVERY_ACTION])
        if not values or values[0].nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        return int(values[0].value.uiVal)

    def xid_events(self, indices: list[int]) -> XidEvents | None:
        """Subscribe to the Xid errors of these GPUs; None if no GPU reports them. For the thread that waits."""
        handles = {index: _handle_or_none(self._nvml, index) for index in indices}
        return XidEvents.subscribe(self._nvml, handles)


class XidEvents:
    """A subscription to Xid errors; `next` may wait in a thread of its own."""

    def __init__(self, library: Any, events: Any, indices: dict[int | None, int]) -> None:
        self._nvml, self._events, self._indices = library, events, indices

    @classmethod
    def subscribe(cls, library: Any, handles: dict[int, Any]) -> XidEvents | None:
        try:
            events = library.nvmlEventSetCreate()
        except library.NVMLError:
            return None
        registered = {
            _address(handle): index
            for index, handle in handles.items()
            if handle is not None and _register(library, handle, events)
        }
        return cls(library, events, registered) if registered else None

    @property
    def indices(self) -> frozenset[int]:
        """The GPUs whose Xid errors are heard."""
        return frozenset(self._indices.values())

    def next(self, timeout_ms: int) -> tuple[int | None, int] | None:
        """Wait for one error: (GPU index or None, Xid code); None after the time-out. Raises NvmlUnavailable."""
        try:
            event = self._nvml.nvmlEventSetWait(self._events, timeout_ms)
        except self._nvml.NVMLError as error:
            if error.value == self._nvml.NVML_ERROR_TIMEOUT:
                return None
            raise NvmlUnavailable(str(error)) from error
        return self._indices.get(_address(event.device)), int(event.eventData)


def _handle_or_none(library: Any, index: int) -> Any:
    try:
        return library.nvmlDeviceGetHandleByIndex(index)
    except library.NVMLError:
        return None


def _register(library: Any, handle: Any, events: Any) -> bool:
    try:
        library.nvmlDeviceRegisterEvents(handle, library.nvmlEventTypeXidCriticalError, events)
    except library.NVMLError:
        return False
    return True


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value
