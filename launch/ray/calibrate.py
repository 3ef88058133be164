"""`distattn calibrate --ray`: each node of a Ray cluster measures itself, in a task that takes all its GPUs or CPUs."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from distattn.cluster import spec as describe
from distattn.cluster.spec import ClusterSpec
from distattn.preflight.outliers import SLOW_FACTOR


def calibrate_nodes(
    address: str, options: Sequence[str], report_progress: Callable[[str], None]
) -> tuple[dict[str, ClusterSpec], list[str]]:
    """Measure all nodes. Return their descriptions by node name, and a sentence for each node whose measurement failed.

    address: see `ray.driver.connected`. options: further options for `distattn calibrate`.
    """
    from distattn.launch.ray.driver import connected
    from distattn.launch.ray.tasks import Task, run_tasks, task_nodes

    command = (sys.executable, "-m", "distattn.launch.cli", "calibrate", "--out", "{out}/node.toml", *options)
    specs: dict[str, ClusterSpec] = {}
    failures: list[str] = []
    with (
        connected(address, quiet=True, cores_here=lambda: os.cpu_count() or 1),
        tempfile.TemporaryDirectory() as folder,
    ):
        nodes = task_nodes()
        report_progress(f"{len(nodes)} nodes measure themselves: {' '.join(node.name for node in nodes)}")
        tasks = [Task(node.name, (*command, "--name", node.name), node.cpus, node.gpus, node.number) for node in nodes]
        for task, end in run_tasks(tasks):
            if end.code or "node.toml" not in end.files:
                output = end.output[-2000:].strip()
                failures.append(f"{task.name}: the measurement failed, exit code {end.code}: {output}")
                continue
            file = Path(folder, f"{len(specs)}.toml")
            file.write_bytes(end.files["node.toml"])
            specs[task.name] = describe.load(file)
            report_progress(f"{task.name} is measured ({len(specs)} of {len(tasks)})")
    return dict(sorted(specs.items())), failures


def slow_nodes(specs: Mapping[str, ClusterSpec]) -> Iterator[str]:
    """Yield a sentence for each speed of a node that is far below the median of the nodes with the same device.

    specs: descriptions by node name.
    """
    for device in sorted({spec.device.name for spec in specs.values()}):
        same_device = {name: _speeds(spec) for name, spec in specs.items() if spec.device.name == device}
        factor = SLOW_FACTOR["cpu" if device.startswith("CPU") else "cuda"]
        for work, unit in next(iter(same_device.values())):
            median = statistics.median(speeds[work, unit] for speeds in same_device.values())
            for name, speeds in same_device.items():
                if speeds[work, unit] * factor < median:
                    yield (
                        f"{name}: {work} at {speeds[work, unit]:.3g} {unit}, "
                        f"the median of {len(same_device)} nodes is {median:.3g}."
                    )


def _speeds(spec: ClusterSpec) -> dict[tuple[str, str], float]:
    """Return a node's speeds by (kind of work, unit)."""
    attention = {
        (f"attention, {direction},", "TFLOP/s"): statistics.median(
            row.tflops for row in spec.attention if row.direction == direction
        )
        for direction in describe.DIRECTIONS
    }
    return {
        ("matrix products", "TFLOP/s"): spec.device.gemm_tflops,
        ("copies", "GB/s"): spec.device.copy_gbs,
        ("links inside", "GB/s"): spec.intra_node.gbs,
        **attention,
    }
