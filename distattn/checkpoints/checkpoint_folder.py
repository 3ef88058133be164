"""A folder of checkpoints: which there are, which are good, and what is wrong with the others. Needs no torch.

A checkpoint is a folder `step-00000100` with the files of torch.distributed.checkpoint and a manifest. While it is written it is
called `step-00000100.tmp-...`; the name is given last, so a folder with the name is whole, unless it was damaged later.
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

# a writer on another machine, whose process cannot be looked up, counts as dead after so long without a byte
WRITER_SILENCE_SECONDS = 3600.0
_CHECKPOINT = re.compile(r"step-(\d{8,})")
# with the name of the process that writes
_UNFINISHED = re.compile(r"step-\d{8,}\.tmp-([0-9a-f]{8}-\d+-\d+)-[0-9a-f]+")
_OUTDATED = re.compile(r"step-\d{8,}\.removed-[0-9a-f]+")
_REPLACED = re.compile(r"(step-\d{8,})\.replaced-[0-9a-f]+")


# where a run keeps its checkpoints
_IN_RUN = "checkpoints"


class Problem(NamedTuple):
    """What is wrong with a checkpoint. offset: the first byte of the file that is concerned; None where it is all of it."""

    file: str
    offset: int | None
    what: str

    def __str__(self) -> str:
        return self.what


class Checkpoint(NamedTuple):
    """A folder that has the name of a checkpoint. manifest: None where it cannot be trusted, and why stands in `problem`.

    verdict: what training has shown of it.
    """

    step: int
    folder: Path
    manifest: Manifest | None
    problem: str
    verdict: CheckpointVerdict = CheckpointVerdict()


def checkpoint_name(step: int) -> str:
    """The name of a checkpoint's folder, such as step-00000100."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a folder, from the one saved first to the newest; those without a manifest at the end, by step.

    Their files are not read. Raises DistattnError where the folder cannot be read; where there is none there are no checkpoints.
    """
    found = []
    for name in _names(folder):
        if not (match := _CHECKPOINT.fullmatch(name)) or not (folder / name).is_dir():
            continue
        step = int(match[1])
        try:
            manifest = _manifest_of(folder / name, step)
            found.append(Checkpoint(step, folder / name, manifest, "", CheckpointVerdict.read(folder / name)))
        except DamagedDataError as error:
            found.append(Checkpoint(step, folder / name, None, str(error)))
    return sorted(found, key=lambda one: (one.manifest is None, one.manifest.serial if one.manifest else 0, one.step))


def by_preference(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints that have a manifest, in the order in which a run tries them: those in doubt after all others,
    and the newest first."""
    whole = [(one.verdict.is_doubtful, -one.manifest.serial, one) for one in checkpoints if one.manifest is not None]
    return [one for *_, one in sorted(whole, key=lambda entry: entry[:2])]


def preferred_step(folder: Path) -> int:
    """Return the step of the checkpoint that a run tries first, or 0 without checkpoints.

    Raises DistattnError as `list_checkpoints`.
    """
    return next((checkpoint.step for checkpoint in by_preference(list_checkpoints(folder))), 0)


def set_aside_since(folder: Path, step: int) -> list[Checkpoint]:
    """Return the checkpoints that were saved after that of a step and set aside for it, in the order in which they were saved.

    Raises DistattnError as `check_step`.
    """
    chosen, found = check_step(folder, step), list_checkpoints(folder)
    return [one for one in found[found.index(chosen) + 1 :] if one.verdict.kind == SET_ASIDE]


def judge_checkpoint(folder: Path, step: int, kind: str, text: str = "") -> None:
    """Write the verdict of the checkpoint of a step, if it is there. Raises OSError.

    folder: of all checkpoints. A checkpoint that is kept stays so. A good one releases those that are kept for an earlier step.
    """
    checkpoint = folder / checkpoint_name(step)
    if checkpoint.is_dir():
        CheckpointVerdict.read(checkpoint)._replace(kind=kind, text=text).write(checkpoint)
        if kind == GOOD:
            release_kept(folder, step)


def discard_checkpoint(folder: Path, step: int) -> None:
    """Remove the checkpoint of a step, if it is there. Raises OSError. folder: of all checkpoints."""
    if (checkpoint := folder / checkpoint_name(step)).is_dir():
        remove_checkpoint(checkpoint)


def keep_newest_good(folder: Path, refused: int) -> None:
    """Keep the newest checkpoint from which training went on well, until `release_kept`. Raises OSError.

    refused: the step, from 0, that was refused.
    """
    good = [one for one in by_preference(list_checkpoints(folder)) if one.verdict.kind == GOOD]
    if good and (not good[0].verdict.kept or good[0].verdict.refused_step is not None):
        why = f"the newest good one before step {refused + 1:,}, which was refused"
        good[0].verdict._replace(kept=why, refused_step=refused).write(good[0].folder)


def release_kept(folder: Path, done: int) -> None:
    """Leave the checkpoints that `keep_newest_good` keeps for one of the first `done` steps to the rule. Raises OSError."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.verdict.refused_step is not None and checkpoint.verdict.refused_step < done:
            checkpoint.verdict._replace(kept="", refused_step=None).write(checkpoint.folder)


def keep_for_good(folder: Path, refused: int) -> None:
    """Have the checkpoints that are kept for a refused step, from 0, stay until a person removes them. Raises OSError."""
    for checkpoint in list_checkpoints(folder):
        if checkpoint.verdict.refused_step == refused:
            checkpoint.verdict._replace(refused_step=None).write(checkpoint.folder)


def check_step(folder: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step. Raises DistattnError where no checkpoint of this step has a manifest."""
    whole = {one.step: one for one in list_checkpoints(folder) if one.manifest is not None}
    if step not in whole:
        steps = ", ".join(f"{one:,}" for one in sorted(whole))
        there = f"it has {'one of step' if len(whole) == 1 else 'those of steps'} {steps}" if whole else "it has none"
        raise DistattnError(f"{folder} has no checkpoint of step {step:,}; {there}.")
    return whole[step]


@contextlib.contextmanager
def choose_step(folder: Path, step: int) -> Iterator[None]:
    """Have a run go on from the checkpoint of this step: those that were saved later are set aside.

    Where the block raises, all verdicts are again as they were. Where the process is killed, the next run goes on from
    this step, or as it would have without the choice, and from no other step. Raises DistattnError as `check_step`, and where a
    verdict cannot be written; nothing is changed then.
    """
    chosen = check_step(folder, step)
    whole = [one for one in list_checkpoints(folder) if one.manifest is not None]
    text = f"it was saved later than step {step:,}, from which a person went on"
    later_ones = whole[whole.index(chosen) + 1 :]
    # the newest comes last: until it is set aside, runs go on from it, unless it is in doubt
    verdicts = [(later, later.verdict._replace(kind=SET_ASIDE, text=text)) for later in later_ones]
    if chosen.verdict.is_doubtful:
        verdicts.insert(0, (chosen, chosen.verdict._replace(kind=UNTESTED, text="")))
    asides: list[tuple[Checkpoint, Path]] = []
    changed: list[Checkpoint] = []
    try:
        try:
            # a full disk is noticed here, before anything is changed
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
    """Write the verdict that a checkpoint had when it was listed, as far as the disk lets it."""
    with contextlib.suppress(OSError):
        if checkpoint.verdict == CheckpointVerdict():
            # without a file it counts as untested
            (checkpoint.folder / VERDICT_FILE).unlink(missing_ok=True)
        else:
            checkpoint.verdict.write(checkpoint.folder)


def find_checkpoints(given: Path) -> list[Checkpoint]:
    """What a person means by a folder, of a run, of checkpoints, or of one; at least one, in the order of `list_checkpoints`.

    Raises DistattnError where there is none.
    """
    if not given.is_dir():
        raise DistattnError(f"{given}: is no folder; name a run, a folder of checkpoints, or a checkpoint.")
    for folder in (given, given / _IN_RUN):
        if found := list_checkpoints(folder):
            return found
    # one of them
    beside = [one for one in list_checkpoints(given.resolve().parent) if one.folder == given.resolve()]
    if beside:
        return beside
    if (given / MANIFEST_FILE).exists():
        # a copy with another name
        manifest = Manifest.read(given)
        return [Checkpoint(manifest.step, given, manifest, "", CheckpointVerdict.read(given))]
    raise DistattnError(f"{given}: has no checkpoints; name a run, a folder of checkpoints, or a checkpoint.")


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint all of whose files are what was written; None where there is none. Reads it from end to end."""
    for checkpoint in reversed(list_checkpoints(folder)):
        if checkpoint.manifest is not None and first_problem(checkpoint.folder, checkpoint.manifest) is None:
            return checkpoint.folder
    return None


def verify_checkpoint(folder: Path, report: Callable[[int], None] = lambda _: None) -> list[Problem]:
    """Read a checkpoint from end to end; name all that is not what was written, and pickles that could run code.

    report: is told of bytes read.
    """
    match = _CHECKPOINT.fullmatch(folder.name)
    try:
        manifest = _manifest_of(folder, int(match[1])) if match else Manifest.read(folder)
    except DamagedDataError as error:
        return [Problem("manifest.json", None, str(error))]
    problems = list(problems_of(folder, manifest, report=report))
    if not problems:
        # digests do not show who wrote the folder, so look at the pickles, too
        try:
            problems += [Problem(*found) for found in foreign_pickles(folder)]
        except OSError as error:
            problems.append(
                Problem(Path(error.filename).name, None, f"{error.filename}: cannot be read: {error.strerror}.")
            )
    return problems


def first_problem(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> Problem | None:
    """The first problem of a part of a checkpoint's blocks, see `problems_of`."""
    return next(problems_of(folder, manifest, part, parts), None)


def problems_of(
    folder: Path, manifest: Manifest, part: int = 0, parts: int = 1, report: Callable[[int], None] = lambda _: None
) -> Iterator[Problem]:
    """What is wrong with the files of a checkpoint, of whose blocks this is one of so many equal parts."""
    total = sum(len(file.blocks) for file in manifest.files)
    begin, end = total * part // parts, total * (part + 1) // parts
    before = 0
    for file in manifest.files:
        mine = range(max(0, begin - before), min(len(file.blocks), end - before))
        before += len(file.blocks)
        if mine:
            yield from _problems_of_file(folder / file.name, file, mine, report)


def sizes_are_right(checkpoint: Checkpoint) -> bool:
    """Whether the manifest is whole and every file is there with its size; their content is not read."""
    if checkpoint.manifest is None:
        return False
    with contextlib.suppress(OSError):
        return all(os.stat(checkpoint.folder / file.name).st_size == file.bytes for file in checkpoint.manifest.files)
    return False


def new_unfinished(folder: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written into, with this process in its name. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{checkpoint_name(step)}.tmp-{writer_name()}-{secrets.token_hex(4)}"
    made.mkdir()
    return made


def commit(unfinished: Path, step: int) -> Path:
    """Give a written folder its name; a checkpoint of that name is replaced. Returns its path. Raises OSError.

    All files are on the disk before, the name is after.
    """
    folder = unfinished.parent
    final = folder / checkpoint_name(step)
    synchronise_folder(str(unfinished / "."))
    replaced = None
    if final.exists():
        # killed before the second renaming, the next one to start gives the old folder its name back
        replaced = final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}")
        final.rename(replaced)
    unfinished.rename(final)
    synchronise_folder(str(final))
    if replaced is not None:
        remove_folder(replaced)
    return final


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. It loses its name first, so that nobody takes what is left for a damaged one. Raises OSError."""
    outdated = folder.with_name(f"{folder.name}.removed-{secrets.token_hex(4)}")
    folder.rename(outdated)
    shutil.rmtree(outdated)


def remove_folder(folder: Path) -> None:
    """Remove a folder and what is in it, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what dead writers have left, and give a folder its name back that was being replaced. Returns what was removed.

    What a living process writes stays. On the same machine that is looked up; a writer elsewhere is dead once nothing in its
    folder has changed for WRITER_SILENCE_SECONDS. What cannot be removed stays.
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
    """Raises DamagedDataError also where the manifest is that of another checkpoint."""
    manifest = Manifest.read(folder)
    if manifest.step != step:
        raise DamagedDataError(f"{folder / 'manifest.json'}: is that of step {manifest.step}, not of {folder.name}.")
    return manifest


def _problems_of_file(
    path: Path, expected: FileDigests, blocks: range, report: Callable[[int], None]
) -> Iterator[Problem]:
    try:
        with open(path, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != expected.bytes:
                what = f"{path}: has {size:,} bytes, but {expected.bytes:,} were written."
                yield Problem(expected.name, min(size, expected.bytes), what)
                return
            for block in blocks:
                try:
                    report(len(read_block(opened.fileno(), path, expected, block)))
                except DamagedDataError as error:
                    yield Problem(expected.name, block * BLOCK_BYTES, str(error))
    except FileNotFoundError:
        yield Problem(expected.name, None, f"{path}: is missing.")
    except OSError as error:
        yield Problem(expected.name, None, f"{path}: cannot be read: {error.strerror}.")


def _is_left(unfinished: Path, writer: str) -> bool:
    """Whether the process that wrote into a folder is dead."""
    if (alive := writer_is_alive(writer)) is not None:
        return not alive
    try:
        return all(file_age(path) > WRITER_SILENCE_SECONDS for path in [unfinished, *unfinished.iterdir()])
    except OSError:
        return False
