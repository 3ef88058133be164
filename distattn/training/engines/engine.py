"""What a training loop asks of whatever holds a model, its gradients and its optimizer over the ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from distattn.driver.context_parallel import ContextParallel

# a sharded micro-batch, as `ContextParallel.steps` yields it
Batch = Mapping[str, Any]
# called with the losses of a micro-batch's tokens (T,), detached, and the micro-batch
OnTokenLosses = Callable[[Tensor, Batch], None]
# kinds of tensors that only an update changes, beside the names that an optimizer gives its own
WEIGHT, MASTER_WEIGHT, COUNTS = "weight", "master weight", "counts of updates"
# (kind, name of the parameter, this rank's part)
StateTensor = tuple[str, str, Tensor]


class EngineState(NamedTuple):
    """All that training changes, under names that every engine uses alike.

    model: parameters by their names in transformers. exp_avg, exp_avg_sq: AdamW's averages by the same names. updates: how
    often parameters have been updated.
    """

    model: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    updates: int


Keep = Callable[[str, Tensor], Tensor]


def cloned(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor beside it, on its device."""
    return tensor.detach().clone()


def host_tensor(name: str, tensor: Tensor) -> Tensor:
    """Return an empty tensor on the host like another one, for what is read from a checkpoint."""
    return torch.empty_like(tensor, device="cpu")


class PipelineStage(NamedTuple):
    """Which stage of a pipeline this rank computes: stages run one after the other, and backward in the reverse order.

    number: from 0, of so many stages. first_layer: the first of the whole model's layers that it has; its modules count from 0.
    """

    number: int = 0
    stages: int = 1
    first_layer: int = 0

    def turn(self, backward: bool) -> int:
        """When the stage has its turn with a micro-batch: 0 to stages - 1 forward, stages + 1 to 2 x stages backward."""
        return 2 * self.stages - self.number if backward else self.number

    @property
    def turn_of_loss(self) -> int:
        """When the loss is computed: after all stages forward, before all backward."""
        return self.stages

    @property
    def is_last(self) -> bool:
        """Whether the stage computes the loss."""
        return self.number == self.stages - 1

    def module_name(self, name: str) -> str:
        """The name of a module of this stage, its layer counted in the whole model."""
        return re.sub(r"(?<=\blayers\.)\d+", lambda found: str(int(found[0]) + self.first_layer), name, count=1)


class Engine(Protocol):
    """A model, its gradients and its optimizer, over all ranks of a run. All methods are collective calls.

    cp: shards batches. model: the module that runs on this rank, for hooks. stage: what part of the whole model that is.
    """

    cp: ContextParallel
    model: torch.nn.Module
    stage: PipelineStage

    def backward(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Forward and backward of a step's micro-batches; gradients are added up. Returns their losses, detached."""

    def evaluate(self, batches: Sequence[Batch], on_token_losses: OnTokenLosses | None = None) -> list[Tensor]:
        """Losses of micro-batches, without gradients; the model is in evaluation mode already."""

    def clip(self, limit: float) -> float:
        """Scale gradients down to a global norm; returns what it was before. `update` or `drop` follows."""

    def update(self, learning_rate: float) -> None:
        """Take the optimizer's step, and drop the gradients."""

    def drop(self) -> None:
        """Drop the gradients without a step."""

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's parameters by their names in transformers, gradients beside them where the engine shows them."""

    def state_tensors(self) -> Iterator[StateTensor]:
        """Yield this rank's part of weights and optimizer state, which only `update` and `load` may change; not collective."""

    def state(self, keep: Keep = cloned) -> EngineState:
        """Return what is saved: references or copies; a checkpoint is read into the tensors, and then given to `load`.

        keep: returns a copy of a tensor that was gathered, given a name for it that no other tensor of the state has.
        """

    def load(self, state: EngineState) -> None:
        """Take over what was read into the tensors of `state`."""

    def close(self) -> None:
        """End what the engine began."""
