"""Small Megatron-core models for CPU ranks, wrapped and scheduled as in Megatron's own training."""

from functools import partial

import small
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

import distattn as da
from distattn.adapters import megatron


def start(tp: int = 1, pp: int = 1, cp: int = 1) -> None:
    # import it only in rank processes, since the import patches torch
    import megatron_on_cpu  # noqa: F401

    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp, create_gloo_process_groups=False)


def config_of(tp: int = 1, pp: int = 1, cp: int = 1, of: type = TransformerConfig, **changes) -> TransformerConfig:
    settings = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        init_method_std=0.2,
        finalize_model_grads_func=finalize_model_grads,
    )
    return of(**{**settings, **changes})


def build(config, spec=None, **changes) -> GPTModel:
    """Return a seeded model. spec: by default distattn's layer spec with the reference kernel."""
    torch.manual_seed(0)
    spec = spec or megatron.replace_core_attention(
        get_gpt_layer_local_spec(normalization="RMSNorm"), kernel="reference"
    )
    settings = dict(
        vocab_size=small.VOCABULARY,
        max_sequence_length=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    return GPTModel(config, spec, **{**settings, **changes})


def wrapped(config, model, distributed_optimizer: bool):
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
    return DistributedDataParallel(config, ddp, model)


def schedule(chunk, config, batches, forward_only: bool = False) -> list[dict]:
    step = partial(megatron.forward_step, config=config)
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[chunk],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def context_parallel(shared: bool = False, **settings) -> da.ContextParallel:
    """Return a driver. shared: data-parallel replicas share attention, separately for each tensor-parallel index."""
    all_ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if shared:
        size = parallel_state.get_context_parallel_world_size()
        return da.ContextParallel(all_ranks, context_parallel_size=size, **small.CAD, kernel="reference", **settings)
    how = dict(strategy="ring", layout="document_zigzag", layout_options={"min_chunk": 4}, kernel="reference")
    return da.ContextParallel(parallel_state.get_context_parallel_group(), loss_group=all_ranks, **{**how, **settings})


class SequenceNorm(torch.nn.Module):
    """A norm for sequence parallelism, which Megatron-core lacks without Apex and Transformer Engine."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(hidden_size)), eps
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def sequence_parallel_spec():
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SequenceNorm
    block = TransformerBlockSubmodules(layer_specs=[layer, layer], layer_norm=SequenceNorm)
    return megatron.replace_core_attention(block, kernel="reference")
