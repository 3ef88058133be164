"""Devices whose work is queued on streams, and the device that is current in a thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# kinds of devices whose streams and events are those of torch.cuda
_KINDS = {"cuda"}


def has_streams(device: torch.device) -> bool:
    """Return whether a device works off streams: a call returns before its work is done."""
    return device.type in _KINDS


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device current in this thread for a while; does nothing for the CPU.

    Triton launches on the current device, and streams and events are those of the current device. It need not be the device of
    the tensors: a new thread begins with device 0.
    """
    return torch.cuda.device(device) if has_streams(device) else nullcontext()


def on_device_of_tensors(function: Function) -> Function:
    """Decorate a function whose first argument is a tensor: make that tensor's device current during a call."""

    @wraps(function)
    def on_device(first: Tensor, *others: Any) -> Any:
        if first.device.type not in _KINDS:
            return function(first, *others)
        with current_device(first.device):
            return function(first, *others)

    return on_device  # type: ignore[return-value]
