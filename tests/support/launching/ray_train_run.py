"""Runs Ray Train's example and makes its last worker kill itself once: `python ray_train_run.py STORAGE` prints the
reports.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))


def train_and_die(settings: dict) -> None:
    """Train, and kill the last worker after its report of step 4 unless an earlier attempt has done so."""
    sys.path.insert(0, str(EXAMPLES))
    import ray_train

    from distattn.adapters.ray_train import RunCheckpoints

    report, done = RunCheckpoints.report, Path(settings["storage"], "killed")

    def report_and_die(self, step: int, *others) -> None:
        report(self, step, *others)
        rank = torch.distributed.get_rank()
        if rank == 0:
            with open(Path(settings["storage"], "steps"), "a", encoding="utf-8") as file:
                file.write(f"{step}\n")
        if step == 4 and rank == settings["workers"] - 1 and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    RunCheckpoints.report = report_and_die
    ray_train.train(settings)


if __name__ == "__main__":
    import ray_train

    result = ray_train.fit({"storage": sys.argv[1], "workers": 2, "every": 2, "steps": 8}, train_and_die)
    reported = [[metrics["step"], metrics["loss"], checkpoint.path] for checkpoint, metrics in result.best_checkpoints]
    sys.stdout.write(f"reported {json.dumps(reported)}\n")
