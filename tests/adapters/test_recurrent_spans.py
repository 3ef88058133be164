"""Spans of recurrent layers of transformers' models, computed on contiguous slices: loss and gradients match a single
process.
"""

from dataclasses import replace

import hybrid_models
import pytest
import torch
from hybrid_models import batch_of, double_precision, in_one_process, worst
from processes import run_on_ranks, sum_gradients

import distattn as da
from distattn.adapters import huggingface, huggingface_spans
from distattn.adapters.huggingface_spans import find_spans, recurrence_shape
from distattn.adapters.pytorch import local_loss
from distattn.cluster.spec import ClusterSpec, Link, load
from distattn.ir.op import op_of

PACK = [11, 1, 12]
_LINEAR, _FULL = "linear_attention", "full_attention"
_TYPES = [_LINEAR, _LINEAR, _FULL, _LINEAR]
_FOUR = dict(num_hidden_layers=4, layer_types=_TYPES)
MODELS = {
    "qwen3_next": _FOUR,
    "nemotron_h": dict(num_hidden_layers=6, layers_block_type=[_LINEAR, "mlp", "moe", _LINEAR, _FULL, "mlp"]),
    # this model's layers return tuples
    "bamba": dict(num_hidden_layers=3, attn_layer_indices=[2]),
    "qwen3_5_text": _FOUR,
    "qwen3_5_moe_text": _FOUR,
    "olmo_hybrid": _FOUR,
    "granitemoehybrid": _FOUR,
    "kimi_linear": _FOUR | dict(mlp_layer_types=["dense", "sparse", "dense", "sparse"]),
    "bailing_hybrid": _FOUR,
}
CHOSEN = ["qwen3_next", "nemotron_h", "bamba"]


def _cluster(ranks: int) -> ClusterSpec:
    """Return a cluster with links so slow that sending the states of many segments takes longer than moving all tokens
    twice.
    """
    return replace(load(f"h100-1x{ranks}"), intra_node=Link(0.001, 10.0))


def _split(rank: int, names: list, pad_to: int, cluster: ClusterSpec | None) -> list:
    """Return (loss, gradients) of checkpointed models. cluster: where moving rows must pay off; None: always move."""
    results = []
    if cluster is None:
        huggingface_spans.recurrent_span = lambda batch, *args, **named: da.RecurrentSpan(batch, "contiguous")
    for name in names:
        model = hybrid_models.build(name, **MODELS[name])
        model.gradient_checkpointing_enable()
        assert huggingface.relayout_recurrent_spans(model)
        settings = dict(layout="block_cyclic", layout_options={"block": 2}, pad_to=pad_to)
        cp = da.ContextParallel(strategy="ring", kernel="reference", cluster=cluster, **settings)
        with double_precision(), cp:
            batch = cp.shard(batch_of(PACK))
            loss = local_loss(model, batch)
            loss.backward()
        sum_gradients(model)
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        local = batch["context_parallel"]
        if cluster is not None:
            assert any(local.relaid_spans.values()), name
        asked = {shape.layout for shape, _ in local.planner.registered_shapes() if shape.op.is_recurrent}
        assert "contiguous" in asked, name
        results.append((total, [parameter.grad for parameter in model.parameters()]))
    return results


@pytest.mark.sampled(20)
@pytest.mark.parametrize("ranks, pad_to, chosen", [(2, 8, True), (4, 1, True), (2, 1, False)])
def test_loss_and_gradients_match_one_process(ranks, pad_to, chosen):
    names = [name for name in MODELS if (name in CHOSEN) == chosen]
    results = run_on_ranks(ranks, _split, names, pad_to, _cluster(ranks) if chosen else None)[-1]
    for name, (total, gradients) in zip(names, results, strict=True):
        model = hybrid_models.build(name, **MODELS[name])
        with double_precision():
            loss, wanted = in_one_process(model, batch_of(PACK))
        error = max(float(abs(total - loss) / loss), worst(gradients, wanted))
        assert error < 1e-10, f"{name}: {error}"


def _forward(model: torch.nn.Module, **asked: bool) -> tuple:
    """Run a forward pass on one rank. Return its local batch and the settings of each call of recurrent_span."""
    cp, choices = da.ContextParallel(strategy="ring", kernel="reference"), []
    batch = cp.shard(batch_of(PACK))

    def choose(batch, op, **settings):
        choices.append(settings | dict(op=op))
        return da.RecurrentSpan(batch, "contiguous")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_spans, "recurrent_span", choose)
        model(**huggingface.inputs(batch), **asked)
    return batch["context_parallel"], choices


@pytest.mark.parametrize("name", MODELS)
def test_the_choice_uses_the_shape_that_layers_request(name):
    model = hybrid_models.build(name, **MODELS[name])
    huggingface.relayout_recurrent_spans(model)
    local, choices = _forward(model)
    assert [choice["layers"] for choice in choices] == [
        sum(model.config.layer_types[number] == _LINEAR for number in span)
        for span in find_spans(model.config.layer_types)
    ]
    (asked,) = (shape for shape, _ in local.planner.registered_shapes() if shape.op.is_recurrent)
    shape = recurrence_shape(model.config)
    assert asked.op == op_of(shape["op"]) and asked.layout == "contiguous"
    assert all(getattr(asked, name) == shape[name] for name in ("heads", "kv_heads", "head_dim", "v_head_dim"))
    # row moves are cached in the batch
    cpu = torch.device("cpu")
    assert local.row_moves("contiguous", cpu) is local.row_moves("contiguous", cpu)
    assert choices[0]["width"] == 32 and asked.dtype == str(choices[0]["dtype"])[6:]


def test_rows_stay_where_hooks_cannot_see_what_becomes_of_them():
    model = hybrid_models.build("qwen3_next", **MODELS["qwen3_next"])
    handles = huggingface.relayout_recurrent_spans(model)
    assert len(_forward(model)[1]) == 2
    for name in ("output_hidden_states", "output_router_logits"):
        assert not _forward(model, **{name: True})[1]
    # without a batch nothing is moved
    with huggingface.single_process_attention(model):
        model(batch_of([9])["input_ids"])
    model.config.output_router_logits = True
    assert not _forward(model)[1]
    model.config.output_router_logits = False

    # layers that read other per-token tensors are refused, because the order of those tensors is unknown
    def give_more(layer, args, named):
        return args, named | {"image_mask": torch.ones(1, 24)}

    for layer in model.get_decoder().layers:
        handles.append(layer.register_forward_pre_hook(give_more, with_kwargs=True, prepend=True))
    assert not _forward(model)[1]
    for handle in handles:
        handle.remove()
    assert not _forward(model)[1]


def test_models_without_such_runs_are_left_alone():
    # in turn: attention next to each recurrence, only convolutions, embeddings passed to all layers, only attention
    for name in ("falcon_h1", "lfm2", "zamba2", "qwen3_moe"):
        assert not huggingface.relayout_recurrent_spans(hybrid_models.build(name)), name


def test_runs_reach_from_a_recurrent_layer_to_the_last_before_one_that_attends():
    m, f, a = _LINEAR, "mlp", _FULL
    assert find_spans([m, m, a, f, m, f, m, f, a, m]) == [range(2), range(4, 7), range(9, 10)]
    assert find_spans([a, f, "conv"]) == find_spans([]) == []
