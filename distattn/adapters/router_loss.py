"""The load-balancing loss of mixture-of-experts models, over the tokens of all ranks.

Fedus, Zoph, Shazeer 2021, arXiv 2101.03961, as transformers computes it from a model's `router_logits` (`output_router_logits`):
E sum_e f_e p_e, where f_e is the fraction of tokens routed to expert e and p_e its mean probability, both over all layers. The
loss is a product of two means, so the losses of single ranks' tokens do not add up to it.
"""

# T tokens on this rank, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.batch.local_batch import LocalBatch
from distattn.batch.packed_batch import IGNORE_INDEX
from distattn.driver.context_parallel import ContextParallel
from distattn.driver.loss_sums import sum_over_loss_group
from distattn.ir.errors import DistattnError

# attributes of transformers' causal language models: the number of experts, the number of experts per token, and the
# weight of the loss
_NAMES = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")


def router_loss(model: torch.nn.Module, output: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Compute this rank's share of the router loss, weighted as in the model's configuration; None if there is no router loss.

    output: the model's output for a sharded batch. Fractions and mean probabilities are taken over the micro-batch's
    tokens on all ranks of the loss group, without padding. Micro-batches of a step are weighted by their label counts.
    Shares add up over ranks like token losses, and include the batch's loss scale. This is a collective call of
    the loss group. Raises DistattnError if the model does not give its number of experts or its loss's weight, or if
    the batch belongs to a pipeline.
    """
    # a transformers model with a router loss has already computed it for this rank's tokens alone
    if getattr(output, "aux_loss", None) is None:
        return None
    experts, chosen, weight = _settings(model)
    local = batch["context_parallel"]
    ranks = local.planner.ranks if isinstance(local, LocalBatch) else None
    if not isinstance(ranks, ContextParallel):
        raise DistattnError(
            "a router loss needs a batch of ContextParallel.shard; set output_router_logits to False in pipelines."
        )
    tokens, labels = local.own_tokens, (batch["labels"] != IGNORE_INDEX).sum().double()
    router_logits = [logits[:tokens].to(labels.device) for logits in output.router_logits]
    counts_E, probabilities_E = _sums_of_tokens(router_logits, experts, chosen)
    rows = torch.full_like(labels, tokens * len(router_logits))
    local_sums = torch.cat([counts_E, torch.stack([labels, rows])])
    counts_E, (labels, rows) = sum_over_loss_group(ranks, local_sums, "a router loss").split([experts, 2])
    return _balance(counts_E, probabilities_E, rows.clamp(min=1)) * (weight * batch["loss_scale"] * labels)


def router_loss_of_tokens(model: torch.nn.Module, router_logits: Sequence[Tensor]) -> Tensor:
    """Compute the router loss of a single process's tokens. router_logits: (T, E) for each layer.

    Raises DistattnError if the model does not give its number of experts or its loss's weight.
    """
    experts, chosen, weight = _settings(model)
    counts_E, probabilities_E = _sums_of_tokens(router_logits, experts, chosen)
    rows = counts_E.new_tensor(sum(map(len, router_logits)))
    return _balance(counts_E, probabilities_E, rows.clamp(min=1)) * weight


def _settings(model: torch.nn.Module) -> tuple[int, int, float]:
    """Return the number of experts, the number of experts per token, and the weight of the loss."""
    if missing := [name for name in _NAMES if not hasattr(model, name)]:
        raise DistattnError(
            f"the router loss of {type(model).__name__} is not computed, because the model has no {missing[0]}; set "
            "output_router_logits to False in its config."
        )
    experts, chosen, weight = (getattr(model, name) for name in _NAMES)
    return experts, chosen, weight  # type: ignore[return-value]


def _sums_of_tokens(router_logits: Sequence[Tensor], experts: int, chosen: int) -> tuple[Tensor, Tensor]:
    """Return each expert's token count (E,) and sum of probabilities (E,), both summed over all layers."""
    device = router_logits[0].device
    counts_E = torch.zeros(experts, dtype=torch.float64, device=device)
    probabilities_E = torch.zeros(experts, device=device)
    for logits_TE in router_logits:
        probability_TE = logits_TE.to(device).softmax(-1)
        indices = probability_TE.detach().topk(chosen, -1).indices.flatten()
        counts_E.scatter_add_(0, indices, torch.ones_like(indices, dtype=torch.float64))
        probabilities_E = probabilities_E + probability_TE.float().sum(0)
    return counts_E, probabilities_E


def _balance(counts_E: Tensor, probabilities_E: Tensor, rows: Tensor) -> Tensor:
    """Compute E sum_e f_e p_e, with f_e = counts_e / rows and p_e = probabilities_e / rows."""
    return len(counts_E) * ((counts_E / rows).to(probabilities_E.dtype) * probabilities_E).sum() / rows
