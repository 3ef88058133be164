"""Save a training run's state in the background, and resume from the newest complete checkpoint.

The files are those of torch.distributed.checkpoint. A checkpoint is written into a folder with a temporary name, synced to disk,
described by a manifest with digests, and renamed last. Only then does it count as a checkpoint (docs/checkpoints.md).
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from distattn.checkpoints.checkpoint_folder import (
    CheckpointProblem,
    by_preference,
    checkpoint_name,
    clean_leftovers,
    commit,
    first_problem,
    list_checkpoints,
    new_unfinished,
    remove_checkpoint,
    remove_folder,
)
from distattn.checkpoints.dcp_storage import file_writer, read_state
from distattn.checkpoints.manifest import FileDigests, Manifest
from distattn.checkpoints.rank_exchange import RankExchange, RankFailure
from distattn.checkpoints.retention import KeepRule
from distattn.checkpoints.staging import HostBuffers, StagedState
from distattn.checkpoints.verdicts import REFUSED, CheckpointVerdict
from distattn.ir.errors import DamagedDataError, DistattnError, LostRankError
from distattn.supervision.heartbeats import activity, awaiting_thread, thread_activity

# warn if waiting for an earlier save takes longer than this many seconds
_LONG_WAIT = 1.0
# a rank counts as hung if it is writing a checkpoint and has not written anything for this many seconds
_WRITE_SECONDS = 120.0


class Loaded(NamedTuple):
    """The checkpoint that a state was loaded from. step: training steps done. facts: its manifest's facts.

    doubt: the verdict, if it is doubtful and no other checkpoint could be loaded, otherwise "".
    """

    step: int
    folder: Path
    facts: Mapping[str, str]
    doubt: str = ""


@dataclass
class _Save:
    step: int
    state: StagedState
    facts: Mapping[str, str]
    verdict: CheckpointVerdict
    staged: threading.Event = field(default_factory=threading.Event)
    written: threading.Event = field(default_factory=threading.Event)


@dataclass
class _Note:
    """Work on the checkpoint folder that waits until earlier saves are written. step: see `Checkpoints.note`."""

    work: Callable[[Path], None]
    step: int | None
    done: threading.Event = field(default_factory=threading.Event)


class _Start(NamedTuple):
    """Rank 0's instructions to a rank that is about to write. plan: None if it is unchanged since the previous save."""

    folder: Path
    serial: int
    plan: SavePlan | None


class _Written(NamedTuple):
    """The files that a rank has written, and DCP's results."""

    results: list[WriteResult]
    files: list[FileDigests]


class _Candidate(NamedTuple):
    """A checkpoint for all ranks to verify. passed_over: why newer or unreadable folders were skipped. doubt: see `Loaded`."""

    folder: Path
    manifest: Manifest
    doubt: str
    passed_over: list[str]


class Checkpoints:
    """The checkpoints of a run. All ranks of a group create, use and close this object together, each from one thread.

    folder: the same on all ranks, on a shared file system; the first save creates it. group: the ranks that save, with any
    backend; None for one process. facts: strings such as digests, keyed by name, for every manifest. keep: the rule that decides
    which checkpoints stay. warn: called on rank 0, also by the writer thread, with a sentence about a failure that the run
    survives.

    Creating this object removes the unfinished folders of dead writers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: dist.ProcessGroup | None,
        facts: Mapping[str, str],
        keep: KeepRule,
        warn: Callable[[str], None],
    ):
        self._folder, self._facts, self._keep, self._warn = Path(folder), dict(facts), keep, warn
        self._exchange = RankExchange(group)
        self._is_root = self._exchange.rank == 0
        self._buffers = HostBuffers()
        # for the most recently started save: the state's signature, and this rank's plan
        self._signature: tuple[Any, ...] | None = None
        self._plan: SavePlan | None = None
        # on rank 0, for the same save: all ranks' plans, and DCP's metadata
        self._local_plans: list[SavePlan] = []
        self._metadata: Metadata | None = None
        # when this object was created, and how long earlier jobs used the folder (see `Manifest.seconds`)
        self._began = time.monotonic()
        self._seconds_before: float | None = None
        # the writer thread's error, and True once a permanent error has been raised
        self._error: DistattnError | None = None
        self._failure_reported = False
        self._last: _Save | None = None
        # a hook on all optimizers while a save overlaps with training
        self._step_hook: RemovableHandle | None = None
        self._last_note: _Note | None = None
        # on rank 0: steps whose last save failed, so any checkpoint of such a step is from an earlier save
        self._failed_steps: set[int] = set()
        self._queue: queue.SimpleQueue[_Save | _Note | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_all, daemon=True, name="distattn-checkpoints")
        self._writer.start()
        if self._is_root:
            # ignore an unreadable folder here, since saving and loading report it
            with contextlib.suppress(DistattnError):
                clean_leftovers(self._folder)

    def save(
        self,
        step: int,
        state: dict[str, Any] | Callable[[HostBuffers], dict[str, Any]],
        *,
        overlap: bool = False,
        facts: Mapping[str, str] | None = None,
        verdict: CheckpointVerdict = CheckpointVerdict(),  # noqa: B008
    ) -> None:
        """Save the state after `step` training steps on a background thread. Collective: all ranks must save the same steps.

        state: nested dictionaries of tensors, DTensors and plain values, as `dcp.save` takes them, or a function that builds
        them (`HostBuffers.build_state`). This returns once the tensors are copied to host memory. With `overlap` it returns
        immediately, and no tensor may change until `wait_staged` returns. torch.optim's optimizers call that before each step;
        other code that changes the state must do so first. facts: additional facts for this save. verdict: the verdict so far.

        If an earlier save is still running, wait for it and warn: skipping this save would require all ranks to agree at every
        save, and a second copy of the state would take as much memory again. A full or unwritable disk causes one warning, and
        the next save tries again. Raises LostRankError if another rank ended during the previous save, and DistattnError if the
        previous save failed for another reason.
        """
        self._wait_for_earlier(step)
        staged = StagedState(self._buffers.build_state(state), self._is_root, self._buffers)
        self._last = _Save(step, staged, facts or {}, verdict)
        self._queue.put(self._last)
        if not overlap:
            self.wait_staged()
        elif self._step_hook is None:
            self._step_hook = register_optimizer_step_pre_hook(lambda *_: self.wait_staged())

    def move_to(self, folder: Path) -> None:
        """Use a different folder, starting with the next save. All ranks use the folder that rank 0 names."""
        self._folder = folder

    def wait_staged(self) -> None:
        """Wait until the last save's tensors have been copied and may change."""
        if self._last is not None:
            self._last.staged.wait()
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    def note(self, work: Callable[[Path], None], step: int | None = None) -> None:
        """Run `work`, such as `judge_checkpoint`, on rank 0 once the last save is written, and then apply the keep rule.

        step: the step of the checkpoint that the work concerns. The work is skipped if the last save of that step failed. Not
        collective: on other ranks, this does nothing. An OSError becomes a warning.
        """
        if self._is_root:
            self._last_note = _Note(work, step)
            self._queue.put(self._last_note)

    def has_failed(self, step: int) -> bool:
        """Return whether the last save of a step failed. Valid on rank 0, after `wait` or `close`."""
        return step in self._failed_steps

    def wait(self) -> None:
        """Wait until the last save is written or has failed, and all work passed to `note` is done. Raises as `save` does."""
        if self._last is not None:
            self._wait_for_writer(self._last)
        if self._last_note is not None:
            self._last_note.done.wait()
        self._raise_error()

    def close(self) -> None:
        """Wait for the last save and end the writer thread. Raises as `save` does, except for errors already raised."""
        self.wait_staged()
        self._queue.put(None)
        self._writer.join()
        self._exchange.close()
        if not self._failure_reported:
            self._raise_error()

    def load_newest(self, state: dict[str, Any], *, required: Mapping[str, str] | None = None) -> Loaded | None:
        """Load the newest undamaged checkpoint into `state`, in place as `dcp.load` does. Collective.

        Doubtful checkpoints are tried last. A warning is given if a newer checkpoint is passed over or a doubtful one is loaded.
        Each rank reads a share of the checkpoint's blocks and compares their digests before any pickle is read. A damaged
        checkpoint is passed over, with one warning that names the damage. If no checkpoint is passed over, those that the keep
        rule does not keep are removed. required: facts that the checkpoint must have. The number of ranks and the sharding of
        tensors may differ from those at the time of the save.

        Returns None if there is no checkpoint. Raises DamagedDataError if all checkpoints are damaged, and DistattnError if a
        required fact differs or the state does not fit.
        """
        self.wait()
        tried: set[Path] = set()
        passed: list[str] = []
        while (candidate := self._next_candidate(tried, passed)) is not None:
            tried.add(candidate.folder)
            passed += candidate.passed_over
            _check_facts(candidate, required or {})
            problem = self._verify_and_read(candidate, state)
            if problem is None:
                self._failed_steps.discard(candidate.manifest.step)
                folder, doubt = candidate.folder, candidate.doubt
                if not passed and self._is_root:
                    # remove what an earlier job would have removed: it may have been killed right after its last save
                    self._remove_old()
                if (passed or doubt) and self._is_root:
                    how = f"anyway: it is in doubt, but no other can be loaded ({doubt})" if doubt else "instead"
                    self._warn(" ".join([*passed, f"Resuming from {folder.name} {how}."]))
                return Loaded(candidate.manifest.step, folder, dict(candidate.manifest.facts), doubt)
            passed.append(problem)
        return None

    # ---- loading

    def _next_candidate(self, tried: set[Path], passed: list[str]) -> _Candidate | None:
        """Return the best untried checkpoint, the same on all ranks. passed: the problems of the checkpoints already tried."""

        def choose(_: Sequence[None]) -> Sequence[_Candidate | None]:
            clean_leftovers(self._folder)
            checkpoints = list_checkpoints(self._folder)
            unreadable = [] if tried else [each.problem for each in checkpoints if each.manifest is None]
            untried = [each for each in by_preference(checkpoints) if each.folder not in tried]
            if untried:
                best, verdict = untried[0], untried[0].verdict
                assert best.manifest is not None
                doubt = f"{verdict.kind}: {verdict.text}" if verdict.is_doubtful else ""
                newer = checkpoints[checkpoints.index(best) + 1 :] if not tried and not doubt else []
                # do not report checkpoints that a person set aside
                passed_over = [f"{each.folder}: {each.verdict.text}." for each in newer if each.verdict.kind == REFUSED]
                candidate = _Candidate(best.folder, best.manifest, doubt, [*passed_over, *unreadable])
                return [candidate] * self._exchange.ranks
            if checkpoints:
                raise DamagedDataError(
                    f"{self._folder}: none of its {len(checkpoints)} checkpoints is whole. {' '.join([*passed, *unreadable])} "
                    "Put back a copy of one, or name another folder to start over."
                )
            return [None] * self._exchange.ranks

        candidate: _Candidate | None = self._decided(lambda: None, choose)
        return candidate

    def _verify_and_read(self, candidate: _Candidate, state: dict[str, Any]) -> str | None:
        """Verify and read a checkpoint. Return its problem, or None if it was read. The result is the same on all ranks."""
        part, parts = self._exchange.rank, self._exchange.ranks
        problem: CheckpointProblem | None = self._decided(
            lambda: first_problem(candidate.folder, candidate.manifest, part, parts),
            lambda problems: [next((each for each in problems if each is not None), None)] * parts,
        )
        if problem is not None:
            return str(problem)
        try:
            # every block is checked again as it is read, so damage after the first check is not loaded
            self._exchange.decide(
                lambda: read_state(candidate.folder, candidate.manifest.files, state), lambda _: [None] * parts
            )
        except RankFailure as failure:
            if failure.kind not in ("damaged", "files"):
                raise failure.raised() from None
            return failure.text
        return None

    def _decided(self, work: Callable[[], Any], decision: Callable[[list[Any]], Sequence[Any]]) -> Any:
        try:
            return self._exchange.decide(work, decision)
        except RankFailure as failure:
            raise failure.raised() from None

    # ---- saving

    def _wait_for_earlier(self, step: int) -> None:
        if self._last is None:
            return
        began = time.monotonic()
        self._wait_for_writer(self._last)
        waited = time.monotonic() - began
        if waited > _LONG_WAIT and self._is_root:
            self._warn(
                f"{checkpoint_name(step)} waited {waited:.1f} s until {checkpoint_name(self._last.step)} was written; "
                "save less often, or write to a faster disk."
            )
        # raise only after the wait, so that all ranks raise in the same call
        self._raise_error()

    def _wait_for_writer(self, save: _Save) -> None:
        action = f"writing {checkpoint_name(save.step)}"
        with activity(action, seconds=_WRITE_SECONDS), awaiting_thread(self._writer.ident or 0):
            save.written.wait()

    def _raise_error(self) -> None:
        if self._error is not None:
            error = self._error
            # losing a rank is permanent
            if isinstance(error, LostRankError):
                self._failure_reported = True
            else:
                self._error = None
            raise error

    def _write_all(self) -> None:
        while (save := self._queue.get()) is not None:
            if isinstance(save, _Note):
                self._do_note(save)
                continue
            # count the step as failed until `_commit` has succeeded
            self._failed_steps.add(save.step)
            try:
                with thread_activity(f"writing {checkpoint_name(save.step)}"):
                    self._write_or_report(save)
            except Exception as error:
                # keep this thread alive, since other threads wait for it
                self._error = RankFailure.of(error, self._exchange.rank).raised()
            finally:
                save.staged.set()
                save.written.set()

    def _do_note(self, note: _Note) -> None:
        try:
            if note.step not in self._failed_steps:
                note.work(self._folder)
            self._remove_old()
        except (OSError, DistattnError) as error:
            self._warn(f"{self._folder}: a verdict on a checkpoint cannot be written: {error}.")
        finally:
            note.done.set()

    def _write_or_report(self, save: _Save) -> None:
        try:
            self._write(save)
        except RankFailure as failure:
            if failure.kind == "error":
                reason = f"{checkpoint_name(save.step)} cannot be saved: rank {failure.rank}: {failure.text}"
                self._error = DistattnError(f"{reason}; a state has tensors and plain values.")
            elif failure.kind != "files":
                self._error = failure.raised()
            elif self._is_root:
                self._warn(
                    f"{checkpoint_name(save.step)} was not saved: rank {failure.rank}: {failure.text}; the run goes on, and the "
                    "next save tries again."
                )

    def _write(self, save: _Save) -> None:
        """Copy, plan and write on all ranks, and commit on rank 0. Raises the same RankFailure on all ranks."""
        start: _Start | None = None
        try:
            start = self._exchange.decide(lambda: self._stage(save), self._start)
            assert start is not None
            self._plan, self._signature = start.plan or self._plan, save.state.signature
            folder, serial = start.folder, start.serial
            self._exchange.decide(
                lambda: self._write_files(save.state, folder), lambda parts: self._commit(save, folder, serial, parts)
            )
        finally:
            if self._is_root and start is not None:
                # after the rename, this folder no longer exists
                remove_folder(start.folder)

    def _stage(self, save: _Save) -> tuple[int, SavePlan | None]:
        """Copy the tensors. Return the step and DCP's plan for this rank, with None for a plan that has not changed."""
        try:
            save.state.copy_tensors()
        finally:
            save.staged.set()
        plan = None if save.state.signature == self._signature else save.state.create_local_plan()
        save.state.forget_originals()
        return save.step, plan

    def _start(self, staged: list[tuple[int, SavePlan | None]]) -> Sequence[_Start]:
        """Create the folder on rank 0, and plan each rank's part if any rank's plan has changed."""
        step, plans = staged[0][0], [plan for _, plan in staged]
        for rank, (other, _) in enumerate(staged):
            if other != step:
                raise DistattnError(
                    f"rank 0 saves step {step}, rank {rank} step {other}; save the same steps on all ranks."
                )
        folder = new_unfinished(self._folder, step)
        try:
            manifests = [each.manifest for each in list_checkpoints(self._folder) if each.manifest is not None]
            serial = 1 + max((manifest.serial for manifest in manifests), default=0)
            if self._seconds_before is None:
                self._seconds_before = max((manifest.seconds or 0.0 for manifest in manifests), default=0.0)
            if all(plan is None for plan in plans):
                return [_Start(folder, serial, None)] * len(plans)
            local = [plan or self._local_plans[rank] for rank, plan in enumerate(plans)]
            final, self._metadata = DefaultSavePlanner().create_global_plan(local)
            final = file_writer(folder)[0].prepare_global_plan(final)
            self._local_plans = local
        except BaseException:
            remove_folder(folder)
            raise
        return [_Start(folder, serial, plan) for plan in final]

    def _write_files(self, state: StagedState, folder: Path) -> _Written:
        """Write this rank's part and sync it to disk. Raises OSError on failure."""
        assert self._plan is not None
        writer, files = file_writer(folder)
        writer.set_up_storage_writer(self._is_root)
        try:
            results = writer.write_data(state.finish_plan(self._plan), state).wait()
        except Exception:
            # torch.save replaces an OSError with an error of its own
            if files.failure is not None:
                raise files.failure from None
            raise
        return _Written(results, files.digests())

    def _commit(self, save: _Save, folder: Path, serial: int, parts: list[_Written]) -> Sequence[None]:
        """Write the metadata and manifest on rank 0 once all parts are on disk, and rename the folder."""
        assert self._metadata is not None
        writer, files = file_writer(folder)
        writer.finish(self._metadata, [part.results for part in parts])
        digests = sorted([*files.digests(), *(file for part in parts for file in part.files)])
        Manifest(
            serial=serial,
            step=save.step,
            saved_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            world_size=self._exchange.ranks,
            torch=torch.__version__,
            facts=self._facts | dict(save.facts),
            files=digests,
            seconds=round((self._seconds_before or 0.0) + time.monotonic() - self._began, 3),
        ).write(folder)
        save.verdict.write(folder)
        commit(folder, save.step)
        self._failed_steps.discard(save.step)
        self._remove_old()
        return [None] * len(parts)

    def _remove_old(self) -> None:
        """Remove checkpoints that the keep rule does not keep, and warn if a checkpoint cannot be removed."""
        try:
            for old in self._keep.removable(list_checkpoints(self._folder)):
                remove_checkpoint(old.folder)
        except OSError as error:
            self._warn(f"{error.filename}: an old checkpoint cannot be removed: {error.strerror}.")


def _check_facts(candidate: _Candidate, required: Mapping[str, str]) -> None:
    """Raise DistattnError naming the first fact that differs. All ranks raise the same error."""
    for name, wanted in required.items():
        actual = candidate.manifest.facts.get(name)
        if actual != wanted:
            difference = f"has {name} {actual}" if actual is not None else f"does not say its {name}"
            raise DistattnError(
                f"{candidate.folder}: {difference}, but this run has {name} {wanted}; resume with what it was saved with, or "
                "name another folder to start over."
            )
