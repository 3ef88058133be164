"""What a person sees of a run while it runs: a bar on a terminal, plain lines elsewhere; and the same on disk."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distattn.training.run_folder import RunFolder, StepMetrics

# a log file wants to be read: not more than one line in this many seconds
_LINE_SECONDS = 2.0


class MetricsReporter:
    """Use as a context; call `report` after every step. Does nothing at all unless `visible` (rank 0)."""

    def __init__(self, run: RunFolder, steps: int, json_lines: bool, visible: bool):
        self.run, self.steps, self.json_lines, self.visible = run, steps, json_lines, visible
        self.began = self.last_line = 0.0
        self.bar: Progress | None = None
        self.tensorboard: Any = None

    def __enter__(self) -> MetricsReporter:
        if not self.visible:
            return self
        # needs a second, and only rank 0 writes
        from torch.utils.tensorboard import SummaryWriter

        self.tensorboard = SummaryWriter(str(self.run.folder / "tensorboard"))
        self.began = time.perf_counter()
        if sys.stdout.isatty() and not self.json_lines:
            text = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s")
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                text,
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console())
            self.bar.add_task("training", total=self.steps, loss=float("nan"), rate=0.0)
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()
        if self.tensorboard:
            self.tensorboard.close()

    def report(self, step: StepMetrics) -> None:
        """Record and show one step."""
        if not self.visible:
            return
        self.run.append(self.run.metrics_file, asdict(step))
        for name in ("loss", "grad_norm", "seconds"):
            self.tensorboard.add_scalar(name, getattr(step, name), step.step)
        self.tensorboard.add_scalar("tokens_per_second", step.tokens / step.seconds, step.step)
        now = time.perf_counter()
        if self.json_lines:
            sys.stdout.write(json.dumps(asdict(step)) + "\n")
            sys.stdout.flush()
        elif self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step.step, loss=step.loss, rate=step.tokens / step.seconds)
        elif now - self.last_line >= _LINE_SECONDS or step.step in (1, self.steps):
            left = (now - self.began) / step.step * (self.steps - step.step)
            sys.stdout.write(
                f"step {step.step}/{self.steps}  loss {step.loss:.3f}  "
                f"{step.tokens / step.seconds:,.0f} tokens/s  about {left:.0f} s left\n"
            )
            sys.stdout.flush()
            self.last_line = now
