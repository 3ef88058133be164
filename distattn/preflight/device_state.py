"""What a rank's device is: its name, its memory, and of a GPU its driver and its clock as nvidia-smi says them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from distattn.memory.host_memory import available_bytes

_DRIVER = Path("/proc/driver/nvidia/version")
# that nvidia-smi may take where the driver has to wake up
_SMI_SECONDS = 5.0


class DeviceState(NamedTuple):
    """name: of the device, "CPU" for a processor. free, total: bytes of its memory; of a processor, what the machine has left."""

    name: str
    free: int | None
    total: int | None


class Clock(NamedTuple):
    """The clock of a GPU's multiprocessors now and at most, in MHz."""

    now: int
    most: int


def device_state(device: torch.device) -> DeviceState:
    """The device of this rank."""
    if device.type == "cpu":
        return DeviceState("CPU", available_bytes(), None)
    free, total = torch.cuda.mem_get_info(device)
    return DeviceState(torch.cuda.get_device_properties(device).name, free, total)


def driver_version() -> str | None:
    """The version of NVIDIA's driver on this machine; None without one."""
    try:
        found = re.search(r"\d{3,}\.\d+(\.\d+)*", _DRIVER.read_text("ascii", "replace"))
    except OSError:
        return None
    return found[0] if found else None


def gpu_clock(device: torch.device) -> Clock | None:
    """The clock of a GPU, as nvidia-smi says it; None on a processor, and where nvidia-smi is not there or does not know."""
    if device.type == "cpu":
        return None
    which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", which, "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
        now, most = map(int, done.stdout.split(","))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return Clock(now, most)
