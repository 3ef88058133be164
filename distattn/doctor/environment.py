"""Check a machine for training: versions, devices, NCCL, Triton, ports."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from packaging.version import Version

# for each package: the first tested version, the first version beyond the tested range, and whether it is required
PACKAGES = {
    "torch": ("2.11", "2.14", True),
    "numpy": ("1.26", "3", True),
    "triton": ("3.6", "3.10", False),
    "transformers": ("5.0", "6", False),
    "accelerate": ("1.10", "2", False),
    "deepspeed": ("0.19", "0.20", False),
    "megatron-core": ("0.16", "0.17", False),
}
# environment variables that slow runs down or break them: the harmful value, and the advice
_VARIABLES = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        "1",
        "kernels and messages of different streams wait for each other; unset it unless tensor parallelism needs it",
    ),
    "NCCL_P2P_DISABLE": ("1", "GPUs of a node cannot access each other directly; unset it"),
    "NCCL_IB_DISABLE": ("1", "nodes are connected by TCP only; unset it"),
    "CUDA_LAUNCH_BLOCKING": ("1", "the host waits for every kernel; unset it"),
}
_SHARED_MEMORY = 1 << 30


class Check(NamedTuple):
    """The result of one check. ok: None if the state is a choice, not a fault. advice: how to fix a fault, or ""."""

    name: str
    ok: bool | None
    state: str
    advice: str = ""


def check_machine() -> list[Check]:
    """Check this machine's versions, devices, kernels, shared memory, ports and environment variables."""
    return [_python(), *_packages(), *_devices(), *_kernels(), *_memory(), *_ports(), *_environment_variables()]


def _python() -> Check:
    have = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 11)
    return Check("python", fine, have, "" if fine else "distattn needs Python 3.11 or later")


def _packages() -> Iterator[Check]:
    for name, (low, high, needed) in PACKAGES.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            yield Check(
                name,
                False if needed else None,
                "not installed",
                f"pip install '{name}>={low},<{high}'" if needed else "",
            )
            continue
        inside = Version(low) <= Version(Version(have).base_version) < Version(high)
        advice = "" if inside else f"tested from {low} to below {high}; run the tests, or install one of these"
        yield Check(name, True if inside else not needed and None, have, advice)


def _devices() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from distattn.kernels.recurrence.hopper import fla_core_advice

    if not torch.cuda.is_available():
        yield Check(
            "GPUs",
            None,
            "none",
            "kernels run on the CPU, ranks communicate through gloo; on a GPU machine look at nvidia-smi",
        )
        gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
        yield Check(
            "gloo", gloo, "there" if gloo else "missing", "" if gloo else "install a PyTorch with torch.distributed"
        )
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        fine = (gpu.major, gpu.minor) >= (8, 0)
        advice = "" if fine else 'the Triton kernels need compute capability 8.0; use kernel="reference"'
        yield Check(f"GPU {index}", fine, f"{gpu.name}, sm_{gpu.major}{gpu.minor}", advice)
        if missing := fla_core_advice(10 * gpu.major + gpu.minor):
            advice = f"{missing.remedy}; until then a slower kernel computes them (triton_chunked or chunked)"
            yield Check(f"kernel fla on GPU {index}", None, missing.fault, advice)
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl_version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "missing"
    yield Check("NCCL", nccl, nccl_version, "" if nccl else "install a PyTorch with NCCL")
    if importlib.util.find_spec("triton") is None:
        yield Check("Triton on GPUs", False, "missing", "pip install triton: the default kernels are written in it")


def _kernels() -> Iterator[Check]:
    """Yield a check for each set of kernel timings that kernel="auto" has cached so far."""
    if importlib.util.find_spec("torch") is None:
        return
    from distattn.kernels.trial_cache import all_trials

    for key, trials in all_trials().items():
        right = sorted((trial.seconds, name) for name, trial in trials.items() if not trial.fault)
        faults = {name: trial.fault for name, trial in trials.items() if trial.fault}
        wrong = [name for name, trial in trials.items() if trial.is_wrong]
        results = ", ".join(
            [*(f"{name} {1e3 * seconds:.2f} ms" for seconds, name in right), *map(": ".join, faults.items())]
        )
        advice = f"please report it: {', '.join(wrong)} computed wrong numbers, and is not used" if wrong else ""
        yield Check(f"kernels, {key}", None if wrong else True, results, advice)


def _memory() -> Iterator[Check]:
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        fine = free >= _SHARED_MEMORY
        advice = "" if fine else "NCCL and data loaders use it; in a container give --shm-size=8g"
        yield Check("/dev/shm", True if fine else None, f"{free / 1e9:.1f} GB free", advice)


def _ports() -> Iterator[Check]:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            yield Check("ports", True, "this machine reaches itself")
    except OSError as error:
        yield Check(
            "ports", False, f"this machine cannot connect to itself: {error}", "look at firewall rules for 127.0.0.1"
        )
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
        yield Check("host name", True, f"{name} resolves")
    except OSError:
        advice = "add it to /etc/hosts, or set MASTER_ADDR and GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME"
        yield Check("host name", None, f"{name} does not resolve", advice)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address:
        try:
            socket.getaddrinfo(address, port or None)
            yield Check("MASTER_ADDR", True, f"{address} resolves")
        except OSError:
            yield Check("MASTER_ADDR", False, f"{address} does not resolve", "name a host that all nodes know")


def _environment_variables() -> Iterator[Check]:
    allocator = "".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available() and "expandable_segments" not in allocator:
            advice = "buffers of changing sizes fragment memory; set it to expandable_segments:True, as `distattn train` does"
            yield Check("PYTORCH_ALLOC_CONF", None, allocator or "not set", advice)
    for name, (bad, why) in _VARIABLES.items():
        if os.environ.get(name) == bad:
            yield Check(name, None, bad, why)
