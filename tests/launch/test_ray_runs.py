"""Runs on a real Ray of several raylets: killed ranks and lost nodes change nothing of what is learned."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from waiting import eventually

from distattn.checkpoints.owner import Owner

ROOT = Path(__file__).parents[2]
STEPS = 20
SHORT = (
    f"--train.steps={STEPS}",
    "--data.tokens_per_step=2048",
    "--data.max_document_tokens=900",
    "--reference_check.steps=0",
)


@pytest.fixture(scope="module")
def cluster():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    found = RayCluster(2, "node1", "node2")
    yield found
    found.stop()


def distattn(cluster, *arguments: str, module: str = "cli", output=subprocess.PIPE) -> subprocess.Popen:
    environment = os.environ | cluster.environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"distattn.launch.{module}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def launch(cluster, folder: Path, *arguments: str) -> subprocess.Popen:
    given = (f"--ray.address={cluster.address}", f"--run.folder={folder}", "--nodes=2", "--gpus=2", *SHORT)
    with open(f"{folder}.out", "w", encoding="utf-8") as output:
        return distattn(cluster, "launch", "ray", "configs/tiny.toml", *given, *arguments, output=output)


def rows(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()] if (folder / file).exists() else []


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Of steps that were done again the last."""
    last = {row["step"]: (row["step"], row["loss"], row["grad_norm"]) for row in rows(folder, "metrics.jsonl")}
    return [last[step] for step in sorted(last)]


def wait_for(run: subprocess.Popen, folder: Path, what: str, condition) -> None:
    def trouble() -> str:
        return f"{what}\n{Path(f'{folder}.out').read_text()[-6000:]}"

    eventually(lambda: condition() or run.poll() is not None, trouble)
    assert condition(), trouble()


@pytest.mark.full
def test_a_run_that_loses_a_rank_and_a_node_and_is_cancelled_learns_the_same(cluster, tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    run = launch(cluster, far, "--checkpoint.every_steps=2")
    wait_for(run, far, "no steps", lambda: len(rows(far, "metrics.jsonl")) > 2)
    os.kill(Owner.read(far / "owner.json").pid, signal.SIGKILL)
    wait_for(run, far, "no second attempt", lambda: len(rows(far, "attempts/attempts.jsonl")) == 1)
    again = len(rows(far, "metrics.jsonl"))
    wait_for(run, far, "no steps of the second attempt", lambda: len(rows(far, "metrics.jsonl")) > again + 2)
    cluster.kill("node2")
    wait_for(run, far, "no third attempt", lambda: len(rows(far, "attempts/attempts.jsonl")) == 2)
    cluster.add("node3")
    again = len(rows(far, "metrics.jsonl"))
    wait_for(run, far, "no steps of the third attempt", lambda: len(rows(far, "metrics.jsonl")) > again)
    assert f"running from {socket.gethostname()} on the Ray cluster at {cluster.address}, " in status(cluster, far)
    assert distattn(cluster, "launch", "cancel", str(far)).wait() == 0
    assert run.wait() == 75
    # another driver goes on
    run = distattn(cluster, str(far), module="ray_attempts")
    said = run.communicate()[0]
    assert run.returncode == 0, said

    first, second, third, fourth = rows(far, "attempts/attempts.jsonl")
    assert first["hosts"] == ["node1", "node2"] and first["blamed"] == ["node1"] and first["exit_code"] == 137
    assert "rank 0 was killed by SIGKILL" in first["why"]
    assert second["hosts"] == ["node1", "node2"] and second["blamed"] == ["node2"] and "node2 was lost" in second["why"]
    assert third["hosts"] == ["node1", "node3"] and third["why"] == "stopped, asked by distattn launch cancel"
    assert fourth["hosts"] == ["node1", "node3"] and fourth["exit_code"] == 0
    said = status(cluster, far)
    assert said.startswith(f"ended, exit code 0, {STEPS} steps done") and "attempt 3 on node1 node3: " in said
    assert {file.name for file in (far / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(4)}
    assert (far / "report.html").exists()
    # the same plan on one machine, without any interruption
    plain = ("--parallel.devices_per_node=2", f"--run.folder={near}")
    done = distattn(cluster, "train", "configs/tiny.toml", *SHORT, *plain)
    said = done.communicate()[0]
    assert done.returncode == 0, said
    assert curve(far) == curve(near) and len(curve(near)) == STEPS


def status(cluster, folder: Path) -> str:
    return distattn(cluster, "launch", "status", str(folder)).communicate()[0]


@pytest.mark.full
def test_nodes_that_fail_or_do_not_answer_are_left_out(cluster, tmp_path):
    # beside the two that others of these tests leave
    cluster.add("node9")
    try:
        environment = os.environ | cluster.environment | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support"}
        command = [sys.executable, str(ROOT / "tests/support/ray_cases.py"), cluster.address, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        cluster.kill("node9")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.split("found ", 1)[1])
    first, second, third = found["nodes"]
    assert found["ends"][1] == 0
    # the process of its actor was killed, not the node
    hosts, code, why, blamed = found["dies"]
    assert hosts == [first, second] and code == 1 and blamed == [second] and f"{second} was lost: " in why
    assert found["fails twice"] == [[first, second], 137, f"{second} ended with exit code 137", [second]]
    assert found["is left out"][:2] == [sorted([first, third]), 0]
    assert found["no room"] == [None, "for 5 s there was no room for 2 nodes of 2 CPUs: 1 nodes are that large"]
    assert f"{third} is left out: its agent did not answer for 20 s" in done.stderr
    assert found["given up"] == -signal.SIGKILL
