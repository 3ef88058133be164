"""RoPE whose frequencies depend on the length: loss and gradients match a single process that has the whole pack, at
every step.
"""

import copy
import re

import pytest
import small
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_on_ranks, sum_gradients
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import distattn as da
from distattn.adapters import huggingface, pytorch
from distattn.models.build import materialise, meta_model

ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 16,
    },
}
# steps whose longest document is longer than, shorter than or as long as max_position_embeddings (16), in mixed order
STEPS = [[30, 8], [10, 3, 3], [5, 45], [20, 7], [16, 12], [17]]


def _plain(kind: str) -> torch.nn.Module:
    return small.build(rope_parameters=ROPES[kind], max_position_embeddings=16)


def _model(kind: str) -> torch.nn.Module:
    model = _plain(kind)
    huggingface.scale_rope_by_pack(model)
    return model


def _whole_pack(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run plain transformers in a single process: one call for the pack, a mask between documents, positions that
    restart in each document.
    """
    lengths, ids = batch["document_lengths"], batch["input_ids"]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    mask = torch.where(seen, 0.0, -torch.inf).double()[None, None]
    with huggingface.single_process_attention(model):
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    goes_on = (document[1:] == document[:-1]).nonzero().flatten()
    loss = F.cross_entropy(logits[goes_on], ids[0, goes_on + 1])
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def _differences(rank: int, kind: str, layout: str) -> list[float]:
    """Return, for each step, the largest difference in loss or gradients between a reused model and a new one."""
    new, model, differences = _plain(kind), _model(kind), []
    batches = [small.micro_batch(lengths) for lengths in STEPS]
    with da.ContextParallel(dist.group.WORLD, strategy="ring", layout=layout, kernel="reference") as cp:
        cp.loss_scale(pytorch.ProbeTarget(model, reduce=lambda: sum_gradients(model)))
        for batch, (local,) in zip(batches, cp.steps([[batch_] for batch_ in batches]), strict=True):
            loss = pytorch.local_loss(model, local)
            loss.backward()
            sum_gradients(model)
            wanted, gradients = _whole_pack(copy.deepcopy(new), batch)
            differs = [abs(cp.mean_loss([loss.detach()]) - float(wanted))]
            differs += [
                float((parameter.grad - gradient).abs().max())
                for parameter, gradient in zip(model.parameters(), gradients, strict=True)
            ]
            differences.append(max(differs))
            model.zero_grad()
    return differences


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize(("ranks", "layout"), [(1, "zigzag"), (2, "document_zigzag"), (4, "zigzag"), (4, "contiguous")])
def test_loss_and_gradients_match_one_process_over_steps_of_different_lengths(kind, ranks, layout):
    for differences in run_on_ranks(ranks, _differences, kind, layout):
        # cosines are computed from float32 frequencies, which are bitwise equal on both sides
        assert max(differences) < 1e-12, differences


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_follow_the_pack_and_not_this_rank_s_tokens(kind):
    """Show why this scaling is needed: otherwise the frequencies would depend on each rank's own positions."""
    model, plain = _model(kind), _plain(kind)
    batch = da.ContextParallel(strategy="ring", kernel="reference").shard(small.micro_batch([40, 4]))
    logits = model(**huggingface.inputs(batch)).logits
    batch["context_parallel"].longest_document = 80
    longer = model(**huggingface.inputs(batch)).logits
    # longrope has only two sets of frequencies
    assert torch.equal(logits, longer) == (kind == "longrope")
    sentence = f"{kind} RoPE, whose frequencies .* Call huggingface.scale_rope_by_pack"
    with pytest.raises(da.DistattnError, match=sentence):
        plain(**huggingface.inputs(batch))


def test_a_model_of_the_meta_device_is_ready():
    config = small.build(rope_parameters=ROPES["dynamic"], max_position_embeddings=16).config
    model = meta_model(config, dtype=torch.float64)
    materialise(model, 1)
    batch = small.micro_batch([40, 4])
    local = da.ContextParallel(strategy="ring", kernel="reference").shard(batch)
    wanted, _ = _whole_pack(copy.deepcopy(model), batch)
    assert float(pytorch.local_loss(model, local)) == pytest.approx(float(wanted), rel=1e-12)


def test_bytes_are_counted_where_positions_have_no_values_and_a_batch_that_knows_no_length_is_refused():
    config = small.build(rope_parameters=ROPES["dynamic"], max_position_embeddings=16).config
    model = meta_model(config)
    positions = torch.arange(8, device="meta")[None]
    cos, _ = model.model.rotary_emb(torch.zeros(1, device="meta"), position_ids=positions)
    assert cos.is_meta and cos.shape == (1, 8, 8)
    local = da.ContextParallel(strategy="ring", kernel="reference").shard(small.micro_batch([40, 4]))
    local["context_parallel"].longest_document = 0
    with pytest.raises(da.DistattnError, match="the longest document of the pack is unknown"):
        model(**huggingface.inputs(local))


def test_scaling_in_some_kinds_of_layers_only_is_refused():
    ropes = {"full_attention": ROPES["dynamic"], "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=ropes,
    )
    with pytest.raises(da.DistattnError, match=re.escape("dynamic RoPE in some kinds of layers only")):
        huggingface.check_config(config)


def test_a_model_without_modules_that_rotate_is_refused():
    model = AutoModelForCausalLM.from_config(small.build(rope_parameters=ROPES["dynamic"]).config)
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(da.DistattnError, match="no module that computes it"):
        huggingface.scale_rope_by_pack(model)
