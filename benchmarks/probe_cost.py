"""Measure the cost of `ContextParallel.loss_scale`, compared with one forward and backward pass of the probe.

    python benchmarks/probe_cost.py

Ranks run on this machine over gloo, with one thread each and a Llama in fp32, trained by a loop that sums gradients,
DDP or FSDP2. A pass is that of the probe: two tokens per rank, with gradients reduced. loss_scale makes two passes and
compares all parameters.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Cell, compare, table, write
from process_guard import guard_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from distattn.adapters import huggingface, pytorch

KINDS = ("loop", "ddp", "fsdp2")


def main() -> None:
    """Start the ranks. Rank 0 prints the table and, if --out is set, appends the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (folder, options), nprocs=options.ranks)


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Time all kinds of trainers on this rank. Rank 0 prints the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    huggingface.register()
    cells: list[Cell] = []
    for kind in KINDS:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="distattn")
        case = (
            f"{kind}, {options.ranks} ranks, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"
        )
        cells += of_trainer(case, kind, model, options)
    if rank == 0:
        sys.stdout.write(table(cells) + "\n")
        if options.out:
            write(options.out, cells)
    dist.destroy_process_group()


def of_trainer(case: str, kind: str, model: Any, options: argparse.Namespace) -> list[Cell]:
    """Time one pass, and a complete call of loss_scale, with one kind of trainer. Return a cell for each."""
    mesh = init_device_mesh("cpu", (1, options.ranks), mesh_dim_names=("dp", "cp"))
    reduce: Callable[[], None] | None = None
    if kind == "fsdp2":
        pytorch.shard_parameters(model, mesh)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    if kind == "loop":

        def reduce() -> None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)

    target = pytorch.ProbeTarget(model, reduce=reduce)
    with pytorch.context_parallel(mesh, strategy="ring") as cp:
        # with gradients enabled, the driver would require a measured scale
        with torch.no_grad():
            batch = cp.shard({"input_ids": torch.arange(2 * options.ranks)[None]})

        def one_pass() -> float:
            with target.preserve_state():
                target.backward(batch, lambda logits: logits.float().sum())
            return cp.loss_scale()

        contestants = {"a pass": lambda: one_pass, "loss_scale": lambda: lambda: cp.loss_scale(target)}
        return compare(
            case, contestants, lambda factor: "" if factor >= 1 else f"factor {factor}", repeats=options.repeats
        )


if __name__ == "__main__":
    guard_processes()
    main()
