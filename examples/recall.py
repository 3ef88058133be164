"""Associative recall with a hybrid model (arXiv 2312.04927): python examples/recall.py [--ratio 3], or torchrun for more ranks.

A document has pairs of keys and values, then the same keys reordered, with values as labels. Every step has new documents.
"""

import argparse
import os

import torch
import torch.distributed as dist
from hybrid_model import Hybrid
from torch.optim.lr_scheduler import LambdaLR

import distattn as da
from distattn.adapters import pytorch

DOCUMENTS, PAIRS, SYMBOLS = 16, 16, 32


def documents(generator: torch.Generator) -> dict[str, torch.Tensor]:
    keys, order = (torch.rand(DOCUMENTS, n, generator=generator).argsort(1)[:, :PAIRS] for n in (SYMBOLS, PAIRS))
    pairs = torch.stack([keys, torch.randint(SYMBOLS, 2 * SYMBOLS, keys.shape, generator=generator)], -1)
    asked = pairs.gather(1, order[..., None].expand(-1, -1, 2))
    ids = torch.cat([pairs, asked], 1).flatten(1)
    labels = torch.full_like(ids, -100)
    labels[:, 2 * PAIRS + 1 :: 2] = asked[..., 1]
    return {"input_ids": ids, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("ratio", 3), ("layers", 4), ("steps", 400), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    options, recalled = parser.parse_args(), []
    generator = torch.Generator().manual_seed(options.seed + 1)
    torch.manual_seed(options.seed)
    model = Hybrid(options.ratio, options.layers, 2 * SYMBOLS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - 0.9 * step / options.steps))
    with da.ContextParallel(strategy="ring") as cp:
        for step in range(options.steps):
            batch = cp.shard(documents(generator))
            logits = model(batch["input_ids"], batch["context_parallel"])
            (loss := pytorch.loss_of(logits, batch)).backward()
            for parameter in model.parameters() if dist.is_initialized() else ():
                dist.all_reduce(parameter.grad)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            hits = (logits.argmax(-1) == batch["labels"]).sum() * batch["loss_scale"]
            recalled, mean = [*recalled[-19:], cp.mean_loss([hits])], cp.mean_loss([loss])
            if cp.rank == 0:
                print(f"step {step + 1} loss {mean:.12f} recall {sum(recalled) / len(recalled):.3f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
