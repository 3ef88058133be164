"""Packs that differ by rank, a small model, and the results of a single process."""

import torch
import torch.distributed as dist
from one_process import loss_by_document
from torch.nn.utils import parameters_to_vector

import distattn as da
from distattn.adapters.pytorch import local_loss
from distattn.training.config.run_file import Config, ModelConfig
from distattn.training.config.run_settings import build_model, configured_model

# the document lengths of each micro-batch, by rank and step. Ranks have unequal numbers of documents and steps
PACKS = [
    [[[150], [40, 9]], [[7, 7, 100]], [[64]]],
    [[[1] * 20 + [30], [3, 60], [33]], [[128]]],
    [[[17, 5]], [[90, 3], [12, 12]]],
    [[[2, 2, 2]], [[200]], [[31], [5]]],
    [[[25, 60]]],
    [[[99]], [[1]]],
    [[[40, 41, 42]], [[10], [10], [10]]],
    [[[8] * 9]],
]
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, dtype="float64"
)


def documents(rank, step, number):
    lengths = PACKS[rank][step][number]
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + number)
    return {"input_ids": torch.randint(0, 256, (1, sum(lengths)), generator=generator), "document_lengths": lengths}


def loader(rank):
    for step, micro_batches in enumerate(PACKS[rank]):
        yield [documents(rank, step, number) for number in range(len(micro_batches))]


def model_of(attention="distattn", dtype="float64"):
    config = Config(model=ModelConfig(**{**MODEL.__dict__, "dtype": dtype}))
    return build_model(config, configured_model(config, 256, 4096), attention)


def whole_run(ranks, dtype="float64"):
    """Compute the losses and gradients of every step with plain transformers in one process, one document at a time."""
    model = model_of("sdpa", dtype)
    out = []
    for step in range(max(len(PACKS[rank]) for rank in range(ranks))):
        batches = [
            documents(r, step, n) for r in range(ranks) if step < len(PACKS[r]) for n in range(len(PACKS[r][step]))
        ]
        loss = loss_by_document(lambda ids: model(ids).logits[0].double(), batches)
        loss.backward()
        out.append((float(loss.detach()), parameters_to_vector([p.grad for p in model.parameters()])))
        model.zero_grad()
    return out


def trained(model, micro_batches, group=None):
    """Run one step over the ranks of the group. Return (loss, gradients)."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        loss = local_loss(model, batch)
        loss.backward()
        total += loss.detach()
    gradient = parameters_to_vector([p.grad for p in model.parameters()])
    for part in (total, gradient):
        dist.all_reduce(part, group=group)
    model.zero_grad()
    return float(total), gradient


def shared(**settings):
    """Return a driver for ranks that share attention while each loads its own documents."""
    return da.ContextParallel(settings.pop("group", None), **{"strategy": "cad", "data": "per_rank", **settings})
