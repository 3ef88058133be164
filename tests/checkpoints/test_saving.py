"""Saving overlaps with training, and survives a disk that is full or not writable."""

import errno
import os
import re
import resource
import threading
import time
from pathlib import Path

import checkpoint_faults as faults
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import run_on_ranks
from waiting import eventually

from distattn.checkpoints import checkpoints as module
from distattn.checkpoints import digested_files
from distattn.checkpoints.checkpoint_folder import (
    list_checkpoints,
    remove_checkpoint,
    verify_checkpoint,
)
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule
from distattn.ir.errors import DistattnError
from distattn.supervision import heartbeats
from distattn.supervision.culprits import Culprit, culprits
from distattn.supervision.heartbeats import HeartbeatBoard


def open_checkpoints(folder, warn=faults.no_warning, keep=None, group=None, **facts):
    return Checkpoints(folder, group=group, facts=facts, keep=keep or KeepRule(), warn=warn)


def steps(folder):
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def test_twenty_saves_leave_the_last_ones_and_nothing_else(tmp_path):
    saver = open_checkpoints(tmp_path, keep=KeepRule(last=3))
    for step in range(1, 21):
        saver.save(step, faults.state_of(step))
    saver.close()
    assert sorted(os.listdir(tmp_path)) == ["step-00000018", "step-00000019", "step-00000020"]
    assert not any(verify_checkpoint(tmp_path / name) for name in os.listdir(tmp_path))
    assert [checkpoint.manifest.serial for checkpoint in list_checkpoints(tmp_path)] == [18, 19, 20]


def test_nothing_is_loaded_without_a_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        saver = open_checkpoints(folder)
        assert saver.load_newest(faults.empty_state()) is None
        saver.close()


def test_the_saved_state_is_the_state_at_the_call(tmp_path):
    saver = open_checkpoints(tmp_path)
    state = faults.state_of(1) | {"history": [1, 2]}
    saver.save(1, state)
    state["history"].append(3)
    for tensor in state["model"].values():
        tensor.zero_()
    saver.wait()
    loaded = faults.empty_state() | {"history": []}
    saver.load_newest(loaded)
    saver.close()
    assert faults.equal(loaded, faults.state_of(1) | {"history": [1, 2]})


def test_copies_are_made_in_the_same_memory_at_every_save(tmp_path):
    saver = open_checkpoints(tmp_path)
    state = faults.state_of(1)
    where = []
    for step in (1, 2):
        saver.save(step, state)
        where.append({name: buffer.data_ptr() for name, buffer in saver._buffers._buffers.items()})
    saver.close()
    assert where[0] == where[1] and len(where[0]) == 16


def test_overlapped_copies_hold_the_state_at_the_call(tmp_path):
    saver = open_checkpoints(tmp_path)
    state = faults.state_of(1)
    saver.save(1, state, overlap=True)
    saver.wait_staged()
    state["model"]["layer 0"].zero_()
    saver.wait()
    loaded = faults.empty_state()
    saver.load_newest(loaded)
    saver.close()
    assert faults.equal(loaded, faults.state_of(1))


def test_an_optimizer_waits_for_the_copies_by_itself(tmp_path, monkeypatch):
    like = module.HostBuffers.like

    def slow_like(buffers, name, tensor):
        time.sleep(0.1)
        return like(buffers, name, tensor)

    monkeypatch.setattr(module.HostBuffers, "like", slow_like)
    weights = torch.nn.ParameterList(torch.ones(5) for _ in range(4))
    optimizer = torch.optim.SGD(weights, lr=1.0)
    saver = open_checkpoints(tmp_path)
    for step in (1, 2):
        wanted = {str(n): weight.detach().clone() for n, weight in enumerate(weights)}
        saver.save(step, {"weights": dict(weights.named_parameters())}, overlap=True)
        sum(weight.sum() for weight in weights).backward()
        optimizer.step()
        assert saver._step_hook is None
        loaded = {"weights": {name: torch.zeros(5) for name in wanted}}
        assert saver.load_newest(loaded).step == step and faults.equal(loaded["weights"], wanted)
        assert not torch.equal(weights[0], wanted["0"])
    saver.close()


def test_a_state_that_changes_while_it_is_copied_is_not_saved(tmp_path, monkeypatch):
    copying, changed = threading.Event(), threading.Event()
    like = module.HostBuffers.like

    def slow_like(buffers, name, tensor):
        copying.set()
        assert changed.wait(60)
        return like(buffers, name, tensor)

    monkeypatch.setattr(module.HostBuffers, "like", slow_like)
    saver = open_checkpoints(tmp_path)
    state = faults.state_of(1)
    saver.save(1, state, overlap=True)
    assert copying.wait(60)
    state["model"]["layer 3"].mul_(2)
    changed.set()
    with pytest.raises(
        DistattnError,
        match=r"model\.layer 3 was changed while it was copied.*call wait_staged\(\) before whatever changes it",
    ):
        saver.wait()
    assert steps(tmp_path) == []
    # once the error has been raised, the next save is attempted
    saver.save(2, state)
    saver.close()
    assert steps(tmp_path) == [2]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_dcp_reads_what_was_saved(tmp_path):
    saver = open_checkpoints(tmp_path)
    saver.save(4, faults.state_of(4))
    saver.close()
    state = faults.empty_state()
    dcp.load(state, checkpoint_id=tmp_path / "step-00000004", no_dist=True)
    assert faults.equal(state, faults.state_of(4))


def test_a_state_of_other_tensors_and_keys_is_saved_after_the_first(tmp_path):
    saver = open_checkpoints(tmp_path)
    saver.save(1, {"a": torch.ones(3)})
    saver.save(2, {"a": torch.ones(5), "b": 2})
    saver.save(3, {"b": 3})
    state = {"b": 0}
    assert saver.load_newest(state).step == 3 and state == {"b": 3}
    remove_checkpoint(tmp_path / "step-00000003")
    state = {"a": torch.zeros(5), "b": 0}
    assert saver.load_newest(state).step == 2 and state["b"] == 2 and state["a"].sum() == 5
    saver.close()


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    saver = open_checkpoints(tmp_path)
    saver.save(1, {"a": torch.ones(3)})
    for state, why in (
        ({"c": torch.ones(3)}, "Missing key in checkpoint state_dict: c"),
        ({"a": torch.ones(4)}, "Size mismatch"),
    ):
        with pytest.raises(DistattnError, match=f"is of another model or optimizer than this run: {why}"):
            saver.load_newest(state)
    saver.close()


def test_a_required_fact_that_differs_is_refused_with_both_values(tmp_path):
    saver = open_checkpoints(tmp_path, plan="abc", config="one")
    saver.save(1, {"a": 1})
    loaded = saver.load_newest({"a": 0}, required={"plan": "abc"})
    assert loaded == (1, tmp_path / "step-00000001", {"plan": "abc", "config": "one"}, "")
    with pytest.raises(DistattnError, match="has plan abc, but this run has plan xyz"):
        saver.load_newest({"a": 0}, required={"plan": "xyz"})
    with pytest.raises(DistattnError, match="does not say its corpus, but this run has corpus c"):
        saver.load_newest({"a": 0}, required={"corpus": "c"})
    saver.close()


def test_a_save_waits_for_the_one_before_with_a_warning(tmp_path, monkeypatch):
    warned, slow = [], module.commit

    def slow_commit(*args):
        time.sleep(0.05)
        return slow(*args)

    monkeypatch.setattr(module, "commit", slow_commit)
    monkeypatch.setattr(module, "_LONG_WAIT", 0.0)
    saver = open_checkpoints(tmp_path, warn=warned.append)
    saver.save(1, {"a": 1})
    saver.save(2, {"a": 2})
    saver.close()
    assert steps(tmp_path) == [1, 2]
    (line,) = warned
    assert re.match(r"step-00000002 waited \d+\.\d s until step-00000001 was written; save less often", line)


def test_after_a_run_has_gone_back_the_newest_is_what_was_saved_last(tmp_path):
    saver = open_checkpoints(tmp_path, keep=KeepRule(last=2))
    for step in (10, 20, 30, 15):
        saver.save(step, {"a": step})
    state = {"a": 0}
    assert saver.load_newest(state).step == 15 and state == {"a": 15}
    # saving a step again replaces its checkpoint
    saver.save(30, {"a": 31})
    assert saver.load_newest(state).step == 30 and state == {"a": 31}
    saver.close()
    assert steps(tmp_path) == [15, 30] and len(os.listdir(tmp_path)) == 2


# ---- writes that fail


def test_a_disk_that_is_full_costs_a_warning_and_the_next_save_works(tmp_path):
    run_on_ranks(1, fill_the_disk, tmp_path)


def fill_the_disk(rank, folder):
    """Imitate a full disk with RLIMIT_FSIZE, in a separate process."""
    warned = []
    saver = open_checkpoints(folder, warned.append, group=dist.group.WORLD)
    saver.save(1, faults.state_of(1))
    saver.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for bytes_allowed in (0, 10_000, 150_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, limits[1]))
        saver.save(2, faults.state_of(2))
        saver.wait()
        assert os.listdir(folder) == ["step-00000001"]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(warned) == 3
    for line in warned:
        assert line == (
            "step-00000002 was not saved: rank 0: File too large; the run goes on, and the next save tries again."
        )
    saver.save(3, faults.state_of(3))
    saver.close()
    assert steps(folder) == [1, 3] and len(warned) == 3


@pytest.mark.parametrize("failing", [0, 1])
def test_all_ranks_continue_if_one_cannot_write(failing, tmp_path):
    assert sum(run_on_ranks(2, fail_on_one_rank, tmp_path, failing), []) == [
        f"step-00000002 was not saved: rank {failing}: {tmp_path}: No space left on device; the run goes on, and the next save "
        "tries again."
    ]
    assert steps(tmp_path) == [1, 3] and len(os.listdir(tmp_path)) == 2


def fail_on_one_rank(rank, folder, failing):
    warned = []
    saver = open_checkpoints(folder, warned.append, group=dist.group.WORLD)
    saver.save(1, faults.state_of(1))
    saver.wait()
    write = digested_files.DigestingFile.write
    if rank == failing:

        def full(file, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

        digested_files.DigestingFile.write = full
    saver.save(2, faults.state_of(2))
    saver.wait()
    digested_files.DigestingFile.write = write
    saver.save(3, faults.state_of(3))
    saver.close()
    return warned


@pytest.mark.waits
@pytest.mark.parametrize("hangs", [0, 1])
def test_the_writing_rank_is_to_blame_when_others_wait_for_a_save(hangs, tmp_path):
    board = HeartbeatBoard.make(2)
    run_on_ranks(2, hang_on_one_rank, tmp_path, hangs, board.path)
    board.close()


def hang_on_one_rank(rank, folder, hangs, board):
    heartbeats.attach(board, rank, 1)
    read, write = HeartbeatBoard.open(board).read, digested_files.DigestingFile.write
    told = "the part of a checkpoint from rank"
    wanted = [Culprit(hangs, "waits for no other rank and makes no progress", "step 3, writing step-00000002")]

    def is_waited_for():
        beats = {0: read(0), 1: read(1)}
        mine, other = beats[rank], beats[1 - rank]
        # this wait is reported with the same text as the exchange before it
        waits = other.waits and other.activity == f"{told} {rank}" and other.seconds == 0
        return mine.seconds and waits and culprits(beats, {0: "S", 1: "S"}) == wanted

    def hang(file, content):
        # hang until the other rank has finished its part and waits for this rank
        eventually(is_waited_for, lambda: f"{read(0)}, {read(1)}")
        return write(file, content)

    if rank == hangs:
        digested_files.DigestingFile.write = hang
    saver = open_checkpoints(folder, group=dist.group.WORLD)
    heartbeats.set_activity("forward and backward", step=2)
    saver.save(2, faults.state_of(2))
    saver.wait()
    assert not read(rank).waits and read(rank).activity == "forward and backward"
    saver.close()
    assert steps(folder) == [2]


@pytest.mark.parametrize("name", ["new_unfinished", "commit", "synchronise"])
def test_a_folder_that_cannot_be_written_costs_a_warning(name, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    warned = []
    saver = open_checkpoints(tmp_path, warned.append)
    where = (
        "distattn.checkpoints.checkpoint_folder.synchronise_folder"
        if name == "synchronise"
        else f"{module.__name__}.{name}"
    )
    monkeypatch.setattr(where, refuse)
    saver.save(1, {"a": 1})
    saver.wait()
    monkeypatch.undo()
    assert len(warned) == 1 and "Read-only file system" in warned[0] and os.listdir(tmp_path) == []
    saver.save(2, {"a": 1})
    saver.close()
    assert steps(tmp_path) == [2]


def test_a_file_where_the_folder_should_be_costs_a_warning(tmp_path):
    warned = []
    (tmp_path / "file").write_text("")
    saver = open_checkpoints(tmp_path / "file", warned.append)
    saver.save(1, {"a": 1})
    saver.close()
    assert len(warned) == 1 and "File exists" in warned[0]
    saver = open_checkpoints(tmp_path / "file")
    with pytest.raises(DistattnError, match="file: cannot be read: Not a directory"):
        saver.load_newest({"a": 0})
    saver.close()


def test_a_state_that_can_never_be_saved_is_an_error_not_a_warning(tmp_path):
    saver = open_checkpoints(tmp_path)
    saver.save(1, {"a": (1, ["two"])})
    saver.wait()
    # a class can be pickled, but a checkpoint that names it could run code
    for step, value in ((2, lambda: 0), (3, threading.Thread), (4, [Path("a")])):
        saver.save(step, {"a": value})
        with pytest.raises(DistattnError, match=r"a \(builtins\.\w+\) cannot be read again|pickle"):
            saver.wait()
    saver.close()
    assert steps(tmp_path) == [1] and len(os.listdir(tmp_path)) == 1


def test_ranks_that_save_different_steps_get_an_error(tmp_path):
    run_on_ranks(2, save_other_steps, tmp_path)
    assert steps(tmp_path) == []


def save_other_steps(rank, folder):
    saver = open_checkpoints(folder, group=dist.group.WORLD)
    saver.save(rank, {"a": 1})
    with pytest.raises(DistattnError, match="rank 0 saves step 0, rank 1 step 1; save the same steps"):
        saver.wait()
    saver.close()


def test_a_state_is_made_once_the_save_before_is_written(tmp_path):
    saver = open_checkpoints(tmp_path)

    def state_of(step):
        def made(buffers):
            assert saver._last is None or saver._last.written.is_set()
            names = faults.state_of(step)["model"]
            return {"model": {name: buffers.keep(f"model.{name}", tensor) for name, tensor in names.items()}}

        return made

    for step in (1, 2):
        saver.save(step, state_of(step), overlap=True)
    loaded = {"model": faults.empty_state()["model"]}
    assert saver.load_newest(loaded).step == 2
    saver.close()
    assert faults.equal(loaded, {"model": faults.state_of(2)["model"]})
