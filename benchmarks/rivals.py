"""Ours, PyTorch's context_parallel and DeepSpeed's DistributedAttention in one run, on 4 gloo ranks on one machine.

    python benchmarks/rivals.py [--tokens 16384] [--ranks 4] [--repeats 5] [--out benchmarks/results/rivals.jsonl]

The benchmark times forward and backward of one attention call, in fp32 with 4 heads of 64; all contestants use
PyTorch's flash attention for CPU. Results are checked against plain attention in one process before anything is timed.
"wire" is the traffic on the loopback device during one call (and two barriers), "plan" the bytes according to our plan.
"planning" is the cost of a new batch before its first layer (plan, proof, program and agreement) on the same busy
cores; in a trainer it runs ahead on a thread.

PyTorch's public context_parallel only supports CUDA operators, so its ring loop (with all-gather and all-to-all
rotation) gets the CPU operators here. DeepSpeed leaves core attention to the user: here it processes documents one by
one. DeepSpeed is optional: pip install deepspeed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from harness import Cell, Contestant, Unsupported, compare, table, write
from process_guard import guard_processes
from torch import Tensor

import distattn as da
from distattn.ir.text_format import readable_bytes

HEADS, DIM, DOCUMENTS = 4, 64, 64
LAYOUTS = {"ring": "zigzag", "allgather": "zigzag", "ulysses": "contiguous", "usp": "zigzag"}
TOLERANCE = 2e-4


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append the cells to this file, as JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (arguments, f"file://{folder}/store", sys.argv), nprocs=arguments.ranks)


def _rank(rank: int, arguments: argparse.Namespace, store: str, argv: list[str]) -> None:
    sys.argv = argv
    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=arguments.ranks, timeout=timedelta(minutes=10)
    )
    cells: list[Cell] = []
    for case, lengths in cases(arguments.tokens).items():
        inputs = make_inputs(arguments.tokens)
        check = Checker(lengths, inputs, arguments.ranks)
        contestants = ours(lengths, inputs, balanced=len(lengths) > 1)
        contestants |= torch_rings(lengths, inputs) | {"deepspeed ulysses": deepspeed(lengths, inputs)}
        print_line = (lambda line: sys.stderr.write(line + "\n")) if rank == 0 else (lambda line: None)
        named = f"{case}, {arguments.tokens:,} tokens, {arguments.ranks} ranks"
        cells += compare(named, contestants, check, repeats=arguments.repeats, count=wire_bytes, progress=print_line)
    if rank == 0:
        for cell in cells:
            cell.facts = {"plan_bytes": None, "planning": ""} | cell.facts
        show = {"wire_bytes": readable_bytes, "plan_bytes": lambda size: "" if size is None else readable_bytes(size)}
        show["planning"] = str
        sys.stdout.write(table(cells, show) + "\n")
        if arguments.out:
            write(arguments.out, cells)
    dist.destroy_process_group()


def cases(tokens: int) -> dict[str, list[int]]:
    """Return document lengths, keyed by case: a single document, and a log-normal pack drawn with a fixed seed."""
    raw = np.random.default_rng(0).lognormal(0, 1.2, DOCUMENTS)
    pack = np.maximum(1, (raw * tokens / raw.sum()).astype(int))
    pack[pack.argmax()] += tokens - pack.sum()
    return {"causal": [tokens], f"pack of {DOCUMENTS} documents": pack.tolist()}


def make_inputs(tokens: int) -> list[Tensor]:
    """Return q, k, v and do (tokens, heads, dim) for the entire axis, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, HEADS, DIM, generator=generator) for _ in range(4)]


def wire_bytes() -> dict[str, int]:
    """Return the bytes that the loopback device has sent so far, read between two barriers of all ranks."""
    dist.barrier()
    lines = Path("/proc/net/dev").read_text().splitlines()
    sent = next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))
    dist.barrier()
    return {"wire_bytes": sent}


def by_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Compute causal attention for tensors (tokens, heads, dim), one document after another."""
    parts = []
    for document in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        heads_first = (x.transpose(0, 1)[None] for x in document)
        parts.append(F.scaled_dot_product_attention(*heads_first, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


class Checker:
    """A check that compares a rank's (tokens, o, dq, dk, dv) with plain attention in one process."""

    def __init__(self, lengths: list[int], inputs: list[Tensor], ranks: int):
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        o = by_document(q, k, v, lengths)
        o.backward(inputs[3])
        self.wanted = [o.detach(), q.grad, k.grad, v.grad]

    def __call__(self, result: tuple[Tensor, ...]) -> str:
        tokens, *got = result
        for name, a, b in zip(("o", "dq", "dk", "dv"), got, self.wanted, strict=True):
            error = float((a - b[tokens]).abs().max() / b.abs().max())
            if not error < TOLERANCE:
                return f"{name} is off by {error:.1e}"
        return ""


def ours(lengths: list[int], inputs: list[Tensor], balanced: bool) -> dict[str, Contestant]:
    """Return a contestant for each strategy, with the layout that suits it."""

    def contestant(strategy: str, name: str) -> Contestant:
        def make() -> Any:
            options = {"mask": da.Mask.documents(lengths)} if name == "balanced" else {}
            layout = getattr(da.Layout, name)(lengths, dist.get_world_size(), **options)
            shape: dict[str, Any] = dict(heads=HEADS, kv_heads=HEADS, head_dim=DIM, dtype="float32")
            if strategy == "usp":
                shape["options"] = {"ulysses": 2}
            began = time.perf_counter()
            plan = da.make_plan(da.Mask.documents(lengths), layout, strategy=strategy, **shape)
            ready, rank = da.prepare(plan), dist.get_rank()
            planning = time.perf_counter() - began
            tokens = torch.from_numpy(layout.tokens(rank))
            local = [layout.shard(x, rank) for x in inputs]

            def run() -> tuple[Tensor, ...]:
                q, k, v = (x.detach().requires_grad_() for x in local[:3])
                o = da.attention(q, k, v, ready)
                o.backward(local[3])
                return tokens, o.detach(), q.grad, k.grad, v.grad

            run.facts = {"plan_bytes": int(plan.bytes()["bytes"].sum()), "planning": f"{planning * 1e3:.1f} ms"}
            return run

        return make

    layouts = {strategy: "balanced" if balanced and name == "zigzag" else name for strategy, name in LAYOUTS.items()}
    return {f"distattn {strategy}, {name}": contestant(strategy, name) for strategy, name in layouts.items()}


def torch_rings(lengths: list[int], inputs: list[Tensor]) -> dict[str, Contestant]:
    """Return contestants for PyTorch's context_parallel: its public API, and its ring loop with each rotation."""
    return {
        "torch context_parallel": lambda: _torch_public(lengths, inputs),
        "torch ring loop, all-gather": lambda: _torch_loop(lengths, inputs, "allgather"),
        "torch ring loop, all-to-all": lambda: _torch_loop(lengths, inputs, "alltoall"),
    }


def _torch_public(lengths: list[int], inputs: list[Tensor]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    if len(lengths) > 1:
        raise Unsupported("causal over the whole axis only, no documents")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in inputs[:3])
    with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]):
        try:
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
        except Exception as error:
            raise Unsupported(f"on CPU tensors: {type(error).__name__}: {str(error).splitlines()[0][:90]}") from None
    raise Unsupported("runs on CPU tensors without communicating")


def _torch_loop(lengths: list[int], inputs: list[Tensor], rotation: str) -> Any:
    from torch.distributed.tensor.experimental._context_parallel import _attention as cp

    if len(lengths) > 1:
        raise Unsupported("causal over the whole axis only, no documents")
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def backward_op(grad_out, query, key, value, out, logsumexp, is_causal):  # noqa: ANN001, ANN202
        return backward(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):  # noqa: ANN001, ANN205
            out, lse = loop.forward(q, k, v)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, do):  # noqa: ANN001, ANN205
            return loop.backward(do, *ctx.saved_tensors)

    class loop:
        @staticmethod
        def forward(q, k, v):  # noqa: ANN001, ANN205
            group = dist.group.WORLD
            return cp._templated_ring_attention(group, 2, forward, query=q, key=k, value=v, is_causal=True)[:2]

        @staticmethod
        def backward(do, q, k, v, out, lse):  # noqa: ANN001, ANN205
            tensors = dict(query=q, key=k, value=v, out=out, logsumexp=lse, is_causal=True)
            group = dist.group.WORLD
            return cp._templated_ring_attention_backward(group, 2, backward_op, do, "grad_out", **tensors)[:3]

    # PyTorch's head-tail load balancing is our zigzag layout
    layout = da.Layout.zigzag(lengths, dist.get_world_size())
    rank = dist.get_rank()
    tokens = torch.from_numpy(layout.tokens(rank))
    local = [layout.shard(x, rank).transpose(0, 1)[None].contiguous() for x in inputs]

    def run() -> tuple[Tensor, ...]:
        cp.set_rotate_method(rotation)
        q, k, v = (x.detach().requires_grad_() for x in local[:3])
        o = Ring.apply(q, k, v)
        o.backward(local[3])
        return tokens, *(x[0].transpose(0, 1) for x in (o.detach(), q.grad, k.grad, v.grad))

    return run


def deepspeed(lengths: list[int], inputs: list[Tensor]) -> Contestant:
    """Return a contestant for DeepSpeed's Ulysses, whose core attention processes documents one by one."""

    def make() -> Any:
        try:
            import deepspeed.comm
            from deepspeed.sequence.layer import DistributedAttention
        except ImportError as error:
            raise Unsupported(f"not installed ({error})") from None
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_backend="gloo", verbose=False)

        class Core(torch.nn.Module):
            def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return by_document(*(x.squeeze(1) for x in (q, k, v)), lengths)[:, None]

        attention = DistributedAttention(Core(), dist.group.WORLD, scatter_idx=2, gather_idx=0)
        layout = da.Layout.contiguous(lengths, dist.get_world_size())
        rank = dist.get_rank()
        tokens = torch.from_numpy(layout.tokens(rank))
        local = [layout.shard(x, rank)[:, None].contiguous() for x in inputs]

        def run() -> tuple[Tensor, ...]:
            q, k, v = (x.detach().requires_grad_() for x in local[:3])
            o = attention(q, k, v, 1)
            o.backward(local[3])
            return tokens, *(x[:, 0] for x in (o.detach(), q.grad, k.grad, v.grad))

        return run

    return make


if __name__ == "__main__":
    guard_processes()
    main()
