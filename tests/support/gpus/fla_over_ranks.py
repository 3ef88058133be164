"""Runs fla-core's context parallelism in Triton's interpreter on gloo ranks, called as the cluster check calls it.

Rank 0 prints JSON: for each rank, op and layout an error message, or an empty string. See `fla_in_interpreter`.
"""

import json
import os
import sys
from importlib import import_module

# must be set before triton is imported
os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from check_recurrences import FLA, Case, of_fla
from fla_in_interpreter import make_kernels_run
from harness import joined


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, None]:
    """Gather `x` from all ranks into (ranks, ...). gloo's own function expects another shape."""
    shards = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, x, group)
    return torch.stack(shards), None


def make_it_run_on_cpus() -> None:
    make_kernels_run()
    modules = [import_module(f"fla.ops.cp.chunk_{name}") for name in ("bwd", "delta_h", "fwd", "merge")]
    for module in modules:
        # fla-core refuses devices other than GPUs
        module._check_cp_device = lambda device: None
    modules[1].all_gather_into_tensor = gathered


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    make_it_run_on_cpus()
    rank, _, device = joined()
    problems = {}
    for op in FLA:
        # one document spans all ranks, and the other lies within one rank's slice
        case = Case.of(op, [26, 6], 1, device)
        problems |= {f"{op}, {layout}": case.check(of_fla(case, layout)()) for layout in ("contiguous", "zigzag")}
    problems_by_rank: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(problems_by_rank, problems)
    if rank == 0:
        sys.stdout.write(json.dumps(problems_by_rank) + "\n")
    dist.destroy_process_group()
