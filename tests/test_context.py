"""What trainers touch: sharded batches, the Hugging Face adapter, and equal losses on any number of ranks."""

import pytest
import torch
from processes import run_on_ranks
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, MistralConfig

import distattn as da
from distattn import programs
from distattn.adapters import huggingface
from distattn.config import Config, ModelConfig
from distattn.layout import LAYOUTS
from distattn.parallel.make_plan import STRATEGIES
from distattn.rows import IGNORE_INDEX
from distattn.train import build_model, local_loss, sum_gradients

TINY = dict(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
IDS = torch.tensor([[1, 2, 3]])


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 256, (1, sum(lengths)), generator=generator), "document_lengths": lengths}


def test_one_rank_gets_the_whole_axis_with_restarting_positions_and_shifted_labels():
    cp = da.ContextParallel(strategy="ring")
    local = cp.shard({"input_ids": torch.tensor([[5, 6, 7, 8]]), "document_lengths": [3, 1]})
    assert local["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert local["position_ids"].tolist() == [[0, 1, 2, 0]]
    assert local["labels"].tolist() == [[6, 7, IGNORE_INDEX, IGNORE_INDEX]]
    assert local["loss_scale"] == 0.5


def test_rows_of_a_batch_are_documents_and_given_labels_count():
    cp = da.ContextParallel(strategy="ring")
    ids = torch.arange(6).reshape(2, 3)
    labels = torch.where(ids == 1, IGNORE_INDEX, ids)
    local = cp.shard({"input_ids": ids, "labels": labels})
    assert local["labels"].tolist() == [[IGNORE_INDEX, 2, IGNORE_INDEX, 4, 5, IGNORE_INDEX]]
    assert local["loss_scale"] == 1 / 3


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: da.ContextParallel(strategy="star"), "strategy 'star'"),
        (
            lambda: da.ContextParallel(strategy="ring", layout="spiral"),
            "layout 'spiral' does not exist; there are contiguous",
        ),
        (lambda: da.ContextParallel(strategy="ring").shard({"input_ids": torch.zeros(4)}), "batch, tokens"),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": torch.zeros(1, 4), "document_lengths": [3]}
            ),
            "add up to 3 tokens, input_ids has 4",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": torch.zeros(1, 4), "document_lengths": [1.5, 2.5]}
            ),
            "whole numbers",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard(
                {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0]])}
            ),
            "attention_mask marks padding",
        ),
        (
            lambda: da.ContextParallel(strategy="ring").shard({"input_ids": IDS, "position_ids": IDS}),
            "batch has position_ids",
        ),
        (lambda: da.ContextParallel(strategy="ring", kernel="bogus"), "kernel 'bogus'"),
        (lambda: da.ContextParallel(strategy="ring", backward="bogus"), "policy 'bogus'"),
        (lambda: da.ContextParallel(strategy="ring", inner="bogus"), "inner is"),
        (
            lambda: da.ContextParallel(strategy="ring", layout_options={"min_chunk": 4}),
            "layout zigzag has no option 'min_chunk'",
        ),
    ],
)
def test_bad_batches_and_names_are_refused(make, sentence):
    with pytest.raises(da.DistattnError, match=sentence):
        make()


def test_equal_batches_share_a_plan():
    cp = da.ContextParallel(strategy="ring")
    shape = (4, 2, 8, 8, "float32")
    first, second, other = (cp.shard(batch(lengths))["context_parallel"] for lengths in ([4, 2], [4, 2], [3, 3]))
    assert first.plan(*shape) is second.plan(*shape) is not other.plan(*shape)


CONFIG = Config(model=ModelConfig(layers=2, width=32, heads=4, kv_heads=2, mlp=64, dtype="float64"))


def _gradients(rank: int, strategy: str, layout: str, lengths: list[int]):
    cp = da.ContextParallel(strategy=strategy, layout=layout)
    model = build_model(CONFIG, "distattn")
    local = cp.shard(batch(lengths))
    loss = local_loss(model, local)
    loss.backward()
    parameters = list(model.parameters())
    sum_gradients(parameters)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total, [parameter.grad for parameter in parameters]


def _plain(lengths: list[int]):
    """One process, one document at a time, transformers' own attention."""
    model = build_model(CONFIG, "sdpa")
    whole = batch(lengths)["input_ids"]
    valid, total = sum(lengths) - len(lengths), 0.0
    for ids in whole.split(lengths, 1):
        logits = model(ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / valid
        loss.backward()
        total += loss.detach()
    return total, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("lengths", [[40, 1, 23, 9], [2]], ids=["pack", "fewer tokens than ranks"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_and_every_gradient_equal_plain_transformers(strategy, lengths):
    loss, gradients = _plain(lengths)
    for layout in LAYOUTS:
        for got, got_gradients in run_on_ranks(4, _gradients, strategy, layout, lengths):
            # the model's norms compute in fp32: a last bit may flip between shapes
            assert abs(got - loss) < 1e-9
            for a, b in zip(got_gradients, gradients, strict=True):
                assert (a - b).abs().max() < 1e-8


def test_the_adapter_refuses_by_name_what_it_would_get_wrong():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    sharded = da.ContextParallel(strategy="ring").shard(batch([3]))["context_parallel"]
    module = torch.nn.Module()

    def call(*arguments, **kwargs):
        return huggingface.attention_forward(module, q, k, k, *arguments, **kwargs)

    for kwargs, sentence in (
        (dict(), "needs the sharded batch"),
        (dict(context_parallel=sharded, dropout=0.1), "dropout 0.1"),
        (dict(context_parallel=sharded, sliding_window=4), "a sliding window"),
        (dict(context_parallel=sharded, softcap=30.0), "soft-capping"),
    ):
        with pytest.raises(da.DistattnError, match=sentence):
            call(None, **kwargs)
    with pytest.raises(da.DistattnError, match="attention mask"):
        call(torch.zeros(1, 1, 3, 3), context_parallel=sharded)
    with pytest.raises(da.DistattnError, match="padding mask"):
        huggingface.no_mask(attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(da.DistattnError, match="not causal"):
        call(None, context_parallel=sharded, is_causal=False)
    module.is_causal = False
    with pytest.raises(da.DistattnError, match="not causal"):
        call(None, context_parallel=sharded)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LlamaConfig(**TINY, is_causal=False), "a mask other than causal"),
        (lambda: MistralConfig(**TINY, sliding_window=2), "local attention of 2 tokens"),
        (
            lambda: Llama4TextConfig(
                **TINY, attention_chunk_size=2, num_local_experts=1, layer_types=["chunked_attention"]
            ),
            "local",
        ),
    ],
    ids=["bidirectional", "window", "chunks"],
)
def test_models_that_want_another_mask_are_refused(make, sentence):
    huggingface.register()
    model = AutoModelForCausalLM.from_config(make(), attn_implementation="distattn")
    local = da.ContextParallel(strategy="ring").shard(batch([5, 3]))
    arguments = {name: local[name] for name in ("input_ids", "position_ids", "context_parallel")}
    with pytest.raises(da.DistattnError, match=sentence):
        model(**arguments, use_cache=False)


def test_the_adapter_passes_sinks_and_soft_caps_on():
    lengths = [4, 3]
    cp = da.ContextParallel(strategy="ring", kernel="reference")
    sharded = cp.shard({"input_ids": torch.arange(7)[None], "document_lengths": lengths})["context_parallel"]
    q, k, v = (torch.randn(1, heads, 7, 8) for heads in (4, 2, 2))
    sink = torch.randn(4)
    got, _ = huggingface.attention_forward(
        torch.nn.Identity(), q, k, v, None, scaling=0.5, softcap=2.0, s_aux=sink, context_parallel=sharded
    )
    plan = sharded.plan(4, 2, 8, 8, "float32")
    parts = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    wanted = da.attention(*parts, plan, scale=0.5, softcap=2.0, sink=sink, kernel="reference")
    assert torch.equal(got[0], wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_follows_the_batch(layout):
    cp = da.ContextParallel(strategy="ring", layout=layout, inner=(2, 0))
    for lengths in ([4, 2], [9], [1, 1, 5]):
        sharded = cp.shard(batch(lengths))["context_parallel"]
        assert sharded.plan(4, 2, 8, 8, "float32").call.mask == da.Mask.documents(lengths, (2, 0))


def test_programs_for_known_shapes_are_made_ahead():
    cp = da.ContextParallel(strategy="ring")

    def layer(lengths):
        sharded = cp.shard(batch(lengths))["context_parallel"]
        made = {need: future.result() for need, future in sharded._plans.items()}
        q, k, v = (torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2))
        sharded.attention(q, k, v)
        (ready,) = sharded._prepared.values()
        return made, ready

    assert layer([4, 2])[0] == {}
    made, ready = layer([3, 3])
    (plan,) = made.values()
    # the layer used the very program that the thread had made
    assert ready.lowered.program is next(iter(programs._PROGRAMS[plan].values()))
