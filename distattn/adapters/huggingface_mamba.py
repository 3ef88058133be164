"""Hugging Face transformers: Mamba models without attention, which do not pass keyword arguments on to their layers.

The layers of `huggingface_recurrent` find the batch among the keyword arguments of the model's call. `Mamba2ForCausalLM` passes
only the mask on to the `Mamba2Model` inside it, so the batch takes the mask's place there. Since the batch is an argument of the
call, not a global, it cannot reach other models or threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from distattn.adapters.huggingface_modules import model_folder
from distattn.adapters.huggingface_recurrent import check_mixing_layer
from distattn.batch.local_batch import BatchAttention
from distattn.ir.errors import DistattnError

# transformers' folders of models without attention, and the prefixes of their class names
_ALONE = {"falcon_mamba": "FalconMamba", "mamba": "Mamba", "mamba2": "Mamba2"}


def pass_batches_to_layers(module: ModuleType) -> None:
    """Make language models without attention pass a sharded batch on to their layers, or refuse it (Mamba-1).

    module: one of transformers' modeling modules; see `huggingface_modules.patch_model_modules`.
    """
    begin = _ALONE.get(model_folder(module.__name__))
    if begin is not None:
        outer, inner = getattr(module, f"{begin}ForCausalLM"), getattr(module, f"{begin}Model")
        outer.forward, inner.forward = _in_place_of_mask(outer.forward), _from_place_of_mask(inner.forward)


@dataclass(frozen=True)
class _InPlaceOfMask:
    batch: BatchAttention


def _in_place_of_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def language_model(self: Any, *arguments: Any, context_parallel: BatchAttention | None = None, **named: Any) -> Any:
        if context_parallel is None:
            return forward(self, *arguments, **named)
        check_mixing_layer(0, self.config)
        if named.get("attention_mask") is not None:
            raise DistattnError(
                "a padding mask was passed to the model; pass it to ContextParallel.shard, which leaves padding out."
            )
        return forward(self, *arguments, **named | {"attention_mask": _InPlaceOfMask(context_parallel)})

    return language_model


def _from_place_of_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def model(self: Any, *arguments: Any, **named: Any) -> Any:
        mask = named.get("attention_mask")
        if isinstance(mask, _InPlaceOfMask):
            named |= {"attention_mask": None, "context_parallel": mask.batch}
        return forward(self, *arguments, **named)

    return model
