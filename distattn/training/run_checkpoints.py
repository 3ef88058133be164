"""A run's checkpoints: saves them, judges them by the steps that follow, and goes back to one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from distattn.checkpoints.checkpoint_folder import (
    discard_checkpoint,
    judge_checkpoint,
    keep_for_good,
    keep_newest_good,
    preferred_step,
    release_kept,
)
from distattn.checkpoints.checkpoints import Checkpoints, Loaded
from distattn.checkpoints.run_lock import RunLock
from distattn.checkpoints.staging import HostBuffers
from distattn.checkpoints.verdicts import GOOD, REFUSED, CheckpointVerdict
from distattn.ir.errors import DamagedStateError, DistattnError
from distattn.ir.text_format import plural, print_message
from distattn.training.engines.engine import Engine, EngineState, host_tensor
from distattn.training.reporting.loss_by_position import LossByPosition
from distattn.training.reporting.metrics import MetricsReporter
from distattn.training.run_facts import REQUIRED, TrainingRun
from distattn.training.run_folder import RESUMED
from distattn.training.watch.module_observer import gather_values
from distattn.training.watch.numerics_watch import ROLLBACK, SKIP, STOP, NumericsWatch, Streak, Verdict
from distattn.training.watch.state_digest import MOST_OF_ONE_RANK, Damage, StateDigest
from distattn.training.watch.weight_growth import WeightGrowth


class RunCheckpoints:
    """The checkpoints of a run that is being trained. All ranks must make the same calls.

    lock: rank 0's lock on the run folder, None elsewhere. engine, watch and by_position hold the state that is saved;
    growth and digest watch it between updates.
    """

    def __init__(
        self,
        run: TrainingRun,
        engine: Engine,
        checkpoints: Checkpoints,
        watch: NumericsWatch,
        growth: WeightGrowth,
        by_position: LossByPosition,
        reporter: MetricsReporter,
        lock: RunLock | None,
    ):
        self.folder, self.config, self.facts = run.folder, run.config, run.facts
        self.engine, self.checkpoints, self.reporter, self.lock = engine, checkpoints, reporter, lock
        self.watch, self.growth, self.by_position = watch, growth, by_position
        self.digest = StateDigest(engine.state_tensors, dist.group.WORLD)
        # the loss of the last step; None before the first step
        self._loss: float | None = None
        # True if a save is due but waits until a step is applied again
        self._save_is_due = False
        # the step of the checkpoint that holds the current weights, and the checkpoint from which they were loaded;
        # both None after an update
        self._saved_step: int | None = None
        self._loaded: Loaded | None = None
        # step of the last save, until the state is compared with its digest; the saved state may be damaged until then
        self._uncompared: int | None = None

    def is_due(self, done: int) -> bool:
        """Return whether to save after `done` steps. A save due during refused steps waits until a step is applied."""
        every = self.config.checkpoint.every_steps
        self._save_is_due |= every > 0 and done % every == 0
        # weights after refused steps may be bad, so they are saved only when the run ends
        return self._save_is_due and self.watch.streak is None

    def save(self, done: int) -> None:
        """Save the state after `done` steps. Raises DistattnError if another job uses the folder or the folder is gone."""
        if self.lock is not None:
            self.lock.check()
            if not self.folder.is_in_place():
                if (place := self.folder.follow()) is None:
                    # raise the error that says that the folder is gone
                    self.folder.hold().check()
                else:
                    self.checkpoints.move_to(place / self.folder.checkpoints.name)
        facts, streak = {} if self._loss is None else {"loss": f"{self._loss:.6g}"}, self.watch.streak
        verdict = CheckpointVerdict()
        # after the run's last step, no later step can tell a bad step from bad weights
        if streak is not None and (self.watch.doubts_weights or done == self.config.train.steps):
            text = f"it was saved after refused steps, from {streak.first + 1:,} on: {streak.reason.removesuffix('.')}"
            verdict = CheckpointVerdict(REFUSED, text)
        self.checkpoints.save(done, self._kept_state, overlap=True, facts=facts, verdict=verdict)
        self._save_is_due, self._saved_step, self._loaded = False, done, None
        self._uncompared = done

    def save_last(self, done: int) -> Damage | None:
        """Save after the run's last step. Return the damage if the state has changed since the last update, else None."""
        self.save(done)
        self.checkpoints.wait()
        return self.digest.compare(done - 1, "the end of the run")

    def finish_early(self, done: int) -> int:
        """Wait for the save of a run that stops after `done` steps, and discard the checkpoint if the state has changed.

        Returns the step of the checkpoint from which a resume would continue, or 0 if there is no checkpoint. All ranks get the
        same step.
        """
        self.checkpoints.wait()
        if (damage := self.digest.compare(done - 1, "the end of the run")) is not None:
            self.reporter.report_warning(damage.step, "damaged state", damage.text)
            # discard only a checkpoint saved by this process: any other checkpoint of this step is older
            if self._uncompared == done:
                self.checkpoints.note(lambda folder: discard_checkpoint(folder, done), done)
        # ask which checkpoint a resume prefers: the save may have failed, or its checkpoint may be in doubt
        newest: list[int] = []
        self.checkpoints.note(lambda folder: newest.append(preferred_step(folder)))
        self.checkpoints.wait()
        steps_of_rank_0: list[int] = gather_values(dist.group.WORLD, newest)[0]
        return steps_of_rank_0[0] if steps_of_rank_0 else 0

    def resume(self) -> int:
        """Load the newest checkpoint. Return its step, or 0 if there is no checkpoint."""
        engine_state = self.engine.state(host_tensor)
        state = self._state(engine_state)
        loaded = self.checkpoints.load_newest(state, required={name: self.facts[name] for name in REQUIRED})
        self._loaded, self._saved_step, self._save_is_due = loaded, loaded and loaded.step, False
        self._uncompared = None
        if loaded is None:
            return 0
        progress = json.loads(state["progress"])
        self.engine.load(engine_state._replace(updates=progress["updates"]))
        self.watch.load_state_dict(progress["watch"])
        self.by_position.load(state["token_losses"])
        ranks, ranks_before = self.config.parallel.ranks, int(loaded.facts["ranks"])
        remarks = f", on {plural(ranks, 'rank')}; it was saved on {ranks_before}" if ranks != ranks_before else ""
        remarks += f"; it is in doubt ({loaded.doubt})" if loaded.doubt else ""
        facts = {"ranks": ranks, "saved_on": ranks_before, **self.folder.resumed_facts()}
        self.growth.forget()
        if self.config.watch.digest_every:
            self.digest.take(f"the loading of {loaded.folder.name}")
        self.reporter.report_event(loaded.step, RESUMED, f"Resumed from {loaded.folder.name}{remarks}.", facts)
        return loaded.step

    def go_back(self, step: int) -> int:
        """Load the newest checkpoint and return its step. Raises DistattnError if none exists. step: the refused step."""
        if not (checkpoint := self.resume()) and self._loaded is None:
            raise DistattnError(
                f"step {step + 1}: there is no checkpoint to go back to, since none could be saved; see the messages above."
            )
        return checkpoint

    def leave_damaged(self, damage: Damage) -> int:
        """Report a damaged state, load a checkpoint from before the damage, and return its step.

        Raises DistattnError if damage repeats or watch.action is "stop", and DamagedStateError if there is no checkpoint.
        """
        step, saved = damage.step, self._uncompared
        self.reporter.report_warning(step, "damaged state", damage.text)
        if saved is not None:
            # the state changed while it was being copied
            self.checkpoints.note(lambda folder: discard_checkpoint(folder, saved), saved)
        if damage.repeats:
            raise DistattnError(
                f"step {step + 1}: {damage.text} This happened {MOST_OF_ONE_RANK} times in this run: have the memory of its host "
                f"tested, exclude the host, and run distattn resume {self.folder.folder}."
            )
        if self.config.watch.action == STOP:
            raise DistattnError(
                f"step {step + 1}: {damage.text} distattn resume {self.folder.folder} goes on from the newest undamaged "
                "checkpoint; watch.action has other reactions."
            )
        if (begin := self.resume()) or self._loaded is not None:
            return begin
        raise DamagedStateError(
            f"step {step + 1}: {damage.text} There is no checkpoint to go back to: the run starts over, or distattn resume "
            f"{self.folder.folder} restarts it."
        )

    def begins_at(self, step: int) -> bool:
        """Return whether `step` is the first step after loading a checkpoint that was not in doubt."""
        return self._loaded is not None and self._loaded.step == step and not self._loaded.doubt

    def judge(self, verdict: Verdict, loss: float) -> None:
        """Record what a step's verdict shows about the checkpoint of the step's weights and that from before a streak.

        The caller has just compared the state with its digest, so the last save copied an undamaged state.
        """
        self._loss, self._uncompared = loss, None
        saved_step, streak = self._saved_step, verdict.streak
        if verdict.applies:
            if saved_step is not None:
                self.checkpoints.note(lambda folder: judge_checkpoint(folder, saved_step, GOOD), saved_step)
            if streak is not None:
                self._end_streak(streak, verdict.recovered)

    def judge_refused(self, verdict: Verdict) -> None:
        """Record what a refused step, already examined, shows about the checkpoint of its weights.

        The newest good checkpoint from before a streak is kept until the run recovers or a later checkpoint proves
        good. A run that skips the step continues with the same weights; `NumericsWatch.doubts_weights` says whether
        they are in doubt.
        """
        self._refuse_saved(verdict)
        if verdict.begins_streak:
            self.checkpoints.note(lambda folder: keep_newest_good(folder, verdict.step))

    def _refuse_saved(self, verdict: Verdict) -> None:
        """Refuse the checkpoint with a refused step's weights if the weights are in doubt."""
        saved_step, streak = self._saved_step, verdict.streak
        if saved_step is None or streak is None:
            return
        if self.config.watch.action == SKIP == verdict.action:
            refused = self.watch.doubts_weights and streak.count <= 2
        else:
            # with rollback, the checkpoint is refused only if the step is bad again after loading it
            refused = verdict.begins_streak and (verdict.action != ROLLBACK or self._loaded is not None)
        if refused:
            text = f"step {streak.first + 1:,}, computed from it, was refused: {streak.reason.removesuffix('.')}"
            self.checkpoints.note(lambda folder: judge_checkpoint(folder, saved_step, REFUSED, text), saved_step)

    def _end_streak(self, streak: Streak, recovered: bool) -> None:
        """Report the end of a streak, and release or keep the checkpoint from before it."""
        if recovered:
            self.checkpoints.note(lambda folder: release_kept(folder, streak.first + 1))
        else:
            self.checkpoints.note(lambda folder: keep_for_good(folder, streak.first))
        if streak.count > 1:
            ending = (
                "loss and gradient norm are back at their old level"
                if recovered
                else "their values have become usual, and the run goes on at a new level: the checkpoint from before them is kept"
            )
            self.reporter.report_warning(streak.last, "refused", f"{describe_streak(streak)}; {ending}.")

    def after_update(self, step: int, stops: Callable[[], object]) -> None:
        """Record the state after an update. stops: a function that returns true if the run is asked to stop after the step."""
        self._saved_step = self._loaded = None
        self.growth.after_update(step)
        self.take_digest(f"the update of step {step + 1}", step + 1, stops)

    def take_digest(self, after: str, done: int, stops: Callable[[], object] = bool) -> None:
        """Hash the state after `done` steps if watch.digest_every asks for it or the state is about to be saved.

        after: see `StateDigest.take`.
        """
        every, saves = self.config.watch.digest_every, self.config.checkpoint.every_steps
        is_saved = saves > 0 and done % saves == 0 or saves >= 0 and done == self.config.train.steps
        if every and (done % every == 0 or is_saved or self._save_is_due or stops()):
            self.digest.take(after)

    def accept_config(self, step: int) -> None:
        """Replace the configuration in the run folder with that of these ranks. If that fails, warn and continue."""
        try:
            self.folder.accept_config(self.config, step)
        except OSError as error:
            print_message(
                f"{self.folder.config_file}: cannot be written: {error.strerror}; these ranks train with the new configuration, "
                "and the next resume uses the old one, unless it gets the same keys."
            )

    def _kept_state(self, buffers: HostBuffers) -> dict[str, Any]:
        """Return the state to save. Tensors that the engine gathers are copied into `buffers`."""
        return self._state(self.engine.state(buffers.keep))

    def _state(self, state: EngineState) -> dict[str, Any]:
        """Return the contents of a checkpoint. state: the engine's state."""
        progress = {"updates": state.updates, "watch": self.watch.state_dict()}
        averages = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
        return {
            "model": state.model,
            "optimizer": averages,
            "token_losses": self.by_position.state(self.engine.cp.loss_group),
            "progress": json.dumps(progress),
        }


def describe_streak(streak: Streak) -> str:
    """Return a clause that names the refused steps."""
    if streak.count == 1:
        return f"step {streak.first + 1:,} was refused"
    return f"{streak.count:,} steps in a row were refused, {streak.first + 1:,} to {streak.last + 1:,}"
