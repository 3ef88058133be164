"""Finds operators that make a GPU's host wait for the device. It uses meta tensors and looks inside our own operators.

Such operators read a number from the device, return a result whose size depends on the data, copy from the device, or
copy to the device from pageable memory or without `non_blocking`. `torch.tensor(list, device=...)` is such a copy, but
PyTorch skips the copy for meta tensors. The functions that make tensors from lists are therefore watched by name.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, partialmethod
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C import TensorBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# these imports register our operators
import distattn.ops.attention
import distattn.ops.convolution
import distattn.ops.latent
import distattn.ops.recurrence  # noqa: F401
from distattn.kernels import devices
from distattn.ops.planned_op import AUTOGRAD, IMPLEMENTATIONS

META = torch.device("meta")
_SYNCHRONISE = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "_unique2",
    "bincount",
)
# on GPUs, _FILL operators read the fill value from the device (`value.item()` in ATen), and _PUT operators copy a
# number from the host
_FILL = ("masked_fill", "masked_fill_", "index_fill", "index_fill_")
_PUT = ("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
# functions that build a tensor from Python numbers and copy it to the device
_OF_NUMBERS = ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (Tensor, "new_tensor"))
_VIEWS_AND_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "set_")


def wait_of(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> str | None:
    """Return why an operator makes the host wait, or None if it does not."""
    return _wait_of_numbers(func, args, kwargs) or _wait_of_copy(func, args, kwargs, results)


def _wait_of_numbers(func: Any, args: Any, kwargs: Any) -> str | None:
    """Return why an operator reads values from the device, judging by its arguments, or None if it does not."""
    name, tensors = func.overloadpacket.__name__, _tensors((args, kwargs))
    if not any(x.device == META for x in tensors):
        return None
    if name in _SYNCHRONISE or str(func).startswith("aten.repeat_interleave.Tensor"):
        return f"{name} waits for the device"
    if name in _FILL and any(x.dim() == 0 and x.device == META for x in _tensors(args[1:])):
        return f"{name} reads the fill value from the device"
    if "index" in name and any(x.dtype == torch.bool for x in tensors):
        return f"{name} by a boolean mask counts on the host"
    return None


def _wait_of_copy(func: Any, args: Any, kwargs: Any, results: list[Tensor], pinned: Container[int] = ()) -> str | None:
    """Return why an operator waits for a copy, or None if it does not. pinned: the addresses of pinned storages."""
    name, tensors = func.overloadpacket.__name__, _tensors((args, kwargs))
    if {x.device.type for x in (*tensors, *results)} != {"cpu", "meta"}:
        return None
    host = next(x for x in (*tensors, *results) if x.device.type == "cpu")
    asynchronous = (kwargs or {}).get("non_blocking") or (name == "copy_" and tuple(args[2:]) == (True,))
    if name in ("_to_copy", "copy_") and asynchronous and host.untyped_storage()._cdata in pinned:
        return None
    # a scalar on the host is passed as a launch argument, but index_put_ copies it to the device
    if name not in ("_to_copy", "copy_", *_PUT) and all(x.dim() == 0 for x in tensors if x.device.type == "cpu"):
        return None
    return f"{name} copies between host and device"


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class HostWaits(TorchDispatchMode):
    """A dispatch mode that records this thread's waits, each with the line of our code that causes it, and counts
    operator launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: Counter[str] = Counter()
        # keeps the tensors alive, so that no other storage reuses their addresses
        self._pinned: dict[int, Tensor] = {}

    def note(self, reason: str) -> None:
        """Record a wait and the line of our code that caused it."""
        ours = [line for line in traceback.extract_stack() if "/tests/support/" not in line.filename]
        lines = [line for line in ours if "/torch/" not in line.filename and "site-packages" not in line.filename]
        self.waits.append(f"{reason}: {lines[-1].filename}:{lines[-1].lineno}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        pins = bool(kwargs.pop("pin_memory", False))
        if name == "_local_scalar_dense" and args[0].device == META:
            self.note("a number is read from the device")
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "_to_copy" and args[0].device == META and torch.device(kwargs.get("device") or META) != META:
            self.note("a tensor is copied to the host")
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if wait := _wait_of_numbers(func, args, kwargs):
            self.note(wait)
        out = func(*args, **kwargs)
        results = _tensors(out)
        if pins:
            self._pinned |= {x.untyped_storage()._cdata: x for x in results}
        if wait := _wait_of_copy(func, args, kwargs, results, self._pinned):
            self.note(wait)
        storages = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        written = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        is_view = all(x.untyped_storage()._cdata in storages for x in results) and not written
        if name not in _VIEWS_AND_EMPTY and not is_view and any(x.device == META for x in results or args):
            self.launches[name] += 1
        return out


@contextmanager
def host_waits() -> Iterator[HostWaits]:
    """Record waits inside the `with` block, where "meta" acts as a device with streams and memory can be pinned."""
    watch = HostWaits()

    def counted(make: Any, *args: Any, **how: Any) -> Tensor:
        out = make(*args, **how)
        if out.device == META and not (isinstance(args[-1], Tensor) and args[-1].device == META):
            watch.note("a list is copied to the device")
        return out

    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled
    patches = [
        mock.patch.object(devices, "_KINDS", {"cuda", META.type}),
        mock.patch.object(torch.cuda, "device", lambda device: nullcontext()),
        mock.patch.object(torch.cuda, "current_stream", lambda device=None: None),
        mock.patch.object(torch, "autocast", lambda kind, **how: autocast(_kind(kind), **how)),
        mock.patch.object(torch, "is_autocast_enabled", lambda kind: is_enabled(_kind(kind))),
        *_operators_as_functions(),
    ]
    with ExitStack() as stack:
        for owner, name in _OF_NUMBERS:
            make = getattr(owner, name)
            stand_in: Any = partial(counted, make)
            if owner is Tensor:

                def stand_in(x: Tensor, *args: Any, make: Any = make, **how: Any) -> Tensor:
                    return counted(make, x, *args, **how)

            patches.append(mock.patch.object(owner, name, stand_in))
        patches.append(mock.patch.object(Tensor, "__setitem__", partialmethod(_assigned, watch)))
        for patch in patches:
            stack.enter_context(patch)
        with watch:
            yield watch


def _assigned(x: Tensor, watch: HostWaits, index: Any, value: Any) -> None:
    """Assign to x[index] as Python does. Note the wait for a number that PyTorch copies from the host on GPUs, but not on
    "meta".
    """
    if x.device == META and isinstance(value, (bool, int, float)) and any(tensor.dim() for tensor in _tensors(index)):
        watch.note("a number is copied to the device")
    TensorBase.__setitem__(x, index, value)


def _kind(kind: str) -> str:
    return "cuda" if kind == META.type else kind


def _operators_as_functions() -> Iterator[Any]:
    """Yield patches that turn our operators into plain autograd functions.

    For meta tensors PyTorch would only compute our operators' result shapes. With these patches, the operators that our
    operators call are seen too.
    """
    for prefix, (save, differentiate) in AUTOGRAD.items():
        forward, backward = (IMPLEMENTATIONS[f"distattn::{prefix}{direction}"] for direction in ("forward", "backward"))
        methods = {"forward": forward, "setup_context": save, "backward": differentiate}
        function = type("Operator", (torch.autograd.Function,), {name: staticmethod(f) for name, f in methods.items()})
        yield mock.patch.object(torch.ops.distattn, f"{prefix}forward", function.apply)
        yield mock.patch.object(torch.ops.distattn, f"{prefix}backward", backward)
