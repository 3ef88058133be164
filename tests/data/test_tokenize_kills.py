"""distattn data tokenize after kills and on full disks: nothing hangs, nothing is lost, and the result is bitwise the
same.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import LIMIT_SECONDS, eventually

from distattn.data.tokenizing import document_sources
from distattn.data.tokenizing import tokenize as tokenize_files
from distattn.launch.data import tokenize_processes
from distattn.supervision.helper_processes import MOST_REPLACEMENTS

ROOT = Path(__file__).parents[2]
SUFFIXES = (".bin", ".idx", ".xxh3", ".json")
SHARDS = 40
# a driver that writes many small shards. It kills itself before it renames a file for the n-th time, or some seconds
# after its workers have finished a given number of shards
DRIVER = """
import os, signal, sys, time
from distattn.data.tokenizing import document_sources
from distattn.data.tokenizing import tokenize
from distattn.launch import cli
from distattn.launch.data import tokenize_processes

document_sources._shard_bytes = lambda sources: 60_000
tokenize._LOCK_SECONDS = 600.0
left, shards, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
rename, give = os.rename, tokenize_processes._Worker.give

def fatal_rename(*names):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*names)

def fatal_give(*arguments):
    global shards
    shards -= 1
    if shards == 0:
        # while the other worker works
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)
    give(*arguments)

os.rename = fatal_rename
tokenize_processes._Worker.give = fatal_give
sys.exit(cli.main(sys.argv[4:]))
"""
# each worker starts with one shard
WORKERS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write a file of about 40 shards. Return its folder and the output of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(5)
    with open(folder / "a.jsonl", "w") as file:
        while file.tell() < SHARDS * 60_000 - 30_000:
            text = "".join(rng.choices("some text of letters äöü", k=rng.randrange(3000)))
            file.write(json.dumps({"text": text}) + "\n")
    done = finish(folder, folder / "whole")
    assert done.returncode == 0, done.stderr
    return folder, contents(folder / "whole")


def start(folder, out, die_at=0, shards=0, seconds=0.0, **more):
    command = [
        "data",
        "tokenize",
        str(folder / "a.jsonl"),
        "--out",
        str(out),
        "--tokenizer",
        "bytes",
        "--processes",
        str(WORKERS),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(die_at), str(shards), str(seconds), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(folder, out, *when, **more):
    process = start(folder, out, *when, **more)
    stdout, stderr = process.communicate(timeout=LIMIT_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def contents(prefix):
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES}


def finished(out):
    return len([file for file in Path(f"{out}.parts").glob("*.json") if file.name != "job.json"])


def workers(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def reached(condition, process):
    """Wait until a condition holds. Return False if the command ends before that."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def test_a_command_that_is_killed_repeatedly_continues(corpus, tmp_path):
    folder, whole = corpus
    rng = random.Random(1)
    out = tmp_path / "out"
    # each run completes a few more shards and never finishes
    for shards in rng.choices(range(1, 5), k=6):
        before = finished(out)
        killed = finish(folder, out, shards=WORKERS + shards, seconds=rng.random() * 0.02)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert before + shards <= finished(out) <= before + shards + WORKERS
    done = finish(folder, out)
    assert done.returncode == 0, done.stderr
    assert "by an earlier command" in done.stdout
    assert contents(out) == whole
    assert not Path(f"{out}.parts").exists()


def test_workers_end_with_a_command_that_is_killed(corpus, tmp_path):
    folder, _ = corpus
    process = start(folder, tmp_path / "out")
    eventually(lambda: len(workers(process)) == 2, "no workers")
    processes = workers(process)
    process.kill()
    process.communicate()
    eventually(lambda: not any(map(alive, processes)), "workers live on")
    assert not any(map(alive, processes))


@pytest.mark.parametrize("die_at", range(1, 6))
def test_a_command_that_is_killed_while_it_renames_files_continues(corpus, tmp_path, die_at):
    folder, whole = corpus
    # the files are renamed in this order: job file, tokens, digests, index, manifest
    killed = finish(folder, tmp_path / "out", die_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out.json").exists()
    assert (tmp_path / "out.idx").exists() == (die_at == 5) and (tmp_path / "out.bin").exists() == (die_at > 2)
    done = finish(folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json", "out.xxh3"]


def workers_of_this_process():
    """Return the process ids of the workers started by the test itself."""
    children = workers(SimpleNamespace(pid=os.getpid()))
    return [pid for pid in children if b"tokenize_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_worker_that_dies_or_stops_is_replaced_and_its_shard_is_repeated(corpus, tmp_path, monkeypatch, capsys, how):
    folder, whole = corpus
    monkeypatch.setattr(document_sources, "_shard_bytes", lambda sources: 60_000)
    monkeypatch.setattr(tokenize_processes, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(tokenize_processes, "_STOPPED_SECONDS", 0.5)
    job = tokenize_files.plan_job(str(tmp_path / "out"), [str(folder / "a.jsonl")], "bytes")
    told, lost = [], []

    def report(progress):
        told.append(progress)
        # after four progress reports, kill all workers in the middle of their shards
        if len(told) == 4:
            lost.extend(workers_of_this_process())
            for pid in lost:
                os.kill(pid, how)

    manifest = tokenize_processes.tokenize(job, WORKERS, report)
    assert contents(tmp_path / "out") == whole and len(lost) == WORKERS
    error_lines = capsys.readouterr().err.splitlines()
    why = "was killed by SIGKILL" if how == signal.SIGKILL else r"is stopped \(SIGSTOP or a debugger\)"
    for line in error_lines:
        assert re.fullmatch(
            rf"distattn: tokenize: process [01] \(({lost[0]}|{lost[1]})\) {why} while it worked on bytes [\d,]+ to [\d,]+ of "
            r".*a\.jsonl; another process will redo it\.",
            line,
        ), line
    assert len(error_lines) == WORKERS
    # work done twice counts once
    assert [sum(counts) for counts in zip(*told, strict=True)][1:3] == [manifest.documents, manifest.tokens]


def test_a_worker_that_is_killed_again_and_again_ends_the_command(corpus, tmp_path, monkeypatch, capsys):
    folder, whole = corpus
    monkeypatch.setattr(document_sources, "_shard_bytes", lambda sources: 60_000)
    job = tokenize_files.plan_job(str(tmp_path / "out"), [str(folder / "a.jsonl")], "bytes")

    def report(progress):
        for pid in workers_of_this_process():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(tokenize_processes.LostProcessError) as lost:
        tokenize_processes.tokenize(job, 1, report)
    assert re.fullmatch(
        r"tokenize: process 0 \(\d+\) was killed by SIGKILL while it worked on bytes [\d,]+ to [\d,]+ of .*a\.jsonl; the "
        r"others were stopped\. If memory ran out, use fewer --processes\..*",
        str(lost.value),
    )
    assert capsys.readouterr().err.count("another process will redo it.") == MOST_REPLACEMENTS
    tokenize_processes.tokenize(job, WORKERS, lambda progress: None)
    assert contents(tmp_path / "out") == whole


def test_two_commands_do_not_work_in_one_place(corpus, tmp_path, monkeypatch):
    from distattn.data.tokenizing import tokenize

    folder, whole = corpus
    monkeypatch.setattr(tokenize, "_LOCK_SECONDS", 0.3)
    job = tokenize.plan_job(str(tmp_path / "out"), [str(folder / "a.jsonl")], "bytes")
    with (
        tokenize.locked(job),
        pytest.raises(tokenize.DistattnError, match="another tokenize command is using it"),
        tokenize.locked(job),
    ):
        pass
    # of two commands started together, the later waits for the earlier, and then has nothing to do
    processes = [start(folder, tmp_path / "out") for _ in range(2)]
    outputs = [process.communicate(timeout=LIMIT_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("there was nothing to do" in stdout for stdout, _ in outputs) == 1
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("limit", [30_000, 500_000], ids=["in a shard", "putting shards together"])
def test_a_limit_on_files_gives_a_sentence_and_nothing_is_lost(corpus, tmp_path, limit):
    folder, whole = corpus

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = finish(folder, tmp_path / "out", preexec_fn=limited)
    assert full.returncode == 2, full.stderr
    assert re.fullmatch(
        r"distattn: .*/out.*: cannot be written after [\d,]+ tokens: File too large; make room, or write elsewhere\..*\n",
        full.stderr,
    ), full.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    kept = finished(tmp_path / "out")
    assert ("Finished shards are kept: the same command continues from there." in full.stderr) == (kept > 0)
    # no shard fits into the lower limit, and every shard fits into the higher limit
    assert kept == 0 if limit == 30_000 else kept > SHARDS // 2
    done = finish(folder, tmp_path / "out")
    assert done.returncode == 0 and contents(tmp_path / "out") == whole, done.stderr


def test_a_full_disk_gives_a_sentence_and_nothing_is_lost(corpus, tmp_path):
    folder, whole = corpus
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        full = finish(folder, disk / "out")
        assert full.returncode == 2, full.stderr
        assert re.search(
            r"cannot be written.*: No space left on device; make room.*Finished shards are kept", full.stderr
        )
        assert len(full.stderr.splitlines()) == 1
        kept = finished(disk / "out")
        assert kept > 5
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        done = finish(folder, disk / "out")
        assert done.returncode == 0, done.stderr
        assert "by an earlier command" in done.stdout and contents(disk / "out") == whole
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
