"""Floating-point operations of a model in training, for MFU (model FLOPs utilisation, Chowdhery et al. 2022, arXiv
2204.02311).

    FLOPs of a step = 6 x tokens x P + sum over layers of 6 x heads x (key dim + value dim) x A
    MFU             = FLOPs of a step / (seconds x ranks x peak FLOP/s of a device)

P is the number of parameters that multiply a token: all matrices, including the output layer's, but not the embedding
that is looked up, and of routed experts only those that a token visits. A is the number of cells of the score matrix
that the mask allows: l x (l + 1) / 2 for each document of l tokens, fewer in layers with a window, and 0 in layers
without attention, whose recurrences and convolutions do not count. A multiplication and an addition are two operations;
backward costs twice as much as forward. Recomputed activations, norms, rotations and the softmax do not count.
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

# forward, and backward for inputs and for weights, two operations each
_PER_PARAMETER = 6
# transformers' name for stacked experts, of which each token visits a few
_EXPERTS = "experts"
_CAUSAL = "causal"
# kinds of layers, as transformers' configurations name them
_WITHOUT_ATTENTION = ("linear_attention", "conv", "mlp", "moe")


@dataclass(frozen=True)
class ModelFlops:
    """The numbers that a model's FLOPs depend on.

    parameters: P above; layers: for each window (None: no window), heads x (key dim + value dim) summed over its layers.
    """

    parameters: float
    layers: tuple[tuple[int | None, int], ...]

    @classmethod
    def of_model(cls, model: torch.nn.Module) -> ModelFlops:
        """Return the numbers of a transformers causal language model, on any device, sharded by FSDP2 or not.

        Raises DistattnError where it has attention but its configuration does not give the number of heads.
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
            # latent attention; transformers' head_dim is its rotary part alone
            head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        value_dim = getattr(config, "v_head_dim", None) or head_dim
        window = getattr(config, "sliding_window", None)
        layers: Counter[int | None] = Counter()
        for kind in kinds or ["full_attention"] * config.num_hidden_layers:
            if kind not in _WITHOUT_ATTENTION:
                layers[window if kind == "sliding_attention" else None] += heads * (head_dim + value_dim)
        return cls(_multiplied(model, config), tuple(layers.items()))

    def of_documents(self, lengths: Sequence[int]) -> float:
        """Return the FLOPs of forward and backward of documents of these lengths, in tokens, over all ranks."""
        attention = 0
        for window, width in self.layers:
            document_mask = _CAUSAL if window is None else apply_window(_CAUSAL, window)
            attention += _PER_PARAMETER * width * Mask.documents(lengths, document_mask).area()
        return _PER_PARAMETER * self.parameters * sum(lengths) + attention


def flops_utilisation(flops: float, seconds: float, ranks: int, peak_tflops: float) -> float:
    """Return the MFU: the share of the ranks' peak, in [0, 1], that a step's model FLOPs took. peak_tflops: of one
    device.
    """
    return flops / (seconds * ranks * peak_tflops * 1e12)


def _multiplied(model: torch.nn.Module, config: Any) -> float:
    """Return the number of parameters that multiply a token; a DTensor's shape is global."""
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    embedding = get_embeddings() if get_embeddings is not None else None
    get_embeddings = getattr(model, "get_output_embeddings", None)
    output = get_embeddings() if get_embeddings is not None else None
    looked_up = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    if output is not None:
        # an output layer tied to the embedding still multiplies
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
