"""Reports of a run in progress: a progress bar on a terminal, plain lines elsewhere, and the same numbers on disk.

The numbers go to JSON lines and TensorBoard files, and to Weights & Biases if a project is named. They all come from
the training loop. Only histograms, which are taken at intervals, synchronize with a device.
"""

from __future__ import annotations

import importlib
import io
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from distattn.ir.errors import DistattnError
from distattn.ir.plan import Plan
from distattn.ir.text_format import print_message
from distattn.parallel.analysis.score_matrix import draw_score_matrix
from distattn.training.health.device_counters import COUNTERS
from distattn.training.health.health_reports import HealthReport
from distattn.training.reporting.json_lines import json_text, write_whole
from distattn.training.reporting.loss_by_position import LossTable
from distattn.training.reporting.tensorboard_files import TensorBoardFiles
from distattn.training.run_folder import EVALUATION, RunFolder, StepMetrics
from distattn.training.watch.module_observer import local_part, plain_name

# minimum seconds between two lines, so that a log file stays readable
_LINE_SECONDS = 2.0
# the metrics logged for each step; unknown values are left out
_SCALARS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "context_length",
    "seconds",
    "tokens_per_second",
    "mfu",
    "data_seconds",
    "wait_seconds",
    "memory_allocated",
    "memory_reserved",
    "memory_resident",
)


class MetricsReporter:
    """Reporter of a run: a context manager whose `report` is called after every step.

    visible: True on rank 0; on other ranks the reporter does nothing. wandb: a Weights & Biases project that gets the
    same metrics, or "" for no project; a resumed run continues its page there. Entering the context raises
    DistattnError if the package is missing.
    """

    def __init__(self, run: RunFolder, steps: int, json_lines: bool, visible: bool, wandb: str = ""):
        self.run, self.steps, self.json_lines, self.visible = run, steps, json_lines, visible
        self.began = self.last_line = 0.0
        self.bar: Progress | None = None
        self.tensorboard = TensorBoardFiles(run.folder / "tensorboard", run.is_in_place)
        self._project = wandb
        self._wandb: Any = None
        self._first_step: int | None = None
        self._was_skipped = False

    def __enter__(self) -> MetricsReporter:
        if not self.visible:
            return self
        if self._project:
            self._wandb = _wandb_run(self._project, self.run)
        # open it now, so that no step waits for the import
        self.tensorboard.open()
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
        self.tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def report(self, step: StepMetrics) -> None:
        """Record and show one step."""
        if not self.visible:
            return
        self.run.append(self.run.metrics_file, step.as_dict())
        scalars = {name: value for name in _SCALARS if (value := getattr(step, name)) is not None}
        self._log(scalars | {"skipped": 1.0 if step.skipped else 0.0}, step.step)
        # a resumed run's earlier steps took no time in this process
        self._first_step = step.step if self._first_step is None else self._first_step
        now = time.perf_counter()
        # print the reason only for the first of several refused steps in a row
        begins, self._was_skipped = bool(step.skipped) and not self._was_skipped, bool(step.skipped)
        if self.json_lines:
            sys.stdout.write(json_text(step.as_dict()) + "\n")
            sys.stdout.flush()
        elif self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step.step, loss=step.loss, rate=step.tokens_per_second)
            if begins:
                self.bar.console.print(f"step {step.step} was not applied: {step.skipped}")
        elif begins or now - self.last_line >= _LINE_SECONDS or step.step in (1, self.steps):
            left = (now - self.began) / (step.step - self._first_step + 1) * (self.steps - step.step)
            skipped = f"; not applied{f': {step.skipped}' if begins else ''}" if step.skipped else ""
            sys.stdout.write(
                f"step {step.step}/{self.steps}  loss {step.loss:.3f}  "
                f"{step.tokens_per_second:,.0f} tokens/s  about {left:.0f} s left{skipped}\n"
            )
            sys.stdout.flush()
            self.last_line = now

    def report_losses(self, step: int, table: LossTable, split: str = EVALUATION) -> None:
        """Record losses by position and corpus: of an evaluation after `step`, or of training since the last report."""
        if not self.visible:
            return
        self.run.append(self.run.losses_file, {"step": step, "split": split} | asdict(table))
        scalars = {f"{split}/loss": table.loss}
        scalars |= {f"{split}_by_corpus/{corpus.name}": corpus.loss for corpus in table.by_corpus}
        scalars |= {f"{split}_by_position/{bucket.first}": bucket.loss for bucket in table.by_position}
        self._log({name: value for name, value in scalars.items() if value is not None}, step)
        self.tensorboard.write(
            lambda writer: writer.add_figure(f"{split} loss by position", _figure_by_position(table), step)
        )
        if split == EVALUATION:
            self._show_evaluation(step, table)

    def _show_evaluation(self, step: int, table: LossTable) -> None:
        """Print the loss of an evaluation, above the progress bar if it is shown."""
        if self.json_lines:
            row = {"step": step, "evaluation_loss": table.loss, "evaluation_tokens": table.tokens}
            sys.stdout.write(json_text(row) + "\n")
        else:
            loss = "not a number" if table.loss is None else f"{table.loss:.3f}"
            text = f"step {step}/{self.steps}  evaluation loss {loss}  of {table.tokens:,} held-out tokens"
            if self.bar:
                self.bar.console.print(text)
            else:
                sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    def report_histograms(self, step: int, model: Any) -> None:
        """Record histograms of weights and gradients; for sharded tensors, only rank 0's shard.

        This copies them from the device, so call it at intervals, between backward and the optimizer step.
        """
        if self.visible:
            self.tensorboard.write(lambda writer: _add_histograms(writer, step, model))

    def report_plan(self, plan: Plan) -> None:
        """Record an image of a plan's score matrix, such as the first step's."""
        if not self.visible:
            return
        from matplotlib.image import imread

        picture = imread(io.BytesIO(draw_score_matrix(plan)), format="png")
        self.tensorboard.write(
            lambda writer: writer.add_image("score matrix of the first plan", picture[..., :3], 0, dataformats="HWC")
        )

    def report_health(self, report: HealthReport) -> None:
        """Record the ranks' speeds. If the report is news, also record it as an event and print it."""
        if not self.visible:
            return
        self.run.append(self.run.health_file, asdict(report))
        scalars = {"health/over_median": report.over_median, "health/slowest_rank": report.slowest}
        for name in ("seconds", "compute_seconds", "wait_seconds", "data_seconds", "probe_seconds"):
            scalars |= {f"health_{name}/{rank}": seconds for rank, seconds in enumerate(getattr(report, name))}
        for rank, counters in enumerate(report.counters):
            scalars |= {f"health_errors/{name}/{rank}": count for name, count in zip(COUNTERS, counters, strict=True)}
        self._log({name: value for name, value in scalars.items() if value is not None}, report.step)
        if report.is_news:
            self.report_event(report.step, "health", report.text)
            print_message(f"step {report.step}: {report.text}")

    def report_event(self, step: int, kind: str, text: str, facts: Mapping[str, Any] | None = None) -> None:
        """Record a rare event.

        kind: refused, restart, rollback, wrong rank and so on. text: a sentence. facts: additional JSON fields.
        """
        if self.visible:
            self.run.append(self.run.events_file, {"step": step, "kind": kind, "text": text, **(facts or {})})
            self.tensorboard.write(lambda writer: writer.add_text(kind, text, step))

    def report_warning(self, step: int, kind: str, text: str) -> None:
        """Record an event and print it to stderr. step: counted from 0. See `report_event` for the other arguments."""
        self.report_event(step + 1, kind, text)
        if self.visible:
            print_message(f"step {step + 1}: {text}")

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        def add(writer: Any) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        self.tensorboard.write(add)
        if self._wandb:
            self._wandb.log(dict(scalars), step=step)


def _wandb_run(project: str, run: RunFolder) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise DistattnError(
            f"train.wandb: {project!r}, but the package wandb is not installed; pip install wandb, or leave the key out."
        ) from None
    config = {"configuration": run.config_file.read_text("utf-8")} if run.config_file.exists() else {}
    if not run.wandb_file.exists():
        write_whole(run.wandb_file, secrets.token_hex(8))
    # for steps that a resumed run repeats, Weights & Biases keeps the first values; the repeated values are equal
    identity = {"id": run.wandb_file.read_text("utf-8"), "resume": "allow"}
    return wandb.init(project=project, name=run.folder.name, dir=str(run.folder), config=config, **identity)


def _add_histograms(writer: Any, step: int, model: Any) -> None:
    for name, parameter in model.named_parameters():
        for kind, values in (("weights", parameter), ("gradients", parameter.grad)):
            finite = _finite_part(values)
            if finite is not None:
                writer.add_histogram(f"{kind}/{plain_name(name)}", finite, step)


def _finite_part(values: Tensor | None) -> Tensor | None:
    """Return the finite values of this rank's shard, or None if it has no finite values, which a histogram needs."""
    if values is None:
        return None
    local = local_part(values).float()
    finite = local[local.isfinite()]
    return finite if finite.numel() else None


def _figure_by_position(table: LossTable) -> Any:
    """Return a figure of the mean loss by position, with positions on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    points = list(_points(table))
    axis.plot([x for x, _ in points], [y for _, y in points], marker="o")
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xlabel("position in the document (tokens, middle of a bucket)")
    axis.set_ylabel("loss (nats)")
    axis.grid(alpha=0.3)
    return figure


def _points(table: LossTable) -> Iterator[tuple[float, float]]:
    for bucket in table.by_position:
        if bucket.loss is not None:
            yield (bucket.first + bucket.last) / 2, bucket.loss
