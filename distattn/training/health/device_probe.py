"""Measures the current speed of a GPU: it computes the same matrix product as all other ranks' GPUs, alone."""

from __future__ import annotations

import math
from typing import Any

import torch

# rows and columns of the matrices, and number of products: 2.7 TFLOP
_SIZE, _PRODUCTS = 2048, 160


class DeviceProbe:
    """The probe of one device. It holds 25 MB of the device's memory while it measures."""

    def __init__(self, device: torch.device):
        self._device = device

    def seconds(self) -> float:
        """Return the seconds of the products by the device's own clock; NaN without a GPU, or without free memory for
        them.

        Waits until the device has finished all earlier work.
        """
        if self._device.type != "cuda":
            return math.nan
        try:
            return self._measured()
        except torch.OutOfMemoryError:
            # a missing measurement must not end a run
            return math.nan

    def _measured(self) -> float:
        # a generator of its own leaves training's random numbers as they are; zeros would draw less power than real
        # data
        random = torch.Generator(self._device).manual_seed(0)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": self._device}
        a, b = (torch.randn(_SIZE, _SIZE, generator=random, **options) for _ in range(2))
        out = torch.empty_like(a)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # the first product chooses a kernel and loads it
        torch.mm(a, b, out=out)
        begin.record()
        for _ in range(_PRODUCTS):
            torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
