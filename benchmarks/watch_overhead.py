"""The cost of monitoring per training step: the numerics watch, the replay check, losses by position and the reporter.

    python benchmarks/watch_overhead.py

One process on one core trains the tiny Llama of configs/tiny.toml, one pack of its text per step. Contestants take
turns in every step, so that other load on the machine affects all of them equally. The medians per step are compared.
The replay check, which only runs at intervals, is timed alone and divided by the interval. The goal is 1 % of a step
for the watch, and 1 % for the check.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import environment

import distattn as da
from distattn.adapters import pytorch
from distattn.data.files.text import byte_corpus, find_corpus
from distattn.data.loader import PackLoader
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_rule import PackRule
from distattn.training.config import run_file as configuration
from distattn.training.config.run_settings import build_model, configured_model
from distattn.training.reporting.loss_by_position import LossByPosition, token_losses
from distattn.training.reporting.metrics import MetricsReporter
from distattn.training.reporting.step_clock import StepClock
from distattn.training.run_folder import RunFolder, StepMetrics
from distattn.training.watch.numerics_watch import NumericsWatch, WatchSettings
from distattn.training.watch.replay_check import ReplayCheck

ROOT = Path(__file__).parents[1]
AIM = 0.01


def main() -> None:
    """Print the table. If --out is set, also append the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--interval", type=int, default=500, help="steps between two replay checks")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), arguments.steps, arguments.tokens, arguments.interval)
    plain = rows["a step"]
    for name, seconds in rows.items():
        share = (
            ""
            if name == "a step"
            else f"{seconds / plain:9.3%} of a step{'' if seconds / plain < AIM else '   <- above the aim'}"
        )
        sys.stdout.write(f"{name:48s}{seconds * 1e3:12.4f} ms{share}\n")
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps({"seconds": rows, "tokens": arguments.tokens} | environment()) + "\n")


def measured(folder: Path, steps: int, tokens: int, interval: int) -> dict[str, float]:
    """Train, and return the median seconds of a step and of each monitor, keyed by name."""
    config = configuration.load(str(ROOT / "configs/tiny.toml"))
    text = find_corpus(
        "{stdlib}", suffix=".py", exclude=["test*", "idle*", "*-packages"], max_document_tokens=tokens // 3
    )
    corpora = [byte_corpus(text, str(folder / "text"))]
    plan = make_pack_plan(folder / "packs", corpora, seed=1, rule=PackRule(((0, tokens),), tokens), steps=steps + 4)
    loader = PackLoader(plan, corpora, rank=0, size=1, corpus_ids=True)
    model = build_model(config, configured_model(config, 256, 4096))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = RunFolder(folder / "run")
    run.folder.mkdir()
    watch = NumericsWatch(model, WatchSettings(), None, run.folder)
    check = ReplayCheck(model, interval)
    sums = LossByPosition(tokens, ["text"])
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    for number in range(1000):
        # fill the watch's window, as in all but the first steps of a run
        watch.judge(number, 6 + number % 7 / 10, 1 + number % 5 / 10)
    with da.ContextParallel(strategy="ring") as cp, MetricsReporter(run, steps, True, visible=True) as reporter:
        clock = StepClock(torch.device("cpu"), cp.messages)
        for number, (batch,) in enumerate(itertools.islice(clock.steps(cp.steps(loader)), steps)):

            def forward_and_backward(batch: dict[str, Any] = batch) -> torch.Tensor:
                loss = pytorch.local_loss(model, batch)
                loss.backward()
                return loss.detach()

            def step(run_once: Callable[[], Any] = forward_and_backward) -> tuple[float, float]:
                loss = run_once()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                return cp.mean_loss([loss]), float(norm)

            loss, norm = timed("a step", step)
            timed("numerics watch, each step", partial(watch.judge, number, loss, norm))
            # the replay check runs the micro-batch twice, but only one run is extra, so one run is subtracted below
            timed(
                "replay check, a micro-batch twice",
                partial(check.check, number, forward_and_backward, optimizer.zero_grad),
            )
            optimizer.zero_grad()
            timed("forward and backward", forward_and_backward)
            optimizer.zero_grad()
            with torch.no_grad():
                losses_T = token_losses(model, batch)
            timed("losses by position and corpus, each step", partial(sums.add_batch, losses_T, batch))
            costs = timed("step clock, each step", clock.lap)
            line = StepMetrics(number + 1, loss, norm, tokens, **costs._asdict())
            with Silence():
                timed("reporter, each step", partial(reporter.report, line))
    medians = {name: statistics.median(values[4:]) for name, values in seconds.items()}
    extra = medians.pop("replay check, a micro-batch twice") - medians.pop("forward and backward")
    medians["replay check, when it is due, beyond the step"] = extra
    medians[f"replay check, every {interval} steps"] = extra / interval
    return medians


class Silence:
    """A context that discards all output. JSON lines are still formatted and written."""

    def __enter__(self) -> None:
        self._stdout = sys.stdout
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115

    def __exit__(self, *_: object) -> None:
        sys.stdout.close()
        sys.stdout = self._stdout


if __name__ == "__main__":
    main()
