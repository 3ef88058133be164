"""What goes into and out of every module, and gradients of these and of weights, in the order in which they are computed.

A look is a small tensor that stays on the device until the pass is over, so that nothing waits. The order is the same on all
ranks of a step, because they run the same modules; a number in it tells which of two ranks saw something first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

INPUT, OUTPUT = "input", "output"
# the whole model, and what is computed around its modules
ROOT = "the model"
# what torch.compile puts around a module
_COMPILED = "_orig_mod"


@dataclass(frozen=True)
class Seen:
    """One tensor of a module. kind: input, output, or a parameter's name; gradient: that of it; elements: how many numbers."""

    module: str
    kind: str
    gradient: bool
    elements: int

    @property
    def computed_in(self) -> str:
        """The module whose code has made the tensor, as far as borders of modules tell.

        What a module is given was made around it, and so was the gradient of what it gives.
        """
        if (self.kind == OUTPUT) != self.gradient:
            return self.module
        return self.module.rpartition(".")[0] or ROOT

    def __str__(self) -> str:
        return f"{'gradient of ' if self.gradient else ''}{self.module} {self.kind}"


@dataclass
class Observations:
    """What was seen in a pass. values: the looks, on the device, one for each of `seen`."""

    seen: list[Seen] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def read(self) -> Tensor:
        """All looks, stacked, on the CPU; it waits for the device once."""
        return torch.stack(self.values).cpu() if self.values else torch.zeros(0)


@contextmanager
def observed_modules(model: torch.nn.Module, look: Callable[[Tensor], Tensor]) -> Iterator[Observations]:
    """Meanwhile `look` is given all floating-point tensors at the borders of modules, detached, as they are computed.

    Inputs are looked at where a module has no other modules in it: what others are given is some module's output, or theirs.
    Modules inside a compiled one are seen only while compilation is off (`torch.compiler.set_stance("force_eager")`). Recomputed
    activations are seen again.
    """
    found = Observations()
    hooks: list[Any] = []

    def see(module: str, kind: str, tensor: Tensor, gradient: bool = False) -> None:
        with torch.no_grad():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found.seen.append(Seen(module, kind, gradient, local.numel()))
            found.values.append(look(local.detach()))

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
        leaf, known = not any(True for _ in module.children()), plain_name(name) or ROOT
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, known=known, leaf=leaf: before(known, leaf, (args, kwargs)), with_kwargs=True
            )
        )
        hooks.append(
            module.register_forward_hook(lambda one, _, out, known=known, leaf=leaf: after(known, leaf, one, out))
        )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def plain_name(name: str) -> str:
    """The name of a module or parameter as the model has it that nobody has compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


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
