"""A Megatron GPTModel on CPU ranks loads a Hugging Face model's weights, computes its logits, and exports the same
weights.
"""

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import model_shapes  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from processes import run_on_ranks  # noqa: E402
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config  # noqa: E402

from distattn.ir.errors import DistattnError  # noqa: E402
from distattn.models.build import materialise, meta_model  # noqa: E402
from distattn.models.megatron_names import (  # noqa: E402
    MegatronShard,
    check_megatron,
    to_huggingface,
    to_megatron,
)

SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    initializer_range=0.2,
    bos_token_id=None,
    eos_token_id=None,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
}


def weights(config: PretrainedConfig) -> torch.nn.Module:
    """Return a model whose norms and biases are not all ones and zeros."""
    model = meta_model(config)
    materialise(model, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def build(config: PretrainedConfig, tp: int, pp: int) -> GPTModel:
    settings = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=getattr(config, "head_dim", None),
        ffn_hidden_size=config.intermediate_size,
        layernorm_epsilon=config.rms_norm_eps,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=config.model_type == "qwen2",
        qk_layernorm=config.model_type == "qwen3",
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    return GPTModel(
        settings,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.model_type == "qwen3"),
        vocab_size=config.vocab_size,
        max_sequence_length=64,
        position_embedding_type="rope",
        parallel_output=False,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _logits(rank: int, name: str, tp: int, pp: int) -> torch.Tensor | None:
    """Return the last stage's logits, after converting the weights to Megatron's and back."""
    import megatron_on_cpu  # noqa: F401

    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    config = CONFIGS[name]()
    tensors = weights(config).state_dict()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    shard = MegatronShard.even(config, parallel_state.get_tensor_model_parallel_rank(), tp, stage, pp)
    model = build(config, tp, pp)
    converted = dict(to_megatron(tensors.__getitem__, config, shard))
    assert converted.keys() == dict(model.named_parameters()).keys()
    missing = model.load_state_dict(converted, strict=False)
    assert not missing.unexpected_keys and not [key for key in missing.missing_keys if "_extra_state" not in key]
    ids, positions = model_shapes.IDS, torch.arange(model_shapes.IDS.shape[1])[None]
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    if not shard.first:
        hidden = torch.empty(ids.shape[1], 1, config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    with torch.no_grad():
        out = model(ids, positions, mask)
    if not shard.last:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    parts = [None] * tp
    local = {key: parameter.detach() for key, parameter in model.named_parameters()}
    dist.all_gather_object(parts, local, group=parallel_state.get_tensor_model_parallel_group())
    for key, tensor in to_huggingface(parts, config, shard):
        assert torch.equal(tensor, tensors[key]), key
    return out if shard.last else None


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.sampled(5)
def test_a_gpt_model_computes_the_logits_of_transformers(name, tp, pp):
    wanted = model_shapes.logits(weights(CONFIGS[name]()))
    by_rank = [logits for logits in run_on_ranks(tp * pp, _logits, name, tp, pp) if logits is not None]
    assert len(by_rank) == tp
    for logits in by_rank:
        # float32 sums are computed in a different order
        assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_all_stages_together_give_every_tensor_back(name):
    config = CONFIGS[name]()
    tensors = weights(config).state_dict()
    got: dict[str, torch.Tensor] = {}
    for stage in range(2):
        shards = [MegatronShard.even(config, rank, 4, stage, 2) for rank in range(4)]
        parts = [dict(to_megatron(tensors.__getitem__, config, shard)) for shard in shards]
        got |= to_huggingface(parts, config, shards[0])
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    model_shapes.assert_equal(
        {key: got[key] for key in tensors if key not in tied}, {k: v for k, v in tensors.items() if k not in tied}
    )
    assert got.keys() == tensors.keys() - tied


def test_models_that_megatron_does_not_support_are_refused_by_name():
    for name in ("gemma", "gpt-oss", "qwen3-moe", "gpt2"):
        with pytest.raises(
            DistattnError, match=f"layout of {model_shapes.config(name).model_type} models is not known"
        ):
            check_megatron(model_shapes.config(name))
    with pytest.raises(DistattnError, match="attention_bias"):
        check_megatron(LlamaConfig(**SMALL, attention_bias=True))
    with pytest.raises(DistattnError, match="4 key/value heads cannot be divided evenly over 8"):
        check_megatron(LlamaConfig(**SMALL), 8)
    with pytest.raises(DistattnError, match="65 token ids cannot be divided evenly over 2"):
        check_megatron(LlamaConfig(**SMALL | {"vocab_size": 65}), 2)
    with pytest.raises(DistattnError, match="4 layers do not divide into 3 pipeline stages"):
        MegatronShard.even(LlamaConfig(**SMALL), pipeline_ranks=3)
    shard = MegatronShard.even(LlamaConfig(**SMALL), tensor_ranks=2)
    with pytest.raises(DistattnError, match="there are 1 parts, but the stage has 2"):
        dict(to_huggingface([{}], LlamaConfig(**SMALL), shard))
