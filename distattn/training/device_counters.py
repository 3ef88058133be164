"""Error counters of a GPU, as NVML has them: memory errors, rows that were replaced, NVLink errors, Xid messages.

NVML is asked through the package nvidia-ml-py (extra `health`). Where that or the driver is missing, there are no counters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

# of a GPU, in the order in which `DeviceCounters.read` gives them
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
    """Of one GPU. index: its number on this machine as `nvidia-smi` has it, -1 where there is none.

    uuid: as PyTorch and NVML name it, None for a device that is no GPU. last_xid: the code of the last Xid message, 0 before one.
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
            # no driver, or a container that hides it
            return
        self._nvml = nvml
        self._events = self._known(self._listen)

    @staticmethod
    def of_device(device: torch.device) -> DeviceCounters:
        """The counters of a device of PyTorch's."""
        if device.type != "cuda":
            return DeviceCounters(None)
        return DeviceCounters(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def read(self) -> list[float]:
        """The counters now, by `COUNTERS`; NaN for what the GPU or the driver does not count. Takes some microseconds each."""
        if self._nvml is None:
            return [float("nan")] * len(COUNTERS)
        nvml = self._nvml
        links = ("CRC_FLIT", "REPLAY", "RECOVERY")
        asked: list[Callable[[], int]] = [
            lambda: self._memory_errors(nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            lambda: self._memory_errors(nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
            lambda: sum(nvml.nvmlDeviceGetRemappedRows(self._handle)[:2]),
            *(partial(self._link_errors, getattr(nvml, f"NVML_NVLINK_ERROR_DL_{kind}")) for kind in links),
            self._xid_messages,
        ]
        found = [self._known(one) for one in asked]
        return [float("nan") if value is None else float(value) for value in found]

    def close(self) -> None:
        """Let NVML go."""
        if self._nvml is not None:
            if self._events is not None:
                self._known(lambda: self._nvml.nvmlEventSetFree(self._events))
            self._known(self._nvml.nvmlShutdown)
            self._nvml = None

    def _known(self, ask: Callable[[], Any]) -> Any:
        """What NVML answers; None where this GPU does not have it."""
        try:
            return ask()
        except self._nvml.NVMLError:
            return None

    def _listen(self) -> Any:
        events = self._nvml.nvmlEventSetCreate()
        self._nvml.nvmlDeviceRegisterEvents(self._handle, self._nvml.nvmlEventTypeXidCriticalError, events)
        return events

    def _memory_errors(self, kind: int) -> int:
        # since the driver was loaded
        return int(self._nvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, self._nvml.NVML_VOLATILE_ECC))

    def _link_errors(self, kind: int) -> int:
        found = [
            self._known(partial(self._nvml.nvmlDeviceGetNvLinkErrorCounter, self._handle, link, kind))
            for link in range(self._nvml.NVML_NVLINK_MAX_LINKS)
        ]
        known = [int(one) for one in found if one is not None]
        if not known:
            raise self._nvml.NVMLError(self._nvml.NVML_ERROR_NOT_SUPPORTED)
        return sum(known)

    def _xid_messages(self) -> int:
        """How many have come since this was made. NVML says so by events, of which one at a time is taken, without waiting."""
        if self._events is None:
            raise self._nvml.NVMLError(self._nvml.NVML_ERROR_NOT_SUPPORTED)
        while (event := self._known(lambda: self._nvml.nvmlEventSetWait_v2(self._events, 0))) is not None:
            self._xids, self.last_xid = self._xids + 1, int(event.eventData)
        return self._xids
