"""Limits on the number of ranks per machine, checked before any rank starts. The errors show the arithmetic."""

from __future__ import annotations

from distattn.cluster.spec import ClusterSpec
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import plural
from distattn.kernels.registry import AUTO, CPU_KERNELS
from distattn.memory.host_memory import available_bytes
from distattn.training.config.checks import NO_GPU_FOR_MEGATRON
from distattn.training.config.run_file import Config
from distattn.training.state_bytes import model_parameters, state_bytes

# private memory of one rank in MB (10^6 bytes), estimated from Private_Dirty in /proc/PID/smaps_rollup with torch 2.13 and
# transformers 5 (not recorded in the log). Memory shared by ranks, such as library code, is not included.
TRAIN_RANK_MB = 400
DOCTOR_RANK_MB = 270
CALIBRATE_RANK_MB = 240


def check_run_fits(config: Config) -> None:
    """Raise DistattnError, with the arithmetic, if this machine has too little memory or too few GPUs for a run's ranks."""
    ranks, kernel = config.parallel.ranks, config.parallel.kernel
    model_mb = state_bytes(config) / 1e6
    check_memory(
        "parallel.ranks",
        ranks,
        TRAIN_RANK_MB + model_mb,
        f"{TRAIN_RANK_MB} MB for Python, torch and transformers, {model_mb:,.0f} MB for its part of model and optimizer",
    )
    if config.engine.name == "megatron" and not gpu_count():
        raise DistattnError(NO_GPU_FOR_MEGATRON)
    # without GPUs, "auto" selects the CPU kernel
    if kernel not in CPU_KERNELS and (kernel != AUTO or gpu_count()):
        check_gpus("parallel.ranks", ranks, f"kernel {kernel!r} needs one for each rank")


def check_device_holds_state(config: Config, cluster: ClusterSpec) -> None:
    """Raise DistattnError if model and optimizer, even without activations, do not fit in the memory of a cluster's device."""
    need, have = state_bytes(config), cluster.device.memory_gb * 1e9
    if config.parallel.kernel not in CPU_KERNELS and need > have:
        raise DistattnError(
            f"model: {model_parameters(config) / 1e9:,.1f} billion parameters with gradients and AdamW's averages take "
            f"{need / 1e9:,.1f} GB on each of {config.parallel.ranks} ranks, a device of {cluster.name} has "
            f"{have / 1e9:,.0f} GB. Use more ranks, or let more of them share the parameters (engine.shard_size or zero_stage)."
        )


def check_nodes_hold_ranks(config: Config, node_bytes: int | None) -> None:
    """Raise DistattnError if a node's ranks need more memory than it has.

    node_bytes: memory of the largest node; None if unknown.
    """
    ranks = config.parallel.devices_per_node or config.parallel.ranks
    # ranks with a GPU keep their state on it
    each = state_bytes(config) if config.parallel.kernel in CPU_KERNELS else 0
    need = ranks * (TRAIN_RANK_MB * 1e6 + each)
    if node_bytes is not None and need > node_bytes:
        raise DistattnError(
            f"parallel.ranks: {ranks} ranks per node need {need / 1e9:,.1f} GB, the largest node has {node_bytes / 1e9:,.1f} GB. "
            "Use fewer ranks on a node, or a smaller model."
        )


def check_memory(key: str, ranks: int, rank_mb: float, parts: str) -> None:
    """Raise DistattnError if the ranks do not fit in free memory. rank_mb: MB (10^6 bytes) per rank. parts: its breakdown."""
    free = available_bytes()
    if free is None or ranks * rank_mb * 1e6 <= free:
        return
    fit = int(free / (rank_mb * 1e6))
    at_most = f"at most {plural(fit, 'rank')} {'fits' if fit == 1 else 'fit'}"
    raise DistattnError(
        f"{key}: {ranks:,} ranks need {ranks * rank_mb / 1e3:,.1f} GB of memory ({rank_mb:,.0f} MB each: {parts}), this machine "
        f"has {free / 1e9:,.1f} GB available: {at_most if fit else 'not even one fits'}."
    )


def check_gpus(key: str, ranks: int, why: str) -> None:
    """Raise DistattnError if this machine has fewer GPUs than ranks. why: the reason, as the end of the message."""
    gpus = gpu_count()
    if ranks > gpus:
        raise DistattnError(f"{key}: {ranks:,} ranks on a machine with {plural(gpus, 'GPU')}; {why}.")


def gpu_count() -> int:
    """Return the number of GPUs on this machine that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
