"""The interface between the training loop and an engine, which holds model, gradients and optimizer across the ranks."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distattn.driver.context_parallel import ContextParallel
from distattn.ir.errors import DistattnError
from distattn.training.config.run_file import Config

# a sharded micro-batch, as `ContextParallel.steps` yields it
Batch = Mapping[str, Any]
# called with a micro-batch's per-token losses (T,), detached, and the micro-batch
OnTokenLosses = Callable[[Tensor, Batch], None]
# kinds of state tensors; the other kinds are the optimizer's names for its state, such as exp_avg
WEIGHT, MASTER_WEIGHT, COUNTS = "weight", "master weight", "counts of updates"
# (kind, parameter name, this rank's shard)
StateTensor = tuple[str, str, Tensor]
# engine name -> class, package needed besides torch and transformers, and distattn's extra that installs the package
_ENGINES = {
    "fsdp2": ("Fsdp2Engine", "", ""),
    "deepspeed": ("DeepSpeedEngine", "deepspeed", "deepspeed"),
    "megatron": ("MegatronEngine", "megatron", "megatron"),
}


class EngineState(NamedTuple):
    """All state that training changes, with the same names in every engine.

    model: parameters by their names in transformers. exp_avg, exp_avg_sq: AdamW's averages by the same names. updates:
    number of optimizer steps taken.
    """

    model: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    updates: int


Keep = Callable[[str, Tensor], Tensor]


def cloned(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on its device."""
    return tensor.detach().clone()


def host_tensor(name: str, tensor: Tensor) -> Tensor:
    """Return an uninitialized host tensor of the same shape and dtype, to read a checkpoint into."""
    return torch.empty_like(tensor, device="cpu")


def assign_keepers(model: torch.nn.Module, ranks: Sequence[int]) -> dict[str, int]:
    """Return, by parameter name, the rank that keeps the gathered parameter: that with the fewest elements so far."""
    elements, keepers = dict.fromkeys(ranks, 0), {}
    for name, parameter in model.named_parameters():
        keepers[name] = min(ranks, key=lambda rank: elements[rank])
        elements[keepers[name]] += parameter.numel()
    return keepers


class PipelineStage(NamedTuple):
    """This rank's pipeline stage. Stages run forward in order, and backward in reverse order.

    number: 0 to stages - 1. first_layer: index of the stage's first layer in the entire model. The stage's module
    numbers its own layers from 0.
    """

    number: int = 0
    stages: int = 1
    first_layer: int = 0

    def turn(self, backward: bool) -> int:
        """Return the stage's turn on a micro-batch: 0 to stages - 1 forward, stages + 1 to 2 x stages backward."""
        return 2 * self.stages - self.number if backward else self.number

    @property
    def turn_of_loss(self) -> int:
        """The turn of the loss: after the forward turns and before the backward turns."""
        return self.stages

    @property
    def is_last(self) -> bool:
        """True if the stage computes the loss."""
        return self.number == self.stages - 1

    def module_name(self, name: str) -> str:
        """Return the name of one of this stage's modules, with the layer's index in the entire model."""
        return re.sub(r"(?<=\blayers\.)\d+", lambda match: str(int(match[0]) + self.first_layer), name, count=1)


class Engine(Protocol):
    """A model, its gradients and its optimizer across all ranks of a run. Methods are collective calls unless noted.

    cp: shards batches. model: the module that runs on this rank, for hooks. stage: this rank's pipeline stage.
    """

    cp: ContextParallel
    model: torch.nn.Module
    stage: PipelineStage

    def backward(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Run the forward and backward passes of the micro-batches, and sum the gradients. Return their losses, detached."""

    def evaluate(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Return the losses of micro-batches, without gradients. The caller has put the model into evaluation mode."""

    def clip(self, limit: float) -> float:
        """Clip gradients to a global norm, and return the norm before clipping. Call `update` or `drop` afterwards."""

    def update(self, learning_rate: float) -> None:
        """Take an optimizer step, and drop the gradients."""

    def drop(self) -> None:
        """Drop the gradients without taking a step."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's parameters by their names in transformers, with gradients if the engine exposes them."""

    def state_tensors(self) -> Iterator[StateTensor]:
        """Yield this rank's shard of weights and optimizer state. Only `update` and `load` change it. Not collective."""

    def state(self, keep: Keep = cloned) -> EngineState:
        """Return the state to save, as references or copies. To load a checkpoint, read it into these tensors and call `load`.

        keep: a function that takes a name (unique in the state) and a gathered tensor, and returns a copy of the tensor.
        """

    def load(self, state: EngineState) -> None:
        """Load the state that was read into the tensors returned by `state`."""

    def close(self) -> None:
        """Release the engine's process groups, threads and other resources."""


def open_engine(config: Config, device: torch.device, vocabulary: int, context: int) -> Engine:
    """Build a run's model and optimizer in the engine that engine.name selects, the only one imported. A collective call.

    vocabulary: upper bound (exclusive) of token ids. context: tokens in the longest pack. Raises DistattnError if the
    engine's package is not installed.
    """
    class_name, package, extra = _ENGINES[config.engine.name]
    if device.type == "cpu":
        # DeepSpeed reads this during import, and would otherwise look for GPUs
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        module = importlib.import_module(f"distattn.training.engines.{config.engine.name}")
    except ModuleNotFoundError as error:
        if not package or (error.name or "").partition(".")[0] != package:
            raise
        raise DistattnError(
            f'engine.name: "{config.engine.name}" needs the package {package}; run pip install "distattn[{extra}]".'
        ) from None
    engine: Engine = getattr(module, class_name)(config, device, vocabulary, context)
    return engine
