"""The training loop: every step's packs and all parameters split over the ranks, from the newest checkpoint on.

`train` is one rank of a run; `distattn.training.rank` calls it in a process of its own. The run folder holds the resolved
configuration, checkpoints and, of a run on text, tokens and the plan of packs; nothing else is shared but the process group.
All that a run's future depends on is the number of the next step, the parameters, the optimizer's averages, and what the numerics
watch and the loss by position have seen.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.checkpoints.checkpoint_folder import (
    discard_checkpoint,
    judge_checkpoint,
    keep_newest_good,
    list_checkpoints,
    release_kept,
)
from distattn.checkpoints.checkpoints import Checkpoints, Loaded
from distattn.checkpoints.retention import KeepRule
from distattn.checkpoints.run_lock import RunLock
from distattn.checkpoints.verdicts import GOOD, REFUSED, CheckpointVerdict
from distattn.data.loader import PackLoader
from distattn.data.order import derived_key
from distattn.data.pack_plan import StepPacks
from distattn.ir.errors import DamagedStateError, DistattnError, RunStopped
from distattn.ir.plan import Plan
from distattn.parallel.analysis.columns import plural
from distattn.supervision.heartbeats import tell, telling
from distattn.training.config import Config
from distattn.training.engines.engine import Batch, Engine, EngineState
from distattn.training.engines.opened import open_engine
from distattn.training.evaluation import evaluate
from distattn.training.json_lines import write_whole
from distattn.training.loss_by_position import LossByPosition
from distattn.training.metrics import MetricsReporter
from distattn.training.numerics_watch import ROLLBACK, STOP, NumericsWatch, Streak, Verdict
from distattn.training.replay_check import ReplayCheck
from distattn.training.run_data import RunData, held_out_data, open_data, piece_rows
from distattn.training.run_facts import REQUIRED, check_steps_left, facts_of
from distattn.training.run_folder import TRAINING, RunFolder, StepMetrics
from distattn.training.run_health import RunHealth
from distattn.training.run_settings import (
    Utilisation,
    configured_model,
    schedule_settings,
    watch_settings,
)
from distattn.training.schedule import learning_rate
from distattn.training.state_digest import MOST_OF_ONE_RANK, Damage, StateDigest
from distattn.training.step_clock import StepClock
from distattn.training.step_documents import append_documents
from distattn.training.stop_request import Stop, StopRequest
from distattn.training.weight_growth import WeightGrowth


def train(run: RunFolder, config: Config, json_lines: bool, device: torch.device, *, accept: bool = False) -> None:
    """Train on this rank from the newest checkpoint of the run folder, or from the beginning, to the last step.

    accept: whether the configuration is the folder's proposed one, to become the run's once nothing speaks against it. Raises
    DistattnError for what cannot be, and where numbers went wrong and the run file says to stop; RunStopped where the run was
    asked to stop, with a checkpoint of the last step that was done.
    """
    data = open_data(run, config)
    with ExitStack() as stack:
        lock, shape = None, configured_model(config, data.vocabulary, data.context)
        given = TrainingRun(run, config, data, shape, facts_of(config, data, shape), device)
        if dist.get_rank() == 0:
            lock = stack.enter_context(RunLock(run.folder))
            run.hold()
            stack.enter_context(closing(run))
            _write_shape(run, shape)
        engine = stack.enter_context(closing(open_engine(config, device, data.vocabulary, data.context)))
        visible, train_config = dist.get_rank() == 0, config.train
        reporter = stack.enter_context(
            MetricsReporter(run, train_config.steps, json_lines, visible, train_config.wandb)
        )
        keep = KeepRule(config.checkpoint.keep_last, config.checkpoint.keep_every_hours or None)
        checkpoints = Checkpoints(run.checkpoints, group=dist.group.WORLD, facts=given.facts, keep=keep, warn=_warn)
        stack.enter_context(closing(checkpoints))
        loop = TrainingLoop(given, engine, checkpoints, reporter, lock, accept)
        stack.enter_context(closing(loop.health))
        stack.enter_context(closing(loop.stop))
        loop.run()
        loop.check_folder()
    steps = [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)]
    if lock is not None and config.checkpoint.every_steps >= 0 and config.train.steps not in steps:
        raise DistattnError(
            f"{run.checkpoints}: the last step's checkpoint could not be saved; make room, and distattn resume "
            f"{run.folder} trains from step {max(steps, default=0):,} on."
        )


class TrainingRun(NamedTuple):
    """What is trained. shape: the transformers configuration of the model. facts: those of `facts_of`. device: of this rank."""

    folder: RunFolder
    config: Config
    data: RunData
    shape: Any
    facts: Mapping[str, str]
    device: torch.device


class TrainingLoop:
    """The steps of a run on one rank. lock: of rank 0, on the run's folder. accept: as for `train`."""

    def __init__(
        self,
        run: TrainingRun,
        engine: Engine,
        checkpoints: Checkpoints,
        reporter: MetricsReporter,
        lock: RunLock | None,
        accept: bool = False,
    ):
        self.folder, self.config, self.data, shape, self.facts, self.device = run
        self.engine, self.checkpoints, self.reporter, self.lock = engine, checkpoints, reporter, lock
        self._accept = accept
        config, data, device = self.config, self.data, self.device
        self.stop = StopRequest(self.folder.stop_file, self.folder.regroup_file, of_folder=self._look_at_folder)
        self.documents = self.folder.lines(self.folder.documents_file, append_documents)
        self.schedule, group = schedule_settings(config), dist.group.WORLD
        self.digest, self.growth = StateDigest(engine.state_tensors, group), WeightGrowth(engine.state_tensors)
        # whether all ranks learn each other's loss; those of tensor and pipeline parallelism do not
        self._shares_loss = dist.get_world_size(engine.cp.loss_group) == dist.get_world_size()
        self.watch = NumericsWatch(
            engine.model,
            watch_settings(config),
            group,
            self.folder.folder,
            engine.cp.messages,
            engine,
            engine.stage,
            self.growth,
        )
        self.replay = ReplayCheck(engine.model, config.watch.replay_every, group, engine.cp.messages, engine.stage)
        self.by_position = LossByPosition(data.context, [corpus.name for corpus in data.corpora], device)
        self._has_evaluated = False
        # of the last step; None before there is one
        self._loss: float | None = None
        # a save that waits until a step is applied again
        self._save_is_due = False
        # the step of the checkpoint that has the weights of now, and what they were loaded from; None once an update changed them
        self._saved_step: int | None = None
        self._loaded: Loaded | None = None
        # what was found of the first step of a streak
        self._finding = ""
        # for which the run is to go back
        self._damage: Damage | None = None
        # of the step before
        self._context: int | None = None
        self.utilisation = Utilisation.of_config(config, shape)
        self.health = RunHealth(engine.cp, device, config.health, self.folder, reporter)

    def run(self) -> None:
        """Train from the newest checkpoint to the last step, and save there."""
        config, last = self.config, self.config.train.steps
        step = begin = self._resume()
        check_steps_left(self.folder, config, begin)
        if self._accept and self.lock is not None:
            self._accept_config(begin)
        if not begin and self.folder.plan_file.exists():
            self.reporter.report_plan(Plan.load(self.folder.plan_file))
        if not begin and config.watch.action == "rollback":
            # something to go back to
            self._save(0)
        if not begin:
            self._digest("the begin of the run", 0)
        while step < last:
            step = self._train_from(step)
            if step == last and config.checkpoint.every_steps >= 0 and begin < last:
                step = self._save_last(last)
        if self.watch.streak is not None:
            self._say(last - 1, "refused", f"The run ends with refused steps: {_in_a_row(self.watch.streak)}.")

    def _save_last(self, last: int) -> int:
        """Save after the last step; returns the step to go on from, which is another one where the state was found damaged."""
        self._save(last)
        self.checkpoints.wait()
        damage = self.digest.compare(last - 1, "the end of the run")
        return last if damage is None else self._leave_damaged(damage)

    def _train_from(self, begin: int) -> int:
        """Train from a step on; returns the last step, or the one to go on from after a rollback."""
        last, evaluation, every = self.config.train.steps, self.config.evaluation, self.config.checkpoint.every_steps
        clock = self.health.clock()
        steps = self.engine.cp.steps(self._loader(self.data, begin, last))
        tell(f"reading the data of step {begin + 1}")
        for step, batches in enumerate(clock.steps(steps), begin):
            self.stop.look()
            planned = self.data.plan.step(step)
            # steps of another length compile and allocate, as the first
            unusual = self._context not in (None, planned.context)
            self._context = planned.context
            tell(
                "forward and backward", step=step, seconds=self.config.supervision.starting_seconds if unusual else 0.0
            )
            if not self._train_step(step, planned, batches, clock):
                return self._roll_back(step)
            done = step + 1
            # before the save: a run that is resumed from it has evaluated
            if evaluation.every_steps and (done % evaluation.every_steps == 0 or done == last):
                self._evaluate(done)
            stop = self.stop.made() if done < last else Stop.NO
            self._save_is_due |= every > 0 and done % every == 0
            # weights after refused steps may be bad ones: they are saved only where the run ends
            saves = self._save_is_due and self.watch.streak is None or every >= 0 and stop
            if done < last and saves and stop != Stop.FOLDER_LOST:
                self._save(done)
            if stop:
                self._end(done, stop)
            clock.skip()
            tell(f"reading the data of step {done + 1}")
        return last

    def _train_step(self, step: int, planned: StepPacks, batches: Sequence[Batch], clock: StepClock) -> bool:
        """One step; False where the run is to go back to a checkpoint."""
        train = self.config.train
        if self.reporter.visible:
            # before anything can go wrong with them
            self.documents.add(lambda: list(piece_rows(self.data, step)))
        self._seed(step)
        if self.replay.due(step):
            self._replay(step, batches)
        token_losses: list[tuple[Tensor, Batch]] = []
        losses = self.engine.backward(batches, lambda losses_T, batch: token_losses.append((losses_T, batch)))
        with telling("the norm of all gradients", waits=True):
            norm = self.health.wait(lambda: self.engine.clip(train.max_grad_norm))
        # what is saved is copied between two digests, and before the update changes it
        self.checkpoints.wait_staged()
        with telling("the mean loss of all ranks", waits=True):
            mean, damage = self._mean_loss(step, losses)
        if damage is not None:
            self.engine.drop()
            self._damage = damage
            return False
        tell("looking at losses and gradients")
        verdict, self._loss = self.watch.judge(step, mean, norm), mean
        if train.histogram_every and step % train.histogram_every == 0:
            self.reporter.report_histograms(step + 1, self.engine)
        rate = learning_rate(self.schedule, step)
        tell("the optimizer's step")
        self._judge_checkpoint(verdict)
        if verdict.applies:
            self.digest.forget()
            self.engine.update(rate)
            self._saved_step = self._loaded = None
            self.growth.after_update(step)
            self._digest(f"the update of step {step + 1}", step + 1)
            for losses_T, batch in token_losses:
                self.by_position.add_batch(losses_T, batch)
        else:
            self.engine.drop()
        lengths = [length for pack in planned.packs for length in pack.lengths]
        costs = clock.lap()
        self.reporter.report(
            StepMetrics(
                step + 1,
                mean,
                norm,
                sum(lengths),
                learning_rate=rate,
                context_length=planned.context,
                mfu=self.utilisation and self.utilisation.of_step(lengths, costs.seconds),
                skipped=verdict.reason,
                **costs._asdict(),
            )
        )
        self.health.after_step(step + 1, costs)
        return verdict.applies or self._act(verdict, batches)

    def _mean_loss(self, step: int, losses: Sequence[Tensor]) -> tuple[float, Damage | None]:
        """The mean loss of a step, and what has changed in the state since the last update, on all ranks the same.

        A rank whose state has changed tells the others by a loss that is NaN, so nothing more is sent while all is well.
        """
        changed = self.digest.changed()
        self.health.state_checks = self.digest.comparisons
        spoilt = [losses[0] * math.nan] if changed and self._shares_loss else []
        mean = self.engine.cp.mean_loss([*losses, *spoilt])
        if not self._shares_loss and self.config.watch.digest_every:
            to_look = self.digest.any(bool(changed))
        else:
            to_look = not math.isfinite(mean)
        return mean, self.digest.explain(step, changed) if to_look else None

    def _digest(self, after: str, done: int) -> None:
        """Digest the state after so many steps, where the run file says so, or it is about to be saved."""
        every, saves = self.config.watch.digest_every, self.config.checkpoint.every_steps
        is_saved = saves > 0 and done % saves == 0 or saves >= 0 and done == self.config.train.steps
        if every and (done % every == 0 or is_saved or self._save_is_due or self.stop.made()):
            self.digest.take(after)

    def _leave_damaged(self, damage: Damage) -> int:
        """Tell of a damaged state and go back to a checkpoint of a whole one; returns its step."""
        step, saved = damage.step, self._saved_step
        self._say(step, "damaged state", damage.text)
        self.health.tell_damage(step + 1, damage.text)
        if saved is not None and self._loaded is None:
            # its copy was made while the state changed
            self.checkpoints.note(lambda folder: discard_checkpoint(folder, saved))
        if damage.repeats:
            raise DistattnError(
                f"step {step + 1}: {damage.text} It is so {MOST_OF_ONE_RANK} times in this run: have the memory of its host "
                f"tested, leave the host out, and go on by distattn resume {self.folder.folder}."
            )
        if self.config.watch.action == STOP:
            raise DistattnError(
                f"step {step + 1}: {damage.text} distattn resume {self.folder.folder} goes on from the newest checkpoint of a "
                "whole state; watch.action says what else to do."
            )
        if (begin := self._resume()) or self._loaded is not None:
            return begin
        raise DamagedStateError(
            f"step {step + 1}: {damage.text} There is no checkpoint to go back to: the run begins anew, or does so by "
            f"distattn resume {self.folder.folder}."
        )

    def _replay(self, step: int, batches: Sequence[Batch]) -> None:
        """Compute the first micro-batch twice and compare; the step begins anew afterwards."""
        difference = self.replay.check(step, lambda: self.engine.backward(batches[:1]), self.engine.drop)
        self.engine.drop()
        if difference is not None:
            self._say(step, "wrong rank", difference.text)

    def _judge_checkpoint(self, verdict: Verdict) -> None:
        """Note what a step shows of the checkpoints: of that with the weights it was computed with, and of those before a streak.

        The newest good one from before a streak is kept for good, unless the run recovers.
        """
        at, step, streak = self._saved_step, verdict.step, verdict.streak
        if verdict.begins_streak:
            text = f"step {step + 1:,}, computed from it, was refused: {verdict.reason.removesuffix('.')}"
            # a rollback loads it first, and the step is computed again
            if at is not None and (verdict.action != ROLLBACK or self._loaded is not None):
                self.checkpoints.note(lambda folder: judge_checkpoint(folder, at, REFUSED, text))
            self.checkpoints.note(lambda folder: keep_newest_good(folder, _kept_before(step)))
        elif verdict.applies:
            if at is not None:
                self.checkpoints.note(lambda folder: judge_checkpoint(folder, at, GOOD))
            if streak is not None:
                self._end_streak(streak, verdict.recovered)

    def _end_streak(self, streak: Streak, recovered: bool) -> None:
        """Tell of a streak that is over, once."""
        if recovered:
            self.checkpoints.note(lambda folder: release_kept(folder, _kept_before(streak.first)))
        if streak.count > 1:
            how = (
                "loss and gradient norm are as before again"
                if recovered
                else "they are usual by now, and the run goes on at another level: the checkpoint from before them is kept"
            )
            self._say(streak.last, "refused", f"{_in_a_row(streak)}; {how}.")

    def _act(self, verdict: Verdict, batches: Sequence[Batch]) -> bool:
        """Do what the run file says of a refused step; False where the run is to go back to a checkpoint.

        Of refused steps in a row the first is looked into, kept as evidence and told of.
        """
        if verdict.begins_streak:
            self._finding = self._find(verdict, batches)
            self._say(verdict.step, "refused", f"{verdict.reason} In a second run: {self._finding}")
        if verdict.action == STOP:
            first = verdict.streak.first if verdict.streak else verdict.step
            raise DistattnError(
                f"step {verdict.step + 1}: {verdict.reason} In a second run of step {first + 1}: {self._finding} See "
                f"{self.folder.folder}/evidence; distattn resume goes on with the newest checkpoint from before it, distattn "
                f"ckpt list {self.folder.folder} shows all, and watch.action says what else to do."
            )
        # where the first step from a checkpoint is bad again, the run goes further back
        loaded = self._loaded
        further = loaded is not None and loaded.step == verdict.step and not loaded.in_doubt
        return not (verdict.action == ROLLBACK or self.config.watch.action == ROLLBACK and further)

    def _find(self, verdict: Verdict, batches: Sequence[Batch]) -> str:
        """Run a refused step again and keep what is known of it; returns what was found."""
        self._seed(verdict.step)
        finding = self.watch.find(verdict.step, lambda number: self.engine.backward([batches[number]])[0], len(batches))
        self.engine.drop()
        self.watch.keep_evidence(verdict, finding, list(piece_rows(self.data, verdict.step)), batches)
        return finding.text

    def _evaluate(self, done: int) -> None:
        """Losses of held-out documents by position and corpus, and of training since the last time."""
        # what is compiled, it is at the first one
        tell("evaluation", seconds=0.0 if self._has_evaluated else self.config.supervision.starting_seconds)
        self._has_evaluated = True
        data, begin = held_out_data(self.config, self.data)
        sums = LossByPosition(data.context, [corpus.name for corpus in data.corpora], self.device)
        loader = self._loader(data, begin, begin + self.config.evaluation.steps)
        found = evaluate(self.engine.cp, self.engine.model, loader, sums, self.engine.evaluate)
        self.reporter.report_losses(done, found)
        self.reporter.report_losses(done, self.by_position.reduce(self.engine.cp.loss_group), TRAINING)
        self.by_position.reset()

    def _look_at_folder(self) -> Stop:
        """On rank 0: look whether the run's folder is where it was."""
        if self.folder.is_in_place():
            return Stop.NO
        return Stop.FOLDER_LOST if self.folder.follow() is None else Stop.FOLDER_MOVED

    def check_folder(self) -> None:
        """Raise DistattnError on rank 0 where the run's folder is not where it was, with what has become of it."""
        if self.lock is not None:
            self.folder.hold().check()

    def _end(self, done: int, stop: Stop) -> None:
        """End the run after a step, saved if it can be. Raises RunStopped, or DistattnError where its folder is elsewhere."""
        self.checkpoints.wait()
        if (damage := self.digest.compare(done - 1, "the end of the run")) is not None:
            self._say(damage.step, "damaged state", damage.text)
            self.checkpoints.note(lambda folder: discard_checkpoint(folder, done))
        if stop != Stop.ASKED:
            what = (
                self.folder.hold().what_happened()
                if self.lock is not None
                else f"{self.folder.folder}: is not in place"
            )
            self.reporter.report_event(done, "stopped", what)
            if stop == Stop.FOLDER_LOST or self.config.checkpoint.every_steps < 0:
                raise DistattnError(f"{what}; the run ends after step {done:,}, which is not saved.")
            place = self.folder.follow() or "its new name"
            raise DistattnError(
                f"{what}; the run was saved there after step {done:,} and ends: distattn resume {place} goes on."
            )
        self.reporter.report_event(done, "stopped", "Stopped as it was asked to.")
        raise RunStopped(
            f"stopped after step {done}, asked by a file in {self.folder.folder}; distattn resume goes on from there."
        )

    def _seed(self, step: int) -> None:
        """What is random in a step, such as dropout, depends on the step alone."""
        torch.manual_seed(derived_key(self.config.run.seed, step, dist.get_rank()))

    def _say(self, step: int, kind: str, text: str) -> None:
        self.reporter.report_event(step + 1, kind, text)
        if self.reporter.visible:
            _warn(f"step {step + 1}: {text}")

    def _loader(self, data: RunData, begin: int, end: int) -> PackLoader:
        return PackLoader(
            data.plan,
            data.corpora,
            rank=self.engine.cp.data_parallel_rank,
            size=self.engine.cp.data_parallel_size,
            start_step=begin,
            steps=end - begin,
            vocabulary=data.vocabulary,
            device=self.device,
            corpus_ids=True,
        )

    def _save(self, done: int) -> None:
        if self.lock is not None:
            self.lock.check()
            if not self.folder.is_in_place():
                if (place := self.folder.follow()) is None:
                    # nothing is left to save into
                    self.check_folder()
                else:
                    self.checkpoints.move_to(place / self.folder.checkpoints.name)
        facts, streak = {} if self._loss is None else {"loss": f"{self._loss:.6g}"}, self.watch.streak
        verdict = CheckpointVerdict()
        if streak is not None:
            text = f"it was saved after refused steps, from {streak.first + 1:,} on: {streak.reason.removesuffix('.')}"
            verdict = CheckpointVerdict(REFUSED, text)
        self.checkpoints.save(done, self._state(), overlap=True, facts=facts, verdict=verdict)
        self._save_is_due, self._saved_step, self._loaded = False, done, None

    def _roll_back(self, step: int) -> int:
        """Go back to the newest checkpoint; returns its step."""
        damage, self._damage = self._damage, None
        if damage is not None:
            return self._leave_damaged(damage)
        if not (checkpoint := self._resume()) and self._loaded is None:
            raise DistattnError(
                f"step {step + 1}: there is no checkpoint to go back to, as none could be saved; see what is said above."
            )
        return checkpoint

    def _resume(self) -> int:
        """Take over the newest checkpoint; returns its step, 0 where there is none."""
        engine_state = self.engine.state()
        state = self._state(engine_state)
        loaded = self.checkpoints.load_newest(state, required={name: self.facts[name] for name in REQUIRED})
        self._loaded, self._saved_step, self._save_is_due = loaded, loaded and loaded.step, False
        if loaded is None:
            return 0
        progress = json.loads(state["progress"])
        self.engine.load(engine_state._replace(updates=progress["updates"]))
        self.watch.load_state_dict(progress["watch"])
        self.by_position.load(state["token_losses"])
        ranks, before = self.config.parallel.ranks, int(loaded.facts["ranks"])
        on = f", on {plural(ranks, 'rank')}; it was saved on {before}" if ranks != before else ""
        facts = {"ranks": ranks, "saved_on": before}
        self.growth.forget()
        if self.config.watch.digest_every:
            self.digest.take(f"the loading of {loaded.folder.name}")
        self.reporter.report_event(loaded.step, "resumed", f"Went on from {loaded.folder.name}{on}.", facts)
        return loaded.step

    def _accept_config(self, step: int) -> None:
        """Make the proposed configuration the run's. A disk that cannot be written costs a warning, and the run its change."""
        try:
            self.folder.accept_proposed_config(step)
        except OSError as error:
            _warn(
                f"{self.folder.config_file}: cannot be written: {error.strerror}; these ranks train with the new configuration, "
                "and the next resume has the one before, unless it is given the same keys."
            )

    def _state(self, engine_state: EngineState | None = None) -> dict[str, Any]:
        """What a checkpoint has."""
        one = self.engine.state() if engine_state is None else engine_state
        progress = {"updates": one.updates, "watch": self.watch.state_dict()}
        averages = {"exp_avg": one.exp_avg, "exp_avg_sq": one.exp_avg_sq}
        return {
            "model": one.model,
            "optimizer": averages,
            "token_losses": self.by_position.state(self.engine.cp.loss_group),
            "progress": json.dumps(progress),
        }


def _write_shape(run: RunFolder, shape: Any) -> None:
    """Write the model's transformers configuration, for exports; a disk that cannot be written costs a warning."""
    file, text = run.folder / "config.json", f"{shape.to_json_string()}"
    try:
        if not file.exists() or file.read_text("utf-8") != text:
            write_whole(file, text)
    except OSError as error:
        _warn(f"{file}: cannot be written: {error.strerror}; checkpoints cannot be exported without it.")


def _kept_before(step: int) -> str:
    return f"the newest good one before step {step + 1:,}, which was refused"


def _in_a_row(streak: Streak) -> str:
    if streak.count == 1:
        return f"step {streak.first + 1:,} was refused"
    return f"{streak.count:,} steps in a row were refused, {streak.first + 1:,} to {streak.last + 1:,}"


def _warn(text: str) -> None:
    sys.stderr.write(f"distattn: {text}\n")
    sys.stderr.flush()
