"""`distattn calibrate`: measure this machine, and write what `plan` and `simulate` need of it.

As a module with arguments it is one rank of the measurement.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distattn.cluster import nccl_tests as nccl
from distattn.cluster import spec as describe
from distattn.cluster.spec import ClusterSpec
from distattn.ir.errors import DistattnError

USAGE = """usage: distattn calibrate --out FILE.toml [--ranks N] [--nodes N] [--name NAME] [options]

Measures attention kernels, matrix products, copies and links on this machine with N ranks at once, and writes a cluster
description for distattn plan --cluster FILE.toml. Takes a minute or two.

  --ranks N             ranks on this machine: its GPUs, or 4 on a machine without
  --nodes N             how many such machines there are (default 1)
  --nccl-inside FILE    take the link inside nodes from nccl-tests' output (text table or -J) instead of own probes
  --nccl-across FILE    the link across nodes, wanted where --nodes is more than 1
  --json                the description as JSON on the console, too

Where the binaries of nccl-tests are on the PATH they are run for the link inside; their commands are printed in any case.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise DistattnError(f"calibrate: {message}. See distattn calibrate --help.")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ("out", "name", "nccl-inside", "nccl-across"):
        parser.add_argument(f"--{name}")
    for name in ("ranks", "nodes"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    if not given.out or Path(given.out).suffix != ".toml":
        raise DistattnError("calibrate: --out FILE.toml is wanted, the description to write.")
    if not Path(given.out).parent.is_dir():
        raise DistattnError(f"calibrate: --out: there is no folder {Path(given.out).parent}.")
    for name in ("ranks", "nodes"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise DistattnError(f"calibrate: --{name}: at least 1, not {getattr(given, name)}.")
    nodes = given.nodes or 1
    # what cannot be read is said before minutes are spent
    inside = nccl.read(given.nccl_inside).link() if given.nccl_inside else None
    across = nccl.read(given.nccl_across).link() if given.nccl_across else None
    if nodes > 1 and across is None:
        raise DistattnError(
            "calibrate: several nodes want --nccl-across FILE, the link between them as nccl-tests saw it."
        )
    ranks = given.ranks or _gpus() or 4
    for command in nccl.commands(ranks, nodes):
        _say(f"links by nccl-tests: {command}")
    found = measured(ranks, given.name or Path(given.out).stem)
    inside = inside or _by_nccl_tests(ranks)
    found = replace(
        found, nodes=nodes, intra_node=inside or found.intra_node, inter_node=across or inside or found.inter_node
    )
    try:
        found.save(given.out)
    except OSError as error:
        raise DistattnError(f"--out: {given.out} cannot be written: {error.strerror}.") from None
    describe.load(given.out)
    if given.json:
        sys.stdout.write(json.dumps({"cluster": given.out, "ranks": ranks, "device": found.device.name}) + "\n")
    else:
        sys.stdout.write(f"{_summary(found)}\nwritten to {given.out}\n")
    return 0


def measured(ranks: int, name: str) -> ClusterSpec:
    """This machine measured by so many processes at once."""
    from distattn.launch.local import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.toml"
        if run_ranks(ranks, "distattn.launch.calibrate_command", str(file), name):
            raise DistattnError("the measurement failed; what went wrong is above.")
        return describe.load(file)


def rank_main(file: str, name: str) -> None:
    """One rank of the measurement; rank 0 writes the file."""
    import os

    import torch
    import torch.distributed as dist

    from distattn.planning.measure_machine import measure

    ranks, cuda = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        first = dist.get_rank() == 0
        found = measure(ranks, name, _say if first else lambda line: None)
        if first:
            found.save(file)
    finally:
        dist.destroy_process_group()


def _by_nccl_tests(ranks: int) -> describe.Link | None:
    """The link inside this machine by nccl-tests, where they are installed and there are GPUs."""
    if ranks < 2 or not _gpus() or shutil.which("sendrecv_perf") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sendrecv.json"
        done = subprocess.run(
            ["sendrecv_perf", "-g", str(ranks), "-b", "8", "-e", "1G", "-f", "4", "-J", str(file)], capture_output=True
        )
        if done.returncode:
            _say("nccl-tests failed; the link is by distattn's own probes")
            return None
        return nccl.read(file, "sendrecv").link()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _summary(found: ClusterSpec) -> str:
    device = found.device
    best = {
        direction: max(row.tflops for row in found.attention if row.direction == direction)
        for direction in describe.DIRECTIONS
    }
    return (
        f"{device.name}: products {device.gemm_tflops:.3g} TFLOP/s, attention {best['forward']:.3g} forward and "
        f"{best['backward']:.3g} backward, copies {device.copy_gbs:.3g} GB/s\n"
        f"links inside {found.intra_node.gbs:.3g} GB/s after {found.intra_node.latency_us:.3g} us, "
        f"across {found.inter_node.gbs:.3g} GB/s after {found.inter_node.latency_us:.3g} us"
    )


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
