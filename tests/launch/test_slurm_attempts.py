"""Attempts of a run in one Slurm job, with Slurm commands whose answers are set by a test."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from distattn.checkpoints.manifest import Manifest
from distattn.launch.attempt_end import AttemptEnd, LeftOut
from distattn.launch.attempts import Attempts

ROOT = Path(__file__).parents[2]
LOST = "srun: error: Node failure on node2"
KILLED = "srun: error: node2: task 1: Killed"
FAILED = "srun: error: node[1-2]: tasks 0-1: Exited with exit code 1"
REFUSED = "srun: error: node[1-2]: tasks 0-1: Exited with exit code 2"
NO_STEP = "srun: error: Unable to create step for job 12: Requested node configuration is not available"
SAVED = "srun: error: node[1-2]: tasks 0-1: Exited with exit code 75"


@pytest.fixture
def job(tmp_path):
    """Return a function that runs the helper in a job of three nodes.

    steps: the output and exit code of srun, step by step. A first attempt that is KILLED has saved step 4. broken: a
    Slurm command that fails. others: nodes of the cluster outside the job.
    """

    def run(
        *steps: tuple[str, int],
        restarts: int = 3,
        requeues: int = 5,
        nodes: int = 2,
        broken: str = "",
        others: str = "",
        asked: str = "",
        **environment: str,
    ):
        bin_folder, folder = tmp_path / "bin", tmp_path / "run"
        bin_folder.mkdir()
        folder.mkdir()
        for number, (output, code) in enumerate(steps):
            first = f"echo SIGTERM > {folder}/stop\n" if code == 75 else ""
            if output == KILLED and number == 0:
                Manifest(0, 4, "2026-11-25T12:00:00+00:00", 2, "2.13.0", {}, []).write(tmp_path)
                saved = f"{folder}/checkpoints/step-00000004"
                first = f"mkdir -p {saved}\ncp {tmp_path}/manifest.json {saved}\n"
            # this step does not end by itself
            last = "exec sleep 1000" if code < 0 else f"exit {code}"
            (bin_folder / f"step{number}").write_text(f"{first}echo '{output}' >&2\n{last}\n")
        listed = [*(f"node{number} allocated" for number in (1, 2, 3)), *others.splitlines()]
        scripts = {
            "srun": f'echo "$@" >> {tmp_path}/steps\nexec bash {bin_folder}/step$(($(wc -l < {tmp_path}/steps) - 1))',
            "sinfo": f"printf '%s\\n' {' '.join(repr(line) for line in listed)}",
            "scancel": "true",
            "squeue": "echo RUNNING",
            "scontrol": f"""case $2 in
                hostnames) [ "$3" = 'node[1-3]' ] && echo node1 node2 node3 || echo node1 node2;;
                job) echo "JobId=$3 ExcNodeList=node8";;
                node) echo "NodeName=$3 NodeAddr=10.0.0.${{3#node}} Port=1";;
                *) echo "$@" >> {tmp_path}/requeued;;
            esac""",
        }
        if broken:
            scripts[broken] = "echo slurm_load: Access denied >&2\nexit 1"
        for name, lines in scripts.items():
            (bin_folder / name).write_text(f"#!/bin/bash\n{lines}\n")
            (bin_folder / name).chmod(0o755)
        environment = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-3]"} | environment
        environment = os.environ | environment | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        command = [
            sys.executable,
            "-m",
            "distattn.launch.slurm.attempts",
            str(folder),
            f"--nodes={nodes}",
            f"--asked={asked}",
        ]
        command += [f"--max-restarts={restarts}", f"--max-requeues={requeues}", "--", "srun", "python"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        started = (tmp_path / "steps").read_text().splitlines() if (tmp_path / "steps").exists() else []
        requeued = (tmp_path / "requeued").read_text().split() if (tmp_path / "requeued").exists() else []
        assert (folder / "state").read_text() == f"ended {done.returncode}\n"
        # this also holds if a user has submitted the script again
        task = environment.get("SLURM_ARRAY_TASK_ID")
        assert json.loads((folder / "job.json").read_text()) == {"job": f"9_{task}" if task else 12}
        assert not task or json.loads((tmp_path / "job.json").read_text()) == {"job": 9}
        return done, started, requeued, Attempts(folder / "attempts").rows()

    return run


def test_a_lost_node_is_left_out_and_each_attempt_listens_elsewhere(job):
    done, started, requeued, rows = job((LOST, 1), ("", 0), ("", 0))
    assert done.returncode == 0 and not requeued, done.stderr
    assert started == [
        "--nodes=2 --ntasks=2 --nodelist=node1,node2 python 10.0.0.1:21021",
        "--nodes=2 --ntasks=2 --nodelist=node1,node3 python 10.0.0.1:22030",
        "--nodes=1 --ntasks=1 --nodelist=node1 python finish",
    ]
    assert rows[0]["why"] == "node2 was lost" and rows[0]["job"] == 12 and rows[1]["why"] == "ended well"
    assert "node2 was lost; all ranks start again from step 0 (restart 1 of 3)" in done.stderr


def test_a_node_that_fails_twice_is_left_out(job):
    done, started, _, rows = job((KILLED, 137), (KILLED, 137), ("", 0), ("", 0))
    assert done.returncode == 0 and [row.get("blamed") for row in rows] == [["node2"], ["node2"], None]
    assert "node1,node2" in started[1] and "node1,node3" in started[2] and rows[0]["why"] == "node2 was killed"


def test_the_job_is_queued_again_if_too_few_nodes_are_left(job):
    done, _, requeued, _ = job((LOST, 1), (LOST.replace("2", "3"), 1))
    assert done.returncode == 75 and requeued == ["requeue", "12"] and "fewer than 2 nodes are left" in done.stderr


def test_a_node_that_fails_twice_without_a_spare_one_is_given_back(job):
    # node8 is already avoided, and node7 is being drained
    done, started, requeued, _ = job(*[(KILLED, 137)] * 2, nodes=3, others="node4 idle\nnode7 draining\nnode8 idle")
    assert done.returncode == 75 and len(started) == 2 and "node2 failed repeatedly and is given back" in done.stderr
    assert requeued == ["requeue", "12", "update", "jobid=12", "excnodelist=node8,node2"]


@pytest.mark.parametrize(
    ("others", "requeues"),
    [("node7 draining\nnode8 idle", 5), ("node4 idle", 0)],
    ids=["no other node", "never queued again"],
)
def test_a_node_that_fails_twice_is_used_if_there_is_no_other(others, requeues, job):
    done, started, requeued, _ = job(*[(KILLED, 137)] * 2, ("", 0), ("", 0), nodes=3, others=others, requeues=requeues)
    assert done.returncode == 0 and not requeued and len(started) == 4


def test_a_node_that_was_left_out_is_avoided_by_the_job_that_is_queued_again(job):
    done, started, requeued, _ = job(*[(KILLED, 137)] * 2, (SAVED, 75), others="node4 idle")
    assert "node1,node3" in started[2] and requeued[2:] == ["update", "jobid=12", "excnodelist=node8,node2"]


def test_a_job_whose_nodes_slurm_has_lost_track_of_is_queued_again(job):
    done, started, requeued, rows = job((FAILED, 1), (NO_STEP, 1))
    assert done.returncode == 75 and len(started) == 2 and requeued == ["requeue", "12"]
    assert rows[1]["why"] == "no ranks were started: Requested node configuration is not available"


def test_a_job_that_never_starts_ranks_ends_and_says_why(job):
    done, started, requeued, _ = job(*[(NO_STEP, 1)] * 3, restarts=2)
    assert done.returncode == 1 and len(started) == 3 and not requeued
    assert "Requested node configuration is not available; 3 attempts made no progress" in done.stderr


def test_commands_of_slurm_that_fail_do_not_end_the_run(job):
    done, started, requeued, _ = job(broken="sinfo")
    assert done.returncode == 75 and not started and requeued == ["requeue", "12"]
    assert "sinfo refused: slurm_load: Access denied" in done.stderr


def test_a_step_that_cannot_be_killed_ends_all_the_same(job):
    # srun itself is killed some seconds later
    done, started, requeued, _ = job((FAILED, -1), ("", 0), ("", 0), broken="scancel")
    assert done.returncode == 0 and len(started) == 3 and not requeued and "scancel refused" not in done.stdout


def test_a_signal_that_came_before_the_ranks_has_them_save(job):
    done, _, requeued, rows = job((SAVED, 75), asked="SIGUSR1")
    assert (
        done.returncode == 75
        and requeued == ["requeue", "12"]
        and rows[0]["why"] == "stopped at the request of SIGUSR1"
    )


def test_ranks_that_say_why_they_cannot_go_on_are_not_started_again(job):
    done, started, requeued, _ = job((REFUSED, 2))
    assert done.returncode == 2 and len(started) == 1 and not requeued


def test_a_run_without_progress_ends(job):
    done, started, requeued, rows = job(*[(FAILED, 1)] * 3, restarts=2)
    assert done.returncode == 1 and len(started) == 3 and not requeued and "3 attempts made no progress" in done.stderr
    # if several nodes have the same message, the first is named
    assert rows[0]["why"] == "node1 ended with exit code 1"


def test_a_job_is_queued_again_after_a_signal_but_not_forever(job):
    done, started, requeued, rows = job((SAVED, 75), requeues=1)
    assert (
        done.returncode == 75
        and requeued == ["requeue", "12"]
        and rows[0]["why"] == "stopped at the request of SIGTERM"
    )
    assert len(started) == 1


def test_a_task_of_a_sweep_is_queued_again_alone(job):
    done, _, requeued, _ = job((SAVED, 75), requeues=1, SLURM_ARRAY_JOB_ID="9", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 75 and requeued == ["requeue", "9_2"]


def test_the_limit_of_requeues_is_named(job):
    done, _, requeued, _ = job((SAVED, 75), requeues=1, SLURM_RESTART_COUNT="1")
    assert done.returncode == 75 and not requeued and "queued again 1 times, slurm.max_requeues" in done.stderr


def test_the_reports_of_nodes_on_their_ranks_give_the_cause():
    hosts, end = ["a", "b", "c"], AttemptEnd(1, {"a": 1, "c": 4, "b": 137}, {"b": "ended with exit code 137"})
    killed = {"why": "rank 3 was killed", "exit_code": 137, "nodes": [1], "kind": "killed"}
    raised = {"why": "rank 0 raised an error", "exit_code": 1, "nodes": [0], "kind": "raised"}
    missed = {"why": "rank 3 is lost", "exit_code": 4, "nodes": [2], "kind": "refused"}
    assert end.cause(hosts, {0: raised, 1: killed, 2: missed}) == ("b: rank 3 was killed", ["b"])
    assert end.cause(hosts, {2: missed, 0: raised}) == ("a: rank 0 raised an error", ["a"])
    hung = killed | {"why": "rank 3 is stopped", "exit_code": 1, "kind": "hung"}
    # a node whose launcher is dead as well reports nothing, but the others miss it
    reset = raised | {"why": "rank 0 raised RuntimeError: Read error: Connection reset by peer", "lost_peer": True}
    assert end.cause(hosts, {0: reset, 2: missed}) == ("b ended with exit code 137", ["b"])
    assert end.cause(hosts, {0: reset, 1: missed}) == ("c no longer answered", ["c"])
    # all nodes report the same cause
    assert end.cause(hosts, {0: hung, 1: hung, 2: hung}) == ("b: rank 3 is stopped", ["b"])
    assert end.cause(hosts, {}) == (end.why(hosts), end.blamed(hosts)) == ("b ended with exit code 137", ["b"])


def test_an_attempt_whose_job_was_killed_is_noted_by_the_next(tmp_path):
    attempts = Attempts(tmp_path / "attempts")
    assert attempts.begin(job=3, hosts=["a"]) == 1 and attempts.rows()[0]["job"] == 3
    attempts.end_open("ended with its job")
    assert attempts.begin(job=4, hosts=["b"]) == 2
    attempts.end(2, 0, "ended well")
    rows = [json.loads(line) for line in (tmp_path / "attempts/attempts.jsonl").read_text().splitlines()]
    assert [(row["attempt"], row["job"], row["exit_code"]) for row in rows] == [(1, 3, None), (2, 4, 0)]
    assert (
        rows == attempts.rows()
        and rows[0]["ended"] is None
        and [path.name for path in (tmp_path / "attempts").iterdir()] == ["attempts.jsonl"]
    )


def test_hosts_that_failed_but_answer_are_taken_again_where_there_are_no_others():
    left_out = LeftOut()
    left_out.blame(["a"], AttemptEnd(1, {"a": 137}), spare=2)
    left_out.blame(["a", "b", "c"], AttemptEnd(1, {"a": 137, "c": None}, lost=["c"]), spare=2)
    # a has failed twice, b stopped answering, and c is gone
    assert left_out.hosts == ["a", "b", "c"]
    assert left_out.take_back() == ["a"] and left_out.hosts == ["b", "c"] and not left_out.take_back()
    left_out.blame(["a"], AttemptEnd(1, {"a": 137}), spare=2)
    assert left_out.hosts == ["b", "c"]


def test_hosts_that_did_not_answer_are_retried_in_order():
    left_out = LeftOut()
    for host in "abc":
        left_out.leave_out_unstarted(host)
    # node a is gone
    assert left_out.take_back_unstarted({"b", "c", "d"}) == "b" and left_out.hosts == ["a", "c"]
    left_out.leave_out_unstarted("b")
    assert [left_out.take_back_unstarted({"b", "c"}) for _ in range(3)] == ["c", "b", ""]
    assert left_out.hosts == ["a"] and left_out.asked_again == {"b", "c"}


@pytest.mark.parametrize(
    ("blamed", "left_out"),
    [
        ("a a", "a"),
        # failures of several hosts over weeks, and errors that all hosts raise
        ("a b a b", ""),
        ("abc abc abc", ""),
        ("ab ac", "a"),
    ],
)
def test_a_host_that_alone_failed_repeatedly_is_excluded(blamed, left_out):
    left_out_ = LeftOut()
    for hosts in blamed.split():
        left_out_.blame(list(hosts), AttemptEnd(1, dict.fromkeys(hosts, 137)), spare=3)
    assert left_out_.hosts == left_out_.failing == list(left_out)


def test_a_host_that_failed_once_in_a_while_stays():
    left_out = LeftOut()
    for day in (0.0, 86401.0):
        with patch.object(time, "monotonic", lambda day=day: day):
            left_out.blame(["a"], AttemptEnd(1, {"a": 137}), spare=3)
    assert not left_out.hosts and not left_out.failing
