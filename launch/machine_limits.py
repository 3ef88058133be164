"""How many ranks this machine can hold: more are refused before any of them starts, with the arithmetic."""

from __future__ import annotations

from pathlib import Path

from distattn.cluster.spec import ClusterSpec
from distattn.ir.errors import DistattnError
from distattn.kernels.registry import AUTO, CPU_KERNELS
from distattn.training.config import Config
from distattn.training.run_data import vocabulary_size

# 10^6 bytes that one rank has for itself (Private_Dirty), measured with torch 2.13 and transformers 5 on Linux: what
# ranks share, such as the libraries' code, is not in it
TRAIN_RANK_MB = 400
DOCTOR_RANK_MB = 270
CALIBRATE_RANK_MB = 240
# the value cgroup v1 has for "no limit" is 2^63 less a page
_NO_LIMIT = 1 << 60


def check_run_fits(config: Config) -> None:
    """Refuse a run with more ranks than this machine has memory or GPUs for. Raises DistattnError with the arithmetic."""
    ranks, kernel = config.parallel.ranks, config.parallel.kernel
    model_mb = state_bytes(config) / 1e6
    check_memory(
        "parallel.ranks",
        ranks,
        TRAIN_RANK_MB + model_mb,
        f"{TRAIN_RANK_MB} MB for Python, torch and transformers, {model_mb:,.0f} MB for its part of model and optimizer",
    )
    # "auto" is the CPU's kernel where there are no GPUs
    if kernel not in CPU_KERNELS and (kernel != AUTO or gpu_count()):
        check_gpus("parallel.ranks", ranks, f"kernel {kernel!r} wants one for each rank")


def check_device_holds_state(config: Config, cluster: ClusterSpec) -> None:
    """Refuse a run whose model and optimizer do not fit into the devices of its cluster, activations left aside."""
    need, have = state_bytes(config), cluster.device.memory_gb * 1e9
    if config.parallel.kernel not in CPU_KERNELS and need > have:
        raise DistattnError(
            f"model: {model_parameters(config) / 1e9:,.1f} billion parameters with gradients and AdamW's averages take "
            f"{need / 1e9:,.1f} GB on each of {config.parallel.ranks} ranks, a device of {cluster.name} has "
            f"{have / 1e9:,.0f} GB. Take more ranks, or let more of them share the parameters (engine.shard_size or zero_stage)."
        )


def check_nodes_hold_ranks(config: Config, node_bytes: int | None) -> None:
    """Refuse a run whose ranks need more memory on a node than it has. node_bytes: of the largest; None where unknown."""
    ranks = config.parallel.devices_per_node or config.parallel.ranks
    # the state of ranks with a device is there
    each = state_bytes(config) if config.parallel.kernel in CPU_KERNELS else 0
    need = ranks * (TRAIN_RANK_MB * 1e6 + each)
    if node_bytes is not None and need > node_bytes:
        raise DistattnError(
            f"parallel.ranks: {ranks} ranks a node need {need / 1e9:,.1f} GB, the largest node has {node_bytes / 1e9:,.1f} GB. "
            "Take fewer ranks on a node, or a smaller model."
        )


def check_memory(key: str, ranks: int, rank_mb: float, parts: str) -> None:
    """Refuse more ranks than fit into the memory that is free now. rank_mb: 10^6 bytes for each; parts: what they are for."""
    free = available_bytes()
    if free is None or ranks * rank_mb * 1e6 <= free:
        return
    fit = int(free / (rank_mb * 1e6))
    raise DistattnError(
        f"{key}: {ranks:,} ranks need {ranks * rank_mb / 1e3:,.1f} GB of memory ({rank_mb:,.0f} MB each: {parts}), this machine "
        f"has {free / 1e9:,.1f} GB available: {f'at most {fit:,} ranks fit' if fit else 'not even one fits'}."
    )


def check_gpus(key: str, ranks: int, why: str) -> None:
    """Refuse more ranks than this machine has GPUs."""
    gpus = gpu_count()
    if ranks > gpus:
        raise DistattnError(f"{key}: {ranks:,} ranks on a machine with {gpus} GPUs; {why}.")


def gpu_count() -> int:
    """GPUs of this machine that torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def state_bytes(config: Config) -> int:
    """Bytes that a rank keeps of weights, gradients and AdamW's two averages, as the engine shards them."""
    ranks, wide = config.parallel.ranks, 8 if config.model.dtype == "float64" else 4
    weights = gradients = averages = 1
    if config.engine.name == "fsdp2":
        weights = gradients = averages = config.engine.shard_size or ranks
    elif config.engine.name == "deepspeed":
        stage = config.engine.zero_stage
        weights, gradients, averages = (ranks if stage >= least else 1 for least in (3, 2, 1))
    else:
        weights = gradients = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
        averages = ranks
    parts = (1 / weights, 1 / gradients, 2 / averages)
    extra = 0.0
    if config.engine.name != "fsdp2" and config.model.dtype == "bfloat16":
        # what computes beside the master weights, which are sharded as the averages are
        parts, extra = (1 / averages, 1 / gradients, 2 / averages), 2 / weights
    return round(model_parameters(config) * (wide * sum(parts) + extra))


def model_parameters(config: Config) -> int:
    """How many numbers the model has."""
    model = config.model
    if model.path:
        # experts, biases and norms are the architecture's own; seconds to import
        from distattn.models.build import meta_model, model_config

        return sum(parameter.numel() for parameter in meta_model(model_config(model.path)).parameters())
    attention = model.hidden_size * model.head_size * (2 * model.num_attention_heads + 2 * model.num_key_value_heads)
    layer = attention + 3 * model.hidden_size * model.intermediate_size + 2 * model.hidden_size
    return 2 * vocabulary_size(config) * model.hidden_size + model.num_layers * layer + model.hidden_size


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that new processes can have: the machine's, or what its cgroups leave. None where nothing tells (not Linux)."""
    left = _cgroup_bytes(root)
    try:
        for line in (root / "proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    return min(left, default=None)


def _cgroup_bytes(root: Path) -> list[int]:
    """Bytes left below each memory limit of this process's cgroup and of those above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, used, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # a container sees its own cgroup at the mount point, whatever the path says
        own = mount / path.strip("/")
        for folder in (own, *own.parents):
            found = _left_in(folder, limit, used, cache)
            if found is not None:
                left.append(found)
            if folder == mount:
                break
    return left


def _left_in(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Bytes below one limit; file pages that the kernel would give up at once do not count as used."""
    try:
        most = (folder / limit).read_text("ascii").strip()
        if most == "max" or int(most) >= _NO_LIMIT:
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        return max(int(most) - int((folder / used).read_text("ascii")) + int(stat.get(cache, 0)), 0)
    except (OSError, ValueError):
        return None
