"""Runs on a real Ray cluster of several raylets: killed ranks and lost nodes do not change what the model learns."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from listening import family_of, listening_addresses
from ray_cluster import RayCluster
from waiting import eventually

from distattn.checkpoints.owner import Owner
from distattn.launch.attempts import Attempts
from distattn.training.config import run_file as configuration
from distattn.training.reporting.json_lines import read_rows

pytestmark = pytest.mark.waits(11)

ROOT = Path(__file__).parents[2]
# enough steps that the run does not finish before its last stop
STEPS = 80
SHORT = (
    f"--train.steps={STEPS}",
    # with the configuration's 3e-3, rounding differences exceed the tolerance within 80 steps
    "--train.learning_rate=1e-3",
    "--data.tokens_per_step=2048",
    "--data.max_document_tokens=900",
    "--data.context_length=1024",
    "--parallel.context_parallel_size=2",
    "--checkpoint.every_steps=2",
    "--reference_check.steps=0",
    "--supervision.patience_seconds=30",
)
# several failures in a row happen before the next checkpoint
ELASTIC = ("--ray.min_nodes=1", "--ray.shrink_seconds=1", "--supervision.max_restarts=9")


@pytest.fixture(scope="module")
def cluster():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    ray_cluster = RayCluster(2, "node1", "node2")
    yield ray_cluster
    ray_cluster.stop()


def distattn(cluster, *arguments: str, module: str = "cli", output=subprocess.PIPE) -> subprocess.Popen:
    environment = os.environ | cluster.environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"distattn.launch.{module}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def launch(cluster, folder: Path, *arguments: str) -> subprocess.Popen:
    settings = (f"--ray.address={cluster.address}", f"--run.folder={folder}", *SHORT)
    with open(f"{folder}.out", "w", encoding="utf-8") as output:
        return distattn(cluster, "launch", "ray", "configs/tiny.toml", *settings, *arguments, output=output)


def rows(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()] if (folder / file).exists() else []


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Return (step, loss, gradient norm) of each step, from its last run if it was repeated."""
    last = {row["step"]: (row["step"], row["loss"], row["grad_norm"]) for row in rows(folder, "metrics.jsonl")}
    return [last[step] for step in sorted(last)]


def wait_for(run: subprocess.Popen, folder: Path, problem: str, condition) -> None:
    def trouble() -> str:
        return f"{problem}\n{Path(f'{folder}.out').read_text()[-6000:]}"

    eventually(lambda: condition() or run.poll() is not None, trouble)
    assert condition(), trouble()


@pytest.mark.full
def test_a_run_that_loses_ranks_and_a_node_and_gets_another_node_learns_the_same(cluster, tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    run = launch(cluster, far, "--nodes=2", "--gpus=2", *ELASTIC)
    wait_for(run, far, "no steps", lambda: len(rows(far, "metrics.jsonl")) > 4)
    kill_first_rank(far, signal.SIGKILL)
    wait_for_attempt(run, far, 2)
    kill_first_rank(far, signal.SIGSTOP)
    wait_for_attempt(run, far, 3)
    cluster.kill("node2")
    wait_for(run, far, "no fourth attempt", lambda: Attempts(far / "attempts").latest == 4 and begun(far))
    # at this moment the ranks of the only node are starting
    cluster.add("node3")
    wait_for_attempt(run, far, 5)
    assert f"running from {socket.gethostname()} on the Ray cluster at {cluster.address}, " in status(cluster, far)
    assert distattn(cluster, "launch", "cancel", str(far)).wait() == 0
    assert run.wait() == 75
    # a different driver continues the run
    run = go_on(cluster, far)
    wait_for_attempt(run, far, 6)
    run.send_signal(signal.SIGINT)
    assert run.wait() == 75
    run = go_on(cluster, far)
    wait_for(run, far, "the run does not end", lambda: run.poll() == 0)

    killed, hung, lost, narrow, cancelled, stopped, last = rows(far, "attempts/attempts.jsonl")
    sizes = [
        (row["hosts"], row["nodes"], row["replicas"]) for row in (killed, hung, lost, narrow, cancelled, stopped, last)
    ]
    two_nodes, again = [(["node1", "node2"], 2, 2)] * 2, [(["node1", "node3"], 2, 2)] * 3
    # node1 has failed twice, so it is used again only if there is no other node
    assert sizes == two_nodes + [(["node2"], 1, 1), (["node1"], 1, 1)] + again
    assert (
        killed["blamed"] == ["node1"] and killed["exit_code"] == 137 and "rank 0 was killed by SIGKILL" in killed["why"]
    )
    assert hung["blamed"] == ["node1"] and "node1: rank 0 is stopped (SIGSTOP or a debugger)" in hung["why"]
    evidence = far / "attempts/002"
    assert {len(read_rows(evidence / f"node-{node}/heartbeats.jsonl")) for node in range(2)} == {2}
    assert lost["blamed"] == ["node2"] and "node2 was lost" in lost["why"]
    assert (narrow["exit_code"], narrow["why"]) == (75, "saved, to continue with 2 nodes")
    assert (
        cancelled["why"] == "stopped at the request of distattn launch cancel"
        and stopped["why"] == "stopped at the request of SIGINT"
    )
    assert last["exit_code"] == 0
    output = status(cluster, far)
    assert output.startswith(f"ended, exit code 0, {STEPS} steps done") and "attempt 7 on node1 node3: " in output
    assert {file.name for file in (far / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(4)}
    assert (far / "report.html").exists()
    # the configurations before and after the attempt on one node
    assert {configuration.load(file).parallel.ranks for file in far.glob("config*.toml")} == {2, 4}

    # a cluster consisting of this machine only, without interruptions
    run = launch(cluster, near, "--gpus=4", "--ray.address=local")
    wait_for(run, near, "no steps", lambda: rows(near, "metrics.jsonl"))
    assert {address for process in family_of(run.pid) for address, _ in listening_addresses(process)} == {"127.0.0.1"}
    wait_for(run, near, "the run does not end", lambda: run.poll() == 0)
    before = min(int(file.stem.split("-")[1]) for file in far.glob("config.until-*.toml"))
    assert curve(far)[:before] == curve(near)[:before] and before > 2
    # one replica sums a step's two packs in a different order than two replicas do, so fp32 rounding differences
    # accumulate
    np.testing.assert_allclose(curve(far), curve(near), rtol=1e-5)
    # steps after the newest checkpoint were repeated with the same pieces
    assert set(pieces(far)) == set(pieces(near)) and len(set(pieces(near))) == len(pieces(near))
    assert len(curve(near)) == STEPS


def pieces(folder: Path) -> list[tuple[int, ...]]:
    return [
        tuple(row[key] for key in ("step", "pack", "document", "start"))
        for row in read_rows(folder / "documents.jsonl")
    ]


def kill_first_rank(folder: Path, number: int) -> None:
    os.kill(Owner.read(folder / "owner.json").pid, number)


def begun(folder: Path) -> bool:
    return Attempts(folder / "attempts").goes_on


def wait_for_attempt(run: subprocess.Popen, folder: Path, number: int) -> None:
    """Wait until attempt `number` has done some steps."""
    wait_for(run, folder, f"no attempt {number}", lambda: Attempts(folder / "attempts").latest == number)
    again = len(rows(folder, "metrics.jsonl"))
    wait_for(run, folder, f"no steps of attempt {number}", lambda: len(rows(folder, "metrics.jsonl")) > again)


def go_on(cluster, folder: Path) -> subprocess.Popen:
    with open(f"{folder}.out", "a", encoding="utf-8") as output:
        return distattn(cluster, str(folder), module="ray.attempts", output=output)


def status(cluster, folder: Path) -> str:
    return distattn(cluster, "launch", "status", str(folder)).communicate()[0]


@pytest.mark.full
def test_nodes_that_fail_or_do_not_answer_are_left_out(cluster, tmp_path):
    # add a node to the two left behind by the other tests
    cluster.add("node9")
    try:
        environment = (
            os.environ
            | cluster.environment
            | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support:{ROOT}/tests/support/launching"}
        )
        command = [sys.executable, str(ROOT / "tests/support/launching/ray_cases.py"), cluster.address, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        cluster.kill("node9")
        cluster.wait_without("node9")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.split("found ", 1)[1])
    first, second, third = results["nodes"]
    assert results["ends"][1] == 0
    # only the actor's process was killed, not the node
    hosts, code, why, blamed = results["dies"]
    assert hosts == [first, second] and code == 1 and blamed == [second] and f"{second} was lost: " in why
    assert results["fails twice"] == [[first, second], 137, f"{second} ended with exit code 137", [second]]
    assert results["is left out"][:2] == [sorted([first, third]), 0]
    assert results["is taken again"][:2] == [[first, second], 0]
    assert f"there are no other nodes: {second} may be used again" in done.stderr
    assert f"{third} is left out: its agent did not answer for 1 s" in done.stderr
    assert results["was slow"][:2] == [sorted([first, third]), 0]
    assert f"there are too few other nodes: {third} is asked again" in done.stderr
    assert f"{second} is left out: its agent did not answer for 1 s" in done.stderr
    assert results["no room"] == [None, "for 100 s there was no room for 2 nodes of 2 CPUs: 2 nodes are that large"]
    assert results["given up"] == -signal.SIGKILL


@pytest.mark.full
def test_commands_run_on_every_node_and_for_every_value(cluster, tmp_path):
    address = f"--ray.address={cluster.address}"
    code = (
        "import sys; print(*sys.argv[2:]); open(sys.argv[1] + '/file', 'w').write('kept'); sys.exit('3' in sys.argv[2])"
    )
    program = ("--", sys.executable, "-c", code, "{out}")
    run = distattn(cluster, str(tmp_path / "nodes"), address, "--every-node", *program, "1", module="ray.tasks")
    output = run.communicate()[0]
    assert run.returncode == 0, output
    # two nodes are left behind by the other tests
    nodes = sorted(file.stem for file in (tmp_path / "nodes").glob("*.log"))
    assert len(nodes) == 2 and all(f"{node}: exit code 0" in output for node in nodes)
    assert {(tmp_path / f"nodes/{node}/file").read_text() for node in nodes} == {"kept"}
    run = distattn(cluster, str(tmp_path / "values"), address, "--array=side=2,3,4", *program, module="ray.tasks")
    output = run.communicate()[0]
    assert run.returncode == 1 and "3: exit code 1" in output, output
    assert [(tmp_path / f"values/{side}.log").read_text() for side in (2, 3, 4)] == [
        f"--side={side}\n" for side in (2, 3, 4)
    ]
