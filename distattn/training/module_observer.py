"""What goes into and out of every module, and gradients of these and of weights, in the order in which they are computed.

Messages of attention, which no module shows, are looked at by their senders. A look is a small tensor that stays on the device
until the pass is over, so that nothing waits. The order is the same on all ranks of a step, because they run the same modules, or
those of stages of a pipeline, which have their turns; places in it tell which of two ranks saw something first.
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
from distattn.parallel.runtime.communicator import all_gather_objects
from distattn.parallel.runtime.transport import Packet
from distattn.training.engines.engine import PipelineStage

INPUT, OUTPUT = "input", "output"
# the whole model, and what is computed around its modules
ROOT = "the model"
# what torch.compile puts around a module
_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class Seen:
    """One tensor of a module. kind: input, output, a parameter's name, or which message; gradient: that of it; elements: how many
    numbers it has."""

    module: str
    kind: str
    gradient: bool
    elements: int

    @property
    def computed_in(self) -> str:
        """The module whose code has made the tensor, as far as borders of modules tell.

        What a module is given was made around it, and so was the gradient of what it gives.
        """
        if self.kind == (OUTPUT if self.gradient else INPUT):
            return _around(self.module)
        return self.module

    def __str__(self) -> str:
        return f"{'gradient of ' if self.gradient else ''}{self.module} {self.kind}"


@dataclass
class Observations:
    """What was seen in a pass, in its order. values: the looks, on the device, one for each of `seen`.

    places: of each its place in the pass, the same on all ranks: the turn of the pipeline's stage, the number of the module's
    tensor, and of the exchange of messages after it, 0 for the tensor itself. Ranks may have unequally many messages in an
    exchange.
    """

    seen: list[Seen] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)

    def read(self) -> Tensor:
        """All looks, stacked, on the CPU; it waits for the device once."""
        return torch.stack(self.values).cpu() if self.values else torch.zeros(0)


@contextmanager
def observed_modules(
    model: torch.nn.Module,
    look: Callable[[Tensor], Tensor],
    messages: MessageMonitor | None = None,
    stage: PipelineStage = PipelineStage(),  # noqa: B008
) -> Iterator[Observations]:
    """Meanwhile `look` is given all floating-point tensors at the borders of modules, detached, as they are computed.

    messages: those of the driver, whose floating-point tensors are looked at before they are sent. stage: the pipeline's that
    `model` is.

    Inputs are looked at where a module has no other modules in it: what others are given is some module's output, or theirs.
    Modules inside a compiled one are seen only while compilation is off (`torch.compiler.set_stance("force_eager")`). Recomputed
    activations are seen again.
    """
    found = Observations()
    hooks: list[Any] = []
    # the last tensor of a module, and the last exchange after it
    place, last = [-1, 0], [ROOT]
    # the turn of the stage, which is another one from the first gradient on
    turn = [stage.turn(backward=False)]

    def see(module: str, kind: str, tensor: Tensor, gradient: bool = False, is_message: bool = False) -> None:
        if not is_message:
            place[:], last[:] = (place[0] + 1, 0), [module]
        if gradient:
            turn[0] = stage.turn(backward=True)
        with torch.no_grad():
            found.places.append((turn[0], place[0], place[1]))
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found.seen.append(Seen(module, kind, gradient, local.numel()))
            found.values.append(look(local.detach()))

    def see_sent(packets: Sequence[Packet]) -> None:
        place[1] += 1
        # attention is called between two modules of its layer
        layer = _around(last[0])
        for packet in packets:
            for tensor in _tensors(packet.tensor):
                see(layer, f"message {packet.name} to rank {packet.peer} of the group", tensor, is_message=True)

    def watch(module: str, kind: str, tensor: Tensor) -> None:
        """The gradient of a tensor, once it is there."""
        if tensor.requires_grad and torch.is_grad_enabled():
            hook = tensor.register_hook(lambda gradient: see(module, kind, gradient, True))
            if tensor.is_leaf:
                # a weight lives on
                hooks.append(hook)

    def before(name: str, leaf: bool, arguments: Any) -> None:
        for tensor in _tensors(arguments):
            if leaf:
                see(name, INPUT, tensor)
            watch(name, INPUT, tensor)

    def after(name: str, leaf: bool, module: torch.nn.Module, out: Any) -> None:
        for tensor in _tensors(out):
            see(name, OUTPUT, tensor)
            if leaf:
                watch(name, OUTPUT, tensor)
        # those that FSDP2 has gathered for this call, before their gradients are reduced
        for kind, parameter in module.named_parameters(recurse=False):
            watch(name, kind, parameter)

    for name, module in model.named_modules():
        leaf, known = not any(True for _ in module.children()), stage.module_name(plain_name(name)) or ROOT
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, known=known, leaf=leaf: before(known, leaf, (args, kwargs)), with_kwargs=True
            )
        )
        hooks.append(
            module.register_forward_hook(lambda one, _, out, known=known, leaf=leaf: after(known, leaf, one, out))
        )
    if messages is not None:
        messages.on_send = see_sent
    try:
        yield found
    finally:
        if messages is not None:
            messages.on_send = None
        for hook in hooks:
            hook.remove()


def gathered(group: dist.ProcessGroup | None, value: Any) -> list[Any]:
    """A value of every rank of a group; None is this process alone. A collective call."""
    if group is None or dist.get_world_size(group) == 1:
        return [value]
    return all_gather_objects(group, value)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor, detached."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def plain_name(name: str) -> str:
    """The name of a module or parameter as the model has it that nobody has compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _around(module: str) -> str:
    return module.rpartition(".")[0] or ROOT


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in tuples, lists and mappings, a transformers model's output among them."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
