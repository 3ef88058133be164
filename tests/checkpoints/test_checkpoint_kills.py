"""Ranks killed while they save: a good checkpoint remains, the other ranks do not hang, and leftovers are removed."""

import os
import signal
import time

import checkpoint_faults as faults
import pytest
import torch.distributed as dist
from processes import run_survivors

from distattn.checkpoints import checkpoint_folder, checkpoints
from distattn.checkpoints.checkpoint_folder import clean_leftovers, commit, list_checkpoints, new_unfinished
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.owner import writer_name
from distattn.checkpoints.retention import KeepRule
from distattn.ir.errors import LostRankError


def test_every_kill_leaves_a_good_checkpoint(tmp_path):
    # benchmarks/checkpoint_faults.py does this 200 times
    assert faults.run_kills(6, seed=3, folder=tmp_path / "run").kills == 6


def lose_a_rank(rank, folder, victim):
    """Kill `victim` as it starts to write its part. Return the other ranks' errors."""
    saver = Checkpoints(folder, group=dist.group.WORLD, facts={}, keep=KeepRule(), warn=faults.no_warning)
    saver.save(1, faults.state_of(1))
    saver.wait()
    if rank == victim:
        checkpoints.file_writer = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
    saver.save(2, faults.state_of(2))
    errors = []
    for _ in range(2):
        with pytest.raises(LostRankError) as raised:
            saver.wait()
        errors.append(str(raised.value))
    with pytest.raises(LostRankError):
        saver.save(3, faults.state_of(3))
    return errors


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_dies_amid_a_save_leaves_the_others_with_an_error(victim, tmp_path):
    survivors = run_survivors(3, victim, lose_a_rank, tmp_path, victim)
    for first, second in survivors.values():
        assert first == second
        assert f"rank {victim} of the group ended during a checkpoint" in first
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1]


def leave(tmp_path, writer):
    folder = tmp_path / f"step-00000001.tmp-{writer}-abcd"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"part")
    return folder


def test_leftovers_of_dead_writers_are_removed_and_those_of_live_ones_are_not(tmp_path):
    machine, pid, started = writer_name().split("-")
    alive = leave(tmp_path, writer_name())
    # no process id exceeds 2**22; the second name has this process's id but another start time
    dead = [leave(tmp_path, f"{machine}-{2**22 + 1}-{started}"), leave(tmp_path, f"{machine}-{pid}-{started}0")]
    far, silent = leave(tmp_path, "00000000-1-1"), leave(tmp_path, "00000000-2-1")
    outdated = tmp_path / "step-00000001.removed-00000005"
    outdated.mkdir()
    mine = tmp_path / "step-00000001.tmp-mine"
    mine.mkdir()
    long_ago = time.time() - checkpoint_folder.WRITER_SILENCE_SECONDS - 60
    for path in [*silent.iterdir(), silent]:
        os.utime(path, (long_ago, long_ago))
    assert clean_leftovers(tmp_path) == sorted(path.name for path in [*dead, silent, outdated])
    # folders whose names are not ours stay
    assert sorted(tmp_path.iterdir()) == sorted([alive, far, mine])


def test_killed_while_it_replaces_a_checkpoint_the_older_one_gets_its_name_back(tmp_path, monkeypatch):
    saver = Checkpoints(tmp_path, group=None, facts={}, keep=KeepRule(), warn=faults.no_warning)
    saver.save(5, faults.state_of(5))
    saver.close()
    unfinished = new_unfinished(tmp_path, 5)
    rename = checkpoint_folder.Path.rename

    def fatal_rename(path, target):
        if path == unfinished:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(checkpoint_folder.Path, "rename", fatal_rename)
    with pytest.raises(KeyboardInterrupt):
        commit(unfinished, 5)
    monkeypatch.undo()
    assert not (tmp_path / "step-00000005").exists()
    saver = Checkpoints(tmp_path, group=None, facts={}, keep=KeepRule(), warn=faults.no_warning)
    state = faults.empty_state()
    assert saver.load_newest(state).step == 5 and faults.equal(state, faults.state_of(5))
    saver.close()
