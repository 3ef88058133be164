"""Two jobs on one folder: the second is refused and told who the owner is, and a dead owner's folder is taken over."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from waiting import eventually

from distattn.checkpoints import run_lock
from distattn.checkpoints.owner import Owner
from distattn.checkpoints.run_lock import LAUNCHER, LEASE_SECONDS, OWNER, RunLock
from distattn.ir.errors import DistattnError

_ROUNDS = 8


def hold(folder, job, ready, child, role):
    os.environ.pop("SLURM_JOB_ID", None)
    if job:
        os.environ["SLURM_JOB_ID"] = job
    lock = RunLock(folder, role)
    if child:
        # imitate a data loader's worker that outlives its parent
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        child.put(pid)
    ready.put(lock is not None)
    signal.pause()


@pytest.fixture
def owner(tmp_path):
    """Start other processes that hold the folder. Kill all of them at the end."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(job="", child=None, role=OWNER):
        ready = context.SimpleQueue()
        started.append(context.Process(target=hold, args=(tmp_path, job, ready, child, role)))
        started[-1].start()
        assert ready.get()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def test_the_second_of_two_jobs_refuses_and_names_the_first(owner, tmp_path, monkeypatch):
    process = owner(job="4711")
    with pytest.raises(
        DistattnError, match=rf"belongs to process {process.pid} on \S+, Slurm job 4711, since 20\S+; end it"
    ):
        RunLock(tmp_path)
    # a different job id is a different job
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(DistattnError, match="Slurm job 4711"):
        RunLock(tmp_path)
    assert process.is_alive()


def test_the_folder_of_a_killed_owner_is_free_at_once(owner, tmp_path):
    process = owner()
    process.kill()
    process.join()
    RunLock(tmp_path).close()
    # a folder whose owner has closed its lock is also free
    with RunLock(tmp_path) as lock:
        lock.check()
    assert os.listdir(tmp_path) == ["owner.lock"]


def test_children_of_a_killed_owner_do_not_keep_the_folder(owner, tmp_path):
    child = multiprocessing.get_context("fork").SimpleQueue()
    process = owner(child=child)
    process.kill()
    process.join()
    pid = child.get()
    try:
        with RunLock(tmp_path), pytest.raises(DistattnError, match=f"belongs to process {os.getpid()}"):
            RunLock(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)


def contend(folder, start, outcomes, done):
    """Try to take the folder at the same time as the others. Report the outcome, and hold the folder until all have
    reported.
    """
    os.environ.pop("SLURM_JOB_ID", None)
    start.wait()
    try:
        lock = RunLock(folder)
    except DistattnError as error:
        outcomes.put(str(error))
    else:
        outcomes.put("")
        done.wait()
        lock.close()


def own_and_die(folder, children):
    """Take the folder, fork a child that inherits all open files, and kill this process."""
    RunLock(folder)
    if (child := os.fork()) == 0:
        signal.pause()
    children.put(child)
    os.kill(os.getpid(), signal.SIGKILL)


def test_one_of_three_jobs_that_come_at_once_gets_the_folder_of_a_killed_owner(tmp_path):
    context = multiprocessing.get_context("fork")
    children = context.SimpleQueue()
    for _ in range(_ROUNDS):
        dead = context.Process(target=own_and_die, args=(tmp_path, children))
        dead.start()
        dead.join()
        start, done, outcomes = context.Barrier(3), context.Event(), context.SimpleQueue()
        jobs = [context.Process(target=contend, args=(tmp_path, start, outcomes, done)) for _ in range(3)]
        for job in jobs:
            job.start()
        refusals = sorted(outcomes.get() for _ in jobs)
        named = Owner.read(tmp_path / "owner.json")
        done.set()
        for job in jobs:
            job.join()
        os.kill(children.get(), signal.SIGKILL)
        assert refusals[0] == "" and all("belongs to process" in refusal for refusal in refusals[1:]), refusals
        assert named is not None and named.pid in {job.pid for job in jobs}


def test_a_lock_on_a_file_that_was_removed_is_no_lock(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / "owner.lock").unlink()
        with pytest.raises(DistattnError, match=f"belongs to process {os.getpid()}"):
            RunLock(tmp_path)


def test_a_forked_child_that_closes_the_lock_takes_nothing_from_its_parent(tmp_path):
    with RunLock(tmp_path) as lock:
        pid = os.fork()
        if pid == 0:
            lock.close()
            os._exit(0)
        os.waitpid(pid, 0)
        lock.check()
        assert Owner.read(tmp_path / "owner.json").pid == os.getpid()


def test_an_attempt_of_the_same_job_waits_for_the_previous_one_to_end(owner, tmp_path, monkeypatch):
    process = owner(job="4711")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: (process.kill(), process.join()))
    with RunLock(tmp_path):
        assert not process.is_alive() and Owner.read(tmp_path / "owner.json").pid == os.getpid()


def elsewhere(folder, role=OWNER, **changes):
    """Write the file of an owner on another machine, on a file system that does not share flock between machines."""
    owner_ = Owner.of_this_process()
    facts = {**owner_.__dict__, "host": "node-7", "machine": "another", "job": "4711", **changes}
    file = folder / f"{role}.json"
    file.write_text(json.dumps(facts))
    return file


def test_a_lease_of_another_machine_is_respected_until_it_ends(tmp_path, monkeypatch):
    file = elsewhere(tmp_path)
    with pytest.raises(
        DistattnError, match=r"on node-7, Slurm job 4711, .*; if it is dead, try again in (1[01]\d|120) s\."
    ):
        RunLock(tmp_path)
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.05)
    ended = time.time() - LEASE_SECONDS - 5
    os.utime(file, (ended, ended))
    with RunLock(tmp_path):
        assert Owner.read(file).pid == os.getpid()


@pytest.mark.parametrize("days", [-3, 3])
def test_a_lease_that_is_still_renewed_has_not_ended_whatever_the_clock_says(days, tmp_path, monkeypatch):
    # the clock has jumped since the lease was last renewed
    file = elsewhere(tmp_path)
    then = time.time() + days * 86400
    os.utime(file, (then, then))
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.2)
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(file))
    with pytest.raises(DistattnError, match="belongs to process .* on node-7"):
        RunLock(tmp_path)


def test_a_lease_from_the_future_that_is_not_renewed_ends(tmp_path, monkeypatch):
    file = elsewhere(tmp_path)
    then = time.time() + 86400
    os.utime(file, (then, then))
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.05)
    with RunLock(tmp_path):
        assert Owner.read(file).pid == os.getpid()


def test_an_attempt_of_the_same_job_on_another_machine_takes_over_at_once(tmp_path, monkeypatch):
    file = elsewhere(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with RunLock(tmp_path):
        assert Owner.read(file).pid == os.getpid()


def test_a_launcher_of_the_same_job_is_another_launcher(owner, tmp_path, monkeypatch):
    # all commands within one salloc have the same SLURM_JOB_ID
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: pytest.fail("it waits"))
    file = elsewhere(tmp_path, LAUNCHER)
    with pytest.raises(DistattnError, match="belongs to process .* on node-7, Slurm job 4711"):
        RunLock(tmp_path, LAUNCHER)
    file.unlink()
    process = owner(job="4711", role=LAUNCHER)
    with pytest.raises(DistattnError, match=f"belongs to process {process.pid} on "):
        RunLock(tmp_path, LAUNCHER)


def test_the_lease_is_renewed_and_its_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEWAL_SECONDS", 0.01)
    with RunLock(tmp_path) as lock:
        file = tmp_path / "owner.json"
        os.utime(file, (0, 0))
        eventually(lambda: file.stat().st_mtime > 1e6, "the lease was not renewed")
        lock.check()
        elsewhere(tmp_path)
        with pytest.raises(DistattnError, match="was taken by process .* on node-7"):
            lock.check()
    # the other owner's file stays
    assert file.exists()


def test_a_folder_that_cannot_be_locked_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DistattnError, match="file: cannot be locked: File exists"):
        RunLock(tmp_path / "file")
