"""The rule that decides which checkpoints are removed after a save."""

import dataclasses
import errno
import os
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import checkpoint_faults as faults
import pytest

from distattn.checkpoints import checkpoints as module
from distattn.checkpoints.checkpoint_folder import (
    list_checkpoints,
)
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule
from distattn.ir.errors import DistattnError


def open_checkpoints(folder, warn=faults.no_warning, keep=None, group=None, **facts):
    return Checkpoints(folder, group=group, facts=facts, keep=keep or KeepRule(), warn=warn)


def steps(folder):
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def fill(folder, hours, keep):
    """Return checkpoints saved after `hours` hours of training (None: unknown), and the steps that the rule would
    remove.
    """
    saver = open_checkpoints(folder, keep=KeepRule(last=1000))
    for step, _ in enumerate(hours):
        saver.save(step, {"a": 1})
    saver.close()
    checkpoints = [
        checkpoint._replace(
            manifest=dataclasses.replace(checkpoint.manifest, seconds=None if hour is None else 3600.0 * hour)
        )
        for checkpoint, hour in zip(list_checkpoints(folder), hours, strict=True)
    ]
    return checkpoints, [checkpoint.step for checkpoint in keep.removable(checkpoints)]


def test_one_checkpoint_of_every_few_hours_is_kept(tmp_path):
    hours = [0, 1, 2, 3, 4.5, 5, 6, 7, 8]
    checkpoints, removable = fill(tmp_path, hours, KeepRule(last=2, every_hours=3))
    # this keeps hours 0, 3 and 6, and the last two checkpoints
    assert removable == [1, 2, 4, 5]
    # the result does not depend on how often the rule was applied
    left = [checkpoint for checkpoint in checkpoints if checkpoint.step not in removable]
    assert KeepRule(last=2, every_hours=3).removable(left) == []


def test_a_clock_that_was_ahead_does_not_end_the_keeping_of_hours(tmp_path, monkeypatch):
    days, clock = iter([0, 3, 0, 0, 0, 0, 0, 0]), [0.0]

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            # during the second save the system clock is three days ahead
            return datetime.now(tz) + timedelta(days=next(days))

    monkeypatch.setattr(module, "datetime", Jumping)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for first, began in ((1, 1e6), (5, 7.0)):
        # the second pass is a new job, on a machine that has just booted
        clock[0] = began
        saver = open_checkpoints(tmp_path, keep=KeepRule(last=1, every_hours=2))
        for step in range(first, first + 4):
            clock[0] += 3600
            saver.save(step, {"a": 1})
            saver.wait()
        saver.close()
    assert steps(tmp_path) == [1, 3, 5, 7, 8]


def test_checkpoints_of_versions_that_counted_no_seconds_stay(tmp_path):
    _, removable = fill(tmp_path, [None, None, 0, 1, 2, 3], KeepRule(last=1, every_hours=2))
    assert removable == [3]


def test_the_only_good_checkpoint_is_never_removed(tmp_path):
    checkpoints, removable = fill(tmp_path, [0, 1, 2, 3], KeepRule(last=2))
    assert removable == [0, 1]
    for step in (2, 3):
        os.truncate(checkpoints[step].folder / "__0_0.distcp", 5)
    assert KeepRule(last=2).removable(checkpoints) == []
    (checkpoints[3].folder / "__0_0.distcp").unlink()
    assert KeepRule(last=2).removable(checkpoints) == []
    # a checkpoint without a valid manifest does not count, and stays
    (checkpoints[3].folder / "manifest.json").unlink()
    assert [checkpoint.step for checkpoint in KeepRule(last=2).removable(list_checkpoints(tmp_path))] == [0]


@pytest.mark.parametrize(("rule", "why"), [({"last": 0}, "at least 1"), ({"every_hours": 0.0}, "more than 0")])
def test_a_rule_that_keeps_nothing_is_refused(rule, why):
    with pytest.raises(DistattnError, match=why):
        KeepRule(**rule)


def test_checkpoints_that_a_killed_job_has_not_removed_go_when_it_is_resumed(tmp_path):
    saver = open_checkpoints(tmp_path, keep=KeepRule(last=1000))
    for step in range(4):
        saver.save(step, {"a": step})
    saver.close()
    saver = open_checkpoints(tmp_path, keep=KeepRule(last=2))
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert saver.load_newest({"a": 0}).step == 3
    saver.close()
    assert steps(tmp_path) == [2, 3]


def test_files_that_cannot_be_removed_cost_a_warning(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    warned = []
    saver = open_checkpoints(tmp_path, warned.append, keep=KeepRule(last=1))
    monkeypatch.setattr(module, "remove_checkpoint", refuse)
    for step in (1, 2):
        saver.save(step, {"a": step})
        saver.wait()
    saver.close()
    assert steps(tmp_path) == [1, 2]
    assert warned == [f"{Path(tmp_path) / 'step-00000001'}: an old checkpoint cannot be removed: Permission denied."]
