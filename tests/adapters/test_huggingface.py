"""transformers models with every kind of attention: several ranks match a single process, or are refused."""

import copy
import subprocess
import sys

import pytest
import torch
from one_process import loss_by_document
from processes import run_on_ranks, sum_gradients
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GPTNeoConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    MptConfig,
    Qwen3Config,
)

import distattn as da
from distattn.adapters import huggingface
from distattn.adapters.pytorch import local_loss

pytestmark = pytest.mark.sampled(4)

TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    # large enough that caps, sinks and windows matter
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
)
BOTH = ["sliding_attention", "full_attention"]
MODELS = {
    "llama": LlamaConfig(**TINY),
    "qwen3": Qwen3Config(**TINY),
    "qwen3 with windows": Qwen3Config(**TINY, use_sliding_window=True, sliding_window=5, layer_types=BOTH),
    "mistral": MistralConfig(**TINY, sliding_window=6),
    "gemma2": Gemma2Config(**TINY, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(**TINY, sliding_window=5, query_pre_attn_scalar=8, layer_types=BOTH),
    "gpt-oss": GptOssConfig(**TINY, sliding_window=5, num_local_experts=4, num_experts_per_tok=2, layer_types=BOTH),
}
LENGTHS = [17, 1, 22]


def build(name: str) -> torch.nn.Module:
    """Return a seeded float64 model, with random sinks for gpt-oss."""
    huggingface.register()
    torch.manual_seed(0)
    # transformers' grouped experts do not support float64
    experts = {"experts_implementation": "eager"} if name == "gpt-oss" else {}
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="distattn", **experts)
    return model.to(torch.float64)


def token_ids() -> torch.Tensor:
    return torch.randint(0, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def plain(model: torch.nn.Module) -> torch.Tensor:
    """Compute the loss in one process with transformers' own attention, one document at a time."""
    with huggingface.single_process_attention(model):
        whole = {"input_ids": token_ids(), "document_lengths": LENGTHS}
        return loss_by_document(lambda ids: model(ids, use_cache=False).logits[0], [whole])


def _split(rank: int, name: str, layers: dict | None):
    model = build(name)
    cp = da.ContextParallel(strategy="ring", layout="document_zigzag", kernel="reference", layers=layers)
    batch = cp.shard({"input_ids": token_ids(), "document_lengths": LENGTHS})
    loss = local_loss(model, batch)
    loss.backward()
    sum_gradients(model)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total, [p.grad for p in model.parameters()]


HYBRID = {"window": dict(strategy="allgather", layout="contiguous"), "full": dict(strategy="ulysses", backward="keep")}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("ranks", "layers"), [(2, HYBRID), (4, None)], ids=["2, layers differ", "4"])
def test_loss_and_gradients_match_one_process(name, ranks, layers):
    model = build(name)
    loss = plain(model)
    loss.backward()
    # transformers computes norms in fp32, and also the softmax where it has no SDPA
    for total, gradients in run_on_ranks(ranks, _split, name, layers):
        assert abs(total - loss) < 1e-6
        for got, parameter in zip(gradients, model.parameters(), strict=True):
            if parameter.grad is not None:
                assert (got - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max() + 1e-9


def test_two_models_in_one_process_and_one_of_them_for_evaluation():
    ours, other = build("gemma3"), build("llama")
    cp = da.ContextParallel(strategy="ring", kernel="reference")
    batch = cp.shard({"input_ids": token_ids(), "document_lengths": LENGTHS})
    for model in (ours, other, ours):
        got = model(**huggingface.inputs(batch)).logits
        with huggingface.single_process_attention(model):
            whole = [model(ids, use_cache=False).logits for ids in token_ids().split(LENGTHS, 1)]
            assert model.generate(token_ids()[:, :5], max_new_tokens=3, do_sample=False).shape == (1, 8)
        assert (got - torch.cat(whole, 1)).abs().max() < 1e-5
    with pytest.raises(da.DistattnError, match="needs the sharded batch"):
        ours(token_ids())


def test_the_adapter_refuses_by_name_what_it_would_get_wrong():
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    sharded = da.ContextParallel(strategy="ring").shard({"input_ids": torch.zeros(1, 3, dtype=torch.int64)})
    sharded = sharded["context_parallel"]
    module = torch.nn.Module()
    module.layer_idx = 7

    def call(mask, q=q, k=k, **kwargs):
        return huggingface.attention_forward(module, q, k, k, mask, **kwargs)

    for kwargs, sentence in (
        (dict(mask=None), "layer 7: .* needs the sharded batch"),
        (dict(mask=None, dropout=0.1), "dropout 0.1"),
        (dict(mask=None, position_bias=q), "position bias"),
        (dict(mask=huggingface.MaskPattern(4)), "masks all but 4 tokens"),
        (dict(mask=None, softcap=30.0), "soft-capping"),
        (dict(mask=torch.zeros(1, 1, 3, 3)), "attention mask"),
        (dict(mask=None, is_causal=False), "not causal"),
        (dict(mask=None, q=q[:, :, :1]), "3 keys for 1 queries: generation"),
        (dict(mask=None, q=q.expand(2, -1, -1, -1), k=k.expand(2, -1, -1, -1)), "has one row"),
    ):
        how = {} if "needs" in sentence else {"context_parallel": sharded}
        with pytest.raises(da.DistattnError, match=sentence):
            call(**kwargs, **how)
    with pytest.raises(da.DistattnError, match="padding mask"):
        huggingface.mask_pattern(attention_mask=torch.tensor([[1, 1, 0]]))
    module.is_causal = False
    with pytest.raises(da.DistattnError, match="not causal"):
        call(None, context_parallel=sharded)


def test_positions_that_a_model_makes_itself_are_refused():
    model = build("llama")
    batch = da.ContextParallel(strategy="ring").shard({"input_ids": token_ids(), "document_lengths": LENGTHS})
    inputs = huggingface.inputs(batch)
    model(**{**inputs, "position_ids": batch["position_ids"].clone()})
    for wrong in (None, torch.arange(sum(LENGTHS))[None]):
        with pytest.raises(da.DistattnError, match="counts positions itself"):
            model(**{**inputs, "position_ids": wrong})


CHUNKED = dict(attention_chunk_size=2, num_local_experts=1, layer_types=["chunked_attention"] * 2)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LlamaConfig(**TINY, is_causal=False), "a mask other than causal"),
        (lambda: Llama4TextConfig(**TINY, **CHUNKED), "layer 0 is a chunked_attention layer"),
        (lambda: MiniMaxConfig(**TINY, layer_types=["full_attention", "linear_attention"]), "linear_attention layer"),
        (lambda: LlamaConfig(**TINY, rope_parameters=MROPE), "multimodal RoPE"),
        (lambda: LlamaConfig(**TINY, rope_parameters=DYNAMIC), "dynamic RoPE"),
        (lambda: LlamaConfig(**TINY, attention_dropout=0.1), "dropout 0.1"),
    ],
    ids=["bidirectional", "chunks", "linear attention", "mrope", "dynamic rope", "dropout"],
)
def test_models_that_would_be_wrong_are_refused(make, sentence):
    huggingface.register()
    model = AutoModelForCausalLM.from_config(make(), attn_implementation="distattn")
    batch = da.ContextParallel(strategy="ring").shard({"input_ids": torch.arange(8)[None]})
    with pytest.raises(da.DistattnError, match=sentence):
        model.train()(**huggingface.inputs(batch))


def test_a_model_without_attention_is_refused():
    huggingface.register()
    shape = dict(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(MambaConfig(**shape))
    batch = da.ContextParallel(strategy="ring").shard({"input_ids": torch.arange(8)[None]})
    with pytest.raises(da.DistattnError, match="selective scan of Mamba-1"):
        local_loss(model, batch)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4),
        MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4, max_seq_len=64),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_works_on_its_mask_is_refused(config):
    huggingface.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="distattn")
    batch = da.ContextParallel(strategy="ring").shard({"input_ids": torch.arange(8)[None]})
    with pytest.raises(da.DistattnError, match="compute with their mask"):
        model(batch["input_ids"], use_cache=False)


MASK = huggingface.MaskPattern(None)


@pytest.mark.parametrize(
    "use",
    [
        lambda: MASK.to(torch.bool),
        lambda: MASK.masked_fill,
        lambda: MASK.shape,
        lambda: MASK[:, :, :3],
        lambda: MASK + torch.zeros(2),
        lambda: torch.zeros(2) + MASK,
        lambda: 1.0 - MASK,
        lambda: ~MASK,
        lambda: MASK == 0,
        lambda: MASK < 1,
        lambda: torch.where(MASK, 0, 1),
        lambda: torch.zeros(2).masked_fill(MASK, 1),
        lambda: len(MASK),
        lambda: MASK and 1,
        lambda: torch.zeros(2)[MASK],
    ],
)
def test_a_mask_that_is_used_as_a_tensor_is_refused(use):
    with pytest.raises(da.DistattnError, match="compute with their mask"):
        use()


def test_a_mask_pattern_is_no_tensor_and_no_tuple():
    assert not isinstance(MASK, tuple) and not hasattr(MASK, "anything_else") and {MASK: 1}[MASK] == 1
    assert copy.deepcopy(huggingface.MaskPattern(3)).window == 3


OWN_CLASSES = [
    FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
    GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4),
    GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
]


@pytest.mark.parametrize("config", OWN_CLASSES, ids=lambda config: config.model_type)
def test_models_with_attention_classes_of_their_own_are_refused(config):
    huggingface.register()
    with pytest.raises(da.DistattnError, match=f"{config.model_type} models .* do not use .* attention interface"):
        AutoModelForCausalLM.from_config(config, attn_implementation="distattn")
    assert AutoModelForCausalLM.from_config(config, attn_implementation="eager").config.model_type == config.model_type


FIRST_IMPORTED_BEFORE = """
import sys
from transformers import AutoModelForCausalLM, FalconConfig, GPTJConfig
import distattn as da
from distattn.adapters import huggingface
falcon, gptj = "transformers.models.falcon.modeling_falcon", "transformers.models.gptj.modeling_gptj"
__import__(falcon)
huggingface.register()
huggingface.register()
assert falcon in sys.modules and gptj not in sys.modules
for config in (FalconConfig(num_hidden_layers=1), GPTJConfig(n_layer=1)):
    try:
        AutoModelForCausalLM.from_config(config, attn_implementation="distattn")
    except da.DistattnError as refusal:
        print(refusal)
"""


@pytest.mark.full
def test_models_refuse_whether_they_are_imported_before_or_after():
    done = subprocess.run([sys.executable, "-c", FIRST_IMPORTED_BEFORE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["falcon", "gptj"]


def test_layers_that_do_not_exist_are_refused():
    model = build("llama")
    cp = da.ContextParallel(strategy="ring", layers={1: {"strategy": "allgather"}, 7: {"strategy": "ulysses"}})
    with pytest.raises(da.DistattnError, match="no attention layer of that number") as refusal:
        local_loss(model, cp.shard({"input_ids": token_ids()}))
    assert "layer 7" in str(refusal.value)


def test_sinks_soft_caps_and_windows_reach_the_call():
    cp = da.ContextParallel(strategy="ring", kernel="reference")
    sharded = cp.shard({"input_ids": torch.arange(7)[None], "document_lengths": [4, 3]})["context_parallel"]
    q, k, v = (torch.randn(1, heads, 7, 8) for heads in (4, 2, 2))
    sink = torch.randn(4)
    how = dict(scaling=0.5, softcap=2.0, s_aux=sink, sliding_window=2, context_parallel=sharded)
    got, _ = huggingface.attention_forward(torch.nn.Identity(), q, k, v, huggingface.MaskPattern(2), **how)
    plan = sharded.plan(4, 2, 8, 8, "float32", 2)
    assert plan.call.mask == da.Mask.documents([4, 3], (1, 0))
    parts = (x[0].transpose(0, 1) for x in (q, k, v))
    wanted = da.attention(*parts, plan, scale=0.5, softcap=2.0, sink=sink, kernel="reference")
    assert torch.equal(got[0], wanted)


def _checkpointed(rank: int, checkpointed: bool):
    model = build("gemma3").train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    cp = da.ContextParallel(strategy="ring", kernel="reference", layers=HYBRID)
    local_loss(model, cp.shard({"input_ids": token_ids(), "document_lengths": LENGTHS})).backward()
    return [p.grad for p in model.parameters()]


def test_activation_checkpointing_changes_nothing():
    for got, wanted in zip(run_on_ranks(2, _checkpointed, True), run_on_ranks(2, _checkpointed, False), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
