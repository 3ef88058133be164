"""Megatron-core on CPU ranks beside its own attention in one process, by our layouts and by its own."""

from functools import partial

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import small  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,  # noqa: E402
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from processes import run_on_ranks  # noqa: E402

import distattn as da  # noqa: E402
from distattn.adapters import megatron  # noqa: E402
from distattn.rows import IGNORE_INDEX  # noqa: E402


def start(tp: int = 1, pp: int = 1, cp: int = 1) -> None:
    # in this process of a rank only: it changes torch
    import megatron_on_cpu  # noqa: F401

    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp, create_gloo_process_groups=False)


def config_of(tp: int = 1, pp: int = 1, cp: int = 1, **changes) -> TransformerConfig:
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
    return TransformerConfig(**{**settings, **changes})


def build(config, spec=None, **changes) -> GPTModel:
    """Seeded; spec: distattn's with the kernel that computes everything, by default."""
    torch.manual_seed(0)
    spec = spec or megatron.use(get_gpt_layer_local_spec(normalization="RMSNorm"), kernel="reference")
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


def context_parallel(**settings) -> da.ContextParallel:
    everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
    how = dict(strategy="ring", layout="document_zigzag", layout_options={"min_chunk": 4}, kernel="reference")
    return da.ContextParallel(parallel_state.get_context_parallel_group(), loss_group=everyone, **{**how, **settings})


def _stock(rank: int, micro_batches: int, replicas: int, changes: dict):
    """Loss and gradients in one process with Megatron's own attention, one document at a time."""
    start()
    model = build(config_of(), get_gpt_layer_local_spec(normalization="RMSNorm"), **changes)
    total, valid = torch.zeros(()), 0
    for replica in range(replicas):
        for batch in small.step(replica, micro_batches):
            lengths = batch["document_lengths"]
            for ids, labels in zip(
                batch["input_ids"].split(lengths, 1), batch["labels"].split(lengths, 1), strict=True
            ):
                causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
                logits = model(ids, torch.arange(ids.shape[1])[None], causal)[0, :-1]
                total = total + F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum")
                valid += int((labels[0, 1:] != IGNORE_INDEX).sum())
    loss = total / valid
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def _gradients(rank: int, cp: int, distributed_optimizer: bool, per_token: bool, micro_batches: int, changes: dict):
    start(cp=cp)
    config = config_of(cp=cp, calculate_per_token_loss=per_token)
    model = megatron.with_layouts(build(config, **changes))
    chunk = wrapped(config, model, distributed_optimizer)
    chunks = megatron.Chunks([chunk], micro_batches)
    ours = context_parallel()
    factor = ours.loss_scale(chunks)
    chunk.zero_grad_buffer()
    parts = ours.shard_step(small.step(parallel_state.get_data_parallel_rank(), micro_batches))
    reports = schedule(chunk, config, parts)
    loss, tokens = (sum(report[name] for report in reports).double() for name in ("loss_sum", "tokens"))
    for number in (loss, tokens):
        dist.all_reduce(number)
    return factor, loss / tokens, [chunks._whole(parameter).clone() for parameter in model.parameters()]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("cp", [2, 4])
def test_gradients_are_those_of_megatrons_own_attention(cp, distributed_optimizer, per_token, micro_batches):
    changes = {"share_embeddings_and_output_weights": cp == 4}
    ((loss, wanted),) = run_on_ranks(1, _stock, micro_batches, 4 // cp, changes)
    arguments = cp, distributed_optimizer, per_token, micro_batches, changes
    for factor, got_loss, gradients in run_on_ranks(4, _gradients, *arguments):
        assert factor == (1 if per_token else 4 // cp * micro_batches)
        assert abs(got_loss - loss) < 1e-5
        assert abs(small.norm_ratio(gradients, wanted) - 1) < 1e-4
