"""Megatron-core: tensor, pipeline, context and data parallelism, with its distributed optimizer.

The layers are Megatron's, without Transformer Engine. Core attention is distattn's. `models.megatron_names` has the
supported models.
"""

# T tokens on this rank

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distattn.adapters import megatron, pytorch
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError
from distattn.models.megatron_names import MegatronShard, check_megatron, to_huggingface, to_megatron
from distattn.models.shards import shard_rows
from distattn.training.config.checks import NO_GPU_FOR_MEGATRON
from distattn.training.config.plan_settings import attention_config
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import build_model, configured_model
from distattn.training.engines.engine import (
    MASTER_WEIGHT,
    WEIGHT,
    Batch,
    EngineState,
    Keep,
    OnTokenLosses,
    PipelineStage,
    StateTensor,
    assign_keepers,
    cloned,
)

# kinds of optimizer tensors of each parameter: master weights and AdamW's averages
_KINDS = ("param", "exp_avg", "exp_avg_sq")
_ROPE_TYPES = ("default", "linear", "llama3")


class MegatronEngine:
    """An `Engine` on Megatron-core. With bfloat16, master weights, optimizer state and summed gradients are float32.

    All pipeline stages and tensor-parallel ranks get the same losses, and on_token_losses is called on all of them.
    """

    def __init__(self, config: Config, device: torch.device, vocabulary: int, context: int):
        parallel, train = config.parallel, config.train
        shape = configured_model(config, vocabulary, context)
        _check_shape(shape, parallel.tensor_parallel_size)
        self._shape, self._device, self._updates = shape, device, 0
        parallel_state.initialize_model_parallel(
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            context_parallel_size=parallel.split_ranks,
            create_gloo_process_groups=False,
        )
        try:
            random.model_parallel_cuda_manual_seed(config.run.seed)
        except (AssertionError, RuntimeError):
            # without a GPU, torch raises AssertionError if built without CUDA, otherwise RuntimeError
            if torch.cuda.is_available():
                raise
            raise DistattnError(NO_GPU_FOR_MEGATRON) from None
        self._shard = MegatronShard.even(
            shape,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel.tensor_parallel_size,
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel.pipeline_parallel_size,
        )
        self.stage = PipelineStage(
            parallel_state.get_pipeline_model_parallel_rank(), parallel.pipeline_parallel_size, self._shard.layers.start
        )
        # the process group of the ranks that hold the same layers
        self._stage_group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self._config = _transformer_config(config, shape, device)
        gpt = _gpt_model(self._config, shape, context)
        # use transformers' frequencies, which are right for all types in _ROPE_TYPES
        gpt.rotary_pos_emb.inv_freq = LlamaRotaryEmbedding(cast(Any, shape)).inv_freq.detach().to(device)
        self.model: torch.nn.Module = megatron.use_batch_positions(gpt).to(device)
        self._parameters = dict(self.model.named_parameters())
        half = config.model.dtype == "bfloat16"
        self._chunk = DistributedDataParallel(
            self._config,
            DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=half),
            Float16Module(self._config, gpt) if half else gpt,
        )
        settings = OptimizerConfig(
            optimizer="adam",
            lr=train.learning_rate,
            weight_decay=train.weight_decay,
            adam_beta1=train.beta1,
            adam_beta2=train.beta2,
            adam_eps=train.epsilon,
            bf16=half,
            params_dtype=torch.bfloat16 if half else torch.float32,
            use_distributed_optimizer=True,
        )
        # without experts, there is only one chained optimizer
        (self._optimizer,) = get_megatron_optimizer(
            settings, [self._chunk], use_gloo_process_groups=False
        ).chained_optimizers
        for group in self._optimizer.param_groups:
            # set the weight decay here, since Megatron's weight-decay schedule, which would do this, is not used
            group["weight_decay"] = train.weight_decay * group["wd_mult"]
        self._begin_averages()
        all_ranks = init_device_mesh(device.type, (dist.get_world_size(),))
        self._begin_weights(build_model(config, shape, device=device, shard=partial(shard_rows, mesh=all_ranks)))
        self.cp = _context_parallel(config)
        self.cp.loss_scale(megatron.ProbeTarget([self._chunk]))

    def backward(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Run the forward and backward passes. Gradients are reduced once, after the last micro-batch. See `Engine.backward`."""
        return self._scheduled(batches, on_token_losses, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Return the losses of micro-batches without gradients. See `Engine.evaluate`."""
        return self._scheduled(batches, on_token_losses, forward_only=True)

    def clip(self, limit: float) -> float:
        """Clip gradients, and return their norm before clipping. See `Engine.clip`."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.clip_grad_norm(limit))

    def update(self, learning_rate: float) -> None:
        """Take an optimizer step. See `Engine.update`."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step_with_ready_grads()
        self._updates += 1
        self.drop()

    def drop(self) -> None:
        """Drop the gradients. See `Engine.drop`."""
        self._optimizer.zero_grad()
        self._chunk.zero_grad_buffer()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this tensor-parallel rank's part of this stage's layers. See `Engine.named_parameters`."""
        # a model shape with this rank's number of heads
        shape, ranks = copy.deepcopy(self._shape), self._shard.tensor_ranks
        shape.num_attention_heads //= ranks
        shape.num_key_value_heads //= ranks
        parts = {name: parameter.detach() for name, parameter in self._parameters.items()}
        return to_huggingface([parts], shape, self._shard._replace(tensor_rank=0, tensor_ranks=1))

    def state_tensors(self) -> Iterator[StateTensor]:
        """Yield weights, and this rank's shards of master weights and averages, by Megatron's names.

        See `Engine.state_tensors`.
        """
        for name, parameter in self._parameters.items():
            yield WEIGHT, name, parameter.detach()
            for kind in _KINDS:
                optimized = self._optimized(name, kind)
                if optimized is not None:
                    yield MASTER_WEIGHT if kind == "param" else kind, name, optimized[0].detach()

    @torch.no_grad()
    def state(self, keep: Keep = cloned) -> EngineState:
        """Return unsharded tensors, gathering one layer at a time. See `Engine.state`.

        Each rank keeps a share of its stage's tensors, so ranks return different names. All tensors are copies made by `keep`.
        """
        states: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for tensors, kind in zip(states, _KINDS, strict=True):
            # caching one parameter is enough, because the requests for all ranks' parts of it are consecutive
            gather = lru_cache(maxsize=1)(partial(self._gathered, kind))
            parts = [_Parts(self._parameters, gather, rank) for rank in range(self._shard.tensor_ranks)]
            for name, whole in to_huggingface(parts, self._shape, self._shard):
                if self._keepers[name] == dist.get_rank():
                    tensors[name] = keep(f"{kind}.{name}", whole)
        return EngineState(states[0], states[1], states[2], self._updates)

    @torch.no_grad()
    def load(self, state: EngineState) -> None:
        """Load the state: each rank broadcasts the tensors that it keeps. See `Engine.load`."""
        for tensors, kind in zip(state[:3], _KINDS, strict=True):

            def read(name: str, tensors: dict[str, Tensor] = tensors) -> Tensor:
                whole = torch.empty(self._wholes[name], dtype=torch.float32, device=self._device)
                if name in tensors:
                    whole.copy_(tensors[name])
                dist.broadcast(whole, self._keepers[name], group=self._stage_group)
                return whole

            self._take(kind, to_megatron(read, self._shape, self._shard))
        self._set_updates(state.updates)

    def close(self) -> None:
        """Close the engine. See `Engine.close`."""
        self.cp.close()
        megatron.close(self._chunk)
        parallel_state.destroy_model_parallel()

    def _scheduled(
        self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None, forward_only: bool
    ) -> list[Tensor]:
        """Run Megatron's pipeline schedule. Return this rank's share of each micro-batch's loss, equal on all stages."""
        token_losses: list[Tensor] = []

        def step(remaining: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(remaining)
            output, reduce_loss = megatron.forward_step(iter([batch]), model, self._config)

            def loss(losses: Tensor) -> tuple[Any, ...]:
                token_losses.append(losses.detach().flatten().float() * (batch["labels"] != IGNORE_INDEX).flatten())
                return tuple(reduce_loss(losses))

            return output, loss

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(batches),
            model=[self._chunk],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        # only the last stage has the losses; it broadcasts them, and all stages know their sizes from the batches
        sizes = [batch["labels"].numel() for batch in batches]
        flat = torch.cat(token_losses) if token_losses else torch.zeros(sum(sizes), device=self._device)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(flat, last, group=parallel_state.get_pipeline_model_parallel_group())
        batch_losses = []
        for losses_T, batch in zip(flat.split(sizes), batches, strict=True):
            if on_token_losses is not None:
                on_token_losses(losses_T, batch)
            batch_losses.append(losses_T.sum() * batch["loss_scale"])
        return batch_losses

    def _begin_averages(self) -> None:
        """Take a step with zero gradients, in which AdamW creates its averages, so a checkpoint can be loaded into them."""
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.optimizer.step()
        self._optimizer.zero_grad()
        self._set_updates(0)

    def _begin_weights(self, model: torch.nn.Module) -> None:
        """Copy the weights of a transformers model that is sharded over all ranks, gathering one layer at a time.

        Each rank frees its shard of a parameter as soon as the parameter is gathered.
        """
        self._wholes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._keepers = assign_keepers(model, dist.get_process_group_ranks(self._stage_group))

        def read(name: str) -> Tensor:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            whole = pytorch.full_tensor(getattr(module, leaf).detach())
            setattr(module, leaf, None)
            return whole

        stages = parallel_state.get_pipeline_model_parallel_world_size()
        for stage in range(stages):
            shard = MegatronShard.even(self._shape, self._shard.tensor_rank, self._shard.tensor_ranks, stage, stages)
            parts = to_megatron(read, self._shape, shard)
            if shard == self._shard:
                self._take("param", parts)
            else:
                for _ in parts:
                    # iterate only to take part in the collective gathers, whose results the ranks of that stage need
                    pass

    @torch.no_grad()
    def _take(self, kind: str, parts: Iterable[tuple[str, Tensor]]) -> None:
        """Copy this rank's parts, given as (name, part), into the parameters or into the average `kind`."""
        for name, part in parts:
            if kind == "param":
                self._parameters[name].copy_(part)
            optimized = self._optimized(name, kind)
            if optimized is not None:
                flat, place = optimized
                flat.copy_(part.flatten()[place])

    def _optimized(self, name: str, kind: str) -> tuple[Tensor, slice] | None:
        """Return this rank's flat optimizer shard of a parameter and its slice of the flat parameter; None if it is empty."""
        optimizer, parameter = self._optimizer, self._parameters[name]
        if parameter not in optimizer.model_param_gbuf_map:
            return None
        buffer, dtype, bucket = optimizer.model_param_gbuf_map[parameter]
        place = optimizer.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
        group, order = optimizer.model_param_group_index_map[parameter]
        main = optimizer.param_groups[group]["params"][order]
        return main if kind == "param" else optimizer.state[main][kind], slice(place.start, place.end)

    def _gathered(self, kind: str, name: str) -> list[Tensor]:
        """Return each tensor-parallel rank's part, gathered from its data-parallel ranks, as float32 in the parameter's shape."""
        shape = self._parameters[name].shape
        flat = torch.zeros(shape.numel(), dtype=torch.float32, device=self._device)
        optimized = self._optimized(name, kind)
        if optimized is not None:
            local, place = optimized
            flat[place] = local
        dist.all_reduce(flat, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        parts = [torch.empty_like(flat) for _ in range(self._shard.tensor_ranks)]
        dist.all_gather(parts, flat, group=parallel_state.get_tensor_model_parallel_group())
        return [part.view(shape) for part in parts]

    def _set_updates(self, updates: int) -> None:
        """Set the number of updates here and in the optimizer."""
        self._updates = updates
        # Apex and Transformer Engine count steps per group, torch's AdamW per parameter
        for group in self._optimizer.param_groups:
            if "step" in group:
                group["step"] = updates
        for parameter_state in self._optimizer.state.values():
            if "step" in parameter_state:
                parameter_state["step"].fill_(updates)


class _Parts(Mapping[str, Tensor]):
    """The parameters of one tensor-parallel rank, gathered on access.

    gather: a cached collective call that returns all ranks' parts of a parameter.
    """

    def __init__(self, names: Collection[str], gather: Callable[[str], list[Tensor]], rank: int):
        self._names, self._gather, self._rank = names, gather, rank

    def __getitem__(self, name: str) -> Tensor:
        return self._gather(name)[self._rank]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_shape(shape: PretrainedConfig, tensor_ranks: int) -> None:
    """Raise DistattnError, naming the reason, if Megatron's GPTModel would compute a different model."""
    check_megatron(shape, tensor_ranks)
    rope = (getattr(shape, "rope_parameters", None) or {}).get("rope_type", "default")
    refused = {
        "tied embeddings (tie_word_embeddings)": shape.tie_word_embeddings,
        f"the activation {shape.hidden_act}": shape.hidden_act != "silu",
        f"rotary embeddings of type {rope}": rope not in _ROPE_TYPES,
        "a sliding window": bool(getattr(shape, "sliding_window", None)) and getattr(shape, "use_sliding_window", True),
        "attention dropout": bool(getattr(shape, "attention_dropout", 0.0)),
    }
    for feature, is_used in refused.items():
        if is_used:
            raise DistattnError(f"engine.name: megatron does not compute {feature} here; use fsdp2 or deepspeed.")


def _transformer_config(config: Config, shape: PretrainedConfig, device: torch.device) -> Any:
    parallel, half = config.parallel, config.model.dtype == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    return TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
        ffn_hidden_size=shape.intermediate_size,
        layernorm_epsilon=shape.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.model_type == "qwen2",
        qk_layernorm=shape.model_type == "qwen3",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=half,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        context_parallel_size=parallel.split_ranks,
        # ranks have different numbers of tokens, for which Megatron requires this dispatcher
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
        # initialize only to mark the parameters that tensor-parallel ranks split; the weights are copied in later
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=device.type == "cpu",
        # off, since they need Apex or Transformer Engine
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def _gpt_model(config: Any, shape: PretrainedConfig, context: int) -> Any:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    return GPTModel(
        config,
        megatron.replace_core_attention(spec),
        shape.vocab_size,
        context,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def _context_parallel(config: Config) -> ContextParallel:
    """Return the ContextParallel of the context-parallel group or, with data = "per_rank", of all data-parallel ranks."""
    attention = attention_config(config)
    all_ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if attention.data == "per_rank":
        return ContextParallel(all_ranks, config=attention)
    return ContextParallel(parallel_state.get_context_parallel_group(), loss_group=all_ranks, config=attention)
