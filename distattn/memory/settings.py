"""A run's memory-saving settings, in one object that both the run and its memory estimate use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from distattn.ir.arguments import check_fields
from distattn.ir.errors import DistattnError
from distattn.ir.limits import Number, OneOf, check_limits
from distattn.memory.activation_checkpointing import checkpoint_layers
from distattn.memory.checkpointing_modes import CHECKPOINTING
from distattn.memory.host_offload import HostOffload
from distattn.memory.tiled_loss import TiledLoss
from distattn.memory.tiled_mlp import tile_feed_forward


@dataclass(frozen=True)
class MemorySettings:
    """Settings that save memory.

    loss_tile_tokens, mlp_tile_tokens: tokens per tile of the loss and of feed-forward layers, 0 to disable tiling.
    activation_checkpointing: "none", "full" (keeps each layer's input) or "save_attention" (also attention's outputs).
    offload: True to keep the inputs of checkpointed layers on the host until the backward pass.
    """

    loss_tile_tokens: Annotated[int, Number(ge=0)] = 0
    mlp_tile_tokens: Annotated[int, Number(ge=0)] = 0
    activation_checkpointing: Annotated[str, OneOf(CHECKPOINTING)] = "none"
    offload: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_limits(self)
        if self.offload and self.activation_checkpointing == "none":
            raise DistattnError(
                'offload takes the inputs of checkpointed layers to the host: set activation_checkpointing = "full".'
            )

    @property
    def loss(self) -> TiledLoss | None:
        """The `loss` argument of `distattn.adapters.pytorch.local_loss`."""
        return TiledLoss(self.loss_tile_tokens) if self.loss_tile_tokens else None

    def apply(self, model: Any, offload: HostOffload | None = None) -> None:
        """Apply the settings once to a transformers model, sharded or not. offload: used instead of a new `HostOffload`."""
        if self.mlp_tile_tokens:
            tile_feed_forward(model, self.mlp_tile_tokens)
        if self.activation_checkpointing != "none":
            save = "attention" if self.activation_checkpointing == "save_attention" else "nothing"
            on_host = (offload or HostOffload()) if self.offload else None
            checkpoint_layers(model.get_decoder().layers, save=save, offload=on_host)
