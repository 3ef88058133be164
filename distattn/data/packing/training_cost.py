"""Estimate the cost of a document in a training step of a given model on a given device, to cap the cost of packs.

Attention times come from `distattn.cluster.cost`, the cost model used to plan strategies. Matrix products with weights are
assumed to run at the device's speed for large ones. A plan stores the resulting integers, so a later change to the device's
description does not change the plan.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np

from distattn.cluster.cost import attention_speed, flops_per_cell, overhead_keys
from distattn.cluster.spec import DIRECTIONS, ClusterSpec, load, shipped_names
from distattn.data.packing.pack_rule import PackCost
from distattn.ir.errors import DistattnError, SettingError
from distattn.ir.limits import Number, check_limits

# matrix products per weight matrix: one in the forward pass, two in the backward pass
_PRODUCTS = 3
# a sequence length beyond which no kernel in the speed tables gets faster
_LONG = 1 << 20
_TERA, _MICRO, _FEMTO = 1e12, 1e-6, 1e-15
# keys of a transformers configuration that differ from the field names here
_KEYS = {"num_hidden_layers": "num_layers"}
# keys of models with experts, where each token uses only some of the weights
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that determine its run time: attention, a gated feed-forward layer, and an output layer.

    head_dim: by default hidden_size / num_attention_heads. num_key_value_heads: by default the number of query heads.
    intermediate_size: width of the feed-forward layer; for a model with experts, the total width of the experts used per token.
    """

    num_layers: Annotated[int, Number(ge=1)]
    hidden_size: Annotated[int, Number(ge=1)]
    num_attention_heads: Annotated[int, Number(ge=1)]
    intermediate_size: Annotated[int, Number(ge=1)]
    vocab_size: Annotated[int, Number(ge=1)]
    num_key_value_heads: Annotated[int, Number(ge=0)] = 0
    head_dim: Annotated[int, Number(ge=0)] = 0

    def __post_init__(self) -> None:
        """Raise DistattnError naming the first invalid size."""
        check_limits(self)
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise SettingError(
                "num_attention_heads",
                f"hidden_size {self.hidden_size} cannot be divided evenly among {self.num_attention_heads} heads; "
                "give head_dim.",
            )

    @classmethod
    def of_configuration(cls, path: str | Path) -> ModelShape:
        """Return the shape given by a model's config.json in the format of transformers.

        Raises DistattnError if the file cannot be read, if a size is missing, and for models with experts.
        """
        try:
            configuration = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
            raise DistattnError(f"{path}: cannot be read: {reason}; name a model's config.json.") from None
        if not isinstance(configuration, dict):
            raise DistattnError(f"{path}: is not a model's configuration; name a config.json of transformers.")
        if experts := [key for key in _EXPERTS if configuration.get(key)]:
            raise DistattnError(
                f"{path}: {experts[0]}: the configuration of a model with experts does not say what a token costs; name the "
                "sizes one by one, and as intermediate_size that of all experts together that one token uses."
            )
        sizes = {_KEYS.get(key, key): value for key, value in configuration.items()}
        needed = {}
        for field in fields(cls):
            # head_dim may be null
            value = sizes.get(field.name) or (None if field.default is MISSING else field.default)
            if type(value) is not int:
                raise DistattnError(
                    f"{path}: {field.name} is missing, or not a whole number; name the sizes one by one in place of model."
                )
            needed[field.name] = value
        return cls(**needed)

    @property
    def width(self) -> int:
        """The width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def multiplications(self) -> int:
        """The number of weights by which each token is multiplied, over all layers and the output layer."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        attention = 2 * (heads + kv_heads) * self.width
        return self.num_layers * self.hidden_size * (attention + 3 * self.intermediate_size) + (
            self.hidden_size * self.vocab_size
        )


def load_device(name: str | Path) -> ClusterSpec:
    """Load a shipped device ("h100"), a cluster ("h100-8x8"), or a cluster's TOML file. Only the cluster's device is used.

    Raises DistattnError if there is no device or cluster with this name.
    """
    return load(f"{name}-1x1" if name in shipped_names() else name)


def training_cost(shape: ModelShape, cluster: ClusterSpec) -> PackCost:
    """Return the cost of the forward and backward pass on one device, as integers in units of an attention cell.

    A cell, one (query, key) pair, costs what it costs in long sequences. A token costs its products with weights, and the part of
    a kernel row's time that does not depend on the number of keys. A document costs the empty rows of its last tile, half a tile
    on average, and the fixed time of one task in each layer and direction. Activation recomputation, the optimizer and
    communication are left out. Raises DistattnError if a cost is too large for a plan.
    """
    device, head_dim = cluster.device, shape.width
    # on average, half a tile of rows is empty at the end of a document
    empty_rows = (device.tile[0] - 1) / 2
    cell = token = document = 0.0
    for direction in DIRECTIONS:
        speed = float(attention_speed(cluster, direction, head_dim, np.array([_LONG]), np.array([_LONG]))[0])
        heads = shape.num_layers * shape.num_attention_heads
        seconds = heads * flops_per_cell(direction, head_dim, head_dim) / speed
        row_keys = overhead_keys(cluster, direction, head_dim)
        # a document of n tokens has n + empty_rows rows of (n + 1) / 2 + row_keys keys, as in `padded_cells`
        cell += seconds
        token += seconds * (row_keys + empty_rows / 2)
        document += seconds * empty_rows * (row_keys + 0.5) + shape.num_layers * device.task_us * _MICRO
    token += 2 * _PRODUCTS * shape.multiplications / (device.gemm_tflops * _TERA)
    return PackCost(round(token / cell), round(document / cell), max(1, round(cell / _FEMTO)))
