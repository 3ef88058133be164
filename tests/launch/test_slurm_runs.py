"""Runs on a real Slurm of three nodes: lost nodes, preemptions and time limits change nothing of what is learned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, why_not
from waiting import eventually

ROOT = Path(__file__).parents[2]
STEPS = 60
SHORT = (f"--train.steps={STEPS}", "--data.tokens_per_step=2048", "--data.max_document_tokens=900")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    found = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


def distattn(cluster, *arguments: str) -> subprocess.CompletedProcess:
    # every node is this machine: its name need not resolve
    environment = os.environ | cluster.environment | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, "-m", "distattn.launch.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def submit(cluster, folder: Path, *arguments: str) -> None:
    done = distattn(cluster, "launch", "slurm", "configs/tiny.toml", f"--run.folder={folder}", *SHORT, *arguments)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("job "), done.stderr


def rows(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()] if (folder / file).exists() else []


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Of steps that were done again the last."""
    last = {row["step"]: (row["step"], row["loss"], row["grad_norm"]) for row in rows(folder, "metrics.jsonl")}
    return [last[step] for step in sorted(last)]


def wait_for(cluster, folder: Path, what: str, condition) -> None:
    def trouble() -> str:
        logs = "".join(file.read_text()[-3000:] for file in sorted(folder.glob("slurm-*.out")))
        return f"{what}\n{cluster.run('squeue')}{cluster.run('sinfo', '-N')}{logs}"

    eventually(condition, trouble)


@pytest.mark.full
def test_a_run_that_loses_a_node_and_is_preempted_learns_the_same(cluster, tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    submit(
        cluster, far, "--nodes=3", "--spare=1", "--gpus=2", "--checkpoint.every_steps=4", "--reference_check.steps=1"
    )
    wait_for(cluster, far, "no steps", lambda: len(rows(far, "metrics.jsonl")) > 5)
    cluster.kill_node("node2")
    wait_for(cluster, far, "no second attempt", lambda: len(rows(far, "attempts/attempts.jsonl")) == 1)
    cluster.start_node("node2")
    again = len(rows(far, "metrics.jsonl"))
    wait_for(cluster, far, "no steps of the second attempt", lambda: len(rows(far, "metrics.jsonl")) > again)
    cluster.run("sbatch", "--partition=urgent", "--nodes=3", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(cluster, far, "it does not end", lambda: (far / "state").read_text() == "ended 0\n")

    first, second, third = rows(far, "attempts/attempts.jsonl")
    assert first["hosts"] == ["node1", "node2"] and first["blamed"] == ["node2"] and "node2" in first["why"]
    assert second["hosts"] == ["node1", "node3"] and second["exit_code"] == 75 and "SIGTERM" in second["why"]
    assert third["exit_code"] == 0 and third["requeues"] == 1 and third["job"] == first["job"]
    said = distattn(cluster, "launch", "status", str(far)).stdout
    assert f"{STEPS} steps done" in said and "attempt 2 on node1 node3: " in said and "ended well" in said
    log = distattn(cluster, "launch", "logs", str(far)).stdout
    assert "largest relative difference to plain transformers" in log and (far / "report.html").exists()
    assert {file.name for file in (far / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(4)}
    # the same plan on one machine, without any interruption
    plain = ("--parallel.devices_per_node=2", "--reference_check.steps=0", f"--run.folder={near}")
    done = distattn(cluster, "train", "configs/tiny.toml", *SHORT, *plain)
    assert done.returncode == 0, done.stderr
    assert curve(far) == curve(near) and len(curve(near)) == STEPS


@pytest.mark.full
def test_a_run_out_of_time_is_queued_again_and_can_be_cancelled(cluster, tmp_path):
    folder = tmp_path / "long"
    submit(cluster, folder, "--nodes=1", "--gpus=2", "--train.steps=100000", "--reference_check.steps=0")
    job = str(json.loads((folder / "job.json").read_text())["job"])
    wait_for(cluster, folder, "it does not begin", lambda: list(folder.glob("attempts/001/*")))
    # as Slurm does so long before the time limit as the script says
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(
        cluster, folder, "it is not queued again", lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    )
    (stopped,) = rows(folder, "attempts/attempts.jsonl")
    assert stopped["why"] == "stopped, asked by SIGUSR1" and stopped["exit_code"] == 75
    assert len(list(folder.glob("checkpoints/step-*"))) == 1
    assert distattn(cluster, "launch", "cancel", str(folder)).returncode == 0
    wait_for(
        cluster,
        folder,
        "it is not cancelled",
        lambda: "JobState=CANCELLED" in cluster.run("scontrol", "show", "job", job),
    )


def test_what_cannot_run_is_not_submitted(cluster, tmp_path):
    large = ("--model.hidden_size=4096", "--model.num_layers=2", f"--run.folder={tmp_path}/never")
    done = distattn(cluster, "launch", "slurm", "configs/tiny.toml", *large, *SHORT)
    assert done.returncode == 2 and "the largest node has 2.1 GB. Take fewer ranks" in done.stderr, done.stderr
    assert not (tmp_path / "never").exists()
    moon = ("--slurm.partition=moon", f"--run.folder={tmp_path}/never")
    done = distattn(cluster, "launch", "slurm", "configs/tiny.toml", *moon, *SHORT)
    assert done.returncode == 2 and "sbatch refused" in done.stderr and "partition" in done.stderr
    assert not (tmp_path / "never").exists()
