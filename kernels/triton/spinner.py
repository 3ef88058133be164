"""A kernel that only holds some multiprocessors, as the kernels of a communicator do while messages travel.

Each program has 32 warps, whose registers take most of those of a multiprocessor, so that a program of an attention kernel does
not fit next to it. It ends when a flag is set, and by itself after a number of turns, so that nothing waits for it forever.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distattn.kernels.triton.launch import TritonLaunch, multiprocessors

# with 32 numbers in each of its 1024 threads
_WARPS, _NUMBERS = 32, 32 * 1024
# NCCL takes 16 to 32 channels, each of which holds one of the 132 multiprocessors of an H100
_SHARE = 8
# a turn waits for a number from the L2 cache, about half a microsecond; all turns take some seconds
_MOST_TURNS = 1 << 23
# seconds until all programs run; only a device that other processes use needs longer
_STARTS_WITHIN = 1.0


@triton.jit(do_not_specialize=["most"])
def spin_kernel(flags_, numbers_, most, NUMBERS: tl.constexpr):
    """Count this program in flags[0], then compute until flags[1] is not 0, or for `most` turns."""
    place = numbers_ + tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    x = tl.load(place)
    tl.atomic_add(flags_, 1)
    turn = 0
    told = 0
    while (turn < most) & (told == 0):
        x = x * 0.5 + 1.0
        told = tl.load(flags_ + 1, volatile=True)
        turn += 1
    tl.store(place, x)


def spin_launch(flags: Tensor, numbers: Tensor, programs: int, most: int = _MOST_TURNS) -> TritonLaunch:
    """Return the launch of `programs` programs. flags: two int32 zeros. numbers: (programs * _NUMBERS,) fp32."""
    arguments: dict[str, Any] = dict(flags_=flags, numbers_=numbers, most=most, NUMBERS=_NUMBERS)
    return TritonLaunch(spin_kernel, (programs,), arguments, {"num_warps": _WARPS})


class Spinner:
    """The running kernel, on its own stream and on an eighth of the multiprocessors of the current device."""

    def __init__(self, device: torch.device):
        """Start the kernel. If not all of its programs run in time, stop them and raise TimeoutError."""
        self.programs = max(multiprocessors(device) // _SHARE, 1)
        # the number of programs that have started, and the flag that stops them
        self.flags = torch.zeros(2, dtype=torch.int32, device=device)
        numbers = torch.zeros(self.programs * _NUMBERS, device=device)
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        launch = spin_launch(self.flags, numbers, self.programs)
        with torch.cuda.stream(self.stream):
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
        # held until `stop` has waited for the stream
        self._numbers = numbers
        self._wait_for_start()

    def stop(self) -> None:
        """End all programs after the work of the current stream, and wait for their end."""
        self.flags[1].fill_(1)
        self.stream.synchronize()

    def _wait_for_start(self) -> None:
        latest = time.monotonic() + _STARTS_WITHIN
        while (started := int(self.flags[0])) < self.programs:
            if time.monotonic() > latest:
                self.stop()
                raise TimeoutError(f"{started} of {self.programs} programs have started in {_STARTS_WITHIN} s")
