"""`distattn calibrate --ray`: every node of a Ray cluster measures itself, as a task that takes all its GPUs, or all its CPUs."""

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
    address: str, words: Sequence[str], report_progress: Callable[[str], None]
) -> tuple[dict[str, ClusterSpec], list[str]]:
    """(The description that each node has of itself, by the node's name; sentences about nodes that could not measure).

    address: of the cluster, as in `ray.driver.connected`. words: more options of `distattn calibrate`.
    """
    from distattn.launch.ray.driver import connected
    from distattn.launch.ray.tasks import Task, run_tasks, task_nodes

    command = (sys.executable, "-m", "distattn.launch.cli", "calibrate", "--out", "{out}/node.toml", *words)
    found: dict[str, ClusterSpec] = {}
    failed: list[str] = []
    with (
        connected(address, quiet=True, cores_here=lambda: os.cpu_count() or 1),
        tempfile.TemporaryDirectory() as folder,
    ):
        nodes = task_nodes()
        report_progress(f"{len(nodes)} nodes measure themselves: {' '.join(node.name for node in nodes)}")
        tasks = [Task(node.name, (*command, "--name", node.name), node.cpus, node.gpus, node.number) for node in nodes]
        for task, end in run_tasks(tasks):
            if end.code or "node.toml" not in end.files:
                said = end.output[-2000:].strip()
                failed.append(f"{task.name}: the measurement failed, exit code {end.code}: {said}")
                continue
            file = Path(folder, f"{len(found)}.toml")
            file.write_bytes(end.files["node.toml"])
            found[task.name] = describe.load(file)
            report_progress(f"{task.name} is measured ({len(found)} of {len(tasks)})")
    return dict(sorted(found.items())), failed


def slow_nodes(found: Mapping[str, ClusterSpec]) -> Iterator[str]:
    """Sentences that name nodes which are much slower than the median of those with the same device. By the nodes' names."""
    for device in sorted({spec.device.name for spec in found.values()}):
        same = {name: _speeds(spec) for name, spec in found.items() if spec.device.name == device}
        factor = SLOW_FACTOR["cpu" if device.startswith("CPU") else "cuda"]
        for what, unit in next(iter(same.values())):
            usual = statistics.median(speeds[what, unit] for speeds in same.values())
            for name, speeds in same.items():
                if speeds[what, unit] * factor < usual:
                    yield f"{name}: {what} at {speeds[what, unit]:.3g} {unit}, the median of {len(same)} nodes is {usual:.3g}."


def _speeds(spec: ClusterSpec) -> dict[tuple[str, str], float]:
    """What a node can be slow in, with its unit."""
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
