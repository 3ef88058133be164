"""A kernel that only occupies some multiprocessors, as communication kernels do while messages are in flight.

Each program has 32 warps, which use most of a multiprocessor's registers, so no program of an attention kernel fits
next to it. It ends when a flag is set, or on its own after a fixed number of iterations, so that nothing waits for it
forever.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.triton.launch import TritonLaunch, multiprocessors

# warps and elements per program: each of its 1024 threads holds 32 numbers
_WARPS, _NUMBERS = 32, 32 * 1024
# occupy an eighth of the multiprocessors: NCCL uses 16 to 32 channels, each on one of the 132 multiprocessors of an H100
_SHARE = 8
# maximum number of iterations, a few seconds: each waits about half a microsecond for a load from the L2 cache
_MOST_TURNS = 1 << 23
# seconds within which all programs must start; they need longer only on a device shared with other processes
_STARTS_WITHIN = 1.0


@triton.jit(do_not_specialize=["most"])
def spin_kernel(flags_, numbers_, most, NUMBERS: tl.constexpr):
    """Count this program in flags[0], then spin until flags[1] is not 0, for at most `most` iterations."""
    place = numbers_ + tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    x = tl.load(place)
    tl.atomic_add(flags_, 1)
    turn = 0
    stop = 0
    while (turn < most) & (stop == 0):
        x = x * 0.5 + 1.0
        stop = tl.load(flags_ + 1, volatile=True)
        turn += 1
    tl.store(place, x)


def spin_launch(flags: Tensor, numbers: Tensor, programs: int, most: int = _MOST_TURNS) -> TritonLaunch:
    """Return a launch with `programs` programs. flags: two int32 zeros. numbers: (programs * _NUMBERS,), fp32."""
    arguments: dict[str, Any] = dict(flags_=flags, numbers_=numbers, most=most, NUMBERS=_NUMBERS)
    return TritonLaunch(spin_kernel, (programs,), arguments, {"num_warps": _WARPS})


class Spinner:
    """The running kernel: it has its own stream and occupies an eighth of the device's multiprocessors."""

    def __init__(self, device: torch.device):
        """Start the kernel. If not all of its programs start in time, stop them and raise TimeoutError."""
        self.programs = max(multiprocessors(device) // _SHARE, 1)
        # the number of programs started, and the flag that stops them
        self.flags = torch.zeros(2, dtype=torch.int32, device=device)
        numbers = torch.zeros(self.programs * _NUMBERS, device=device)
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        launch = spin_launch(self.flags, numbers, self.programs)
        with torch.cuda.stream(self.stream):
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
        # keep the memory allocated while the kernel uses it on its own stream
        self._numbers = numbers
        self._wait_for_start()

    def stop(self) -> None:
        """Stop all programs once the current stream's work is done, and wait until they have ended."""
        self.flags[1].fill_(1)
        self.stream.synchronize()

    def _wait_for_start(self) -> None:
        latest = time.monotonic() + _STARTS_WITHIN
        while (started := int(self.flags[0])) < self.programs:
            if time.monotonic() > latest:
                self.stop()
                raise TimeoutError(f"{started} of {self.programs} programs have started in {_STARTS_WITHIN} s")
