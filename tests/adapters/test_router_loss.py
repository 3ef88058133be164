"""Mixture-of-experts models on several ranks: their router loss equals that of a single process with all tokens."""

import sys

import hybrid_models
import pytest
import torch
import torch.nn.functional as F
from hybrid_models import EXPERTS, batch_of, double_precision, worst
from processes import run_on_ranks, sum_gradients
from torch.distributed.device_mesh import init_device_mesh
from transformers import DogeConfig

import distattn as da
from distattn.adapters import huggingface, pytorch
from distattn.memory.tiled_loss import TiledLoss

# the weight of the router loss relative to the token losses, large so that errors show
WEIGHT = 0.7
# document lengths by replica and micro-batch; one replica has fewer micro-batches
STEPS = [[[17, 1, 22], [9]], [[12, 4]]]
CASES = [(name, None) for name in EXPERTS] + [("mixtral", TiledLoss(tile_tokens=8))]


def build(name: str) -> torch.nn.Module:
    asked = {} if name == "glm4_moe" else dict(output_router_logits=True, router_aux_loss_coef=WEIGHT)
    return hybrid_models.build(name, **asked)


def _split(rank: int, replicas: int, ranks: int, cases: list) -> list:
    mesh = init_device_mesh("cpu", (replicas, ranks), mesh_dim_names=("dp", "cp"))
    results = []
    for name, tiled in cases:
        model = build(name)
        with double_precision(), pytorch.context_parallel(mesh, strategy="ring", kernel="reference", pad_to=8) as cp:
            step = [batch_of(lengths) for lengths in STEPS[rank // ranks]]
            losses = [pytorch.local_loss(model, batch, tiled) for batch in cp.shard_step(step)]
            torch.stack(losses).sum().backward()
        sum_gradients(model)
        results.append((cp.mean_loss(losses), [parameter.grad for parameter in model.parameters()]))
    return results


def in_one_process(model: torch.nn.Module, replicas: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute token losses over all labels of all replicas, and transformers' router loss for each round of
    micro-batches.
    """
    router = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    rounds, labels = [], []
    with huggingface.single_process_attention(model):
        for index in range(2):
            tokens, logits = [], []
            packs = [STEPS[replica][index] for replica in range(replicas) if index < len(STEPS[replica])]
            for batch in map(batch_of, packs):
                for ids in batch["input_ids"].split(batch["document_lengths"], 1):
                    out = model(ids, use_cache=False)
                    tokens.append(F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="sum"))
                    logits.append(getattr(out, "router_logits", None))
            labels.append(sum(sum(lengths) - len(lengths) for lengths in packs))
            extra = 0.0
            if logits[0] is not None:
                of_layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
                extra = WEIGHT * router(of_layers, model.num_experts, model.num_experts_per_tok)
            rounds.append((torch.stack(tokens).sum(), extra))
    loss = sum(tokens + number * extra for (tokens, extra), number in zip(rounds, labels, strict=True)) / sum(labels)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(("replicas", "ranks"), [(1, 2), (2, 2)])
def test_loss_and_gradients_match_one_process(replicas, ranks):
    cases = CASES if replicas == 1 else CASES[1:2]
    results = run_on_ranks(replicas * ranks, _split, replicas, ranks, cases)[-1]
    for (name, _), (total, gradients) in zip(cases, results, strict=True):
        model = build(name)
        with double_precision():
            loss, wanted = in_one_process(model, replicas)
        error = max(abs(total - float(loss)) / float(loss), worst(gradients, wanted))
        assert error < 1e-10, f"{name}: {error}"


def test_a_router_loss_of_another_kind_is_refused():
    with pytest.raises(da.DistattnError, match="router loss of doge models"):
        huggingface.check_config(DogeConfig(output_router_logits=True))
    model = build("mixtral")
    del model.router_aux_loss_coef
    batch = da.ContextParallel(strategy="ring", kernel="reference").shard(batch_of([9]))
    with pytest.raises(da.DistattnError, match="MixtralForCausalLM is not computed.* no router_aux_loss_coef"):
        pytorch.local_loss(model, batch)


def test_logits_alone_are_refused_for_training():
    model = build("mixtral")
    batch = da.ContextParallel(strategy="ring", kernel="reference").shard(batch_of([9]))
    with pytest.raises(da.DistattnError, match="MixtralForCausalLM has a router loss.*call pytorch.local_loss"):
        pytorch.forward(model, batch)
    with torch.no_grad():
        assert torch.equal(pytorch.forward(model, batch), pytorch.logits_of(model, batch))
