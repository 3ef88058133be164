"""A GPU's error counters, read from NVML: memory errors, remapped rows, NVLink errors and Xid messages.

NVML comes from the package nvidia-ml-py (extra `health`). If the package or the driver is missing, all counters are NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# names of the counters, in the order of `DeviceCounters.read`
COUNTERS = (
    "corrected memory errors",
    "uncorrected memory errors",
    "replaced memory rows",
    "NVLink CRC errors",
    "NVLink replays",
    "NVLink recoveries",
    "Xid messages",
)


class DeviceCounters:
    """The counters of one GPU. index: the GPU's index in `nvidia-smi`, or -1 if unknown.

    uuid: the GPU's UUID in NVML, or None for a device that is not a GPU. last_xid: code of the last Xid message, 0
    before the first message.
    """

    def __init__(self, uuid: str | None):
        self.index, self.last_xid = -1, 0
        self._xids = 0
        self._nvml: Any = None
        self._handle: Any = None
        self._events: Any = None
        if uuid is None:
            return
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            self.index = int(nvml.nvmlDeviceGetIndex(self._handle))
        except nvml.NVMLError:
            # there is no driver, or the container hides it
            return
        self._nvml = nvml
        self._events = self._ask(self._listen)

    @staticmethod
    def of_device(device: torch.device) -> DeviceCounters:
        """Return the counters of a PyTorch device."""
        if device.type != "cuda":
            return DeviceCounters(None)
        return DeviceCounters(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def read(self) -> list[float]:
        """Return the counters in the order of `COUNTERS`, with NaN for unavailable counters. Takes microseconds."""
        if self._nvml is None:
            return [float("nan")] * len(COUNTERS)
        nvml = self._nvml
        links = ("CRC_FLIT", "REPLAY", "RECOVERY")
        readers: list[Callable[[], int]] = [
            lambda: self._memory_errors(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            lambda: self._memory_errors(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            lambda: sum(nvml.nvmlDeviceGetRemappedRows(self._handle)[:2]),
            *(partial(self._link_errors, getattr(nvml, f"NVML_NVLINK_ERROR_DL_{kind}")) for kind in links),
            self._xid_messages,
        ]
        counts = [self._ask(reader) for reader in readers]
        return [float("nan") if value is None else float(value) for value in counts]

    def close(self) -> None:
        """Shut NVML down."""
        if self._nvml is not None:
            if self._events is not None:
                self._ask(lambda: self._nvml.nvmlEventSetFree(self._events))
            self._ask(self._nvml.nvmlShutdown)
            self._nvml = None

    def _ask(self, query: Callable[[], Any]) -> Any:
        """Return the result of an NVML query, or None if NVML cannot answer it for this GPU."""
        try:
            return query()
        except self._nvml.NVMLError:
            return None

    def _listen(self) -> Any:
        events = self._nvml.nvmlEventSetCreate()
        self._nvml.nvmlDeviceRegisterEvents(self._handle, self._nvml.nvmlEventTypeXidCriticalError, events)
        return events

    def _memory_errors(self, kind: int) -> int:
        # volatile counters: errors since the driver was loaded
        return int(self._nvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, self._nvml.NVML_VOLATILE_ECC))

    def _link_errors(self, kind: int) -> int:
        counts = [
            self._ask(partial(self._nvml.nvmlDeviceGetNvLinkErrorCounter, self._handle, link, kind))
            for link in range(self._nvml.NVML_NVLINK_MAX_LINKS)
        ]
        available = [int(count) for count in counts if count is not None]
        if not available:
            raise self._nvml.NVMLError(self._nvml.NVML_ERROR_NOT_SUPPORTED)
        return sum(available)

    def _xid_messages(self) -> int:
        """Return the number of Xid messages since this object was created. Polls NVML's events without waiting."""
        if self._events is None:
            raise self._nvml.NVMLError(self._nvml.NVML_ERROR_NOT_SUPPORTED)
        while (event := self._ask(lambda: self._nvml.nvmlEventSetWait_v2(self._events, 0))) is not None:
            self._xids, self.last_xid = self._xids + 1, int(event.eventData)
        return self._xids
