"""`distattn calibrate`: measure this machine, and write the cluster description that `plan` and `simulate` need.

Run as a module with arguments, it is one rank of the measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from distattn.launch.command_line import CommandParser, no_progress, print_line, print_to_stderr

USAGE = """usage: distattn calibrate --out FILE.toml [--ranks N] [--nodes N] [--name NAME] [options]
       distattn calibrate --out FILE.toml --ray [HOST:PORT] [--ranks N] [--json]

Measures attention kernels, matrix products, copies and links on this machine with N ranks at once, and writes a cluster
description for distattn plan --cluster FILE.toml. Takes a minute or two.

  --ranks N             ranks on this machine: its GPUs, or 4 on a machine without GPUs
  --nodes N             how many such machines there are (default 1)
  --nccl-inside FILE    take the link inside nodes from nccl-tests' output (text table or -J) instead of distattn's probes
  --nccl-across FILE    the link across nodes; required if --nodes is more than 1
  --ray [HOST:PORT]     every node of a Ray cluster measures itself, into FILE-NODE.toml; slow nodes are named
  --json                also print the description as JSON

If the binaries of nccl-tests are on the PATH, they measure the link inside nodes; their commands are always printed.
"""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    options = _parse(arguments)
    if options.ray is not None:
        return _calibrate_nodes(options)
    # read the files first, so that an unreadable file is reported before minutes of measurements
    inside = nccl.read(options.nccl_inside).link() if options.nccl_inside else None
    across = nccl.read(options.nccl_across).link() if options.nccl_across else None
    if options.nodes > 1 and across is None:
        raise DistattnError(
            "calibrate: several nodes need --nccl-across FILE, the link between nodes as nccl-tests measured it."
        )
    ranks = _ranks(options.ranks)
    for command in nccl.commands(ranks, options.nodes):
        print_to_stderr(f"links by nccl-tests: {command}")
    spec = measure_with_ranks(ranks, options.name or Path(options.out).stem)
    inside = inside or _link_by_nccl_tests(ranks)
    spec = replace(
        spec, nodes=options.nodes, intra_node=inside or spec.intra_node, inter_node=across or inside or spec.inter_node
    )
    try:
        spec.save(options.out)
    except OSError as error:
        raise DistattnError(f"--out: {options.out} cannot be written: {error.strerror}.") from None
    # check that the file can be read back
    describe.load(options.out)
    if options.json:
        print_line(json.dumps({"cluster": options.out, "ranks": ranks, "device": spec.device.name}))
    else:
        print_line(f"{_summary(spec)}\nwritten to {options.out}")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the options. Raises DistattnError for numbers below 1, or an unsuitable --out."""
    parser = CommandParser("calibrate")
    for name in ("out", "name", "nccl-inside", "nccl-across"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ray", nargs="?", const="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if not options.out or Path(options.out).suffix != ".toml":
        raise DistattnError("calibrate: --out FILE.toml is required: the file to write the description to.")
    if not Path(options.out).parent.is_dir():
        raise DistattnError(f"calibrate: --out: there is no folder {Path(options.out).parent}.")
    for name in ("ranks", "nodes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise DistattnError(f"calibrate: --{name}: must be at least 1, not {getattr(options, name)}.")
    return options


def _calibrate_nodes(options: argparse.Namespace) -> int:
    """Write a description for each node of a Ray cluster, and print which nodes are slow. Return the exit code."""
    if options.name or options.nccl_inside or options.nccl_across or options.nodes > 1:
        raise DistattnError(
            "calibrate: with --ray every node describes itself: leave out --name, --nodes and --nccl-*."
        )
    if importlib.util.find_spec("ray") is None:
        raise DistattnError("calibrate --ray needs ray: pip install 'distattn[ray]'.")
    # import this here: importing torch takes seconds
    from distattn.launch.ray.calibrate import calibrate_nodes, slow_nodes

    ranks = ("--ranks", str(options.ranks)) if options.ranks else ()
    specs, failed = calibrate_nodes(options.ray, ranks, print_to_stderr)
    out, slow = Path(options.out), list(slow_nodes(specs))
    files = {name: out.with_name(f"{out.stem}-{name.replace('/', '_')}.toml") for name in specs}
    for name, spec in specs.items():
        try:
            spec.save(files[name])
        except OSError as error:
            raise DistattnError(f"--out: {files[name]} cannot be written: {error.strerror}.") from None
    if options.json:
        print_line(json.dumps({"clusters": {name: str(file) for name, file in files.items()}, "slow": slow}))
    else:
        for name, spec in specs.items():
            print_line(f"{name}: {_summary(spec)}\nwritten to {files[name]}")
        print_line("\n".join(slow) or "no node is much slower than the others")
    for sentence in failed:
        print_to_stderr(sentence)
    return 1 if failed else 0


def _ranks(asked: int | None) -> int:
    """Return the number of ranks: `asked`, else one per GPU, else 4. Raises DistattnError if this machine is too small."""
    # import this here: importing torch takes seconds
    from distattn.launch.ranks import machine_limits

    gpus = machine_limits.gpu_count()
    ranks = asked or gpus or 4
    memory = machine_limits.CALIBRATE_RANK_MB
    machine_limits.check_memory("calibrate: --ranks", ranks, memory, "Python, torch and its tensors")
    if gpus:
        machine_limits.check_gpus("calibrate: --ranks", ranks, "each rank measures one")
    return ranks


def measure_with_ranks(ranks: int, name: str) -> ClusterSpec:
    """Measure this machine with several processes running concurrently. Raises DistattnError if a process fails."""
    from distattn.launch.ranks.local import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.toml"
        if run_ranks(ranks, "distattn.launch.calibrate_command", str(file), name):
            raise DistattnError("the measurement failed; the cause is above.")
        return describe.load(file)


def rank_main(file: str, name: str) -> None:
    """Run one rank of the measurement. Rank 0 writes the file."""
    import os

    import torch
    import torch.distributed as dist

    from distattn.planning.measure_machine import measure_machine

    ranks, cuda = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        first = dist.get_rank() == 0
        spec = measure_machine(ranks, name, print_to_stderr if first else no_progress)
        if first:
            spec.save(file)
    finally:
        dist.destroy_process_group()


def _link_by_nccl_tests(ranks: int) -> describe.Link | None:
    """Measure the link inside this machine with nccl-tests. Return None if there is no GPU, or if the tests cannot run."""
    from distattn.launch.ranks import machine_limits

    if ranks < 2 or not machine_limits.gpu_count() or shutil.which("sendrecv_perf") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sendrecv.json"
        done = subprocess.run(
            ["sendrecv_perf", "-g", str(ranks), "-b", "8", "-e", "1G", "-f", "4", "-J", str(file)], capture_output=True
        )
        if done.returncode:
            print_to_stderr("nccl-tests failed; distattn's own probes measure the link")
            return None
        return nccl.read(file, "sendrecv").link()


def _summary(spec: ClusterSpec) -> str:
    device = spec.device
    best = {
        direction: max(row.tflops for row in spec.attention if row.direction == direction)
        for direction in describe.DIRECTIONS
    }
    return (
        f"{device.name}: products {device.gemm_tflops:.3g} TFLOP/s, attention {best['forward']:.3g} forward and "
        f"{best['backward']:.3g} backward, copies {device.copy_gbs:.3g} GB/s\n"
        f"links inside {spec.intra_node.gbs:.3g} GB/s after {spec.intra_node.latency_us:.3g} us, "
        f"across {spec.inter_node.gbs:.3g} GB/s after {spec.inter_node.latency_us:.3g} us"
    )


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
