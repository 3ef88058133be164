"""Arguments and launches of Triton and Gluon kernels: tiles, lists of runs, tensors with their strides."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.spec import FinalRows, ScoreMod
from distattn.kernels.split_tiles import SplitTiles
from distattn.kernels.tile_runs import TileRuns

# coordinates of the tensor-memory accelerator have 32 bits
TMA_LIMIT = 1 << 31


class Tile(NamedTuple):
    """Sides of a tile in query rows and keys, warps of a program, and stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


class TileRunTensors(NamedTuple):
    """Runs as the kernels read them: int32 tensors, see `TileRuns`."""

    first: Tensor
    run: Tensor
    band: Tensor
    row_band: Tensor
    group: Tensor
    order: Tensor


class SplitTileTensors(NamedTuple):
    """Runs of tiles of keys by part, see `SplitTiles`."""

    runs: TileRunTensors
    part: Tensor
    sums: Tensor
    slots: int


class TritonLaunch(NamedTuple):
    """One launch: the arguments of `kernel[grid](**arguments, **options)`, which the compile lint also reads."""

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
    """Return the compute capability of a device: 80, 90, ...; 80 in the interpreter."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; that of an H100 without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tile_run_tensors(runs: TileRuns) -> TileRunTensors:
    """Copy runs into tensors on the host."""
    return TileRunTensors(*(torch.from_numpy(column) for column in runs[:6]))


def split_tile_tensors(tiles: SplitTiles) -> SplitTileTensors:
    """Copy runs of split tiles into tensors on the host."""
    part, sums = (torch.from_numpy(column) for column in (tiles.part, tiles.sums))
    return SplitTileTensors(tile_run_tensors(tiles.runs), part, sums, tiles.slots)


def schedule_to_device(schedule: Any, device: torch.device) -> Any:
    """Return a kernel's schedule with all tensors on a device."""
    if isinstance(schedule, Tensor):
        return schedule.to(device)
    if not isinstance(schedule, tuple):
        return schedule
    parts = (schedule_to_device(part, device) for part in schedule)
    return type(schedule)(*parts) if hasattr(schedule, "_fields") else tuple(parts)


def tensor_arguments(**tensors: Tensor) -> dict[str, Any]:
    """Return arguments for tensors (tokens, heads, ...) and their strides."""
    out: dict[str, Any] = {}
    for name, x in tensors.items():
        out |= {f"{name}_": x, f"{name}_row": x.stride(0), f"{name}_head": x.stride(1)}
    return out


def final_arguments(sums: Tensor, final: FinalRows | None) -> dict[str, Any]:
    """Return arguments for the finished rows of a result. Without them all are None, which is compiled to no argument."""
    if final is None:
        return dict(final_=None, turn_=None, number=None, FINAL=False)
    # kernels compute one address for both
    assert final.target_THD.stride() == sums.stride(), "finished rows have the strides of their sums"
    return dict(final_=final.target_THD, turn_=final.turns_T, number=final.number, FINAL=True)


def call_arguments(
    lists: TileRunTensors, rows: int, keys: int, heads: int, group: int, first: int, score: ScoreMod
) -> dict[str, Any]:
    """Return arguments for the runs, the shape of the call and the score."""
    columns = {f"{name}_": column for name, column in lists._asdict().items()}
    numbers = dict(rows=rows, keys=keys, heads=heads, tiles=len(lists.order), shift=first, GROUP=group)
    score_options = dict(scale=score.scale, cap=score.softcap, CAP=score.softcap > 0, ALIBI=score.slopes_H is not None)
    return columns | numbers | score_options


def make_launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile) -> TritonLaunch:
    """Make a launch with those of the arguments that the kernel has."""
    kernel_arguments = {name: arguments[name] for name in kernel.arg_names}
    # Triton 3.10 no longer fuses products and sums by default
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return TritonLaunch(kernel, (programs,), kernel_arguments, options)
