"""How fast a GPU is just now: it computes the same matrix product as all other ranks' GPUs, by itself."""

from __future__ import annotations

import math
from typing import Any

import torch

# rows and columns of the matrices, and how many products: 2.7 TFLOP
_SIZE, _PRODUCTS = 2048, 160


class DeviceProbe:
    """Of one device. It holds 25 MB of the device's memory while it measures."""

    def __init__(self, device: torch.device):
        self._device = device

    def seconds(self) -> float:
        """Of the products, by the device's own clock; NaN on what is no GPU, and where there is no memory for them just now.

        Waits until the device has done all that it was given.
        """
        if self._device.type != "cuda":
            return math.nan
        try:
            return self._measured()
        except torch.OutOfMemoryError:
            # no run is to end for it
            return math.nan

    def _measured(self) -> float:
        # numbers of its own: those of training stay as they are; zeros would take less power than what is trained
        random = torch.Generator(self._device).manual_seed(0)
        given: dict[str, Any] = {"dtype": torch.bfloat16, "device": self._device}
        a, b = (torch.randn(_SIZE, _SIZE, generator=random, **given) for _ in range(2))
        out = torch.empty_like(a)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the first one chooses a kernel, and loads it
        torch.mm(a, b, out=out)
        begin.record()
        for _ in range(_PRODUCTS):
            torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
