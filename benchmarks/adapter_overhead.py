"""The overhead of adapters, without kernels and transfers: microseconds per layer, and the share of a tiny model's step.

    python benchmarks/adapter_overhead.py

A single process runs, so nothing is transferred, and the kernel returns immediately. Each layer call is a forward and a
backward pass. Adapters are compared with the bare operators on tensors in the operators' own layout. "short" has 64
tokens, so only host time counts; "long" has 2,048, the tokens per rank of configs/tiny.toml, so copies count, too. The
goals are 200 microseconds per layer and 2 % of a step.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Cell, compare, table, write
from host_time import InstantKernel

import distattn as da
from distattn.adapters import huggingface
from distattn.adapters.pytorch import local_loss
from distattn.batch.planner import AttentionShape
from distattn.training.config import run_file as configuration
from distattn.training.config.run_settings import build_model, configured_model

ROOT = Path(__file__).parents[1]
AIM_LAYER, AIM_STEP = 200, 0.02
# calls per timing: enough to make the cost of reading the clock negligible
CALLS = 50


class Instant(da.ContextParallel):
    """Context parallelism whose attention kernel returns immediately."""

    def watch(self, batch: Any, plan: Any, shape: Any) -> Any:
        return InstantWatch()


class InstantWatch:
    """A pass observer that replaces the kernel. See `distattn.ops.executable.PassObserver`."""

    alternates = False

    def prepares(self) -> None: ...

    def begins(self, direction: str, score: Any) -> None: ...

    def kernel(self, kernel: Any) -> Any:
        return InstantKernel


def main() -> None:
    """Print the table. With --out, also append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        config = configuration.load(str(ROOT / "configs/tiny.toml"))
        cells: list[Cell] = []
        layers = {}
        for name, tokens in {"short": 64, "long": arguments.tokens}.items():
            cells += of_layer(
                f"{name}: a layer of {tokens} tokens, forward and backward", tokens, config, arguments.repeats
            )
            medians = {cell.contestant: cell.median or 0.0 for cell in cells[-3:]}
            layers[name] = medians["transformers"] - medians["operators"]
        sys.stdout.write(table(cells) + "\n\n")
        sys.stdout.write(f"transformers beyond the operators: {layers['short'] * 1e6:.0f} us a short layer, ")
        sys.stdout.write(f"{layers['long'] * 1e6:.0f} us a long one (aim {AIM_LAYER})\n")
        sys.stdout.write(f"a step of the tiny model on {arguments.tokens} tokens, other documents every time:\n")
        steps = {}
        for name, ahead in {"sharded when needed": False, "sharded a step ahead": True}.items():
            step, shard, planned = of_step(config, arguments.tokens, ahead)
            share = (layers["long"] * config.model.num_layers + shard + planned) / step
            steps[name] = dict(step=step, shard=shard, planned=planned, share=share)
            sys.stdout.write(
                f"  {name}: {step * 1e3:.0f} ms; sharding {shard * 1e3:.1f} ms, waiting for plan and proof "
            )
            sys.stdout.write(
                f"{planned * 1e3:.1f} ms; with {config.model.num_layers} layers {share:.2%} (aim {AIM_STEP:.0%})\n"
            )
        if arguments.out:
            write(arguments.out, cells, layer_seconds=layers, steps=steps)
        dist.destroy_process_group()


def of_layer(case: str, tokens: int, config: Any, repeats: int) -> list[Cell]:
    """Time the operators and the adapters on the same inputs. Return one cell for each."""
    shape = config.model
    heads, kv_heads, dim = (
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.hidden_size // shape.num_attention_heads,
    )
    cp = Instant(dist.group.WORLD, strategy="ring", kernel="cpu")
    batch = cp.shard({"input_ids": torch.zeros(1, tokens, dtype=torch.int64)})["context_parallel"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, number, dim, generator=generator) for number in (heads, kv_heads, kv_heads))

    def operators():  # noqa: ANN202
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        ready = batch.executable(AttentionShape.of(*inputs), torch.device("cpu"))

        def call() -> torch.Tensor:
            o, _, _ = torch.ops.distattn.forward(*inputs, None, None, ready.handle, ready.kept_elements, dim**-0.5, 0.0)
            torch.autograd.grad(o, inputs, o.detach())
            return o

        return repeated(call)

    def transformers():  # noqa: ANN202
        # models pass (1, heads, tokens, dim), a view of (1, tokens, heads, dim)
        inputs = [x.clone()[None].requires_grad_() for x in (q, k, v)]
        module = torch.nn.Module()
        module.layer_idx = 0
        mask = huggingface.MaskPattern(None)

        def call() -> torch.Tensor:
            by_token = (x.transpose(1, 2) for x in inputs)
            o, _ = huggingface.attention_forward(module, *by_token, mask, scaling=dim**-0.5, context_parallel=batch)
            torch.autograd.grad(o, inputs, o.detach())
            return o[0]

        return repeated(call)

    def megatron():  # noqa: ANN202
        core = megatron_core(shape, batch)
        inputs = [x.clone()[:, None].requires_grad_() for x in (q, k, v)]

        def call() -> torch.Tensor:
            o = core(*inputs, None)
            torch.autograd.grad(o, inputs, o.detach())
            return o.view(tokens, heads, dim)

        return repeated(call)

    contestants = {"operators": operators, "transformers": transformers}
    if importlib.util.find_spec("megatron") is not None:
        contestants["megatron-core"] = megatron
    # check only the shape, because the tests check the adapters' results
    check = lambda o: "" if o.shape == q.shape else "another result"  # noqa: E731
    return compare(case, contestants, check, repeats=repeats, warmup=3)


def repeated(call: Any) -> Any:
    """Return a function that makes CALLS calls and returns the last result."""

    def calls() -> Any:
        for _ in range(CALLS):
            result = call()
        return result.detach()

    calls.calls = CALLS
    return calls


def megatron_core(shape: Any, batch: Any) -> Any:
    """Return our core attention module for Megatron."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from distattn.adapters.megatron import CoreAttention
    from distattn.adapters.megatron_batches import MegatronBatches

    sizes = dict(
        num_layers=1,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
    )
    config = TransformerConfig(**sizes, attention_dropout=0.0)
    groups = ProcessGroupCollection(cp=dist.group.WORLD, tp=dist.group.WORLD)
    batches = MegatronBatches({"strategy": "ring", "kernel": "cpu"})
    batches.batch = lambda *args: batch
    return CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups, batches=batches)


def of_step(config: Any, tokens: int, ahead: bool) -> tuple[float, float, float]:
    """Return the median seconds of (a step of the tiny model, sharding its batch, waiting for its plan and program).

    A step is the forward pass with the loss and the backward pass, without the optimizer. Every step has different documents.
    ahead: True to shard every batch one step ahead.
    """
    model = build_model(config, configured_model(config, 256, 4096), huggingface.NAME)
    cp = da.ContextParallel(dist.group.WORLD, strategy="ring", kernel="cpu")
    shape = config.model
    asked = AttentionShape(
        shape.num_attention_heads,
        shape.num_key_value_heads,
        *(shape.hidden_size // shape.num_attention_heads,) * 2,
        "float32",
    )
    rows = []
    batches = (documents(tokens, number) for number in itertools.count())
    following = cp.shard(next(batches))
    for _ in range(12):
        began = time.perf_counter()
        sharded_batch = cp.shard(next(batches))
        batch, following = (following, sharded_batch) if ahead else (sharded_batch, None)
        sharded = time.perf_counter()
        batch["context_parallel"].executable(asked, torch.device("cpu"))
        ready = time.perf_counter()
        local_loss(model, batch).backward()
        rows.append((time.perf_counter() - began, sharded - began, ready - sharded))
    # leave out the first steps, which warm up
    step, shard, planned = (statistics.median(column) for column in zip(*rows[3:], strict=True))
    return step, shard, planned


def documents(tokens: int, seed: int) -> dict[str, Any]:
    """Return a pack of five documents of random lengths."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(seed))[:4].sort().values + 1
    lengths = torch.diff(cuts, prepend=torch.zeros(1), append=torch.tensor([float(tokens)])).int().tolist()
    return {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), "document_lengths": lengths}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
