"""fla-core's own context parallelism in Triton's interpreter, over the gloo ranks of a launcher, as the cluster check calls it.

Rank 0 prints what is wrong on each rank with each op and layout as JSON, empty texts where nothing is. See `fla_in_interpreter`.
"""

import json
import os
import sys
from importlib import import_module

# before triton is imported
os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from check_recurrences import FLA, Case, of_fla
from fla_in_interpreter import make_kernels_run
from harness import joined


def gathered(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, None]:
    """What all ranks have, as (ranks, ...): over gloo theirs wants another shape."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, x, group)
    return torch.stack(everyone), None


def make_it_run_on_cpus() -> None:
    make_kernels_run()
    modules = [import_module(f"fla.ops.cp.chunk_{name}") for name in ("bwd", "delta_h", "fwd", "merge")]
    for module in modules:
        # it refuses devices that are no GPUs
        module._check_cp_device = lambda device: None
    modules[1].all_gather_into_tensor = gathered


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    make_it_run_on_cpus()
    rank, _, device = joined()
    found = {}
    for op in FLA:
        # a document across all ranks, and one inside a slice
        case = Case.of(op, [26, 6], 1, device)
        found |= {f"{op}, {layout}": case.check(of_fla(case, layout)()) for layout in ("contiguous", "zigzag")}
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if rank == 0:
        sys.stdout.write(json.dumps(everyone) + "\n")
    dist.destroy_process_group()
