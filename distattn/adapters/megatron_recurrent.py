"""Megatron-core's Gated DeltaNet and Mamba-2 layers with context parallelism: any layout and packed documents.

Megatron-core 0.16 refuses packs in Gated DeltaNet, splits Mamba-2's heads over context-parallel ranks, and needs extra kernels
for both (flash-linear-attention and mamba-ssm). Here parameters, their names, tensor parallelism and checkpoints are Megatron's.
Convolutions and recurrences are those of `LocalBatch`, on the heads of one tensor-parallel rank.
`megatron.replace_core_attention` puts these layers into specs.
"""

# T tokens on this rank, B rows, X channels, H heads of values, G heads of queries and keys, K key dim, V value dim

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet as MegatronGatedDeltaNet
from megatron.core.ssm.mamba_mixer import MambaMixer as MegatronMambaMixer
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.func import functional_call

from distattn.adapters.megatron_batches import MegatronBatches
from distattn.adapters.recurrent_layers import l2norm, ssd_scan
from distattn.batch.local_batch import LocalBatch
from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype


class GatedDeltaNet(MegatronGatedDeltaNet):  # type: ignore[misc]
    """Megatron's Gated DeltaNet, run by a plan. batches: the plans for batches sharded by Megatron's loaders.

    Raises DistattnError if a head would be split between tensor-parallel ranks.
    """

    def __init__(
        self,
        config: Any,
        *arguments: Any,
        batches: MegatronBatches,
        pg_collection: Any,
        cp_comm_type: Any = None,
        **named: Any,
    ):
        ranks = pg_collection.tp.size()
        for name in ("linear_num_key_heads", "linear_num_value_heads"):
            if getattr(config, name) % ranks:
                raise DistattnError(
                    f"{name} is {getattr(config, name)}, and heads are split over {ranks} tensor-parallel ranks: make it a "
                    f"multiple of {ranks}."
                )
        super().__init__(config, *arguments, pg_collection=pg_collection, **named)
        self.batches = batches

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: Any = None,
        **rotary: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the layer as Megatron's transformer layer calls it: hidden states (T, B, C) -> the same shape, and a bias."""
        _refuse_inference(self, inference_context, inference_params)
        projected_TBX, _ = self.in_proj(hidden_states)
        flat, batch = _flat(self, projected_TBX, packed_seq_params)
        parts = 2 * self.qk_dim + self.v_dim, self.v_dim, self.num_value_heads, self.num_value_heads
        qkv, gate, beta, alpha = flat.split([part // self.tp_size for part in parts], -1)
        mixed = batch.causal_conv1d(qkv.contiguous(), self.conv1d.weight.squeeze(1), bias=self.conv1d.bias)
        widths = [width // self.tp_size for width in (self.qk_dim, self.qk_dim, self.v_dim)]
        q, k, v_TX = self.act_fn(mixed).split(widths, -1)
        q_TGK, k_TGK = (self._key_heads(x) for x in (q, k))
        v_THV, gate_THV = (x.unflatten(-1, (-1, self.value_head_dim)).contiguous() for x in (v_TX, gate))
        wide = accumulation_dtype(alpha.dtype)
        g_TH = (-self.A_log.exp() * F.softplus(alpha.to(wide) + self.dt_bias)).to(wide)
        o_THV = batch.recurrence(q_TGK, k_TGK, v_THV, "gated_delta_rule", g=g_TH, beta=beta.sigmoid())
        normed_THV = self._norm(o_THV.flatten(0, 1)).view(o_THV.shape)
        gated_THV = (normed_THV * self.act_fn(gate_THV.to(wide))).to(o_THV.dtype)
        out: tuple[Tensor, Tensor | None] = self.out_proj(_rows(gated_THV, projected_TBX))
        return out

    def _norm(self, x_XV: Tensor) -> Tensor:
        """Apply Megatron's norm, and sum its weight's gradient over tensor-parallel ranks, which have different heads.

        Megatron-core 0.16 sums this gradient only with sequence parallelism, for which the norm marks its weight.
        """
        weights = dict(self.out_norm.named_parameters())
        for name, weight in weights.items():
            if not (self.config.sequence_parallel and getattr(weight, "sequence_parallel", False)):
                weights[name] = copy_to_tensor_model_parallel_region(weight, self.pg_collection.tp)
        normed: Tensor = functional_call(self.out_norm, weights, (x_XV,))
        return normed

    def _key_heads(self, x_TX: Tensor) -> Tensor:
        """Split channels into key heads (T, G, K), and normalize these if the layer uses L2 norms."""
        x = x_TX.unflatten(-1, (-1, self.key_head_dim)).contiguous()
        return l2norm(x) if self.use_qk_l2norm else x


class MambaMixer(MegatronMambaMixer):  # type: ignore[misc]
    """Megatron's Mamba-2 mixer, run by a plan. Each context-parallel rank has all heads of its tensor-parallel rank.

    batches: the plans for batches sharded by Megatron's loaders.
    """

    def __init__(self, *arguments: Any, batches: MegatronBatches, pg_collection: Any, **named: Any):
        # Megatron's mixer would split heads over context-parallel ranks
        alone = copy.copy(pg_collection)
        alone.cp = _OneRank()
        super().__init__(*arguments, pg_collection=alone, **named)
        self.batches, self.pg_collection = batches, pg_collection

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        inference_params: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the mixer as Megatron's Mamba layer calls it: hidden states (T, B, C) -> the same shape, and a bias."""
        _refuse_inference(self, inference_context, inference_params)
        projected_TBX, _ = self.in_proj(hidden_states)
        flat, batch = _flat(self, projected_TBX, packed_seq_params)
        inner, keys = self.d_inner_local_tp, self.ngroups_local_tp * self.d_state
        z_TX, convolved, dt_TH = flat.split([inner, inner + 2 * keys, self.nheads_local_tp], -1)
        mixed = batch.causal_conv1d(convolved.contiguous(), self.conv1d.weight.squeeze(1), bias=self.conv1d.bias)
        x_TX, k, q = self.act(mixed).split([inner, keys, keys], -1)
        q_TGK, k_TGK = (x.unflatten(-1, (-1, self.d_state)).contiguous() for x in (q, k))
        x_THV = x_TX.unflatten(-1, (-1, self.headdim))
        wide = accumulation_dtype(dt_TH.dtype)
        dt_TH = F.softplus(dt_TH.to(wide) + self.dt_bias.to(wide))
        skip = self.D.view(-1, self.headdim if self.D_has_hdim else 1)
        o_THV = ssd_scan(batch, x_THV, dt_TH, -self.A_log.to(wide).exp(), k_TGK, q_TGK, skip)
        gate_THV = self.act(z_TX.to(wide)).view(o_THV.shape)
        y_TBX = _rows((o_THV * gate_THV).to(x_THV.dtype), projected_TBX)
        out: tuple[Tensor, Tensor | None] = self.out_proj(self.norm(y_TBX) if self.rmsnorm else y_TBX)
        return out


class _OneRank:
    """A stand-in for a process group of one rank."""

    def size(self) -> int:
        """Return 1, the number of ranks."""
        return 1


def _flat(layer: Any, x_TBX: Tensor, packed_seq_params: Any) -> tuple[Tensor, LocalBatch]:
    """Return the rows of x, concatenated end to end, (T * B, X), and the batch to which they belong."""
    batch = layer.batches.batch(tuple(x_TBX.shape[:2]), packed_seq_params, layer.pg_collection.cp)
    return x_TBX.transpose(0, 1).flatten(0, 1), batch


def _rows(x_THV: Tensor, like_TBX: Tensor) -> Tensor:
    """Undo the concatenation of rows by `_flat`. Returns (T, B, H * V)."""
    tokens, rows = like_TBX.shape[:2]
    return x_THV.reshape(rows, tokens, -1).transpose(0, 1).contiguous()


def _refuse_inference(layer: Any, *contexts: Any) -> None:
    if any(context is not None for context in contexts):
        raise DistattnError(
            f"layer {layer.layer_number - 1} asks for inference with a cache of states, which is not computed."
        )
