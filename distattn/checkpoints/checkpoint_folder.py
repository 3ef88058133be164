"""A folder of checkpoints: list them, verify them, choose one, and remove old ones. This module does not need torch.

A checkpoint is a folder `step-00000100` with the files of torch.distributed.checkpoint and a manifest. While it is being written,
it is called `step-00000100.tmp-...`. It is renamed last, so a folder with the final name is complete unless it was damaged later.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from distattn.checkpoints.digested_files import read_block
from distattn.checkpoints.manifest import BLOCK_BYTES, MANIFEST_FILE, FileDigests, Manifest
from distattn.checkpoints.owner import file_age, writer_is_alive, writer_name
from distattn.checkpoints.pickled_names import foreign_pickles
from distattn.checkpoints.verdicts import GOOD, SET_ASIDE, UNTESTED, VERDICT_FILE, CheckpointVerdict
from distattn.data.files.indexed_file import synchronise_folder
from distattn.ir.errors import DamagedDataError, DistattnError

# a writer on another machine counts as dead after this time without a write, since its process cannot be looked up
WRITER_SILENCE_SECONDS = 3600.0
_CHECKPOINT = re.compile(r"step-(\d{8,})")
# the folder's name contains the writer's name
_UNFINISHED = re.compile(r"step-\d{8,}\.tmp-([0-9a-f]{8}-\d+-\d+)-[0-9a-f]+")
_OUTDATED = re.compile(r"step-\d{8,}\.removed-[0-9a-f]+")
_REPLACED = re.compile(r"(step-\d{8,})\.replaced-[0-9a-f]+")
# the folder within a run's folder that holds its checkpoints
_IN_RUN = "checkpoints"


class CheckpointProblem(NamedTuple):
    """A fault in a checkpoint. offset: the first affected byte of the file, None for the entire file. text: a sentence."""

    file: str
    offset: int | None
    text: str

    def __str__(self) -> str:
        return self.text


class Checkpoint(NamedTuple):
    """A folder with a checkpoint's name. manifest: None if it cannot be trusted, for the reason in `problem`.

    verdict: training's verdict on the checkpoint.
    """

    step: int
    folder: Path
    manifest: Manifest | None
    problem: str
    verdict: CheckpointVerdict = CheckpointVerdict()


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder, such as step-00000100."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return a folder's checkpoints in the order in which they were saved. Checkpoints without a manifest come last.

    Their data files are not read. Returns [] for a missing folder. Raises DistattnError if the folder cannot be read.
    """
    checkpoints = []
    for name in _names(folder):
        if not (match := _CHECKPOINT.fullmatch(name)) or not (folder / name).is_dir():
            continue
        step = int(match[1])
        try:
            manifest = _manifest_of(folder / name, step)
            checkpoints.append(Checkpoint(step, folder / name, manifest, "", CheckpointVerdict.read(folder / name)))
        except DamagedDataError as error:
            checkpoints.append(Checkpoint(step, folder / name, None, str(error)))
    return sorted(checkpoints, key=lambda c: (c.manifest is None, c.manifest.serial if c.manifest else 0, c.step))


def by_preference(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints with a manifest as a run tries them: newest first, but all doubtful checkpoints last."""
    with_manifest = [(c.verdict.is_doubtful, -c.manifest.serial, c) for c in checkpoints if c.manifest is not None]
    return [checkpoint for *_, checkpoint in sorted(with_manifest, key=lambda entry: entry[:2])]


def preferred_step(folder: Path) -> int:
    """Return the step of the checkpoint that a run tries first; 0 if it has no checkpoint. Raises as `list_checkpoints` does."""
    return next((checkpoint.step for checkpoint in by_preference(list_checkpoints(folder))), 0)


def set_aside_since(folder: Path, step: int) -> list[Checkpoint]:
    """Return the set-aside checkpoints that were saved after the checkpoint of `step`, in the order in which they were saved.

    Raises DistattnError as `check_step` does.
    """
    chosen, checkpoints = check_step(folder, step), list_checkpoints(folder)
    later = checkpoints[checkpoints.index(chosen) + 1 :]
    return [checkpoint for checkpoint in later if checkpoint.verdict.kind == SET_ASIDE]


def judge_checkpoint(folder: Path, step: int, kind: str, text: str = "") -> None:
    """Write a verdict on the checkpoint of `step`, if it exists. Raises OSError on failure.

    folder: the folder of all checkpoints. A kept checkpoint stays kept. A good verdict releases checkpoints kept for an earlier
    step.
    """
    checkpoint = folder / checkpoint_name(step)
    if checkpoint.is_dir():
        CheckpointVerdict.read(checkpoint)._replace(kind=kind, text=text).write(checkpoint)
        if kind == GOOD:
            release_kept(folder, step)


def discard_checkpoint(folder: Path, step: int) -> None:
    """Remove the checkpoint of `step`, if it exists, from the folder of all checkpoints. Raises OSError on failure."""
    if (checkpoint := folder / checkpoint_name(step)).is_dir():
        remove_checkpoint(checkpoint)


def keep_newest_good(folder: Path, refused: int) -> None:
    """Keep the newest checkpoint with a good verdict until `release_kept` releases it. Raises OSError on failure.

    refused: the refused step, counted from 0.
    """
    good = [checkpoint for checkpoint in by_preference(list_checkpoints(folder)) if checkpoint.verdict.kind == GOOD]
    if good and (not good[0].verdict.kept or good[0].verdict.refused_step is not None):
        why = f"the newest good one before step {refused + 1:,}, which was refused"
        good[0].verdict._replace(kept=why, refused_step=refused).write(good[0].folder)


def release_kept(folder: Path, done: int) -> None:
    """Let the keep rule decide again on checkpoints kept for one of the first `done` steps. Raises OSError on failure."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.verdict.refused_step is not None and checkpoint.verdict.refused_step < done:
            checkpoint.verdict._replace(kept="", refused_step=None).write(checkpoint.folder)


def keep_for_good(folder: Path, refused: int) -> None:
    """Keep the checkpoints kept for a refused step (counted from 0) until a user removes them. Raises OSError on failure."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.verdict.refused_step == refused:
            checkpoint.verdict._replace(refused_step=None).write(checkpoint.folder)


def check_step(folder: Path, step: int) -> Checkpoint:
    """Return the checkpoint of `step`. Raises DistattnError if no checkpoint of this step has a manifest."""
    by_step = {
        checkpoint.step: checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.manifest is not None
    }
    if step not in by_step:
        steps = ", ".join(f"{existing:,}" for existing in sorted(by_step))
        others = (
            f"it has {'one of step' if len(by_step) == 1 else 'those of steps'} {steps}" if by_step else "it has none"
        )
        raise DistattnError(f"{folder} has no checkpoint of step {step:,}; {others}.")
    return by_step[step]


@contextlib.contextmanager
def choose_step(folder: Path, step: int) -> Iterator[None]:
    """Make a run continue from the checkpoint of `step` by setting aside all checkpoints that were saved later.

    If the context's body raises, all verdicts are restored. If the process is killed, the next run continues either from this
    step or as it would have without the choice. Raises DistattnError as `check_step` does, or if a verdict cannot be written, in
    which case nothing is changed.
    """
    chosen = check_step(folder, step)
    with_manifest = [checkpoint for checkpoint in list_checkpoints(folder) if checkpoint.manifest is not None]
    text = f"it was saved later than step {step:,}, from which a person went on"
    later_ones = with_manifest[with_manifest.index(chosen) + 1 :]
    # set the newest aside last: until then, runs continue from it unless it is doubtful
    verdicts = [(later, later.verdict._replace(kind=SET_ASIDE, text=text)) for later in later_ones]
    if chosen.verdict.is_doubtful:
        verdicts.insert(0, (chosen, chosen.verdict._replace(kind=UNTESTED, text="")))
    asides: list[tuple[Checkpoint, Path]] = []
    changed: list[Checkpoint] = []
    try:
        try:
            # detect a full disk here, before anything is changed
            for checkpoint, verdict in verdicts:
                asides.append((checkpoint, verdict.write_aside(checkpoint.folder)))
            for checkpoint, aside in asides:
                os.replace(aside, checkpoint.folder / VERDICT_FILE)
                changed.append(checkpoint)
        except OSError as error:
            raise DistattnError(
                f"{folder}: a verdict on a checkpoint cannot be written: {error.strerror}; make room."
            ) from None
        yield
    except BaseException:
        for _, aside in asides:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        for checkpoint in changed:
            _restore_verdict(checkpoint)
        raise


def _restore_verdict(checkpoint: Checkpoint) -> None:
    """Write back the verdict that a checkpoint had when it was listed, ignoring disk errors."""
    with contextlib.suppress(OSError):
        if checkpoint.verdict == CheckpointVerdict():
            # without a verdict file, the checkpoint counts as untested
            (checkpoint.folder / VERDICT_FILE).unlink(missing_ok=True)
        else:
            checkpoint.verdict.write(checkpoint.folder)


def find_checkpoints(path: Path) -> list[Checkpoint]:
    """Return the checkpoints at a path that a user names: a run, a folder of checkpoints, or a single checkpoint.

    The order is that of `list_checkpoints`. Raises DistattnError if the path has no checkpoints.
    """
    if not path.is_dir():
        raise DistattnError(f"{path}: is not a folder; name a run, a folder of checkpoints, or a checkpoint.")
    for folder in (path, path / _IN_RUN):
        if checkpoints := list_checkpoints(folder):
            return checkpoints
    # the path may be a single checkpoint
    single = [
        checkpoint for checkpoint in list_checkpoints(path.resolve().parent) if checkpoint.folder == path.resolve()
    ]
    if single:
        return single
    if (path / MANIFEST_FILE).exists():
        # the path may be a copy of a checkpoint under a different name
        manifest = Manifest.read(path)
        return [Checkpoint(manifest.step, path, manifest, "", CheckpointVerdict.read(path))]
    raise DistattnError(f"{path}: has no checkpoints; name a run, a folder of checkpoints, or a checkpoint.")


def newest_good(folder: Path) -> Path | None:
    """Read checkpoints from end to end, newest first. Return the first undamaged checkpoint's folder, or None."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if checkpoint.manifest is not None and first_problem(checkpoint.folder, checkpoint.manifest) is None:
            return checkpoint.folder
    return None


def verify_checkpoint(folder: Path, report: Callable[[int], None] = lambda _: None) -> list[CheckpointProblem]:
    """Read a checkpoint from end to end. Return all differences from what was written, and pickles that could run code.

    report: called with the number of bytes of each block read.
    """
    match = _CHECKPOINT.fullmatch(folder.name)
    try:
        manifest = _manifest_of(folder, int(match[1])) if match else Manifest.read(folder)
    except DamagedDataError as error:
        return [CheckpointProblem("manifest.json", None, str(error))]
    problems = list(problems_of(folder, manifest, report=report))
    if not problems:
        # digests do not show who wrote the folder, so also check the pickles
        try:
            problems += [CheckpointProblem(*pickle) for pickle in foreign_pickles(folder)]
        except OSError as error:
            problems.append(
                CheckpointProblem(
                    Path(error.filename).name, None, f"{error.filename}: cannot be read: {error.strerror}."
                )
            )
    return problems


def first_problem(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> CheckpointProblem | None:
    """Return the first problem that `problems_of` yields; None if it yields no problem."""
    return next(problems_of(folder, manifest, part, parts), None)


def problems_of(
    folder: Path, manifest: Manifest, part: int = 0, parts: int = 1, report: Callable[[int], None] = lambda _: None
) -> Iterator[CheckpointProblem]:
    """Yield the problems in part `part` of a checkpoint's blocks, which are divided into `parts` equal parts."""
    total = sum(len(file.blocks) for file in manifest.files)
    begin, end = total * part // parts, total * (part + 1) // parts
    before = 0
    for file in manifest.files:
        blocks = range(max(0, begin - before), min(len(file.blocks), end - before))
        before += len(file.blocks)
        if blocks:
            yield from _problems_of_file(folder / file.name, file, blocks, report)


def sizes_are_right(checkpoint: Checkpoint) -> bool:
    """Return whether the manifest is valid and every file has the right size. The files' contents are not read."""
    if checkpoint.manifest is None:
        return False
    with contextlib.suppress(OSError):
        return all(os.stat(checkpoint.folder / file.name).st_size == file.bytes for file in checkpoint.manifest.files)
    return False


def new_unfinished(folder: Path, step: int) -> Path:
    """Create the folder to write a checkpoint into, with this process in its name. Raises OSError on failure."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{checkpoint_name(step)}.tmp-{writer_name()}-{secrets.token_hex(4)}"
    unfinished.mkdir()
    return unfinished


def commit(unfinished: Path, step: int) -> Path:
    """Rename a written folder to its final name, replacing any checkpoint of that name. Return its path.

    All files must already be on disk. The name is on disk when this returns. Raises OSError on failure.
    """
    folder = unfinished.parent
    final = folder / checkpoint_name(step)
    synchronise_folder(str(unfinished / "."))
    replaced = None
    if final.exists():
        # if this process is killed before the second rename, `clean_leftovers` restores the old folder's name
        replaced = final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}")
        final.rename(replaced)
    unfinished.rename(final)
    synchronise_folder(str(final))
    if replaced is not None:
        remove_folder(replaced)
    return final


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. Rename it first, so that if this is interrupted, the rest is not mistaken for a damaged checkpoint.

    Raises OSError on failure.
    """
    outdated = folder.with_name(f"{folder.name}.removed-{secrets.token_hex(4)}")
    folder.rename(outdated)
    shutil.rmtree(outdated)


def remove_folder(folder: Path) -> None:
    """Remove a folder and its contents, ignoring errors."""
    shutil.rmtree(folder, ignore_errors=True)


def clean_leftovers(folder: Path) -> list[str]:
    """Remove dead writers' unfinished folders, and restore a folder that was being replaced. Return the removed names.

    A writer on this machine is dead if its process has ended. A writer elsewhere counts as dead once nothing in its folder has
    changed for WRITER_SILENCE_SECONDS. Folders that cannot be removed stay.
    """
    removed = []
    for name in _names(folder):
        path = folder / name
        if match := _REPLACED.fullmatch(name):
            if (folder / match[1]).exists():
                remove_folder(path)
            else:
                with contextlib.suppress(OSError):
                    path.rename(folder / match[1])
        elif _OUTDATED.fullmatch(name) or ((match := _UNFINISHED.fullmatch(name)) and _is_left(path, match[1])):
            remove_folder(path)
            removed.append(name)
    return removed


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DistattnError(f"{folder}: cannot be read: {error.strerror}; name a folder of checkpoints.") from None


def _manifest_of(folder: Path, step: int) -> Manifest:
    """Return the manifest of a step's checkpoint. Raises DamagedDataError if it is unusable or belongs to another step."""
    manifest = Manifest.read(folder)
    if manifest.step != step:
        raise DamagedDataError(f"{folder / 'manifest.json'}: is that of step {manifest.step}, not of {folder.name}.")
    return manifest


def _problems_of_file(
    path: Path, expected: FileDigests, blocks: range, report: Callable[[int], None]
) -> Iterator[CheckpointProblem]:
    try:
        with open(path, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != expected.bytes:
                text = f"{path}: has {size:,} bytes, but {expected.bytes:,} were written."
                yield CheckpointProblem(expected.name, min(size, expected.bytes), text)
                return
            for block in blocks:
                try:
                    report(len(read_block(opened.fileno(), path, expected, block)))
                except DamagedDataError as error:
                    yield CheckpointProblem(expected.name, block * BLOCK_BYTES, str(error))
    except FileNotFoundError:
        yield CheckpointProblem(expected.name, None, f"{path}: is missing.")
    except OSError as error:
        yield CheckpointProblem(expected.name, None, f"{path}: cannot be read: {error.strerror}.")


def _is_left(unfinished: Path, writer: str) -> bool:
    """Return whether the process that was writing into a folder is dead, as `clean_leftovers` defines it."""
    if (alive := writer_is_alive(writer)) is not None:
        return not alive
    try:
        return all(file_age(path) > WRITER_SILENCE_SECONDS for path in [unfinished, *unfinished.iterdir()])
    except OSError:
        return False
