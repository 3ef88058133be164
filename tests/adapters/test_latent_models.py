"""transformers' models with latent attention, in expanded and latent form, compared to a single process."""

import hybrid_models
import pytest
import torch
from hybrid_models import LATENT, batch_of, double_precision, in_one_process, worst
from processes import run_on_ranks, sum_gradients

import distattn as da
from distattn.adapters import huggingface
from distattn.adapters.huggingface_latent import MODELS
from distattn.adapters.pytorch import local_loss

PACK = [17, 1, 22]
CASES = {
    2: [
        (name, strategy, by_latents)
        for name in LATENT
        for strategy, by_latents in (("allgather", False), ("ring", True))
    ],
    4: [
        ("deepseek_v3", "allgather", True),
        ("deepseek_v3", "ulysses", False),
        ("deepseek_v3", "ulysses", True),
        ("glm4_moe_lite", "ring", True),
    ],
}


def _split(rank: int, cases: list) -> list:
    results = []
    for name, strategy, by_latents in cases:
        model = hybrid_models.build(name)
        if by_latents:
            huggingface.attend_by_latents(model)
        with double_precision(), da.ContextParallel(strategy=strategy, layout="zigzag", kernel="reference") as cp:
            part = cp.shard(batch_of(PACK))
            loss = local_loss(model, part)
            loss.backward()
            shapes = [shape for shape, _ in cp.planner.registered_shapes()]
        sum_gradients(model)
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        results.append(
            (total, [parameter.grad for parameter in model.parameters()], [shape.op.kind for shape in shapes])
        )
    return results


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranks", CASES)
def test_loss_and_gradients_match_one_process(ranks):
    results = run_on_ranks(ranks, _split, CASES[ranks])[-1]
    for case, (total, gradients, ops) in zip(CASES[ranks], results, strict=True):
        model = hybrid_models.build(case[0])
        with double_precision():
            loss, wanted = in_one_process(model, batch_of(PACK))
        error = max(float(abs(total - loss) / loss), worst(gradients, wanted))
        assert error < 1e-10, f"{case}: {error}"
        assert ("latent_attention" in ops) == case[2], ops


def test_every_supported_model_is_tested():
    folders = {type(hybrid_models.config(name)).__module__.split(".")[2] for name in LATENT}
    assert folders == set(MODELS)


def test_whole_batches_are_computed_alone_in_between():
    model = hybrid_models.build("deepseek_v3").eval()
    whole = batch_of([9])["input_ids"]
    huggingface.attend_by_latents(model)
    sharded = da.ContextParallel(strategy="ring", kernel="reference").shard(batch_of([9]))
    for _ in range(2):
        got = model(**huggingface.inputs(sharded)).logits
        with huggingface.single_process_attention(model):
            assert (model(whole).logits - got).abs().max() < 1e-5
            assert model.generate(whole, max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_models_without_latents_or_plain_weights_are_refused():
    with pytest.raises(da.DistattnError, match="Qwen3NextForCausalLM has no latent attention"):
        huggingface.attend_by_latents(hybrid_models.build("qwen3_next"))
    model = hybrid_models.build("deepseek_v3")
    attention = model.get_decoder().layers[1].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)
    with pytest.raises(da.DistattnError, match="is a Sequential, not a plain linear layer"):
        huggingface.attend_by_latents(model)
