"""A file cache of kernel trials on this machine, by device, driver, PyTorch, Triton, kernel sources and shape."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distattn.ir.bands import LO, UNBOUNDED
from distattn.kernels.flash.attention import implementation
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.spec import KernelRequirements
from distattn.kernels.trials import Trial, mostly_overlap_messages


def cache_file() -> Path:
    """Return the path of the cache file, in the user's XDG cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "distattn", "kernels.json")


def trial_key(masks: list[LaunchMask], requirements: KernelRequirements) -> str:
    """Return a readable line with everything that a trial of attention depends on."""
    largest = max((mask.rows for mask in masks), default=0)
    first = max(masks, key=lambda mask: mask.heads, default=None)
    # assume that the ranking of kernels is the same for numbers of rows within a factor of two
    rows = 1 << max(largest - 1, 0).bit_length()
    heads = f"{first.heads}:{first.kv_heads}" if first else "no heads"
    shape = f"{str(requirements.dtype)[6:]} {heads} {requirements.head_dim}/{requirements.v_head_dim}"
    extras = "".join(f" {name}" for name in ("softcap", "alibi") if getattr(requirements, name))
    steps = f" steps of {requirements.least_step}" if requirements.least_step else ""
    windows = " windows" * any((mask.bands[:, LO] > -UNBOUNDED // 2).any() for mask in masks)
    kind = ", messages in flight" * mostly_overlap_messages(masks)
    return (
        f"{_machine(requirements.device)} | kernels {_sources()} | {shape}{extras}{steps}{windows}, {rows} rows{kind}"
    )


def trial_key_of_op(requirements: KernelRequirements, heads: int, key_heads: int) -> str:
    """Return the key for a recurrence or convolution. It contains the versions of the packages that kernels come from, but
    nothing about the plan."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("fla-core", "tilelang"))
    shape = f"{str(requirements.dtype)[6:]} {heads}:{key_heads} {requirements.head_dim}/{requirements.v_head_dim}"
    groups = " groups" * requirements.grouped
    kernels = f"{packages} | kernels {_sources()}"
    return f"{_machine(requirements.device)} | {kernels} | {requirements.op.name} {shape}{groups}"


def read_trials(key: str, names: tuple[str, ...]) -> dict[str, Trial] | None:
    """Return the cached trials of the kernels `names`; None if any of these kernels has no trial."""
    stored = _read().get(key, {})
    # ignore a file written by a different version or edited by hand
    with suppress(TypeError, KeyError):
        return {name: Trial(**stored[name]) for name in names}
    return None


def write_trials(key: str, trials: dict[str, Trial]) -> None:
    """Add trials to the cache file. Do nothing if the file cannot be written."""
    if not trials:
        return
    path = cache_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # other ranks on this machine write the file, too: take the lock, and replace the file atomically
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            everything = _read()
            everything[key] = everything.get(key, {}) | {name: trial._asdict() for name, trial in trials.items()}
            aside = path.with_suffix(".new")
            aside.write_text(json.dumps(everything, indent=1))
            os.replace(aside, path)


def all_trials() -> dict[str, dict[str, Trial]]:
    """Return all stored trials, keyed by `trial_key` or `trial_key_of_op`."""
    out = {}
    for key, trials in _read().items():
        with suppress(TypeError, AttributeError):
            out[key] = {name: Trial(**trial) for name, trial in trials.items()}
    return out


def _read() -> dict[str, Any]:
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@cache
def _sources() -> str:
    """Return a short hash of the kernels' sources, so that changes to them invalidate trials."""
    folder = Path(__file__).parent
    texts = b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))
    return hashlib.sha1(texts).hexdigest()[:8]


def _machine(device: torch.device) -> str:
    name, driver = "CPU", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        with suppress(OSError):
            driver = Path("/proc/driver/nvidia/version").read_text().split("Module", 1)[-1].split()[0]
    flash = implementation()
    return f"{name} | driver {driver or 'unknown'} | torch {torch.__version__} ({flash}) | triton {_version('triton')}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
