"""Launches of Triton and Gluon kernels and their arguments: tile sizes, run lists, tensors and their strides."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.spec import FinalRows, ScoreMod
from distattn.kernels.split_tiles import SplitTiles
from distattn.kernels.tile_runs import TileRuns

# coordinates of the tensor memory accelerator (TMA) have 32 bits
TMA_LIMIT = 1 << 31


class Tile(NamedTuple):
    """A tile's size in query rows and keys, the warps per program, and the number of pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


class TileRunTensors(NamedTuple):
    """Run lists as int32 tensors, the form that kernels read. See `TileRuns`."""

    first: Tensor
    run: Tensor
    band: Tensor
    row_band: Tensor
    group: Tensor
    order: Tensor


class SplitTileTensors(NamedTuple):
    """Run lists of key tiles, some split into parts. See `SplitTiles`."""

    runs: TileRunTensors
    part: Tensor
    sums: Tensor
    slots: int


class TritonLaunch(NamedTuple):
    """A kernel launch, `kernel[grid](**arguments, **options)`. The compile lint reads these fields, too."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]
    options: dict[str, int]


def run_launch(launch: TritonLaunch) -> None:
    """Run a launch, unless its grid is empty."""
    if launch.grid[0]:
        launch.kernel[launch.grid](**launch.arguments, **launch.options)


@cache
def compute_capability(device: torch.device) -> int:
    """Return the compute capability of a device as 80, 90, ...; 80 if it is not a GPU, as in the interpreter."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; if it is not a GPU, that of an H100."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tile_run_tensors(runs: TileRuns) -> TileRunTensors:
    """Return the runs as tensors on the host, without a copy."""
    return TileRunTensors(*(torch.from_numpy(column) for column in runs[:6]))


def split_tile_tensors(tiles: SplitTiles) -> SplitTileTensors:
    """Return the runs of split tiles as tensors on the host, without a copy."""
    part, sums = (torch.from_numpy(column) for column in (tiles.part, tiles.sums))
    return SplitTileTensors(tile_run_tensors(tiles.runs), part, sums, tiles.slots)


def schedule_to_device(schedule: Any, device: torch.device) -> Any:
    """Return a kernel's schedule with all its tensors moved to `device`."""
    if isinstance(schedule, Tensor):
        return schedule.to(device)
    if not isinstance(schedule, tuple):
        return schedule
    parts = (schedule_to_device(part, device) for part in schedule)
    return type(schedule)(*parts) if hasattr(schedule, "_fields") else tuple(parts)


def tensor_arguments(**tensors: Tensor) -> dict[str, Any]:
    """Return kernel arguments for tensors (tokens, heads, ...) and for their row and head strides."""
    out: dict[str, Any] = {}
    for name, x in tensors.items():
        out |= {f"{name}_": x, f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}
    return out


def final_arguments(sums: Tensor, final: FinalRows | None) -> dict[str, Any]:
    """Return the arguments for finished rows of a result: None if `final` is None, which compiles the kernel without them."""
    if final is None:
        return dict(final_=None, turn_=None, number=None, FINAL=False)
    # kernels compute a single offset for both tensors
    assert final.target_THD.stride() == sums.stride(), "finished rows have the strides of their sums"
    return dict(final_=final.target_THD, turn_=final.turns_T, number=final.number, FINAL=True)


def call_arguments(
    lists: TileRunTensors, rows: int, keys: int, heads: int, group: int, first: int, score: ScoreMod
) -> dict[str, Any]:
    """Return kernel arguments for the run lists, the call's shape and the score."""
    columns = {f"{name}_": column for name, column in lists._asdict().items()}
    numbers = dict(rows=rows, keys=keys, heads=heads, tiles=len(lists.order), shift=first, GROUP=group)
    score_options = dict(scale=score.scale, cap=score.softcap, CAP=score.softcap > 0, ALIBI=score.slopes_H is not None)
    return columns | numbers | score_options


def make_launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> TritonLaunch:
    """Return a launch with those of `arguments` that the kernel takes."""
    kernel_arguments = {name: arguments[name] for name in kernel.arg_names}
    # fuse multiplications and additions, which Triton 3.10 no longer does by default
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return TritonLaunch(kernel, (programs,), kernel_arguments, options)
