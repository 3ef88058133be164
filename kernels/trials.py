"""Trials of kernels: each is compared with the reference on a sample of a launch, and timed on a larger sample.

Trials reject kernels that are wrong on this device, driver or compiler before training uses them, and rank the correct
kernels by speed. If most of a rank's cells are computed while messages are in flight, kernels are timed next to a
kernel that occupies some multiprocessors, as communication does in training.
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
from distattn.kernels.spec import FinalRows, KernelRequirements, ScoreMod
from distattn.kernels.triton.launch import schedule_to_device

# the largest accepted relative difference: several times what rounding of inputs and weights can cause
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4, torch.float64: 1e-9}
# maximum numbers of rows, keys and heads in the samples for the comparison, and in the samples for timing
_COMPARED, _TIMED = (384, 512, 8), (16384, 16384, 1 << 30)
_RUNS = 3
_SEED = 1234
# maximum number of attempts at a trial that runs out of memory, and the factor by which free memory must grow before the next
# attempt
_MOST_ATTEMPTS, _MORE_MEMORY = 3, 1.25
_LOG = logging.getLogger("distattn")


class Trial(NamedTuple):
    """The result of a kernel's trial: its largest relative difference from the reference, and the time of a forward and
    backward pass in seconds.

    fault: the reason not to use the kernel, or "" if it is correct. passing: True if the fault may not recur on the next try.
    lacked: if the trial ran out of memory, the bytes of device memory that were free before it. attempts: the number of
    attempts that ran out of memory.
    """

    difference: float = 0.0
    seconds: float = 0.0
    fault: str = ""
    passing: bool = False
    lacked: int = 0
    attempts: int = 0

    @property
    def is_wrong(self) -> bool:
        """True if the kernel computed wrong results."""
        # the difference of a kernel that could not run is 0
        return bool(self.fault) and self.difference != 0.0

    def may_succeed_now(self, device: torch.device) -> bool:
        """Return whether to retry a trial that ran out of memory: at most twice, and only if free memory has grown by a
        quarter."""
        return 0 < self.attempts < _MOST_ATTEMPTS and free_bytes(device) >= _MORE_MEMORY * self.lacked


def try_each(
    names: Sequence[str],
    requirements: KernelRequirements,
    differences: Callable[[Any], list[float]],
    seconds: Callable[[Any], float],
    report: Callable[[str], None],
) -> dict[str, Trial]:
    """Try kernels one after another; return their trials, keyed by name. differences, seconds: see `run_trial`."""
    trials = {}
    for name in names:
        report(f"trying kernel {name} ...")
        with current_device(requirements.device):
            trials[name] = run_trial(name, requirements, differences, seconds)
    return trials


def try_kernels(
    names: Sequence[str],
    masks: Sequence[LaunchMask],
    requirements: KernelRequirements,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Trial]:
    """Try kernels on the launches of a rank's plan. Return {} if there are no launches.

    Launches are of two kinds, with or without messages in flight. The sample comes from the largest launch of the kind that has
    more cells in total.
    """
    if not masks:
        return {}
    kind = mostly_overlap_messages(masks)
    largest = max((mask for mask in masks if mask.overlaps_messages == kind), key=_cells)
    return try_each(
        names,
        requirements,
        lambda kernel: [_difference(kernel, sample_launch(largest, *_COMPARED, at), requirements) for at in (0.0, 0.6)],
        lambda kernel: _seconds(kernel, sample_launch(largest, *_TIMED, 1.0), requirements),
        report,
    )


def mostly_overlap_messages(masks: Sequence[LaunchMask]) -> bool:
    """Return whether at least half of the launches' cells are computed while messages are in flight."""
    overlapped = sum(_cells(mask) for mask in masks if mask.overlaps_messages)
    return overlapped > 0 and 2 * overlapped >= sum(map(_cells, masks))


def _cells(mask: LaunchMask) -> int:
    """Return the number of cells of a launch, summed over all heads."""
    return int((areas(mask.bands) * (mask.band_heads[:, 1] - mask.band_heads[:, 0])).sum())


def sample_launch(mask: LaunchMask, rows: int, keys: int, heads: int, at: float) -> LaunchMask:
    """Return a part of a launch around the row at fraction `at` (0 to 1) of its largest band.

    The part has at most `rows` rows and `keys` keys, and about `heads` heads.
    """
    # use complete head groups, starting with the first
    num_heads = -(-heads // mask.group_size) * mask.group_size - mask.first_head
    count = min(max(num_heads, 1), mask.heads)
    theirs = mask.bands[mask.band_heads[:, 0] < count]
    band = theirs[int(areas(theirs).argmax())]
    row = int(band[Q0]) + round(at * (int(band[Q1] - band[Q0]) - 1))
    _, end = (int(x[0]) for x in row_key_ranges(band[None], np.array([row])))
    first_row = min(max(row - rows // 2, 0), max(mask.rows - rows, 0))
    # take the last keys that this row attends to, and some of the keys after them
    first_key = min(max(end - keys * 7 // 8, 0), max(mask.keys - keys, 0))
    some = slice(first_row, min(first_row + rows, mask.rows)), slice(first_key, min(first_key + keys, mask.keys))
    return crop_launch(mask, *some, count)


def crop_launch(mask: LaunchMask, rows: slice, keys: slice, heads: int) -> LaunchMask:
    """Return a launch of only the rows `rows`, the keys `keys` and the first `heads` heads of a launch."""
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


def run_trial(
    name: str,
    requirements: KernelRequirements,
    differences: Callable[[Any], Sequence[float]],
    seconds: Callable[[Any], float],
) -> Trial:
    """Try one kernel. Raise DistattnError if the trial has made the device unusable.

    differences: a function that returns the relative differences between a loaded kernel's results and correct results. seconds:
    a function that returns the seconds of the kernel's forward and backward pass.
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
        # a missing package may be installed before the next trial
        return Trial(fault=str(error), passing=True)
    except torch.OutOfMemoryError:
        # the next trial may have enough memory for the sample and the kernel's workspace
        fault = f'its trial ran out of device memory; kernel="{name}" uses it without a trial'
        return Trial(fault=fault, passing=True, lacked=free, attempts=1)
    except Exception as error:
        # a compiler or driver error only rules out this kernel, unless the device is lost
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
    """Return the largest relative difference of any row of outputs or gradients from the reference in fp64 on the same
    inputs.

    If the kernel accumulates, also check results written to tensors of the inputs' dtype, and results added to existing
    ones.
    """
    inputs = _Inputs.of(mask, requirements)
    q, k, v, do = (x.double() for x in inputs[:4])
    exact = reference.prepare(mask, requirements)
    o, lse = reference.forward(q, k, v, exact, inputs.score)
    delta = (do * o).sum(-1)
    expected = (o, lse, *reference.backward(do, q, k, v, lse, delta, exact, inputs.score))
    schedule = schedule_to_device(kernel.prepare(mask, requirements), requirements.device)
    # give the backward pass the exact lse and delta, so that the forward pass's errors are not counted twice
    wide = accumulation_dtype(requirements.dtype)
    backward = (inputs.do, *inputs[:3], lse.to(wide), delta.to(wide), schedule, inputs.score)

    def run(dtype: torch.dtype | None, add: bool) -> float:
        if dtype is None:
            return _far((*kernel.forward(*inputs[:3], schedule, inputs.score), *kernel.backward(*backward)), expected)
        places = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in expected]
        places[1] = torch.full(lse.shape, -torch.inf, dtype=wide, device=lse.device)
        into = places[0], places[1]
        # call it twice: a kernel that overwrites instead of adding gives correct results the first time, on zeros, but
        # not the second time
        for _ in range(1 + add):
            kernel.forward(*inputs[:3], schedule, inputs.score, into=into, merge=add)
            kernel.backward(*backward, into=(places[2], (places[3], places[4])), add=(add, add))
        return _far(places, (o, lse + math.log(2), *(2 * x for x in expected[2:])) if add else expected)

    def run_finished(directions: Sequence[str]) -> float:
        """Run two launches that sum up results, where the second writes all rows in the inputs' dtype."""
        places = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in expected]
        finished = [torch.zeros_like(x, dtype=requirements.dtype) for x in places]
        turns = torch.ones(len(lse), dtype=torch.int32, device=lse.device)
        places[1].fill_(-torch.inf)
        # fill sums with NaN, because no launch may read sums that no launch has written
        places[0].fill_(torch.nan), places[2].fill_(torch.nan)
        for number in range(2):
            of_o, of_dq = (
                {"final": FinalRows(finished[result], turns, number)} if direction in directions else {}
                for direction, result in (("forward", 0), ("backward", 2))
            )
            into = places[0], places[1]
            kernel.forward(*inputs[:3], schedule, inputs.score, into=into, merge=number > 0, **of_o)
            kernel.backward(*backward, into=(places[2], (places[3], places[4])), add=(number > 0, number > 0), **of_dq)
        results = [finished[0] if "forward" in directions else places[0], places[1]]
        results += [finished[2] if "backward" in directions else places[2], *places[3:]]
        return _far(results, (o, lse + math.log(2), *(2 * x for x in expected[2:])))

    ways: list[tuple[torch.dtype | None, bool]] = [(None, False)]
    if kernel.ACCUMULATES:
        ways += [(requirements.dtype, False), (wide, True)]
    differences = [run(*way) for way in ways]
    if finishes := getattr(kernel, "FINISHES", ()):
        differences.append(run_finished(finishes))
    return _largest(differences)


def _far(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any row, relative to the larger of its norm and the rms norm of its tensor's rows.

    got, expected: (o, lse, dq, dk, dv). Return infinity if `got` and `expected` differ in which rows have no keys.
    """
    empty = expected[1] == -torch.inf
    if not torch.equal(empty, got[1] == -torch.inf):
        return float("inf")
    differences = []
    for a, b in zip(got, expected, strict=True):
        a, b = (x[..., None].masked_fill(empty[..., None], 0.0) if x.dim() == 2 else x for x in (a.double(), b))
        size = b.norm(dim=-1)
        usual = size.square().mean().sqrt().clamp(min=1e-12)
        differences.append(float(((a - b).norm(dim=-1) / size.clamp(min=usual)).max()))
    return _largest(differences)


def _largest(values: Sequence[float]) -> float:
    """Return the largest value, or infinity if any value is NaN."""
    return max((value if value == value else float("inf") for value in values), default=0.0)


def _seconds(kernel: Kernel, mask: LaunchMask, requirements: KernelRequirements) -> float:
    """Return the median seconds of a forward and backward pass, with some multiprocessors held if the launch overlaps
    messages."""
    inputs = _Inputs.of(mask, requirements)
    schedule = schedule_to_device(kernel.prepare(mask, requirements), requirements.device)

    def run() -> Any:
        o, lse = kernel.forward(inputs.q, inputs.k, inputs.v, schedule, inputs.score)
        return kernel.backward(
            inputs.do, inputs.q, inputs.k, inputs.v, lse, torch.zeros_like(lse), schedule, inputs.score
        )

    return median_seconds(run, requirements.device, multiprocessors_held if mask.overlaps_messages else nullcontext)


def median_seconds(
    run: Callable[[], Any],
    device: torch.device,
    beside: Callable[[torch.device], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Return the median seconds of a few runs after a first run that compiles. beside: a context in which other work runs."""
    times = []
    run()
    for _ in range(_RUNS):
        _wait(device)
        with beside(device):
            began = time.perf_counter()
            run()
            # wait only for this stream, because the other work keeps the device busy
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            times.append(time.perf_counter() - began)
    return median(times)


@contextmanager
def multiprocessors_held(device: torch.device) -> Iterator[None]:
    """Hold some multiprocessors of a GPU while the context is open, as communication would. Warn once if that fails."""
    spinner = None
    if device.type == "cuda":
        try:
            # import Triton here, because it is not installed everywhere
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
    """Warn, once per reason, that kernels are timed without holding multiprocessors."""
    _LOG.warning(
        "kernels are timed as if no messages were in flight: the kernel that imitates messages failed (%s)", reason
    )


def free_bytes(device: torch.device) -> int:
    """Return the bytes available to tensors on a GPU (free memory and unused memory of PyTorch's allocator), or 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rank_kernels(trials_by_rank: Sequence[dict[str, Trial]], names: Sequence[str]) -> list[str]:
    """Return the kernels that were correct on every rank that ran trials, sorted by the time of the slowest rank.

    The result is the same on all ranks. names: the kernels to rank. Return [] if no rank has run a trial. Raise DistattnError if
    no kernel is correct.
    """
    nonempty = [trials for trials in trials_by_rank if trials]
    if not nonempty:
        return []
    right = [name for name in names if all(name in trials and not trials[name].fault for trials in nonempty)]
    if not right:
        reasons = "; ".join(f"{name}: {nonempty[0][name].fault}" for name in names if name in nonempty[0])
        raise DistattnError(f'no kernel can be used here ({reasons}). Use kernel="reference", which is slow.')
    return sorted(right, key=lambda name: max(trials[name].seconds for trials in nonempty))
