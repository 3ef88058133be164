"""The cost of health checks per training step on 4 ranks: reports (per wait, step and report) and state digests.

    torchrun --nproc-per-node 4 benchmarks/health_overhead.py [CONFIG] [--tokens N] [--engine NAME]

The ranks train the tiny Llama of configs/tiny.toml with FSDP2 on packs of 2,048 tokens. Times are medians of rank 0. A
barrier precedes each report and each digest, so that waiting for a slow rank does not count. The goal is 0.1 % of a
step for reports, and 0.5 % for two digests: one after each update and one before the next.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distattn.training.config import run_file as configuration
from distattn.training.engines.engine import open_engine
from distattn.training.health.health_reports import HealthReport, HealthReports, count_waits
from distattn.training.reporting.metrics import MetricsReporter
from distattn.training.run_folder import RunFolder
from distattn.training.watch.state_digest import StateDigest
from distattn.training.watch.weight_growth import WeightGrowth

ROOT = Path(__file__).parents[1]
STEPS, EVERY, CALLS = 12, 50, 200


def main() -> None:
    """Measure the costs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "configs/tiny.toml"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--engine", default="fsdp2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = configuration.load(options.config)
    parallel = replace(config.parallel, ranks=dist.get_world_size())
    config = replace(config, parallel=parallel, engine=replace(config.engine, name=options.engine))
    engine = open_engine(config, torch.device("cpu"), 256, options.tokens)
    reports: list[HealthReport] = []
    health = HealthReports(engine.cp, torch.device("cpu"), 1, reports.append)
    clock, waits, steps = health.clock(), [0], []
    batch = {"input_ids": torch.arange(options.tokens)[None] % 251, "document_lengths": [options.tokens // 2] * 2}
    counted = dist.Work.wait

    def counting(work: Any, *arguments: Any) -> Any:
        waits[0] += 1
        return counted(work, *arguments)

    dist.Work.wait = counting  # type: ignore[method-assign]
    for batches in engine.cp.steps([batch] * STEPS):
        began, before = time.perf_counter(), waits[0]
        losses = engine.backward(batches)
        engine.clip(1.0)
        engine.cp.mean_loss(losses)
        engine.update(1e-3)
        steps.append((time.perf_counter() - began, waits[0] - before))
    dist.Work.wait = counted  # type: ignore[method-assign]
    costs = clock.lap()
    report = median(lambda: health.after_step(1, costs), before=dist.barrier)
    with tempfile.TemporaryDirectory() as folder, MetricsReporter(RunFolder(Path(folder)), 1, True, True) as reporter:
        written = median(lambda: reporter.report_health(replace(reports[0], reports_in_a_row=1)))
    quiet = HealthReports(engine.cp, torch.device("cpu"), 1 << 30, reports.append)
    step = median(lambda: quiet.after_step(1, costs))
    quiet.close()
    health.close()
    digest, growth = StateDigest(engine.state_tensors, dist.group.WORLD), WeightGrowth(engine.state_tensors)
    taken = median(lambda: digest.take("an update"), before=dist.barrier)
    changed = median(digest.changed, before=dist.barrier)
    # sharing the digests' verdict if no common loss carries it: the mean loss alone, sharing during the mean loss, and
    # sharing after it
    kinds = {
        "loss": lambda: engine.cp.mean_loss(losses),
        "beside": lambda: (digest.share(False), engine.cp.mean_loss(losses))[0](),
        "after": lambda: (engine.cp.mean_loss(losses), digest.share(False)())[1],
    }
    told = {name: median(work, before=dist.barrier) for name, work in kinds.items()}
    norms = median(lambda: growth.after_update(0), before=dist.barrier)
    state = sum(tensor.numel() * tensor.element_size() for _, _, tensor in engine.state_tensors())
    done = dist.all_reduce(torch.zeros(1), async_op=True)
    assert done is not None
    done.wait()
    plain = median(done.wait)
    stop = count_waits(health._waits)
    wait = median(done.wait) - plain
    stop()
    if dist.get_rank() == 0:
        seconds, number = (statistics.median(values) for values in zip(*steps[2:], strict=True))
        rows = {
            f"counting {number:.0f} waits of a step": wait * number,
            "adding a step up": step,
            f"a report, every {EVERY} steps": report / EVERY,
            f"writing it, every {EVERY} steps": written / EVERY,
        }
        sys.stdout.write(
            f"a step of {dist.get_world_size()} ranks {seconds * 1e3:.1f} ms; a report {report * 1e3:.3f} ms\n"
        )
        for name, cost in rows.items():
            sys.stdout.write(f"{name:40s}{cost * 1e6:10.1f} us  {cost / seconds:.4%} of a step\n")
        sys.stdout.write(f"{'together':53s} {sum(rows.values()) / seconds:.4%} of a step\n")
        rows = {
            "a digest after each update": taken,
            "a digest before the next, compared": changed,
            "norms of weights after each update": norms,
        }
        sys.stdout.write(f"weights and optimizer state of rank 0: {state:,} bytes\n")
        for name, cost in rows.items():
            sys.stdout.write(f"{name:40s}{cost * 1e6:10.1f} us  {cost / seconds:.4%} of a step\n")
        sys.stdout.write(f"{'both digests':53s} {(taken + changed) / seconds:.4%} of a step\n")
        for name in ("beside", "after"):
            cost = told[name] - told["loss"]
            label = f"told to all ranks {name} the loss (pipelines)"
            sys.stdout.write(f"{label:40s}{cost * 1e6:8.1f} us  {cost / seconds:.4%} of a step\n")
    engine.close()
    dist.destroy_process_group()


def median(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Return the median seconds of `work`. before: a function called before each call of `work`, untimed."""
    seconds = []
    for _ in range(CALLS):
        before()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
