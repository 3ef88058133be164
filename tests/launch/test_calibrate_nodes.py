"""Calibrating the nodes of a Ray cluster: slow nodes are named, and bad input is refused. Stand-ins replace Ray's
tasks.
"""

import importlib.util
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tomli_w

from distattn.cluster import spec as describe
from distattn.launch import cli
from distattn.launch.ray.calibrate import slow_nodes

USUAL = describe.load("h100-1x8")
HOT = replace(USUAL, device=replace(USUAL.device, gemm_tflops=USUAL.device.gemm_tflops / 2))
LOOSE = replace(USUAL, intra_node=replace(USUAL.intra_node, gbs=USUAL.intra_node.gbs / 3))
CPU = replace(HOT, device=replace(HOT.device, name="CPU, 2 threads a rank", gemm_tflops=0.1))


def test_nodes_are_compared_with_those_of_the_same_device():
    sentences = list(slow_nodes({"a": USUAL, "b": HOT, "c": USUAL, "d": LOOSE, "e": CPU}))
    assert [sentence.partition(" at ")[0] for sentence in sentences] == ["b: matrix products", "d: links inside"]
    assert sentences[0].endswith(f"the median of 4 nodes is {USUAL.device.gemm_tflops:.3g}.")
    assert not list(slow_nodes({"a": HOT}))


@pytest.fixture
def tasks(monkeypatch):
    """Replace the cluster by nodes whose answers are set by a test."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    from distattn.launch.ray import driver as ray_driver
    from distattn.launch.ray import tasks as ray_tasks

    nodes = {"node1": USUAL, "node2": USUAL, "node10": HOT}
    monkeypatch.setattr(ray_driver, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(
        ray_tasks, "task_nodes", lambda: [ray_tasks.RayNode(name, name * 9, 8.0, 8.0) for name in nodes]
    )

    def run(tasks_):
        for task in tasks_:
            assert task.command[-4:] == ("--ranks", "2", "--name", task.name) and (task.gpus, task.node) == (
                8.0,
                task.name * 9,
            )
            content = tomli_w.dumps(describe.asdict(nodes[task.name])) if nodes[task.name] else ""
            files = {"node.toml": content.encode()} if content else {}
            yield task, ray_tasks.TaskEnd(0 if content else 3, "no GPU answers\n", files)

    monkeypatch.setattr(ray_tasks, "run_tasks", run)
    return nodes


def test_each_node_gets_a_description_and_the_slow_one_is_named(tasks, tmp_path, capsys):
    arguments = ["calibrate", "--out", str(tmp_path / "mine.toml"), "--ray", "--ranks=2", "--json"]
    assert cli.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: describe.load(file) for name, file in told["clusters"].items()} == tasks
    assert told["clusters"]["node10"] == str(tmp_path / "mine-node10.toml")
    assert len(told["slow"]) == 1 and told["slow"][0].startswith("node10: matrix products at ")
    tasks["node2"] = None
    assert cli.main(arguments) == 1
    told = capsys.readouterr()
    assert "node2: the measurement failed, exit code 3: no GPU answers" in told.err
    assert list(json.loads(told.out)["clusters"]) == ["node1", "node10"]


def test_settings_that_every_node_determines_itself_are_refused(capsys, tmp_path):
    assert cli.main(["calibrate", "--out", str(tmp_path / "mine.toml"), "--ray", "--nodes=2"]) == 2
    assert "with --ray every node describes itself: leave out --name, --nodes" in capsys.readouterr().err
