"""Kernels on trial: each that could serve a launch is compared with the reference on a sample of it, and timed on a larger one.

So a kernel that is wrong on this device, with this driver or compiler, is found before it computes anything, and the fastest
right one is taken. Where most of a rank's cells are computed while messages are in flight, kernels are timed beside another
kernel that holds some multiprocessors, as the communicator's do then.
"""

# T query rows, S key rows, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.ir.bands import K0, K1, OK, OQ, Q0, Q1, areas, clip, row_key_ranges
from distattn.ir.errors import DistattnError
from distattn.kernels import reference
from distattn.kernels.devices import current_device
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.registry import Kernel, load_kernel
from distattn.kernels.spec import KernelRequirements, ScoreMod
from distattn.kernels.triton.launch import schedule_to_device

# of a tensor's norm: what rounding of inputs and weights explains, several times over
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-9}
# rows, keys and heads of samples: some for comparison, and at most so many for times
_COMPARED, _TIMED = (384, 512, 8), (16384, 16384, 1 << 30)
_RUNS = 3
_SEED = 1234
# of a trial that runs out of memory, and by how much free memory has to grow before the next one
_MOST_ATTEMPTS, _MORE_MEMORY = 3, 1.25
_LOG = logging.getLogger("distattn")


class Trial(NamedTuple):
    """How a kernel did: the largest relative difference of a row from the reference, and seconds of forward and backward.

    fault: why it must not be used; an empty text where it is right. passing: the fault may be gone another time. lacked: bytes of
    device memory that were free before it, if they were too few. attempts: how often that has happened.
    """

    difference: float = 0.0
    seconds: float = 0.0
    fault: str = ""
    passing: bool = False
    lacked: int = 0
    attempts: int = 0

    def may_succeed_now(self, device: torch.device) -> bool:
        """Return whether a trial that ran out of memory should be made again: a few times, each with a quarter more memory."""
        return 0 < self.attempts < _MOST_ATTEMPTS and free_bytes(device) >= _MORE_MEMORY * self.lacked


def try_each(
    names: Sequence[str],
    requirements: KernelRequirements,
    differences: Callable[[Any], list[float]],
    seconds: Callable[[Any], float],
    report: Callable[[str], None],
) -> dict[str, Trial]:
    """The trials of kernels, one after another; differences and seconds: of a loaded kernel."""
    found = {}
    for name in names:
        report(f"trying kernel {name} ...")
        with current_device(requirements.device):
            found[name] = tried(name, requirements, differences, seconds)
    return found


def try_kernels(
    names: Sequence[str],
    masks: Sequence[LaunchMask],
    requirements: KernelRequirements,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Trial]:
    """Return the trials of kernels on all launches of a rank's plan. Nothing is tried without a launch.

    The largest launch of the kind that has most cells is sampled: with messages in flight, or without.
    """
    if not masks:
        return {}
    kind = mostly_overlap_messages(masks)
    largest = max((mask for mask in masks if mask.overlaps_messages == kind), key=_cells)
    return try_each(
        names,
        requirements,
        lambda kernel: [_difference(kernel, sample(largest, *_COMPARED, at), requirements) for at in (0.0, 0.6)],
        lambda kernel: _seconds(kernel, sample(largest, *_TIMED, 1.0), requirements),
        report,
    )


def mostly_overlap_messages(masks: Sequence[LaunchMask]) -> bool:
    """Return whether at least half of the cells of some launches are computed while messages are in flight."""
    overlapped = sum(_cells(mask) for mask in masks if mask.overlaps_messages)
    return overlapped > 0 and 2 * overlapped >= sum(map(_cells, masks))


def _cells(mask: LaunchMask) -> int:
    """Return the cells of a launch, of all heads."""
    return int((areas(mask.bands) * (mask.band_heads[:, 1] - mask.band_heads[:, 0])).sum())


def sample(mask: LaunchMask, rows: int, keys: int, heads: int, at: float) -> LaunchMask:
    """At most so many rows and keys and about so many heads of a launch, where row `at` (0 to 1) of the largest band ends."""
    # whole groups, from the first on
    wanted = -(-heads // mask.group_size) * mask.group_size - mask.first_head
    count = min(max(wanted, 1), mask.heads)
    theirs = mask.bands[mask.band_heads[:, 0] < count]
    band = theirs[int(areas(theirs).argmax())]
    row = int(band[Q0]) + round(at * (int(band[Q1] - band[Q0]) - 1))
    _, end = (int(x[0]) for x in row_key_ranges(band[None], np.array([row])))
    first_row = min(max(row - rows // 2, 0), max(mask.rows - rows, 0))
    # the end of that row's keys, with some that it does not see
    first_key = min(max(end - keys * 7 // 8, 0), max(mask.keys - keys, 0))
    some = slice(first_row, min(first_row + rows, mask.rows)), slice(first_key, min(first_key + keys, mask.keys))
    return cropped(mask, *some, count)


def cropped(mask: LaunchMask, rows: slice, keys: slice, heads: int) -> LaunchMask:
    """These rows and keys of the first heads of a launch, as a launch of its own."""
    bands = clip(mask.bands, rows.start, rows.stop, keys.start, keys.stop)
    band_heads = np.minimum(mask.band_heads, heads)
    kept = (bands[:, Q0] < bands[:, Q1]) & (bands[:, K0] < bands[:, K1]) & (band_heads[:, 0] < band_heads[:, 1])
    bands, band_heads = bands[kept].copy(), band_heads[kept]
    bands[:, [Q0, Q1, OQ]] -= rows.start
    bands[:, [K0, K1, OK]] -= keys.start
    shift = mask.distance_shift[kept] + keys.start - rows.start
    sizes = rows.stop - rows.start, keys.stop - keys.start
    kv_heads = -(-(mask.first_head + heads) // mask.group_size)
    counts = sizes + (heads, kv_heads, mask.group_size, mask.first_head)
    return LaunchMask(bands, band_heads, shift, *counts, mask.overlaps_messages, mask.in_larger_job)


def tried(
    name: str,
    requirements: KernelRequirements,
    differences: Callable[[Any], Sequence[float]],
    seconds: Callable[[Any], float],
) -> Trial:
    """The trial of one kernel module, by functions of it: how far its results are from right ones, and what it needs.

    Raises DistattnError where the device can no longer be used.
    """
    free = free_bytes(requirements.device)
    try:
        kernel = load_kernel(name)
        if why_not := kernel.unsupported_reason(requirements):
            return Trial(fault=why_not)
        difference = _largest(differences(kernel))
        if not difference <= _TOLERANCE[requirements.dtype]:
            return Trial(difference, fault=f"wrong: {difference:.1e} from the reference")
        return Trial(difference, seconds(kernel))
    except DistattnError as error:
        # a package that is not installed may be there another time
        return Trial(fault=str(error), passing=True)
    except torch.OutOfMemoryError:
        # of the tensors of the sample, or of the kernel's own: another time there may be room
        fault = f'its trial ran out of device memory; kernel="{name}" uses it without a trial'
        return Trial(fault=fault, passing=True, lacked=free, attempts=1)
    except Exception as error:
        # a compiler's or a driver's trouble is this kernel's alone, unless the device is lost for all
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
        try:
            _wait(requirements.device)
        except RuntimeError:
            raise DistattnError(
                f"kernel {name} has broken the device ({reason}): start again with another kernel=."
            ) from None
        return Trial(fault=reason, passing=True)


class _Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    score: ScoreMod

    @staticmethod
    def of(mask: LaunchMask, requirements: KernelRequirements) -> _Inputs:
        device = requirements.device
        generator = torch.Generator(device).manual_seed(_SEED)

        def tensor(rows: int, heads: int, width: int) -> Tensor:
            return torch.randn(rows, heads, width, generator=generator, device=device).to(requirements.dtype)

        dim, v_dim = requirements.head_dim, requirements.v_head_dim
        slopes = torch.rand(mask.heads, generator=generator, device=device) / 8 if requirements.alibi else None
        return _Inputs(
            tensor(mask.rows, mask.heads, dim),
            tensor(mask.keys, mask.kv_heads, dim),
            tensor(mask.keys, mask.kv_heads, v_dim),
            tensor(mask.rows, mask.heads, v_dim),
            ScoreMod(dim**-0.5, 20.0 if requirements.softcap else 0.0, slopes),
        )


def _difference(kernel: Kernel, mask: LaunchMask, requirements: KernelRequirements) -> float:
    """The largest relative difference of a row of outputs and gradients from the reference in fp64, of the same inputs.

    Results are new, and, where the kernel takes places for them, also written in the inputs' dtype, and added to themselves.
    """
    given = _Inputs.of(mask, requirements)
    q, k, v, do = (x.double() for x in given[:4])
    exact = reference.prepare(mask, requirements)
    o, lse = reference.forward(q, k, v, exact, given.score)
    delta = (do * o).sum(-1)
    wanted = (o, lse, *reference.backward(do, q, k, v, lse, delta, exact, given.score))
    schedule = schedule_to_device(kernel.prepare(mask, requirements), requirements.device)
    # the backward's own inputs are exact, so that a fault of the forward is not seen twice
    wide = accumulation_dtype(requirements.dtype)
    backward = (given.do, *given[:3], lse.to(wide), delta.to(wide), schedule, given.score)

    def run(dtype: torch.dtype | None, add: bool) -> float:
        if dtype is None:
            return _far((*kernel.forward(*given[:3], schedule, given.score), *kernel.backward(*backward)), wanted)
        places = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in wanted]
        places[1] = torch.full(lse.shape, -torch.inf, dtype=wide, device=lse.device)
        into = places[0], places[1]
        # a kernel that writes where it should add is right on zeros, and the second time wrong
        for _ in range(1 + add):
            kernel.forward(*given[:3], schedule, given.score, into=into, merge=add)
            kernel.backward(*backward, into=(places[2], (places[3], places[4])), add=(add, add))
        return _far(places, (o, lse + math.log(2), *(2 * x for x in wanted[2:])) if add else wanted)

    ways: list[tuple[torch.dtype | None, bool]] = [(None, False)]
    if kernel.ACCUMULATES:
        ways += [(requirements.dtype, False), (wide, True)]
    return _largest([run(*way) for way in ways])


def _far(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of a row of a head, relative to it or to a usual one. Results are (o, lse, dq, dk, dv)."""
    empty = wanted[1] == -torch.inf
    if not torch.equal(empty, got[1] == -torch.inf):
        return float("inf")
    found = []
    for a, b in zip(got, wanted, strict=True):
        a, b = (x[..., None].masked_fill(empty[..., None], 0.0) if x.dim() == 2 else x for x in (a.double(), b))
        size = b.norm(dim=-1)
        usual = size.square().mean().sqrt().clamp(min=1e-12)
        found.append(float(((a - b).norm(dim=-1) / size.clamp(min=usual)).max()))
    return _largest(found)


def _largest(values: Sequence[float]) -> float:
    """The largest of some numbers; infinite where one is none."""
    return max((value if value == value else float("inf") for value in values), default=0.0)


def _seconds(kernel: Kernel, mask: LaunchMask, requirements: KernelRequirements) -> float:
    """Return the seconds of forward and backward; beside a kernel that holds multiprocessors if the launch overlaps messages."""
    given = _Inputs.of(mask, requirements)
    schedule = schedule_to_device(kernel.prepare(mask, requirements), requirements.device)

    def run() -> Any:
        o, lse = kernel.forward(given.q, given.k, given.v, schedule, given.score)
        return kernel.backward(given.do, given.q, given.k, given.v, lse, torch.zeros_like(lse), schedule, given.score)

    return median_seconds(run, requirements.device, multiprocessors_held if mask.overlaps_messages else nullcontext)


def median_seconds(
    run: Callable[[], Any],
    device: torch.device,
    beside: Callable[[torch.device], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Return the median of a few runs, after one that compiles. beside: what else happens during each of the few runs."""
    times = []
    run()
    for _ in range(_RUNS):
        _wait(device)
        with beside(device):
            began = time.perf_counter()
            run()
            # not for the device, which what is beside keeps busy
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            times.append(time.perf_counter() - began)
    return median(times)


@contextmanager
def multiprocessors_held(device: torch.device) -> Iterator[None]:
    """Hold some multiprocessors of a GPU inside the block, as a communicator does. Warn once if they cannot be held."""
    spinner = None
    if device.type == "cuda":
        try:
            # Triton is not everywhere where kernels are tried
            from distattn.kernels.triton.spinner import Spinner

            spinner = Spinner(device)
        except Exception as error:
            _warn_of_spinner(f"{type(error).__name__}: {error}")
    try:
        yield
    finally:
        if spinner is not None:
            spinner.stop()


@cache
def _warn_of_spinner(reason: str) -> None:
    """Say once that times are without a kernel that holds multiprocessors."""
    _LOG.warning(
        "kernels are timed as if no messages were in flight: the kernel that stands for messages failed (%s)", reason
    )


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a GPU tensors can have: what is free, and what PyTorch's allocator holds unused; 0 for CPUs."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ranking(everyone: Sequence[dict[str, Trial]], names: Sequence[str]) -> list[str]:
    """Kernels that were right on every rank that tried them, by the slowest rank's time; all ranks come to the same list.

    names: the kernels. An empty list where nobody has tried any. Raises DistattnError where none is right.
    """
    tried = [trials for trials in everyone if trials]
    if not tried:
        return []
    right = [name for name in names if all(name in trials and not trials[name].fault for trials in tried)]
    if not right:
        reasons = "; ".join(f"{name}: {tried[0][name].fault}" for name in names if name in tried[0])
        raise DistattnError(f'no kernel can be used here ({reasons}). Use kernel="reference", which is slow.')
    return sorted(right, key=lambda name: max(trials[name].seconds for trials in tried))
