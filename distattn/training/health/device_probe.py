"""Measures a GPU's current speed with a matrix product that is the same on all ranks and needs no communication."""

from __future__ import annotations

import math
from typing import Any

import torch

# rows and columns of the square matrices, and number of products: 2.7 TFLOP in total
_SIZE, _PRODUCTS = 2048, 160


class DeviceProbe:
    """The probe of one device. It uses 25 MB of device memory while it measures."""

    def __init__(self, device: torch.device):
        self._device = device

    def seconds(self) -> float:
        """Return the seconds that the products take by the device's clock; NaN without a GPU or enough free memory.

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
        # use random data, since zeros would draw less power than real data, and a separate generator, which leaves
        # training's random state unchanged
        random = torch.Generator(self._device).manual_seed(0)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": self._device}
        a, b = (torch.randn(_SIZE, _SIZE, generator=random, **options) for _ in range(2))
        out = torch.empty_like(a)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # warm up: the first product selects and loads a kernel
        torch.mm(a, b, out=out)
        begin.record()
        for _ in range(_PRODUCTS):
            torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
