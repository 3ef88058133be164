"""A check that fla-core computes per-token decays correctly on Hopper GPUs with this Triton, and advice on what to install."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, files, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

NEWER_TORCH = "install torch 2.13 (Triton 3.7.1)"
TILELANG = "tilelang with the CUDA compiler nvcc"
# Triton from the first version (inclusive) to the second (exclusive) gives wrong results; fla-core itself rejects these versions
# only in the backward pass (its issue 640)
_FIRST_WRONG, _FIRST_RIGHT = Version("3.4.0"), Version("3.7.1")
# packages that contain Triton; nightly builds of PyTorch depend on the second
_TRITONS = ("triton", "pytorch-triton")


class DecayFault(NamedTuple):
    """The reason why fla-core cannot compute per-token decays on this machine, and what to install to fix it."""

    fault: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.remedy}"


def token_decay_fault(capability: int, has_delta_rule: bool) -> DecayFault | None:
    """Return why fla-core cannot compute per-token decays on a GPU of this compute capability (90 is Hopper), or None.

    has_delta_rule: True for an op with a delta rule, such as Gated DeltaNet. fla-core 0.6 can compute such ops with
    tilelang, but no others: `fla/ops/simple_gla/chunk.py` keeps fp32 states, which its tilelang kernels reject.
    """
    triton = _triton_version()
    if capability != 90 or triton is None or not _FIRST_WRONG <= Version(triton) < _FIRST_RIGHT:
        return None
    if not has_delta_rule:
        return DecayFault(f"Triton {triton} computes decays per token (Mamba-2) wrongly on Hopper GPUs", NEWER_TORCH)
    if _tilelang_compiles():
        return None
    fault = f"Triton {triton} computes decays per token (Gated DeltaNet) wrongly on Hopper GPUs"
    return DecayFault(fault, f"{NEWER_TORCH} or {TILELANG}")


def fla_core_advice(capability: int, delta_rules: tuple[bool, ...] = (True, False)) -> DecayFault | None:
    """Return why fla-core cannot compute per-token decays, and a remedy. Return None if it can, or if it is not installed.

    delta_rules: for each op in use, whether it has a delta rule. By default, check ops both with and without one.
    """
    if _installed_version("fla-core") is None:
        return None
    faults = [token_decay_fault(capability, has_delta_rule) for has_delta_rule in delta_rules]
    return next((fault for fault in faults if fault is not None), None)


def _triton_version() -> str | None:
    return next((number for name in _TRITONS if (number := _installed_version(name))), None)


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tilelang_compiles() -> bool:
    """Return whether fla-core 0.6 would use tilelang: installed, not disabled, and nvcc available (`fla/backends.py`)."""
    is_off = os.environ.get("FLA_TILELANG") == "0" or os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1"
    return find_spec("tilelang") is not None and not is_off and _has_nvcc()


def _has_nvcc() -> bool:
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if shutil.which("nvcc") or any((Path(folder) / "bin" / "nvcc").exists() for folder in folders if folder):
        return True
    # this package contains nvcc from version 13 on
    package = "nvidia-cuda-nvcc"
    return _installed_version(package) is not None and any(file.name == "nvcc" for file in files(package) or [])
