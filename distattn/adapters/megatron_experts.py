"""Megatron-core's expert router with context parallelism: its losses count every token except padding once.

Splitting sequences does not change how tokens are dispatched to experts, but it changes the router's losses. Megatron-core
0.16 assumes that all ranks have the same number of tokens, and with `calculate_per_token_loss` it weights a loss over
all context-parallel ranks by one rank's number of tokens.
"""

# T tokens on this rank, X experts

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from distattn.ir.errors import DistattnError


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router, with losses over the tokens, without padding, of all ranks that share a batch."""

    own_tokens: int | Tensor = 0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route like Megatron's router, and count the tokens in logits (T, B, X) without padding."""
        # count tokens separately, since Megatron sums its count over ranks in place, so it may be that of this rank or of
        # all ranks
        self.own_tokens = logits.shape[:2].numel() if padding_mask is None else (~padding_mask).sum()
        routed: tuple[Tensor, Tensor] = super().routing(logits, padding_mask)
        return routed

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: dist.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """Add the loss as Megatron's router does, but weight a rank's share by the number of tokens on all ranks."""
        if self.calculate_per_token_loss:
            # each data-parallel replica has its own loss, and training minimizes the mean of these losses
            replicas = reduce_group.size() // self.tp_cp_group.size()
            valid_token_count = _sum_over(self.own_tokens, reduce_group, activation) / replicas
        attached: Tensor = super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, reduce_group_has_dp, valid_token_count
        )
        return attached

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Apply the z-loss like Megatron's router, but as a mean over all ranks' tokens, not as a mean of the ranks' means."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares_T = logits.logsumexp(-1).square()
        if padding_mask is not None:
            squares_T = squares_T * ~padding_mask
        total = _sum_over(self.own_tokens, self.tp_cp_group, squares_T)
        share = squares_T.sum() / total.clamp(min=1)
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        save_to_aux_losses_tracker("z_loss", share * self.tp_cp_group.size(), self.layer_number, layers)
        loss = coefficient * share
        scaled: Tensor = MoEAuxLossAutoScaler.apply(logits, loss * total if self.calculate_per_token_loss else loss)
        return scaled

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Apply the bias like Megatron's router, but mask the map (T, X) here, since Megatron's mask does not fit its shape."""
        super()._apply_expert_bias(routing_map if padding_mask is None else routing_map & ~padding_mask[:, None])


def replace_router(layer: Any) -> None:
    """Replace Megatron's router in a layer's spec, if it has one, with `Router`."""
    experts: Any = getattr(getattr(layer, "submodules", None), "mlp", None)
    submodules: Any = getattr(experts, "submodules", None)
    if getattr(submodules, "router", None) is TopKRouter:
        submodules.router = Router


def check_experts(model: torch.nn.Module, config: Any) -> None:
    """Raise DistattnError if experts or router losses would depend on how a batch is split over ranks."""
    if config.num_moe_experts is None:
        return
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for fault, is_set in {
        "an expert's capacity is a share of one rank's tokens: leave out moe_expert_capacity_factor": (
            config.moe_expert_capacity_factor is not None
        ),
        "a router that megatron.replace_core_attention has not replaced assumes the same number of tokens on all ranks: pass the "
        "layer's spec to it": any(not isinstance(router, Router) for router in routers),
        'sinkhorn balances the tokens of one rank: use moe_router_load_balancing_type="aux_loss"': (
            "sinkhorn" in config.moe_router_load_balancing_type
        ),
        "sequence parallelism in a pipeline does not split the mask of padding that routers need: leave out one of the two": (
            config.sequence_parallel and config.pipeline_model_parallel_size > 1
        ),
    }.items():
        if is_set:
            raise DistattnError(f"{fault}.")


def padding_of(batch: Mapping[str, Any], config: Any) -> Tensor | None:
    """Return a mask (1, T) of this rank's padding, or None for models without experts, which do not need it."""
    if config.num_moe_experts is None:
        return None
    ids = batch["input_ids"]
    return torch.arange(ids.shape[1], device=ids.device)[None] >= batch["context_parallel"].own_tokens


def _sum_over(count: int | Tensor, group: dist.ProcessGroup, like: Tensor) -> Tensor:
    total = torch.as_tensor(count, dtype=torch.float32, device=like.device).clone()
    dist.all_reduce(total, group=group)
    return total
