"""Compute transformers' Llama norms in the model's dtype; its own code rounds to float32 whatever the dtype.

A float64 run that sums in another order would otherwise now and then round a value to its float32 neighbor, 6e-8 away.
"""

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def _forward(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


LlamaRMSNorm.forward = _forward
