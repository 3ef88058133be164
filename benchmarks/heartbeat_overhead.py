"""Measure what heartbeats cost a training step, end to end: the training loop with and without them, in one run.

    python benchmarks/heartbeat_overhead.py --steps 400

Ranks train the tiny Llama of configs/tiny.toml by FSDP2. Each step is drawn to be told on a board, as for a launcher, or not at
all, the same on all ranks; or it is told and every call is timed. Of steps the wall time and the processor time of rank 0 are
compared: ratios of medians, with the interval that holds 95 % of those of the steps drawn again. The aim is 0.1 % of a step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import environment
from process_guard import guard_processes

from distattn.launch.command_line import no_progress
from distattn.launch.start_run import start_run
from distattn.supervision import heartbeats
from distattn.training import loop
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config
from distattn.training.rank import on_rank
from distattn.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
ARMS, FIRST, DRAWN = ("told", "untold", "timed"), 6, 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    # of a rank
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        sys.exit(on_rank(arguments.folder, rank))
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"--parallel.ranks={arguments.ranks}",
            f"--train.steps={arguments.steps}",
            "--checkpoint.every_steps=-1",
        ]
        overrides += [
            f"--data.tokens_per_step={arguments.tokens}",
            f"--data.max_document_tokens={arguments.tokens // 3}",
        ]
        overrides += [f"--run.folder={folder}/run", "--health.every_steps=0"]
        config = configuration.load(ROOT / "configs/tiny.toml", overrides)
        run = start_run(config, no_progress)
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={arguments.ranks}"]
        # a line for each step
        subprocess.run([*command, __file__, f"--folder={run.folder}"], check=True, stdout=subprocess.DEVNULL)
        steps = json.loads((run.folder / "costs.json").read_text())
    show(steps[FIRST:])


def rank(run: RunFolder, config: Config, device: torch.device) -> int:
    """Train as one rank. Rank 0 leaves [arm, wall seconds, processor seconds, beats, seconds of telling] of each step."""
    draws, told, tell = random.Random(1), heartbeats._CURRENT, loop.set_activity
    board = heartbeats.HeartbeatBoard.make(1)
    write, spent, steps = board.writer(0, 1), [0.0], []

    def timed(*values: Any) -> None:
        # of this thread: what others do meanwhile does not count; without what looking at the clock takes
        before, began = time.thread_time(), time.thread_time()
        type(told).set(told, *values)
        spent[0] += time.thread_time() - began - (began - before)

    def marks() -> list[float]:
        heartbeat = board.read(0)
        return [time.perf_counter(), time.process_time(), heartbeat.beats if heartbeat else 0, spent[0]]

    arm, before = "", marks()

    def tell_step(activity: str, **fields: Any) -> None:
        """Note the times of the step before, which ends where another one begins."""
        nonlocal arm, before
        if "step" in fields:
            now = marks()
            steps.append([arm, *(now_at - earlier for earlier, now_at in zip(before, now, strict=True))])
            arm = draws.choice(ARMS)
            told.write = None if arm == "untold" else write
            # where it is found instead of the class's
            vars(told).pop("set", None)
            if arm == "timed":
                told.set = timed  # type: ignore[method-assign]
            before = marks()
        tell(activity, **fields)

    loop.set_activity = tell_step  # type: ignore[assignment]
    loop.train(run, config, True, device)
    if torch.distributed.get_rank() == 0:
        (run.folder / "costs.json").write_text(json.dumps(steps))
    return 0


def show(steps: list[list[Any]]) -> None:
    """Print what steps cost."""
    arms = {arm: [step[1:] for step in steps if step[0] == arm] for arm in ARMS}
    counts = ", ".join(f"{len(rows)} {arm}" for arm, rows in arms.items())
    sys.stdout.write(f"steps: {counts}, {environment()['cores']} cores\n")
    for column, name in enumerate(("wall time", "processor time")):
        told, untold = ([row[column] for row in arms[arm]] for arm in ("told", "untold"))
        draws = random.Random(2)
        ratios = sorted(
            ratio(draws.choices(told, k=len(told)), draws.choices(untold, k=len(untold))) for _ in range(DRAWN)
        )
        low, high = ratios[DRAWN // 40], ratios[-DRAWN // 40]
        text = f"{ratio(told, untold):+.3%} ({low:+.3%} to {high:+.3%})"
        sys.stdout.write(f"{name:16s}{statistics.median(untold) * 1e3:9.2f} ms a step untold, told {text}\n")
    beats, spent, step = (statistics.median(row[column] for row in arms["timed"]) for column in (2, 3, 1))
    sys.stdout.write(f"{beats:.0f} times a step, {spent * 1e6:.1f} us: {spent / step:.4%} of a step's processor time\n")


def ratio(told: list[float], untold: list[float]) -> float:
    """Return by how much the median of steps is longer where they are told, as a share."""
    return statistics.median(told) / statistics.median(untold) - 1


if __name__ == "__main__":
    guard_processes()
    main()
