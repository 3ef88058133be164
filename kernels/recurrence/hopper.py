"""Whether Triton computes the decays of tokens of fla-core's kernels rightly on Hopper GPUs, and what to install if not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

WAY_OUT = "install torch 2.13 (Triton 3.7.1) or tilelang"
# fla-core refuses these versions itself, in the backward pass (its issue 640)
_FIRST_WRONG, _FIRST_RIGHT = Version("3.4.0"), Version("3.7.1")


def token_decay_fault(capability: int) -> str | None:
    """Return why fla-core cannot compute decays of tokens on a GPU of this compute capability (90 is Hopper), or None."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return None
    is_wrong = _FIRST_WRONG <= Version(triton) < _FIRST_RIGHT
    if capability != 90 or not is_wrong or find_spec("tilelang") is not None:
        return None
    return f"Triton {triton} computes Gated DeltaNet and Mamba-2 wrongly on Hopper GPUs: {WAY_OUT}"


def fla_core_advice(capability: int) -> str | None:
    """Return what to install so that `fla` computes them here; None where it does, or fla-core is not installed."""
    try:
        version("fla-core")
    except PackageNotFoundError:
        return None
    return token_decay_fault(capability)
