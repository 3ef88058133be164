"""The resources that a run needs on each node, on Slurm and on Ray."""

from __future__ import annotations

from typing import NamedTuple

from distattn.kernels.registry import CPU_KERNELS
from distattn.training.config.run_file import Config

# CPU cores per GPU, for data loading, planning ahead and NCCL's threads
_CPUS_PER_GPU = 4


class NodeNeeds(NamedTuple):
    """The resources of one node: its number of ranks, and the GPUs and CPU cores that they need in total."""

    ranks: int
    gpus: int
    cpus: int


def node_needs(config: Config) -> NodeNeeds:
    """Return the resources that a run needs on each node."""
    ranks = config.parallel.devices_per_node or config.parallel.ranks
    gpus = config.parallel.kernel not in CPU_KERNELS
    return NodeNeeds(ranks, ranks if gpus else 0, ranks * (_CPUS_PER_GPU if gpus else 1))
