"""The end-to-end cost of heartbeats per training step: the training loop with and without them, in one run.

    python benchmarks/heartbeat_overhead.py --steps 400

Ranks train the tiny Llama of configs/tiny.toml with FSDP2. Each step is assigned at random, equally on all ranks, to
one of three arms: "told" writes heartbeats to a board, as for a launcher; "untold" writes none; "timed" writes them and
times every call. The wall time and the CPU time of rank 0's steps are compared: ratios of medians, with 95 % bootstrap
intervals. The goal is 0.1 % of a step.
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
    """Start the run and print the table. If --folder is set, train as one of the run's ranks instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    # passed to ranks only
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
        # discard the output, which has a line per step
        subprocess.run([*command, __file__, f"--folder={run.folder}"], check=True, stdout=subprocess.DEVNULL)
        steps = json.loads((run.folder / "costs.json").read_text())
    show(steps[FIRST:])


def rank(run: RunFolder, config: Config, device: torch.device) -> int:
    """Train as one rank. Rank 0 writes [arm, wall seconds, CPU seconds, beats, seconds spent on heartbeats] for each
    step.

    The file is costs.json in the run folder.
    """
    draws, told, tell = random.Random(1), heartbeats._CURRENT, loop.set_activity
    board = heartbeats.HeartbeatBoard.make(1)
    write, spent, steps = board.writer(0, 1), [0.0], []

    def timed(*values: Any) -> None:
        # CPU time of this thread, so that other threads do not count, minus the time to read the clock
        before, began = time.thread_time(), time.thread_time()
        type(told).set(told, *values)
        spent[0] += time.thread_time() - began - (began - before)

    def marks() -> list[float]:
        heartbeat = board.read(0)
        return [time.perf_counter(), time.process_time(), heartbeat.beats if heartbeat else 0, spent[0]]

    arm, before = "", marks()

    def tell_step(activity: str, **fields: Any) -> None:
        """Record the times of the previous step when a new step starts, and draw the new step's arm."""
        nonlocal arm, before
        if "step" in fields:
            now = marks()
            steps.append([arm, *(now_at - earlier for earlier, now_at in zip(before, now, strict=True))])
            arm = draws.choice(ARMS)
            told.write = None if arm == "untold" else write
            # restore the class's method, which an attribute of the instance hides in "timed" steps
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
    """Print the comparison of the arms."""
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
    """Return the relative increase of the median step time from `untold` to `told`."""
    return statistics.median(told) / statistics.median(untold) - 1


if __name__ == "__main__":
    guard_processes()
    main()
