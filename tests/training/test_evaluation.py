"""Evaluation inside training gives correct losses, and leaves the run bitwise equal to one without it."""

import pytest
import torch
from processes import run_on_ranks
from small import STEPS, build, micro_batch
from torch.distributed.device_mesh import init_device_mesh

import distattn as da
from distattn.adapters import huggingface, pytorch
from distattn.ir.errors import DistattnError
from distattn.training.evaluation import evaluate, evaluation_mode
from distattn.training.reporting.loss_by_position import LossByPosition

HELD_OUT = [[micro_batch([33, 7])], [micro_batch([5, 5, 21]), micro_batch([64])]]
TRAINED = [[micro_batch(lengths) for lengths in STEPS[number % 2]] for number in range(5)]


def alone(model):
    """Return (sum of losses, tokens) by position bucket, computed by plain transformers one document at a time."""
    sums = {}
    with huggingface.single_process_attention(model), torch.no_grad():
        for batch in (pack for step in HELD_OUT for pack in step):
            for ids in batch["input_ids"].split(batch["document_lengths"], 1):
                logits = model(ids, use_cache=False).logits[0, :-1]
                losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
                for position, loss in enumerate(losses.tolist()):
                    first = 0 if position == 0 else 1 << (position.bit_length() - 1)
                    total, count = sums.get(first, (0.0, 0))
                    sums[first] = total + loss, count + 1
    return sums


def _trained(rank, evaluated, settings):
    """Return losses and gradient norms of all steps, the tables of both evaluations, and the table from `alone`."""
    model = build(torch.float64, attention_dropout=0.0)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    wanted = alone(model)
    pytorch.shard_parameters(model, mesh)
    out, tables = [], []
    with pytorch.context_parallel(mesh, **settings) as cp:
        cp.loss_scale(pytorch.ProbeTarget(model))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sums = LossByPosition(64)
        model.model.layers[1].eval()
        for number, batches in enumerate(cp.steps(TRAINED)):
            losses = []
            for batch in batches:
                if evaluated and number in (0, 3):
                    # evaluate within a step, before FSDP2 has gradients
                    table = evaluate(cp, model, HELD_OUT, sums)
                    tables.append({bucket.first: (bucket.loss, bucket.tokens) for bucket in table.by_position})
                    modes = [module.training for module in (model, model.model.layers[0], model.model.layers[1].mlp)]
                    assert modes == [True, True, False]
                losses.append(pytorch.local_loss(model, batch))
                losses[-1].backward()
            norm = pytorch.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
            torch.manual_seed(number)
            if evaluated:
                evaluate(cp, model, HELD_OUT, sums)
            out.append((cp.mean_loss(losses), float(norm), float(torch.rand(1))))
    return out, tables, wanted


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "settings",
    [
        dict(strategy="ring", layout="zigzag"),
        dict(strategy="cad", data="per_rank", context_parallel_size=1, options=dict(block=8)),
    ],
    ids=["replicated", "per_rank"],
)
def test_evaluation_disturbs_nothing_and_finds_the_losses_of_one_process(settings):
    plain = run_on_ranks(2, _trained, False, settings)
    evaluated = run_on_ranks(2, _trained, True, settings)
    for (without, _, _), (curve, tables, wanted) in zip(plain, evaluated, strict=True):
        assert curve == without
        # with per-rank data, each of the two ranks evaluates these batches as its own
        copies = 1 if settings["strategy"] == "ring" else 2
        for first, (total, count) in wanted.items():
            loss, tokens = tables[0][first]
            assert tokens == copies * count and loss == pytest.approx(total / count, rel=1e-9)
        assert sum(tokens for _, tokens in tables[0].values()) == copies * sum(count for _, count in wanted.values())
        assert tables[-1][0][0] != tables[0][0][0]


def test_a_loader_without_labels_is_refused_and_modes_come_back_after_an_error():
    model = build(torch.float32)
    refused = pytest.raises(DistattnError, match="no token with a label; give it documents of at least two tokens")
    with da.ContextParallel(strategy="ring") as cp, refused:
        evaluate(cp, model, [micro_batch([1, 1])], LossByPosition(4))
    with pytest.raises(RuntimeError, match="fell over"), evaluation_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("fell over")
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
