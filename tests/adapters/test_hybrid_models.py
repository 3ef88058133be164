"""transformers' hybrid models: several ranks match a single process that computes one document at a time."""

import copy
import sys
from contextlib import AbstractContextManager, nullcontext

import hybrid_models
import pytest
import torch
from hybrid_models import RECURRENT, batch_of, double_precision, in_one_process, worst
from processes import run_on_ranks, sum_gradients
from transformers import AutoModelForCausalLM, FalconMambaConfig, JambaConfig, MambaConfig

import distattn as da
from distattn.adapters import huggingface, huggingface_recurrent
from distattn.adapters.huggingface_recurrent import MODELS
from distattn.adapters.pytorch import local_loss

PACK = [17, 1, 22]
# one model per kind of layer: Gated DeltaNet, KDA with latent attention, Mamba-2 in a hybrid, Mamba-2 alone, short
# convolutions
KINDS = ["qwen3_next", "kimi_linear", "nemotron_h", "mamba2", "lfm2"]
CASES = {
    2: [(name, PACK, dict(layout="zigzag")) for name in RECURRENT],
    1: [(name, PACK, dict(layout="zigzag")) for name in KINDS],
    4: [
        *((name, PACK, dict(layout="contiguous")) for name in KINDS),
        *((name, PACK, dict(layout="balanced")) for name in KINDS),
        # packs of three tokens, which leave some ranks without tokens and are padded
        *((name, [2, 1], dict(layout="zigzag", pad_to=8)) for name in KINDS),
    ],
}


def _precision(dtype: torch.dtype) -> AbstractContextManager[None]:
    return double_precision() if dtype == torch.float64 else nullcontext()


def _split(rank: int, cases: list, dtype: torch.dtype) -> list:
    results = []
    for name, lengths, how in cases:
        model = hybrid_models.build(name, dtype)
        with _precision(dtype), da.ContextParallel(strategy="ring", kernel="reference", **how) as cp:
            loss = local_loss(model, cp.shard(batch_of(lengths)))
            loss.backward()
        sum_gradients(model)
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        results.append((total, [parameter.grad for parameter in model.parameters()]))
    return results


def _check(ranks: int, cases: list, dtype: torch.dtype, tolerance: float) -> None:
    results = run_on_ranks(ranks, _split, cases, dtype)[-1]
    for (name, lengths, how), (total, gradients) in zip(cases, results, strict=True):
        model = hybrid_models.build(name, dtype)
        with _precision(dtype):
            loss, wanted = in_one_process(model, batch_of(lengths))
        error = max(float(abs(total - loss) / loss), worst(gradients, wanted))
        assert error < tolerance, f"{name} {lengths} {how}: {error}"


@pytest.mark.sampled(8)
@pytest.mark.parametrize("ranks", CASES)
def test_loss_and_gradients_match_one_process(ranks):
    _check(ranks, CASES[ranks], torch.float64, 1e-10)


def test_loss_and_gradients_in_float32():
    _check(2, [(name, PACK, dict(layout="zigzag")) for name in KINDS], torch.float32, 2e-5)


def test_bfloat16_errors_are_at_most_twice_those_of_one_process():
    results = run_on_ranks(2, _split, [(name, PACK, dict(layout="zigzag")) for name in KINDS], torch.bfloat16)[-1]
    for name, (_, gradients) in zip(KINDS, results, strict=True):
        model = hybrid_models.build(name, torch.bfloat16)
        _, rounded = in_one_process(copy.deepcopy(model), batch_of(PACK))
        _, wanted = in_one_process(model.float(), batch_of(PACK))
        ours, theirs = (_distance(some, wanted) for some in (gradients, rounded))
        assert ours < 2 * theirs, f"{name}: {ours}, one process {theirs}"


def _distance(gradients: list, wanted: list) -> float:
    pairs = zip(gradients, wanted, strict=True)
    return sum(float((a.float() - b).square().sum()) for a, b in pairs if b is not None) ** 0.5


def test_every_supported_model_is_tested():
    folders = {type(hybrid_models.config(name)).__module__.split(".")[2] for name in RECURRENT}
    assert folders == set(MODELS)


def test_the_same_model_computes_whole_batches_alone():
    model = hybrid_models.build("qwen3_next").eval()
    whole = batch_of([9])["input_ids"]
    sharded = da.ContextParallel(strategy="ring", kernel="reference").shard(batch_of([9]))
    got = model(**huggingface.inputs(sharded)).logits
    with huggingface.single_process_attention(model):
        assert (model(whole).logits - got).abs().max() < 1e-5
        assert model.generate(whole, max_new_tokens=3, do_sample=False).shape == (1, 12)
    with pytest.raises(da.DistattnError, match="keep no cache"):
        model(**huggingface.inputs(sharded) | {"use_cache": True})


def test_an_older_transformers_is_refused(monkeypatch):
    config = hybrid_models.config("lfm2")
    huggingface.check_config(config)
    monkeypatch.setattr(huggingface_recurrent.transformers, "__version__", "5.22.1")
    with pytest.raises(da.DistattnError, match=r"layer 0 is a conv layer.* needs transformers 5.23, and 5.22.1"):
        huggingface.check_config(config)


def test_a_layer_that_does_not_ask_for_its_plan_is_noticed(monkeypatch):
    model = hybrid_models.build("lfm2")
    module = sys.modules[type(model).__module__]
    planned = module.causal_conv1d_fn.__wrapped__
    # imitate a version of transformers with a different name for the function
    monkeypatch.setattr(module, "causal_conv1d_fn", lambda *args, context_parallel, **named: planned(*args, **named))
    cp = da.ContextParallel(strategy="ring", kernel="reference")
    with pytest.raises(da.DistattnError, match="the conv layers of Lfm2ForCausalLM did not ask for their plans"):
        local_loss(model, cp.shard(batch_of(PACK)))


def _checkpointed(rank: int, checkpointed: bool) -> list:
    # run all forward passes first, so that all models and their batches exist at the same time
    cp = da.ContextParallel(strategy="ring", kernel="reference")
    models = [hybrid_models.build(name) for name in ("qwen3_next", "mamba2", "mamba2")]
    losses = []
    for model, lengths in zip(models, (PACK, PACK, [9, 20]), strict=True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        losses.append(local_loss(model, cp.shard(batch_of(lengths))))
    for loss in losses:
        loss.backward()
    return [parameter.grad for model in models for parameter in model.parameters()]


def test_activation_checkpointing_and_other_models_change_nothing():
    for got, wanted in zip(run_on_ranks(2, _checkpointed, True), run_on_ranks(2, _checkpointed, False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_mamba_1_and_masks_beside_a_batch_are_refused():
    cp = da.ContextParallel(strategy="ring", kernel="reference")
    inputs = huggingface.inputs(cp.shard(batch_of(PACK)))
    huggingface.register()
    for kind in (MambaConfig, FalconMambaConfig):
        config = kind(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
        model = AutoModelForCausalLM.from_config(config)
        named = rf"scan of Mamba-1.* models of bailing_hybrid,.* not of {config.model_type}\."
        with pytest.raises(da.DistattnError, match=named):
            model(**inputs)
        model(inputs["input_ids"])
    with pytest.raises(da.DistattnError, match="selective scan of Mamba-1.* not of jamba"):
        huggingface.check_config(JambaConfig(num_hidden_layers=2))
    with pytest.raises(da.DistattnError, match="a padding mask was passed"):
        hybrid_models.build("mamba2")(**inputs, attention_mask=torch.ones(1, sum(PACK)))
