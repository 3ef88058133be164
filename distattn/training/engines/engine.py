"""The interface between the training loop and an engine, which holds a model, its gradients and its optimizer over the ranks."""

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
# called with the losses of a micro-batch's tokens (T,), detached, and the micro-batch
OnTokenLosses = Callable[[Tensor, Batch], None]
# kinds of tensors that only an update changes, in addition to the optimizer's names for its own tensors
WEIGHT, MASTER_WEIGHT, COUNTS = "weight", "master weight", "counts of updates"
# (kind, name of the parameter, this rank's part)
StateTensor = tuple[str, str, Tensor]
# by name: its class, the package that it needs besides torch and transformers, and distattn's extra that installs it
_ENGINES = {
    "fsdp2": ("Fsdp2Engine", "", ""),
    "deepspeed": ("DeepSpeedEngine", "deepspeed", "deepspeed"),
    "megatron": ("MegatronEngine", "megatron", "megatron"),
}


class EngineState(NamedTuple):
    """All state that training changes, with the same names in every engine.

    model: parameters by their names in transformers. exp_avg, exp_avg_sq: AdamW's averages by the same names. updates: number of
    updates of the parameters.
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
    """Return an empty tensor on the host like another one, to read a checkpoint into."""
    return torch.empty_like(tensor, device="cpu")


def assign_keepers(model: torch.nn.Module, ranks: Sequence[int]) -> dict[str, int]:
    """Return the rank that keeps each parameter by name, for state that is gathered: the rank with the fewest elements so far."""
    elements, keepers = dict.fromkeys(ranks, 0), {}
    for name, parameter in model.named_parameters():
        keepers[name] = min(ranks, key=lambda rank: elements[rank])
        elements[keepers[name]] += parameter.numel()
    return keepers


class PipelineStage(NamedTuple):
    """This rank's stage of a pipeline: stages run one after the other, and backward in the reverse order.

    number: from 0 to stages - 1. first_layer: its first layer in the whole model; the layers of its own module count from 0.
    """

    number: int = 0
    stages: int = 1
    first_layer: int = 0

    def turn(self, backward: bool) -> int:
        """Return the stage's turn with a micro-batch: 0 to stages - 1 forward, stages + 1 to 2 x stages backward."""
        return 2 * self.stages - self.number if backward else self.number

    @property
    def turn_of_loss(self) -> int:
        """The turn of the loss: after the forward turns and before the backward turns."""
        return self.stages

    @property
    def is_last(self) -> bool:
        """Whether the stage computes the loss."""
        return self.number == self.stages - 1

    def module_name(self, name: str) -> str:
        """Return the name of a module of this stage, with its layer counted in the whole model."""
        return re.sub(r"(?<=\blayers\.)\d+", lambda match: str(int(match[0]) + self.first_layer), name, count=1)


class Engine(Protocol):
    """A model, its gradients and its optimizer over all ranks of a run. All methods are collective calls.

    cp: shards batches. model: the module that runs on this rank, for hooks. stage: this rank's part of the whole model.
    """

    cp: ContextParallel
    model: torch.nn.Module
    stage: PipelineStage

    def backward(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Run the step's micro-batches forward and backward, and sum their gradients. Return their losses, detached."""

    def evaluate(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Return the losses of micro-batches, without gradients. The model is already in evaluation mode."""

    def clip(self, limit: float) -> float:
        """Scale gradients down to a global norm; return the norm before. `update` or `drop` follows."""

    def update(self, learning_rate: float) -> None:
        """Take the optimizer's step, and drop the gradients."""

    def drop(self) -> None:
        """Drop the gradients without a step."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's parameters by their names in transformers, with gradients if the engine exposes them."""

    def state_tensors(self) -> Iterator[StateTensor]:
        """Yield this rank's part of weights and optimizer state, which only `update` and `load` may change; not collective."""

    def state(self, keep: Keep = cloned) -> EngineState:
        """Return the state to save, as references or copies. A checkpoint is read into these tensors and then passed to `load`.

        keep: returns a copy of a gathered tensor; its first argument is a name that is unique in the state.
        """

    def load(self, state: EngineState) -> None:
        """Load the values that were read into the tensors of `state`."""

    def close(self) -> None:
        """Release the engine's groups, threads and other resources."""


def open_engine(config: Config, device: torch.device, vocabulary: int, context: int) -> Engine:
    """Build the model and the optimizer of a run in the engine `engine.name`, without importing other engines. Collective.

    vocabulary: token ids are below it. context: tokens of the longest pack. Raise DistattnError if the engine's package is not
    installed.
    """
    class_name, package, extra = _ENGINES[config.engine.name]
    if device.type == "cpu":
        # DeepSpeed reads it during import; without it DeepSpeed looks for GPUs
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
