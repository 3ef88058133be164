"""Your own model in your own training loop: torchrun --nproc-per-node 4 examples/own_model.py [--data per_rank]"""

import torch
import torch.distributed as dist
from packs import DEVICE, arguments, settings, steps
from torch import nn

import distattn as da
from distattn.adapters import pytorch

HEADS, WIDTH = 4, 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, context_parallel: da.ContextParallel) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x[0])).view(-1, 3, HEADS, WIDTH // HEADS).unbind(1)
        x = x + self.out(context_parallel.attention(q, k, v).flatten(1))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(1024, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, input_ids, position_ids, context_parallel) -> torch.Tensor:  # noqa: ANN001
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, context_parallel)
        return self.lm_head(x)


def main() -> None:
    options = arguments()
    dist.init_process_group()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(GPT().to(DEVICE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with da.ContextParallel(**settings(options.data, dist.get_world_size())) as cp:
        cp.loss_scale(pytorch.ProbeTarget(model))
        for number, batches in enumerate(cp.steps(steps(options.steps, cp))):
            losses = [pytorch.local_loss(model, batch) for batch in batches]
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = cp.mean_loss(losses)
            if dist.get_rank() == 0:
                print(f"step {number + 1} loss {mean:.12f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
