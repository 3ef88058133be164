"""Runs on a real Slurm cluster of four nodes: lost nodes, preemptions and time limits do not change what the model
learns.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_once import made_once
from slurm_cluster import SlurmCluster, why_not
from waiting import eventually

from distattn.launch.attempts import Attempts

pytestmark = pytest.mark.waits(12)

ROOT = Path(__file__).parents[2]
STEPS = 60
SHORT = (f"--train.steps={STEPS}", "--data.tokens_per_step=2048", "--data.max_document_tokens=900")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    slurm = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


def distattn(cluster, *arguments: str) -> subprocess.CompletedProcess:
    # every node is this machine, whose name need not resolve
    environment = os.environ | cluster.environment | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, "-m", "distattn.launch.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def submit(cluster, folder: Path, *arguments: str) -> str:
    """Submit a run. Return the job number."""
    done = distattn(cluster, "launch", "slurm", "configs/tiny.toml", f"--run.folder={folder}", *SHORT, *arguments)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("job "), done.stderr
    return done.stdout.splitlines()[-1].removeprefix("job ").partition(":")[0]


def rows(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()] if (folder / file).exists() else []


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of each step, from its last run if it was repeated."""
    last = {row["step"]: (row["step"], row["loss"], row["grad_norm"]) for row in rows(folder, "metrics.jsonl")}
    return [last[step] for step in sorted(last)]


@pytest.fixture(scope="module")
def uninterrupted(cluster, tmp_path_factory) -> list[tuple[int, float, float]]:
    """Return the curve of the same plan run on one machine."""

    def make(folder: Path) -> None:
        plain = ("--parallel.devices_per_node=2", "--reference_check.steps=0", f"--run.folder={folder}/run")
        done = distattn(cluster, "train", "configs/tiny.toml", *SHORT, *plain)
        assert done.returncode == 0, done.stderr

    steps = curve(made_once(tmp_path_factory, "uninterrupted", make) / "run")
    assert len(steps) == STEPS
    return steps


def wait_for(cluster, folder: Path, problem: str, condition) -> None:
    def trouble() -> str:
        logs = "".join(file.read_text()[-3000:] for file in sorted(folder.glob("slurm-*.out")))
        return f"{problem}\n{cluster.run('squeue')}{cluster.run('sinfo', '-N')}{logs}"

    eventually(condition, trouble)


@pytest.mark.full
def test_a_run_that_loses_a_node_hangs_and_is_preempted_learns_the_same(cluster, uninterrupted, tmp_path):
    far = tmp_path / "far"
    # patient enough for a loaded machine
    how = ("--checkpoint.every_steps=4", "--reference_check.steps=1", "--supervision.patience_seconds=30")
    submit(cluster, far, "--nodes=3", "--spare=1", "--gpus=2", *how)
    wait_for(cluster, far, "no steps", lambda: len(rows(far, "metrics.jsonl")) > 5)
    cluster.kill_node("node2")
    wait_for(cluster, far, "no second attempt", lambda: len(rows(far, "attempts/attempts.jsonl")) == 1)
    cluster.start_node("node2")
    again = len(rows(far, "metrics.jsonl"))
    # wait for more than two steps, since ranks that have done fewer get more time
    wait_for(cluster, far, "no steps of the second attempt", lambda: len(rows(far, "metrics.jsonl")) > again + 3)
    cluster.signal_ranks("node3", signal.SIGSTOP, most=1)
    wait_for(cluster, far, "no third attempt", lambda: len(rows(far, "attempts/attempts.jsonl")) == 2)
    again = len(rows(far, "metrics.jsonl"))
    wait_for(cluster, far, "no steps of the third attempt", lambda: len(rows(far, "metrics.jsonl")) > again)
    cluster.run("sbatch", "--partition=urgent", "--nodes=4", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(cluster, far, "it does not end", lambda: (far / "state").read_text() == "ended 0\n")

    first, second, third, fourth = rows(far, "attempts/attempts.jsonl")
    assert first["hosts"] == ["node1", "node2"] and first["blamed"] == ["node2"] and "node2" in first["why"]
    assert second["hosts"] == ["node1", "node3"] and second["blamed"] == ["node3"] and second["exit_code"] == 1
    assert re.match(r"node3: rank [23] is stopped \(SIGSTOP or a debugger\): step \d+, ", second["why"]), second["why"]
    for node in ("node-0", "node-1"):
        kept = far / "attempts/002" / node
        assert rows(kept, "heartbeats.jsonl") and list(kept.glob("stacks-*.txt")), list(kept.iterdir())
    assert third["hosts"] == ["node1", "node3"] and third["exit_code"] == 75 and "SIGTERM" in third["why"]
    assert fourth["exit_code"] == 0 and fourth["requeues"] == 1 and fourth["job"] == first["job"] == second["job"]
    output = distattn(cluster, "launch", "status", str(far)).stdout
    assert f"{STEPS} steps done" in output and "attempt 2 on node1 node3: " in output and "ended well" in output
    log = distattn(cluster, "launch", "logs", str(far)).stdout
    assert "largest relative difference to plain transformers" in log and (far / "report.html").exists()
    assert {file.name for file in (far / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(4)}
    assert curve(far) == uninterrupted


@pytest.mark.full
def test_a_run_out_of_time_is_queued_again_learns_the_same_and_can_be_cancelled(cluster, uninterrupted, tmp_path):
    folder = tmp_path / "long"
    began = time.time()
    limits = ("--slurm.signal_seconds=100", "--supervision.patience_seconds=600")
    job = submit(cluster, folder, "--nodes=2", "--gpus=2", *limits)
    # the next jobs use the free nodes
    submit(cluster, tmp_path / "new", "--nodes=2", "--gpus=2", "--preflight.action=only")
    rates = ("--array=train.learning_rate=1e-3,3e-3", "--train.steps=2", "--reference_check.steps=0")
    submit(cluster, tmp_path / "rates", "--nodes=1", "--gpus=2", *rates)
    wait_for(cluster, folder, "no steps", lambda: len(rows(folder, "metrics.jsonl")) > 3)
    # Slurm checks limits twice a minute, so keep the run from ending before that
    cluster.signal_ranks("node1", signal.SIGSTOP, most=2)
    cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={2 + int(time.time() - began) // 60}")
    wait_for(cluster, folder, "it is not asked to stop", (folder / "stop").exists)
    cluster.signal_ranks("node1", signal.SIGCONT, most=2)
    wait_for(
        cluster, folder, "it is not queued again", lambda: "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    )
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=UNLIMITED")
    again = len(rows(folder, "metrics.jsonl"))
    wait_for(cluster, folder, "no steps afterwards", lambda: len(rows(folder, "metrics.jsonl")) > again + 2)
    assert len(list(folder.glob("checkpoints/step-*"))) == 1
    # an administrator takes a node away and returns it
    down = Attempts(folder / "attempts").rows()[-1]["hosts"][1]
    cluster.run("scontrol", "update", f"nodename={down}", "state=down", "reason=test")
    wait_for(
        cluster, folder, "it is not queued again", lambda: "Restarts=2" in cluster.run("scontrol", "show", "job", job)
    )
    # Slurm may already have resumed the node, since with ReturnToService=2 any node that registers becomes usable.
    # Slurm waits for cred_expire before it starts the job again. Job steps have the same numbers as before, so Slurm
    # could mistake a late message about an old step for the end of the new one
    cluster.run("scontrol", "update", f"nodename={down}", "state=resume", check=False)
    again = len(rows(folder, "metrics.jsonl"))
    wait_for(cluster, folder, "no steps without the node", lambda: len(rows(folder, "metrics.jsonl")) > again + 2)
    first = Attempts(folder / "attempts").rows()[-1]["hosts"][0]
    cluster.signal_ranks(first, signal.SIGSTOP, most=2)
    # leftovers of the earlier attempt on a node that returned too soon may end later attempts
    stopped, *lost = rows(folder, "attempts/attempts.jsonl")
    assert lost and all(attempt["exit_code"] != 0 for attempt in lost), lost
    assert stopped["why"] == "stopped at the request of SIGUSR1" and stopped["exit_code"] == 75, stopped
    assert stopped["hosts"] == ["node1", "node2"]
    assert distattn(cluster, "launch", "cancel", str(folder)).returncode == 0
    cluster.signal_ranks(first, signal.SIGCONT, most=2)
    wait_for(
        cluster,
        folder,
        "it is not cancelled",
        lambda: "JobState=CANCELLED" in cluster.run("scontrol", "show", "job", job),
    )
    steps = len(curve(folder))
    assert curve(folder) == uninterrupted[:steps] and again < steps

    checked = tmp_path / "new-preflight"
    wait_for(cluster, checked, "no preflight", lambda: (checked / "state").read_text() == "ended 0\n")
    assert json.loads((checked / "preflight.json").read_text())["problems"] == []
    assert not (checked / "metrics.jsonl").exists() and not (checked / "report.html").exists()
    assert "preflight: 4 ranks on 1 host in " in distattn(cluster, "launch", "logs", str(checked)).stdout
    assert "attempt 1 on node3 node4: " in distattn(cluster, "launch", "status", str(checked)).stdout

    sweep = [tmp_path / "rates" / task for task in "01"]
    for run in sweep:
        wait_for(cluster, run, "no end of the sweep", lambda run=run: (run / "state").read_text() == "ended 0\n")
    rates_of_runs = [[(row["step"], row["learning_rate"]) for row in rows(run, "metrics.jsonl")] for run in sweep]
    # with a schedule, the runs' learning rates in each step have the same ratio as the rates of the sweep
    assert [[step for step, _ in run_rates] for run_rates in rates_of_runs] == [[1, 2], [1, 2]]
    assert [3 * rate for _, rate in rates_of_runs[0]] == pytest.approx([rate for _, rate in rates_of_runs[1]])
    assert distattn(cluster, "launch", "status", str(tmp_path / "rates")).stdout.count("2 steps done") == 2


@pytest.mark.full
def test_a_node_that_fails_twice_is_given_back_and_the_run_continues_without_it(cluster, uninterrupted, tmp_path):
    folder = tmp_path / "given"
    saved = ("--checkpoint.every_steps=2", "--supervision.patience_seconds=600")
    job = submit(cluster, folder, "--nodes=2", "--gpus=2", *saved)
    wait_for(cluster, folder, "no checkpoint", lambda: list(folder.glob("checkpoints/step-*/manifest*")))
    bad = Attempts(folder / "attempts").rows()[-1]["hosts"][1]
    for ended in (1, 2):
        steps = len(rows(folder, "metrics.jsonl"))
        cluster.signal_ranks(bad, signal.SIGKILL, most=1)
        wait_for(
            cluster, folder, "it is not noticed", lambda n=ended: len(rows(folder, "attempts/attempts.jsonl")) == n
        )
        wait_for(cluster, folder, "no further steps", lambda n=steps: len(rows(folder, "metrics.jsonl")) > n + 1)
    first, second, *_, last = Attempts(folder / "attempts").rows()
    assert first["blamed"] == second["blamed"] == [bad] and first["exit_code"] == second["exit_code"] == 137
    assert first["hosts"] == second["hosts"] and (first["requeues"], last["requeues"]) == (0, 1)
    assert bad not in last["hosts"] and f"ExcNodeList={bad}" in cluster.run("scontrol", "show", "job", job)
    assert f"{bad} failed repeatedly and is given back" in distattn(cluster, "launch", "logs", str(folder)).stdout
    assert distattn(cluster, "launch", "cancel", str(folder)).returncode == 0
    steps = len(curve(folder))
    assert curve(folder) == uninterrupted[:steps] and steps > 2


def test_impossible_runs_are_not_submitted(cluster, tmp_path):
    large = ("--model.hidden_size=4096", "--model.num_layers=2", f"--run.folder={tmp_path}/never")
    done = distattn(cluster, "launch", "slurm", "configs/tiny.toml", *large, *SHORT)
    assert done.returncode == 2 and "the largest node has 2.1 GB. Use fewer ranks" in done.stderr, done.stderr
    assert not (tmp_path / "never").exists()
    moon = ("--slurm.partition=moon", f"--run.folder={tmp_path}/never")
    done = distattn(cluster, "launch", "slurm", "configs/tiny.toml", *moon, *SHORT)
    assert done.returncode == 2 and "sbatch refused" in done.stderr and "partition" in done.stderr
    assert not (tmp_path / "never").exists()
