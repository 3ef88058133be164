"""Read the state of a rank's device: its name and memory, and for a GPU also the driver version and the clock."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from distattn.memory.host_memory import available_bytes

_DRIVER = Path("/proc/driver/nvidia/version")
# time limit in seconds for nvidia-smi, which may have to wake up the driver
_SMI_SECONDS = 5.0


class DeviceState(NamedTuple):
    """A device and its memory in bytes.

    name: the device's name, or "CPU". free: free device memory; on a CPU, free memory of the machine. total: None on a CPU.
    """

    name: str
    free: int | None
    total: int | None


class Clock(NamedTuple):
    """The current and the maximum clock of a GPU's multiprocessors, in MHz."""

    now: int
    most: int


def device_state(device: torch.device) -> DeviceState:
    """Return the name and memory of this rank's device."""
    if device.type == "cpu":
        return DeviceState("CPU", available_bytes(), None)
    free, total = torch.cuda.mem_get_info(device)
    return DeviceState(torch.cuda.get_device_properties(device).name, free, total)


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver on this machine, or None if there is no driver."""
    try:
        match = re.search(r"\d{3,}\.\d+(\.\d+)*", _DRIVER.read_text("ascii", "replace"))
    except OSError:
        return None
    return match[0] if match else None


def gpu_clock(device: torch.device) -> Clock | None:
    """Return a GPU's clock as reported by nvidia-smi, or None on a CPU or if nvidia-smi is missing or does not report it."""
    if device.type == "cpu":
        return None
    device_option = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", device_option, "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS)
        now, most = map(int, done.stdout.split(","))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return Clock(now, most)
