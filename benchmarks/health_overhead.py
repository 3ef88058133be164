"""What reports of health cost a training step on 4 ranks: counting each wait, adding up each step, and the report itself.

    torchrun --nproc-per-node 4 benchmarks/health_overhead.py

The ranks train the tiny Llama of configs/tiny.toml by FSDP2 on packs of 2,048 tokens. Medians of rank 0; ranks meet before each
report, so that waiting for a slow one does not count. The aim is 0.1 % of a step.
"""

from __future__ import annotations

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

from distattn.training import config as configuration
from distattn.training.collective_waits import count_waits
from distattn.training.engines.opened import open_engine
from distattn.training.health import HealthReport, HealthReports
from distattn.training.metrics import MetricsReporter
from distattn.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
TOKENS, STEPS, EVERY, CALLS = 2048, 12, 50, 200


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = configuration.load(str(ROOT / "configs/tiny.toml"))
    parallel = replace(config.parallel, ranks=dist.get_world_size())
    engine = open_engine(replace(config, parallel=parallel), torch.device("cpu"), 256, TOKENS)
    reports: list[HealthReport] = []
    health = HealthReports(engine.cp, torch.device("cpu"), 1, reports.append)
    clock, waits, steps = health.clock(), [0], []
    batch = {"input_ids": torch.arange(TOKENS)[None] % 251, "document_lengths": [TOKENS // 2] * 2}
    counted = dist.Work.wait

    def counting(work: Any, *given: Any) -> Any:
        waits[0] += 1
        return counted(work, *given)

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
    engine.close()
    dist.destroy_process_group()


def median(work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Seconds."""
    found = []
    for _ in range(CALLS):
        before()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main()
