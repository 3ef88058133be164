"""Observes every module's inputs and outputs, their gradients, and weight gradients, in the order of computation.

Attention's messages, which are not visible at module boundaries, are observed by their senders. An observation is a
small tensor that stays on the device until the pass is over, so nothing synchronizes. Each observation has a place in
the pass. Places are comparable across ranks, since all ranks run the same modules or pipeline stages with a fixed order
of turns, so they tell which rank observed something first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distattn.driver.message_monitor import MessageMonitor
from distattn.parallel.runtime.communication.communicator import all_gather_objects
from distattn.parallel.runtime.communication.transport import Packet
from distattn.training.engines.engine import PipelineStage

INPUT, OUTPUT = "input", "output"
# stands for the entire model, including code outside its submodules
ROOT = "the model"
# the wrapper that torch.compile puts around a module
_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class ObservedTensor:
    """A tensor of one module. kind: "input", "output", a parameter's name, or a description of a message.

    gradient: True for the gradient of that tensor. elements: number of values.
    """

    module: str
    kind: str
    gradient: bool
    elements: int

    @property
    def computed_in(self) -> str:
        """The module whose code computed the tensor, as far as module boundaries show it.

        A module's input and the gradient of its output are computed by the enclosing module.
        """
        if self.kind == (OUTPUT if self.gradient else INPUT):
            return _around(self.module)
        return self.module

    def __str__(self) -> str:
        return f"{'gradient of ' if self.gradient else ''}{self.module} {self.kind}"


@dataclass
class Observations:
    """The observations of a pass, in order. values: one value on the device for each tensor in `seen`.

    places: each tensor's place in the pass, comparable across ranks: (turn of the pipeline stage, index of the module's
    tensor, index of the message exchange after it). The last index is 0 for the tensor itself. All messages of an
    exchange share a place, since ranks may send different numbers of messages in it.
    """

    seen: list[ObservedTensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self) -> Tensor:
        """Return all observations stacked, on the CPU. Synchronizes with the device once."""
        return torch.stack(self.values).cpu() if self.values else torch.zeros(0)


@contextmanager
def observed_modules(
    model: torch.nn.Module,
    look: Callable[[Tensor], Tensor],
    messages: MessageMonitor | None = None,
    stage: PipelineStage = PipelineStage(),  # noqa: B008
) -> Iterator[Observations]:
    """Call `look` on every floating-point tensor (detached) that crosses a module boundary within the block.

    messages: the driver's monitor; floating-point tensors in messages are observed before they are sent. stage: the
    pipeline stage of `model`.

    Inputs are observed only for modules without submodules, since the inputs of other modules are outputs that are
    observed anyway. Modules inside a compiled module are observed only while compilation is off
    (`torch.compiler.set_stance("force_eager")`). Recomputed activations are observed again.
    """
    observations = Observations()
    hooks: list[Any] = []
    # place: index of the last tensor, and of the last exchange after it; last: the module of that tensor
    place, last = [-1, 0], [ROOT]
    # the stage's turn; it changes at the first gradient
    turn = [stage.turn(backward=False)]

    def record(module: str, kind: str, tensor: Tensor, gradient: bool = False, is_message: bool = False) -> None:
        if not is_message:
            place[:], last[:] = (place[0] + 1, 0), [module]
        if gradient:
            turn[0] = stage.turn(backward=True)
        with torch.no_grad():
            observations.places.append((turn[0], place[0], place[1]))
            local = local_part(tensor)
            observations.seen.append(ObservedTensor(module, kind, gradient, local.numel()))
            observations.values.append(look(local))

    def record_sent(packets: Sequence[Packet]) -> None:
        place[1] += 1
        # the attention function runs between two modules of its layer, so the layer encloses the last module
        layer = _around(last[0])
        for packet in packets:
            for tensor in _tensors(packet.tensors()):
                record(layer, f"message {packet.name} to rank {packet.peer} of the group", tensor, is_message=True)

    def watch_gradient(module: str, kind: str, tensor: Tensor) -> None:
        """Record the gradient of a tensor when it is computed."""
        if tensor.requires_grad and torch.is_grad_enabled():
            hook = tensor.register_hook(lambda gradient: record(module, kind, gradient, True))
            if tensor.is_leaf:
                # weights outlive the pass, so their hooks must be removed
                hooks.append(hook)

    def before(name: str, leaf: bool, arguments: Any) -> None:
        for tensor in _tensors(arguments):
            if leaf:
                record(name, INPUT, tensor)
            watch_gradient(name, INPUT, tensor)

    def after(name: str, leaf: bool, module: torch.nn.Module, out: Any) -> None:
        for tensor in _tensors(out):
            record(name, OUTPUT, tensor)
            if leaf:
                watch_gradient(name, OUTPUT, tensor)
        # FSDP2 has gathered these parameters for this call, so their gradients are seen before reduction
        for kind, parameter in module.named_parameters(recurse=False):
            watch_gradient(name, kind, parameter)

    for name, module in model.named_modules():
        leaf, module_name = not any(True for _ in module.children()), stage.module_name(plain_name(name)) or ROOT
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, module_name=module_name, leaf=leaf: before(module_name, leaf, (args, kwargs)),
                with_kwargs=True,
            )
        )
        hooks.append(
            module.register_forward_hook(
                lambda module, _, out, module_name=module_name, leaf=leaf: after(module_name, leaf, module, out)
            )
        )
    if messages is not None:
        messages.on_send = record_sent
    try:
        yield observations
    finally:
        if messages is not None:
            messages.on_send = None
        for hook in hooks:
            hook.remove()


def gather_values(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """Return the values of all ranks of a group, or only this process's if group is None. A collective call."""
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    return all_gather_objects(group, value)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def plain_name(name: str) -> str:
    """Return the name that a module or parameter had before torch.compile wrapped its module."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _around(module: str) -> str:
    return module.rpartition(".")[0] or ROOT


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in tuples, lists and mappings, such as a transformers model's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
