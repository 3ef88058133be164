"""A model's training FLOPs, and its MFU (model FLOPs utilisation, Chowdhery et al. 2022, arXiv 2204.02311).

    FLOPs per step = 6 x tokens x P + sum over layers of 6 x heads x (key dim + value dim) x A
    MFU            = FLOPs per step / (seconds x ranks x peak FLOP/s per device)

P is the number of parameters that multiply each token: all matrices including the output layer, but not the embedding
lookup, and only the routed experts that a token visits. A is the number of score-matrix cells that the mask allows:
l x (l + 1) / 2 for each document of l tokens, fewer in layers with a window, and 0 in layers without attention, whose
recurrences and convolutions are not counted. A multiply-add counts as two operations, and backward as twice the cost of
forward. Recomputed activations, norms, rotary embeddings and the softmax are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distattn.batch.layer_overrides import apply_window
from distattn.ir.errors import DistattnError
from distattn.ir.mask import Mask

# forward, backward for inputs, and backward for weights: two operations each
_PER_PARAMETER = 6
# transformers' name for stacked experts; each token visits only a few of them
_EXPERTS = "experts"
_CAUSAL = "causal"
# layer types without attention, as named in transformers' configurations
_WITHOUT_ATTENTION = ("linear_attention", "conv", "mlp", "moe")


@dataclass(frozen=True)
class ModelFlops:
    """The dimensions of a model that determine its FLOPs.

    parameters: P in the module's docstring. layers: pairs of a window (None for no window) and heads x (key dim + value
    dim), summed over the layers with that window.
    """

    parameters: float
    layers: tuple[tuple[int | None, int], ...]

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> ModelFlops:
        """Return the dimensions of a transformers causal language model, on any device, whether sharded by FSDP2 or not.

        Raises DistattnError if it has attention but its configuration does not give the number of heads.
        """
        config: Any = getattr(model, "config", None)
        kinds = getattr(config, "layer_types", None)
        if kinds and all(kind in _WITHOUT_ATTENTION for kind in kinds):
            return cls(_multiplied(model, config), ())
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):
            raise DistattnError(
                f"{type(model).__name__} has no config with num_attention_heads: its FLOPs are not known."
            )
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if hasattr(config, "qk_nope_head_dim"):
            # latent attention: transformers' head_dim covers only the rotary part
            head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        value_dim = getattr(config, "v_head_dim", None) or head_dim
        window = getattr(config, "sliding_window", None)
        layers: Counter[int | None] = Counter()
        for kind in kinds or ["full_attention"] * config.num_hidden_layers:
            if kind not in _WITHOUT_ATTENTION:
                layers[window if kind == "sliding_attention" else None] += heads * (head_dim + value_dim)
        return cls(_multiplied(model, config), tuple(layers.items()))

    def of_documents(self, lengths: Sequence[int]) -> float:
        """Return the forward and backward FLOPs of all ranks for documents with the given `lengths` in tokens."""
        attention = 0
        for window, width in self.layers:
            document_mask = _CAUSAL if window is None else apply_window(_CAUSAL, window)
            attention += _PER_PARAMETER * width * Mask.documents(lengths, document_mask).area()
        return _PER_PARAMETER * self.parameters * sum(lengths) + attention


def flops_utilisation(flops: float, seconds: float, ranks: int, peak_tflops: float) -> float:
    """Return the MFU in [0, 1]: a step's model FLOPs as a share of the ranks' peak. peak_tflops: peak of one device."""
    return flops / (seconds * ranks * peak_tflops * 1e12)


def _multiplied(model: torch.nn.Module, config: Any) -> float:
    """Return the number of parameters that multiply each token. DTensors count with their global shape."""
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    embedding = get_embeddings() if get_embeddings is not None else None
    get_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_embeddings() if get_embeddings is not None else None
    looked_up = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    if output is not None:
        # an output layer tied to the embedding still multiplies each token
        looked_up -= {id(parameter) for parameter in output.parameters()}
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((number for name in names if (number := getattr(config, name, None))), 1)
    visited = getattr(config, "num_experts_per_tok", None) or experts
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias") and id(parameter) not in looked_up:
            share = visited / experts if _EXPERTS in name.split(".") else 1.0
            total += share * parameter.numel()
    return total
