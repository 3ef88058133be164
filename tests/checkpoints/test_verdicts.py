"""Training verdicts decide which checkpoints are kept and loaded. A user's choice takes precedence."""

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from distattn.checkpoints import checkpoints as module
from distattn.checkpoints.checkpoint_folder import (
    choose_step,
    discard_checkpoint,
    judge_checkpoint,
    keep_for_good,
    keep_newest_good,
    list_checkpoints,
    preferred_step,
    release_kept,
    verify_checkpoint,
)
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.manifest import Manifest
from distattn.checkpoints.retention import KeepRule
from distattn.checkpoints.verdicts import GOOD, REFUSED, SET_ASIDE, UNTESTED, CheckpointVerdict
from distattn.ir.errors import DistattnError


def open_checkpoints(folder, warned, last=9):
    return Checkpoints(folder, group=None, facts={}, keep=KeepRule(last=last), warn=warned.append)


def steps(folder):
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def test_checkpoints_in_doubt_push_no_good_one_out_and_are_loaded_last(tmp_path):
    warned = []
    saver = open_checkpoints(tmp_path, warned, last=1)

    def judged(step, kind):
        in_doubt = CheckpointVerdict(kind, "why") if kind == REFUSED else CheckpointVerdict()
        saver.save(step, {"a": step}, facts={"loss": str(step)}, verdict=in_doubt)
        if kind == GOOD:
            saver.note(lambda folder: judge_checkpoint(folder, step, GOOD))

    for step, kind in ((1, GOOD), (2, GOOD), (3, REFUSED), (4, UNTESTED), (5, REFUSED)):
        judged(step, kind)
    saver.wait()
    # step 2 is the newest known to be good, and step 4 the newest not in doubt
    assert steps(tmp_path) == [2, 4, 5]
    state = {"a": 0}
    assert saver.load_newest(state).step == 4 and state == {"a": 4}
    assert warned == [f"{tmp_path / 'step-00000005'}: why. Resuming from step-00000004 instead."]
    # once a checkpoint is found to be good, all earlier checkpoints are removed
    saver.note(lambda folder: judge_checkpoint(folder, 4, GOOD))
    saver.wait()
    assert steps(tmp_path) == [4, 5]
    assert list_checkpoints(tmp_path)[0].manifest.facts == {"loss": "4"}
    # a checkpoint kept because of a refused step is kept until it is released
    saver.note(lambda folder: keep_newest_good(folder, 9))
    for step in (6, 7):
        judged(step, GOOD)
    saver.wait()
    assert steps(tmp_path) == [4, 7]
    saver.note(lambda folder: release_kept(folder, 9))
    saver.wait()
    assert steps(tmp_path) == [4, 7]
    saver.note(lambda folder: release_kept(folder, 10))
    # if all checkpoints are in doubt, the newest is loaded
    saver.note(lambda folder: judge_checkpoint(folder, 7, REFUSED, "why"))
    loaded = saver.load_newest(state)
    assert (loaded.step, loaded.doubt) == (7, "refused: why") and steps(tmp_path) == [7]
    sentence = "Resuming from step-00000007 anyway: it is in doubt, but no other can be loaded (refused: why)."
    assert warned[1:] == [sentence]
    saver.close()


@pytest.mark.parametrize(("new_level", "kept"), [(False, []), (True, [5])])
def test_the_mark_of_a_refused_step_goes_once_the_run_has_passed_it(new_level, kept, tmp_path):
    saver = open_checkpoints(tmp_path, [])

    def save_good(step):
        saver.save(step, {"a": step})
        saver.note(lambda folder: judge_checkpoint(folder, step, GOOD), step)

    def marked():
        saver.wait()
        return [checkpoint.step for checkpoint in list_checkpoints(tmp_path) if checkpoint.verdict.kept]

    save_good(5)
    # step 8 is refused; then the run goes back or restarts, which ends the streak of refused steps silently
    saver.note(lambda folder: keep_newest_good(folder, 8))
    if new_level:
        saver.note(lambda folder: keep_for_good(folder, 8))
    save_good(8)
    assert marked() == [5]
    save_good(9)
    assert marked() == kept
    saver.close()


def test_a_verdict_on_a_save_that_failed_leaves_an_older_checkpoint_of_the_same_step_as_it_was(tmp_path, monkeypatch):
    warned = []
    saver = open_checkpoints(tmp_path, warned)
    saver.save(5, {"a": 1})
    saver.note(lambda folder: judge_checkpoint(folder, 5, GOOD), 5)
    saver.wait()
    older = list_checkpoints(tmp_path)
    assert older[0].verdict.kind == GOOD and not saver.has_failed(5)

    def refuse(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(module, "new_unfinished", refuse)
        saver.save(5, {"a": 2})
        saver.note(lambda folder: judge_checkpoint(folder, 5, REFUSED, "why"), 5)
        saver.note(lambda folder: discard_checkpoint(folder, 5), 5)
        saver.wait()
    assert list_checkpoints(tmp_path) == older and saver.has_failed(5)
    assert len(warned) == 1 and "step-00000005 was not saved" in warned[0]
    # a run that has loaded the older checkpoint of this step judges that checkpoint
    assert saver.load_newest({"a": 0}).step == 5 and not saver.has_failed(5)
    saver.save(5, {"a": 3})
    saver.note(lambda folder: judge_checkpoint(folder, 5, REFUSED, "why"), 5)
    saver.close()
    assert list_checkpoints(tmp_path)[0].verdict.kind == REFUSED


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"kind": "fine"}', b'{"kind": 3}', b'{"refused_step": ""}', b"\xff", b"[" * 100_000]
)
def test_an_unreadable_verdict_does_not_count(tmp_path, content):
    saver = open_checkpoints(tmp_path, [])
    saver.save(1, {"a": 1})
    saver.close()
    (checkpoint,) = list_checkpoints(tmp_path)
    (checkpoint.folder / "verdict.json").write_bytes(content)
    assert list_checkpoints(tmp_path)[0].verdict == CheckpointVerdict() and not verify_checkpoint(checkpoint.folder)


def kinds_of(folder):
    return [checkpoint.verdict.kind for checkpoint in list_checkpoints(folder)]


def test_a_person_chooses_a_step_and_later_ones_are_set_aside(tmp_path):
    saver = open_checkpoints(tmp_path, [])
    for step in (10, 20, 30, 40):
        saver.save(step, {"a": step})
    saver.wait()
    judge_checkpoint(tmp_path, 20, REFUSED, "why")
    missing = pytest.raises(DistattnError, match="has no checkpoint of step 25; it has those of steps 10, 20, 30, 40")
    with missing, choose_step(tmp_path, 25):
        pass
    (tmp_path / "one" / "step-00000004").mkdir(parents=True)
    Manifest(1, 4, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(tmp_path / "one" / "step-00000004")
    only_one = pytest.raises(DistattnError, match="one has no checkpoint of step 3; it has one of step 4[.]")
    with only_one, choose_step(tmp_path / "one", 3):
        pass
    with choose_step(tmp_path, 20):
        assert kinds_of(tmp_path) == [UNTESTED, UNTESTED, SET_ASIDE, SET_ASIDE]
    assert kinds_of(tmp_path) == [UNTESTED, UNTESTED, SET_ASIDE, SET_ASIDE]
    state = {"a": 0}
    assert saver.load_newest(state).step == 20
    saver.close()


def _choose_and_die(folder, step, replaced):
    """Choose a step in a child process that is killed once it has renamed `replaced` verdicts into place, or at the
    latest when a run would load the step.
    """
    replace, left = os.replace, [replaced]

    def fatal_replace(*names):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        replace(*names)

    os.replace = fatal_replace
    with choose_step(folder, step):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("replaced", range(4))
def test_a_choice_whose_process_is_killed_is_complete_or_was_not_made(tmp_path, replaced):
    for serial, step in enumerate((10, 20, 30, 40), 1):
        (tmp_path / f"step-{step:08d}").mkdir()
        Manifest(serial, step, "2026-01-01T00:00:00+00:00", 4, "2.13.0", {}, []).write(tmp_path / f"step-{step:08d}")
    judge_checkpoint(tmp_path, 20, REFUSED, "why")
    child = multiprocessing.get_context("fork").Process(target=_choose_and_die, args=(tmp_path, 20, replaced))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    # the refused checkpoint is judged first, then the checkpoints saved later
    assert preferred_step(tmp_path) == (20 if replaced == 3 else 40)
    with choose_step(tmp_path, 40):
        pass
    assert preferred_step(tmp_path) == 40


def test_a_full_disk_sets_no_checkpoint_aside(tmp_path, monkeypatch):
    saver = open_checkpoints(tmp_path, [])
    for step in (10, 20, 30):
        saver.save(step, {"a": step})
    saver.close()
    written, write = [], Path.write_text

    def full(file, *content):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(file)
        return write(file, *content)

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DistattnError, match="cannot be written: No space left on device"), choose_step(tmp_path, 10):
        pass
    assert kinds_of(tmp_path) == [UNTESTED] * 3 and sorted(tmp_path.rglob("*")) == before
