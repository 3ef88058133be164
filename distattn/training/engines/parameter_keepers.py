"""Which rank keeps which parameters, where state is gathered and each rank keeps a share."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def assign_keepers(model: torch.nn.Module, ranks: Sequence[int]) -> dict[str, int]:
    """By parameter the rank that keeps it where each keeps a share: whoever has least so far."""
    kept, found = dict.fromkeys(ranks, 0), {}
    for name, parameter in model.named_parameters():
        found[name] = min(ranks, key=lambda rank: kept[rank])
        kept[found[name]] += parameter.numel()
    return found
