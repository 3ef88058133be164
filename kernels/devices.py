"""Helpers for devices that queue work on streams, and for a thread's current device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# types of devices that use the streams and events of torch.cuda
_KINDS = {"cuda"}


def has_streams(device: torch.device) -> bool:
    """Return whether calls on the device are asynchronous: they queue work on a stream and return before it is done."""
    return device.type in _KINDS


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that makes a device current in this thread; for the CPU, it does nothing.

    Triton, streams and events use the current device, which may differ from the tensors' device: a new thread starts
    with device 0.
    """
    return torch.cuda.device(device) if has_streams(device) else nullcontext()


def on_device_of_tensors(function: Function) -> Function:
    """Decorate a function whose first argument is a tensor so that the tensor's device is current during each call."""

    @wraps(function)
    def on_device(first: Tensor, *others: Any) -> Any:
        if first.device.type not in _KINDS:
            return function(first, *others)
        with current_device(first.device):
            return function(first, *others)

    return on_device  # type: ignore[return-value]
