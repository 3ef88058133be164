"""Megatron-core 0.16: core attention in tensor x context x pipeline x data parallel training.

    spec = replace_core_attention(get_gpt_layer_local_spec(normalization="RMSNorm"), strategy="ring")
    model = GPTModel(config, spec, ...)

That alone handles all batches sharded by Megatron's own loaders: sbhd rows in its zigzag order, thd packs in their
per-document zigzag, and per-batch groups. Batches sharded by distattn may have any layout and any document lengths:

    use_batch_positions(model)                        # rotary embeddings at the batch's positions
    forward_backward(forward_step_func=partial(forward_step, config=config), data_iterator=iter(batches), ...)
"""

# T tokens on this rank, B rows, H query heads, K key/value heads, D head dim, E value head dim, V vocabulary on this rank

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_model_config
from torch import Tensor

from distattn.adapters.megatron_batches import MegatronBatches, PackedShard
from distattn.adapters.megatron_experts import check_experts, padding_of, replace_router
from distattn.adapters.pytorch import full_tensor, gradients_aside, probed_parameters, unwrapped
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.driver.parameter_probe import ProbedParameter
from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype

_LOG = logging.getLogger("distattn")
# the core attentions that can be replaced; others compute something else (sparse, linear)
_STOCK = ("DotProductAttention", "TEDotProductAttention", "CoreAttention")
# recurrent layers whose states and convolutions can be split
_RECURRENT = ("GatedDeltaNet", "MambaMixer")
_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def replace_core_attention(spec: Any, **settings: Any) -> Any:
    """Put distattn's core attention into the spec of a layer, or of all layers of a block or a Mamba stack. Return the spec.

    This includes the core attention of multi-latent attention. Gated DeltaNet and Mamba-2 layers are replaced by those of
    `megatron_recurrent`, and expert routers by that of `megatron_experts`. settings: fields of `AttentionConfig` for batches
    sharded by Megatron's loaders; the default strategy is "ring".
    """
    batches = MegatronBatches({"strategy": "ring", **settings})
    for number, layer in enumerate(_layers_of(spec)):
        self_attention: Any = getattr(layer.submodules, "self_attention", getattr(layer.submodules, "mixer", layer))
        attention: Any = getattr(self_attention, "submodules", None)
        name = _name_of(getattr(attention, "core_attention", None) or self_attention)
        if name in _RECURRENT:
            # import these layers only if they are used, since Megatron's need Triton
            from distattn.adapters import megatron_recurrent

            self_attention.module = getattr(megatron_recurrent, name)
            self_attention.params = {**self_attention.params, "batches": batches}
        elif name in _STOCK:
            attention.core_attention = ModuleSpec(CoreAttention, params={"batches": batches})
        else:
            raise DistattnError(
                f"layer {number} of the spec has {name}, which is neither a core attention that can be split "
                f"({', '.join(_STOCK)}) nor one of {', '.join(_RECURRENT)}."
            )
    for layer in (*_layers_of(spec), getattr(getattr(spec, "submodules", None), "moe_layer", None)):
        replace_router(layer)
    return spec


def close(model: Any) -> None:
    """End the threads and communicators of a model's core attention. All ranks call this. model: a model or its chunks."""
    for part in model if isinstance(model, list) else [model]:
        for module in unwrapped(part).modules():
            if isinstance(batches := getattr(module, "batches", None), MegatronBatches):
                batches.close()


def _layers_of(spec: Any) -> list[Any]:
    """Return the specs of the layers that mix tokens, from the spec of a block, a Mamba stack or a single layer."""
    if hasattr(spec, "layer_specs"):
        return list(spec.layer_specs)
    stack: Any = getattr(spec, "submodules", None)
    if not hasattr(stack, "mamba_layer"):
        return [spec]
    return [layer for layer in (stack.mamba_layer, stack.attention_layer) if layer is not IdentityOp]


def _name_of(spec: Any) -> str:
    module = getattr(spec, "module", spec)
    return getattr(module, "__name__", type(module).__name__)


class CoreAttention(MegatronModule):
    """Megatron's core attention, run by a plan.

    q (T, B, H, D), k (T, B, K, D), v (T, B, K, E) -> (T, B, H * E). In the thd format, all of them are without B.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: Any = None,
        batches: MegatronBatches | None = None,
    ):
        super().__init__(config=config)
        self.layer = layer_number - 1
        self.attn_mask_type, self.scale = attn_mask_type, softmax_scale
        self.batches = batches or MegatronBatches({"strategy": "ring"})
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.group, self.tp_group = groups.cp, groups.tp
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for request, is_set in {
            f"{attention_type} attention": attention_type != "self",
            f"attention dropout {dropout} (set attention_dropout=0)": dropout > 0,
            "the largest logit of each head (qk_clip, log_max_attention_logit)": config.qk_clip
            or getattr(config, "log_max_attention_logit", False),
        }.items():
            if is_set:
                self._refuse(request)
        self.window = self._window()
        heads = config.num_attention_heads // self.tp_group.size()
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", torch.zeros(heads), persistent=False)
        elif config.softmax_type == "learnable":
            # Transformer Engine uses this name, so checkpoints are compatible
            device = None if config.use_cpu_initialization else torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, device=device, dtype=config.params_dtype))
            tensor_parallel.set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        else:
            self.register_buffer("softmax_offset", None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute core attention as called by Megatron's attention layer (shapes: see the class)."""
        if attention_mask is not None:
            self._refuse("an attention mask (pass None: documents are causal)")
        if attention_bias is not None:
            self._refuse("an attention bias")
        if (attn_mask_type or self.attn_mask_type) not in _CAUSAL:
            self._refuse(f"the mask {attn_mask_type or self.attn_mask_type}")
        if query.shape[0] != key.shape[0]:
            self._refuse(f"{key.shape[0]} keys for {query.shape[0]} queries, generation with a key/value cache,")
        packed = query.dim() == 3
        if packed:
            query, key, value = (x[:, None] for x in (query, key, value))
        batch = self.batches.batch(query.shape[:2], packed_seq_params, self.group)
        tokens, rows = query.shape[:2]
        # concatenate rows end to end
        flat = (x.transpose(0, 1).reshape(tokens * rows, *x.shape[2:]).contiguous() for x in (query, key, value))
        how = dict(window=self.window, layer=self.layer, sink=self.softmax_offset)
        o_THE = batch.attention(*flat, self.scale, **how)
        if packed:
            # multi-latent attention drops the row dimension for every pack, but restores it only for thd
            return o_THE.flatten(1)[:, None] if isinstance(packed_seq_params, PackedShard) else o_THE.flatten(1)
        return o_THE.reshape(rows, tokens, -1).transpose(0, 1).contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict[str, Any]:
        """Return the sinks as sharded tensors if they are learned, otherwise an empty dict."""
        if not isinstance(self.softmax_offset, torch.nn.Parameter):
            return {}
        sinks = {"softmax_offset": self.softmax_offset}
        return make_sharded_tensors_for_checkpoint(sinks, prefix, {"softmax_offset": 0}, sharded_offsets)

    def _window(self) -> int | None:
        config = self.config
        if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer + 1):
            return None
        left, right = config.window_size
        if right > 0:
            self._refuse(f"a window that sees {right} tokens ahead")
        return None if left < 0 else left + 1

    def _refuse(self, request: str) -> None:
        raise DistattnError(f"layer {self.layer} asks for {request}, which is not computed.")


class Rotary(torch.nn.Module):
    """A model's rotary embedding at the positions of a sharded batch. Megatron's own batches are unaffected.

    without_rows: True for multi-latent attention, whose queries have no row dimension in a pack.
    """

    def __init__(self, base: torch.nn.Module, without_rows: bool = False):
        super().__init__()
        self.base, self.without_rows = base, without_rows

    def get_rotary_seq_len(self, *arguments: Any, **named: Any) -> int:
        """Return the sequence length for Megatron. For sharded batches, the returned int also carries the batch's positions."""
        packed = next((x for x in (*arguments, *named.values()) if isinstance(x, PackedShard)), None)
        if packed is None:
            return self.base.get_rotary_seq_len(*arguments, **named)  # type: ignore[operator,no-any-return]
        return _Positions.of(packed.batch["position_ids"][0])

    def forward(self, max_seq_len: int, *arguments: Any, **named: Any) -> Any:
        """Compute the angles of this rank's tokens, (T, 1, 1, D), or (T, 1, D) without rows."""
        if not isinstance(max_seq_len, _Positions):
            return self.base(max_seq_len, *arguments, **named)
        # packed_seq gives all positions in order, not in Megatron's zigzag
        computed = self.base(int(max_seq_len), packed_seq=True)
        angles, *scale = computed if isinstance(computed, tuple) else (computed,)
        local = angles[max_seq_len.of_tokens]
        local = local.squeeze(1) if self.without_rows else local
        return (local, *scale) if isinstance(computed, tuple) else local


class _Positions(int):
    of_tokens: Tensor

    @staticmethod
    def of(positions_T: Tensor) -> _Positions:
        longest = _Positions(int(positions_T.max()) + 1)
        longest.of_tokens = positions_T
        return longest


def use_batch_positions(model: Any) -> Any:
    """Let a GPTModel accept sharded batches in any layout, and return the model.

    Raises DistattnError if positions would be wrong.
    """
    config = model.config
    latent = config.multi_latent_attention
    for fault, is_set in {
        "fused rotary embeddings of multi-latent attention support only Megatron's own order": latent
        and config.apply_rope_fusion,
        "interleaved rotary embeddings of multi-latent attention need rows": latent and config.rotary_interleaved,
        "multimodal RoPE is not sharded": model.position_embedding_type == "mrope",
        "multi-token prediction rolls labels over the rank's tokens": bool(getattr(config, "mtp_num_layers", None)),
    }.items():
        if is_set:
            raise DistattnError(
                f"{fault}: leave out use_batch_positions, and use batches that Megatron's own loaders shard."
            )
    check_experts(model, config)
    for module in model.modules():
        if isinstance(base := getattr(module, "rotary_pos_emb", None), torch.nn.Module):
            module.rotary_pos_emb = Rotary(base, without_rows=isinstance(module, MultiLatentAttention))
    return model


def forward_step(batches: Iterator[Mapping[str, Any]], model: Any, config: Any) -> tuple[Tensor, Callable[..., Any]]:
    """Run a forward step on a sharded batch. With config bound, this is a `forward_step_func` for Megatron's schedules.

    Return the token losses, and a function that computes the loss from them: their sum divided by the number of valid tokens.
    """
    batch = next(batches)
    check_shard(batch, config)
    check_servers(batch)
    check_rotary(model)
    # Megatron has no label that means "ignore": give such tokens the label 0 here, and leave their losses out in `loss_of`
    labels = batch["labels"].clamp(min=0)
    packed = PackedShard.of(batch)
    named = dict(labels=labels, packed_seq_params=packed, padding_mask=padding_of(batch, config))
    losses = model(batch["input_ids"], batch["position_ids"], None, **named)
    return losses, partial(loss_of, batch, config)


def loss_of(batch: Mapping[str, Any], config: Any, losses: Tensor) -> tuple[Any, ...]:
    """Return the loss for Megatron's schedules: (sum, tokens, report) if calculate_per_token_loss, otherwise (share, report)."""
    valid = (batch["labels"] != IGNORE_INDEX).flatten()
    total = losses.to(accumulation_dtype(losses.dtype)).flatten()[valid].sum()
    report = {"loss_sum": total.detach().clone(), "tokens": valid.sum()}
    if config.calculate_per_token_loss:
        return total, valid.sum().int(), report
    return total * batch["loss_scale"], report


def check_shard(batch: Mapping[str, Any], config: Any) -> None:
    """Raise DistattnError if a shard does not fit the model's parallelism."""
    tokens, parts = batch["input_ids"].shape[1], config.tensor_model_parallel_size
    if config.sequence_parallel and tokens % parts:
        raise DistattnError(
            f"sequence_parallel splits a rank's tokens {parts} ways, and it has {tokens}: pass pad_to={parts} to ContextParallel."
        )
    if config.pipeline_model_parallel_size > 1 and not config.variable_seq_lengths:
        raise DistattnError(
            'ranks have different numbers of tokens: set variable_seq_lengths=True (and moe_token_dispatcher_type="alltoall", '
            "which Megatron needs with it) in the TransformerConfig."
        )


def check_servers(batch: Mapping[str, Any]) -> None:
    """Raise DistattnError if some ranks of the batch's group only serve."""
    if batch["context_parallel"].planner.config.servers:
        raise DistattnError("Megatron trains on all ranks, so no rank can only serve; leave servers out.")


def check_rotary(model: Any) -> None:
    """Raise DistattnError if the model's rotary embeddings do not support batches sharded by distattn."""
    rotaries = [getattr(module, "rotary_pos_emb", None) for module in unwrapped(model).modules()]
    if any(rotary is not None and not isinstance(rotary, Rotary) for rotary in rotaries):
        raise DistattnError(
            "the model's rotary embeddings support only Megatron's own order; call megatron.use_batch_positions(model)."
        )


class ProbeTarget:
    """Model chunks in Megatron's DistributedDataParallel, which `ContextParallel.loss_scale` probes.

    micro_batches: the number of micro-batches in a step. Megatron divides by it unless calculate_per_token_loss is set.
    """

    def __init__(self, chunks: list[Any], micro_batches: int = 1):
        self.chunks, self.micro_batches = chunks, micro_batches
        self.config = get_model_config(chunks[0])
        self.micro_batches_per_step = None if self.config.calculate_per_token_loss else micro_batches
        self._last = unwrapped(chunks[-1])
        for chunk in chunks:
            check_rotary(chunk)

    def layer(self) -> torch.nn.Module | None:
        """Return the output layer on the last pipeline stage, None on other stages."""
        return self._last.output_layer if self._last.post_process else None

    def vocab_rows(self) -> int:
        """Return the number of vocabulary rows on a tensor-parallel rank."""
        return self._last.vocab_size // self.config.tensor_model_parallel_size

    def backward(self, batch: Mapping[str, Any], loss_of: Callable[[Tensor], Tensor]) -> None:
        """Run a step of Megatron's schedule in which only the first micro-batch contributes to the loss."""
        check_servers(batch)
        number = iter(range(self.micro_batches))

        def loss(logits: Tensor) -> tuple[Any, ...]:
            first = next(number) == 0
            total = loss_of(logits) if first else 0.0 * logits.sum()
            tokens = torch.tensor(int(first), dtype=torch.int, device=logits.device)
            return (total, tokens, {}) if self.config.calculate_per_token_loss else (total, {})

        def step(batches: Iterator[Any], model: Any) -> tuple[Tensor, Callable[..., Any]]:
            packed = PackedShard.of(batch)
            named = dict(packed_seq_params=packed, padding_mask=padding_of(batch, self.config))
            logits = model(batch["input_ids"], batch["position_ids"], None, **named)
            return logits, loss

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(()) for _ in self.chunks] if len(self.chunks) > 1 else iter(()),
            model=self.chunks,
            num_microbatches=self.micro_batches,
            seq_length=batch["input_ids"].shape[1] * self.config.context_parallel_size,
            micro_batch_size=1,
            forward_only=False,
        )

    def inputs(self, x: Tensor) -> Tensor:
        """Return the layer's input. With sequence parallelism, gather it as the layer does."""
        if not self.config.sequence_parallel:
            return x
        return tensor_parallel.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)

    def gradient(self) -> Tensor:
        """Return the output layer's weight gradient without the loss scale, gathering the parts of a distributed optimizer."""
        weight = self._last.output_layer.weight
        if weight is None:
            weight = self._last.shared_embedding_or_output_weight()
        return full_tensor(self._gathered_gradient(weight)) / self._scale()

    def _scale(self) -> float:
        """Return the factor by which Megatron has multiplied gradients."""
        scale = 1.0 if self.config.grad_scale_func is None else float(self.config.grad_scale_func(torch.ones(1)))
        if self.config.calculate_per_token_loss:
            # in the probe, each rank counts one token
            scale /= parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        return scale

    def parameters(self) -> list[ProbedParameter]:
        """Return all parameters of this rank's stage. Tensor- and expert-parallel ranks hold different values."""
        if self.config.gradient_accumulation_fusion and dist.get_rank() == 0:
            _LOG.warning(
                "with gradient_accumulation_fusion Megatron adds gradients where the probe does not see them: only the output "
                "layer's was compared. Probe once with gradient_accumulation_fusion=False to compare all parameters."
            )
        scale, probed = self._scale(), []
        gathered: dict[int, tuple[Any, Tensor]] = {}
        for number, chunk in enumerate(self.chunks):
            prefix = f"chunk {number}: " if len(self.chunks) > 1 else ""

            def reduced(parameter: Any) -> Tensor | None:
                gradient = self._gathered_gradient(parameter, gathered)
                return None if gradient is None else gradient / scale

            for parameter in probed_parameters(chunk, reduced):
                probed.append(parameter._replace(name=prefix + parameter.name, **self._sums_of(parameter)))
        return probed

    def _sums_of(self, probed: ProbedParameter) -> dict[str, Any]:
        """Return the `ProbedParameter` fields that say over which ranks, besides the loss group, Megatron sums a gradient."""
        parameter: Any = probed.held
        group: dict[str, Any] = {}
        if self.config.gradient_accumulation_fusion:
            group["leaf"] = lambda: None
        if not getattr(parameter, "allreduce", True):
            experts = parallel_state.get_expert_tensor_and_model_parallel_rank()
            group |= dict(group=parallel_state.get_expert_data_parallel_group(), part=experts)
        further = []
        tensor_ranks = self.config.tensor_model_parallel_size
        is_norm = self.config.qk_layernorm and ("q_layernorm" in probed.name or "k_layernorm" in probed.name)
        if tensor_ranks > 1 and getattr(parameter, "average_gradients_across_tp_domain", False):
            further.append(parallel_state.get_tensor_model_parallel_group())
            group["share"] = 1 / tensor_ranks
        elif tensor_ranks > 1 and (
            is_norm or (self.config.sequence_parallel and getattr(parameter, "sequence_parallel", False))
        ):
            further.append(parallel_state.get_tensor_model_parallel_group())
        if self.config.pipeline_model_parallel_size > 1 and getattr(parameter, "shared_embedding", False):
            further.append(parallel_state.get_embedding_group())
        return group | dict(further=tuple(further))

    def _gathered_gradient(self, weight: Any, gathered: dict[int, tuple[Any, Tensor]] | None = None) -> Tensor | None:
        """Return the reduced gradient from Megatron's buffers, gathering the parts of a distributed optimizer.

        gathered: a cache of the last bucket of each buffer and its gradients. There is an entry per buffer because
        ranks with different experts may read different numbers of a buffer's parameters, but all ranks must gather
        equally often.
        """
        gathered = {} if gathered is None else gathered
        for chunk in self.chunks:
            # without Megatron's wrapper, `buffers` is the method of torch.nn.Module
            buffers = chunk.buffers if isinstance(getattr(chunk, "buffers", None), list) else []
            for buffer in (*buffers, *(chunk.expert_parallel_buffers if buffers else ())):
                if weight not in buffer.param_index_map or not buffer.ddp_config.use_distributed_optimizer:
                    continue
                start, end, number = buffer.param_index_map[weight]
                bucket = buffer.buckets[number]
                if gathered.get(id(buffer), (None,))[0] is not bucket:
                    parts = bucket.grad_data.view(buffer.data_parallel_world_size, -1)
                    all_parts = [torch.empty_like(parts[0]) for _ in parts]
                    mine = parts[dist.get_rank(buffer.data_parallel_group)].contiguous()
                    dist.all_gather(all_parts, mine, group=buffer.data_parallel_group)
                    gathered[id(buffer)] = bucket, torch.cat(all_parts)
                return gathered[id(buffer)][1][start - bucket.offset : end - bucket.offset].view(weight.shape)
        main_gradient = getattr(weight, "main_grad", None)
        return weight.grad if main_gradient is None else main_gradient

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """Set gradients aside while the context is open. Restore them and the random number generators afterwards."""
        distributed = [chunk for chunk in self.chunks if hasattr(chunk, "zero_grad_buffer")]
        buffers = [buffer for chunk in distributed for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        before = [buffer.grad_data.clone() for buffer in buffers]
        numbers = tensor_parallel.get_cuda_rng_tracker().get_states()
        for chunk in distributed:
            chunk.zero_grad_buffer()
        with gradients_aside(torch.nn.ModuleList(self.chunks)):
            try:
                yield
            finally:
                for chunk in distributed:
                    chunk.zero_grad_buffer()
                for buffer, gradients in zip(buffers, before, strict=True):
                    buffer.grad_data.copy_(gradients)
                tensor_parallel.get_cuda_rng_tracker().set_states(numbers)
