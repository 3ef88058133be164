"""Simulated against measured times on this machine, after calibration: every strategy, forward and backward.

    python benchmarks/predict_local.py [--ranks 2 4] [--json FILE]

For each number of ranks the machine is calibrated with that many processes at once (`distattn calibrate`). Then one
attention call of every strategy is measured over gloo and simulated with the calibrated description: fp32, 8 query
heads and 4 KV heads of 64, 8,192 tokens, a causal mask and a pack of documents. The output is simulated / measured
milliseconds, sorted by the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from harness import compare
from process_guard import guard_processes

import distattn as da
from distattn.cluster import spec as describe
from distattn.launch.calibrate_command import measure_with_ranks
from distattn.parallel.make_plan import STRATEGIES

TOKENS = 8192
PACKS = {"causal": [TOKENS], "documents": [4096, 2048, 1024, 512, 256, 128, 64, 64]}
SHAPE = dict(heads=8, kv_heads=4, head_dim=64, dtype="float32")


def main() -> int:
    """Compare simulated with measured times, after calibration. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure)
    rows = []
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            cluster = measure_with_ranks(ranks, "here")
            file = Path(folder) / "times.json"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            subprocess.run([*launcher, __file__, "--measure", str(file)], check=True)
            rows += report(ranks, cluster, json.loads(file.read_text()))
    errors = [abs(row["simulated"] / row["measured"] - 1) for row in rows]
    print_line(f"median error {np.median(errors):.0%}, worst {max(errors):.0%}")
    if arguments.json:
        arguments.json.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return 0


def plan_of(pack: str, strategy: str, ranks: int) -> da.Plan:
    """Return the plan for a pack and strategy, which is the same on every rank."""
    lengths = PACKS[pack]
    layout = da.Layout.balanced(lengths, ranks, mask=da.Mask.documents(lengths))
    return da.make_plan(da.Mask.documents(lengths), layout, strategy=strategy, **SHAPE)


def measure(file: Path) -> int:
    """Measure every strategy and pack as one rank. Rank 0 writes the median milliseconds to `file`."""
    ranks = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo")
    times = {}
    for pack in PACKS:
        makers = {strategy: partial(layer, pack, strategy, ranks) for strategy in STRATEGIES}
        for cell in compare(pack, makers, lambda result: "", repeats=7):
            times[f"{pack} {cell.contestant}"] = cell.median * 1e3 if cell.median else None
    if dist.get_rank() == 0:
        file.write_text(json.dumps(times))
    dist.destroy_process_group()
    return 0


def layer(pack: str, strategy: str, ranks: int) -> Callable[[], None]:
    """Return a function that runs attention forward and backward on this rank's tokens."""
    plan = plan_of(pack, strategy, ranks)
    ready = da.prepare(plan)
    tokens = plan.call.layout.shard_sizes()[dist.get_rank()]
    q, k, v = (torch.randn(tokens, heads, 64, requires_grad=True) for heads in (8, 4, 4))
    do = torch.randn(tokens, 8, 64)
    return lambda: torch.autograd.grad(da.attention(q, k, v, ready), (q, k, v), do) and None


def report(ranks: int, cluster: describe.ClusterSpec, times: dict[str, float | None]) -> list[dict]:
    """Print a table for each pack. Return its rows."""
    rows = []
    for name, real in times.items():
        if real is None:
            continue
        pack, strategy = name.rsplit(" ", 1)
        timeline = da.simulate(plan_of(pack, strategy, ranks), cluster)
        guess = (timeline.forward.seconds + timeline.backward.seconds) * 1e3
        rows.append(dict(ranks=ranks, pack=pack, strategy=strategy, simulated=guess, measured=real))
    for pack in PACKS:
        here = [row for row in rows if row["pack"] == pack]
        print_line(f"{ranks} ranks, {pack}: milliseconds simulated / measured")
        for row in sorted(here, key=lambda row: row["measured"]):
            print_line(
                f"  {row['strategy']:12s}{row['simulated']:8.0f} / {row['measured']:<8.0f}"
                f"{row['simulated'] / row['measured'] - 1:+.0%}"
            )
    return rows


def print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    guard_processes()
    sys.exit(main())
