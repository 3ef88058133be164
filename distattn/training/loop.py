"""The training loop of one rank. A step's packs and all parameters are split over the ranks.

`distattn.training.rank` calls `train` in a separate process per rank. Ranks share the process group and the run folder,
which has the resolved configuration, checkpoints and, for a run on text, tokens and the plan of packs. A run continues
from its newest checkpoint. How it continues depends only on the step number, the parameters, the optimizer's averages,
and the state of the numerics watch and of the loss by position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distattn.checkpoints.checkpoint_folder import list_checkpoints, preferred_step
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule
from distattn.checkpoints.run_lock import RunLock
from distattn.data.loader import PackLoader
from distattn.data.packing.pack_plan import StepPacks
from distattn.data.packing.permutation import derived_key
from distattn.ir.errors import DistattnError, RunStopped
from distattn.ir.plan import Plan
from distattn.ir.text_format import print_message
from distattn.supervision.heartbeats import activity, set_activity
from distattn.training.config.run_file import Config
from distattn.training.config.run_settings import Utilisation, configured_model, schedule_settings, watch_settings
from distattn.training.engines.engine import Batch, Engine, open_engine
from distattn.training.evaluation import evaluate
from distattn.training.health.run_health import RunHealth
from distattn.training.learning_rate import learning_rate
from distattn.training.proposal import Proposal
from distattn.training.reporting.json_lines import write_whole
from distattn.training.reporting.loss_by_position import LossByPosition
from distattn.training.reporting.metrics import MetricsReporter
from distattn.training.reporting.step_clock import StepClock
from distattn.training.reporting.step_documents import append_documents
from distattn.training.run_checkpoints import RunCheckpoints, describe_streak
from distattn.training.run_data import RunData, held_out_data, open_data, piece_rows
from distattn.training.run_facts import TrainingRun, check_steps_left, resume_facts
from distattn.training.run_folder import TRAINING, RunFolder, StepMetrics
from distattn.training.stop_request import Stop, StopRequest
from distattn.training.watch.numerics_watch import ROLLBACK, STOP, NumericsWatch, Verdict
from distattn.training.watch.replay_check import ReplayCheck
from distattn.training.watch.state_digest import Damage
from distattn.training.watch.weight_growth import WeightGrowth


def train(
    run: RunFolder, config: Config, json_lines: bool, device: torch.device, *, proposal: Proposal | None = None
) -> None:
    """Train on this rank from the run folder's newest checkpoint, or from scratch, to the last step.

    proposal: the proposal with this configuration, which rank 0 applies after all checks. Raises DistattnError for invalid
    settings, and for wrong values if watch.action is "stop". Raises RunStopped if the run was asked to stop, after saving a
    checkpoint unless checkpoints are off.
    """
    data = open_data(run, config)
    with ExitStack() as stack:
        lock, shape = None, configured_model(config, data.vocabulary, data.context)
        training_run = TrainingRun(run, config, data, shape, resume_facts(config, data, shape), device)
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
        checkpoints = Checkpoints(
            run.checkpoints, group=dist.group.WORLD, facts=training_run.facts, keep=keep, warn=print_message
        )
        stack.enter_context(closing(checkpoints))
        loop = TrainingLoop(training_run, engine, checkpoints, reporter, lock, proposal)
        stack.enter_context(closing(loop.health))
        stack.enter_context(closing(loop.stop))
        loop.run()
        loop.check_folder()
    steps, last_step = [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)], config.train.steps
    # the folder may have an older checkpoint of the last step, so also check that the save did not fail
    if (
        lock is not None
        and config.checkpoint.every_steps >= 0
        and (last_step not in steps or checkpoints.has_failed(last_step))
    ):
        raise DistattnError(
            f"{run.checkpoints}: the last step's checkpoint could not be saved; make room, and distattn resume "
            f"{run.folder} trains from step {preferred_step(run.checkpoints):,} on."
        )


class TrainingLoop:
    """The training loop of one rank. lock: rank 0's lock on the run folder, None elsewhere. proposal: see `train`."""

    def __init__(
        self,
        run: TrainingRun,
        engine: Engine,
        checkpoints: Checkpoints,
        reporter: MetricsReporter,
        lock: RunLock | None,
        proposal: Proposal | None = None,
    ):
        self.folder, self.config, self.data, shape, self.facts, self.device = run
        self.engine, self.checkpoints, self.reporter, self.lock = engine, checkpoints, reporter, lock
        self._proposal = proposal
        config, data, device = self.config, self.data, self.device
        self.stop = StopRequest(self.folder.stop_file, self.folder.regroup_file, of_folder=self._look_at_folder)
        self.documents = self.folder.lines(self.folder.documents_file, append_documents)
        self.schedule, group = schedule_settings(config), dist.group.WORLD
        growth = WeightGrowth(engine.state_tensors)
        # True if the loss is reduced over all ranks; with tensor or pipeline parallelism it is not
        self._shares_loss = dist.get_world_size(engine.cp.loss_group) == dist.get_world_size()
        self.watch = NumericsWatch(
            engine.model,
            watch_settings(config),
            group,
            self.folder.folder,
            engine.cp.messages,
            engine,
            engine.stage,
            growth,
        )
        self.replay = ReplayCheck(engine.model, config.watch.replay_every, group, engine.cp.messages, engine.stage)
        self.by_position = LossByPosition(data.context, [corpus.name for corpus in data.corpora], device)
        self.run_checkpoints = RunCheckpoints(
            run, engine, checkpoints, self.watch, growth, self.by_position, reporter, lock
        )
        self.digest = self.run_checkpoints.digest
        self._has_evaluated = False
        # what a second run of the streak's first step found, as text
        self._finding = ""
        # the damage that forces the run to go back to a checkpoint, or None
        self._damage: Damage | None = None
        # context length of the previous step
        self._context: int | None = None
        self.utilisation = Utilisation.of_config(config, shape)
        self.health = RunHealth(engine.cp, device, config.health, self.folder, reporter)

    def run(self) -> None:
        """Train from the newest checkpoint to the last step, and save the result."""
        config, last = self.config, self.config.train.steps
        step = begin = self._resume()
        if not begin and self.folder.plan_file.exists():
            self.reporter.report_plan(Plan.load(self.folder.plan_file))
        if not begin and config.watch.action == "rollback":
            # a rollback needs a checkpoint
            self.run_checkpoints.save(0)
        if not begin:
            self.run_checkpoints.take_digest("the start of the run", 0)
        while step < last:
            step = self._train_from(step)
            if step == last and config.checkpoint.every_steps >= 0 and begin < last:
                damage = self.run_checkpoints.save_last(last)
                step = last if damage is None else self._leave_damaged(damage)
        if self.watch.streak is not None:
            ends = f"The run ends with refused steps: {describe_streak(self.watch.streak)}."
            self.reporter.report_warning(last - 1, "refused", ends)

    def _resume(self) -> int:
        """Load the checkpoint to continue from, apply the proposal, and return the checkpoint's step."""
        proposal = self._proposal if self.lock is not None else None
        with nullcontext() if proposal is None else proposal.applied(self.config):
            begin = self.run_checkpoints.resume()
            check_steps_left(self.folder, self.config, begin)
        if proposal is not None:
            self.run_checkpoints.accept_config(begin)
        return begin

    def _train_from(self, begin: int) -> int:
        """Train from step `begin`. Return the last step, or the step to continue from after a rollback."""
        last, evaluation, every = self.config.train.steps, self.config.evaluation, self.config.checkpoint.every_steps
        clock = self.health.clock()
        steps = self.engine.cp.steps(self._loader(self.data, begin, last))
        set_activity(f"reading the data of step {begin + 1}", key="data")
        for step, batches in enumerate(clock.steps(steps), begin):
            self.stop.look()
            planned = self.data.plan.step(step)
            # the first step of a new context length compiles and allocates, as the first step of a run does
            unusual = self._context not in (None, planned.context)
            self._context = planned.context
            seconds = self.config.supervision.starting_seconds if unusual else 0.0
            set_activity("forward and backward", step=step, seconds=seconds, key="forward and backward")
            if not self._train_step(step, planned, batches, clock):
                if (damage := self._damage) is None:
                    return self.run_checkpoints.go_back(step)
                self._damage = None
                return self._leave_damaged(damage)
            done = step + 1
            # evaluate before saving, so that a run resumed from the checkpoint does not evaluate again
            if evaluation.every_steps and (done % evaluation.every_steps == 0 or done == last):
                self._evaluate(done)
            stop = self.stop.reason() if done < last else Stop.NO
            saves = self.run_checkpoints.is_due(done) or every >= 0 and stop
            if done < last and saves and stop != Stop.FOLDER_LOST:
                self.run_checkpoints.save(done)
            if stop:
                self._end(done, stop)
            clock.skip()
            set_activity(f"reading the data of step {done + 1}", key="data")
        return last

    def _train_step(self, step: int, planned: StepPacks, batches: Sequence[Batch], clock: StepClock) -> bool:
        """Run one step. Return False if the run must go back to a checkpoint."""
        train = self.config.train
        if self.reporter.visible:
            # record the documents before they can cause an error
            self.documents.add(lambda: list(piece_rows(self.data, step)))
        self._seed(step)
        if self.replay.due(step):
            self._replay(step, batches)
        token_losses: list[tuple[Tensor, Batch]] = []
        losses = self.engine.backward(batches, lambda losses_T, batch: token_losses.append((losses_T, batch)))
        with activity("the norm of all gradients", waits=True, key="gradient norm"):
            norm = self.health.wait(lambda: self.engine.clip(train.max_grad_norm))
        # the next digest and the update must not begin before a checkpoint being saved has copied the state
        self.checkpoints.wait_staged()
        with activity("the mean loss of all ranks", waits=True, key="mean loss"):
            mean, damage = self._mean_loss(step, losses)
        if damage is not None:
            self.engine.drop()
            self._damage = damage
            return False
        set_activity("looking at losses and gradients", key="looking")
        verdict = self.watch.judge(step, mean, norm)
        if train.histogram_every and step % train.histogram_every == 0:
            self.reporter.report_histograms(step + 1, self.engine)
        rate = learning_rate(self.schedule, step)
        set_activity("the optimizer's step", key="optimizer")
        self.run_checkpoints.judge(verdict, mean)
        if verdict.applies:
            self.digest.forget()
            self.engine.update(rate)
            self.run_checkpoints.after_update(step, self.stop.reason)
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
        """Return a step's mean loss and, if any rank's state changed since the last update, the damage; equal on all ranks.

        A rank whose state has changed signals it with an additional NaN loss, so undamaged runs send nothing extra. If
        the loss is not reduced over all ranks, a flag is reduced over all ranks at the same time instead.
        """
        changed = self.digest.changed()
        self.health.state_checks = self.digest.comparisons
        nan_loss = [losses[0] * math.nan] if changed and self._shares_loss else []
        shared = None if self._shares_loss else self.digest.share(bool(changed))
        mean = self.engine.cp.mean_loss([*losses, *nan_loss])
        explains = not math.isfinite(mean) if shared is None else shared()
        return mean, self.digest.explain(step, changed) if explains else None

    def _leave_damaged(self, damage: Damage) -> int:
        """Report a damaged state, go back to a checkpoint from before the damage, and return its step."""
        self.health.report_damage(damage.step + 1, damage.text)
        return self.run_checkpoints.leave_damaged(damage)

    def _replay(self, step: int, batches: Sequence[Batch]) -> None:
        """Run the first micro-batch twice, report any difference, and drop the gradients."""
        difference = self.replay.check(step, lambda: self.engine.backward(batches[:1]), self.engine.drop)
        self.engine.drop()
        if difference is not None:
            self.reporter.report_warning(step, "wrong rank", difference.text)

    def _act(self, verdict: Verdict, batches: Sequence[Batch]) -> bool:
        """Handle a refused step as watch.action specifies. Return False if the run must go back to a checkpoint.

        Of consecutive refused steps, only the first is examined, reported and kept as evidence.
        """
        if verdict.begins_streak:
            self._finding = self._find(verdict, batches)
            self.reporter.report_warning(verdict.step, "refused", f"{verdict.reason} In a second run: {self._finding}")
        self.run_checkpoints.judge_refused(verdict)
        if verdict.action == STOP:
            first = verdict.streak.first if verdict.streak else verdict.step
            raise DistattnError(
                f"step {verdict.step + 1}: {verdict.reason} In a second run of step {first + 1}: {self._finding} See "
                f"{self.folder.folder}/evidence; distattn resume goes on with the newest checkpoint from before it, distattn "
                f"ckpt list {self.folder.folder} lists all, and watch.action has other reactions."
            )
        # if the first step after a checkpoint is bad again, the run goes further back
        further = self.run_checkpoints.begins_at(verdict.step)
        return not (verdict.action == ROLLBACK or self.config.watch.action == ROLLBACK and further)

    def _find(self, verdict: Verdict, batches: Sequence[Batch]) -> str:
        """Run a refused step again, keep its evidence, and return the finding's text."""
        self._seed(verdict.step)
        finding = self.watch.find(verdict.step, lambda number: self.engine.backward([batches[number]])[0], len(batches))
        self.engine.drop()
        self.watch.keep_evidence(verdict, finding, list(piece_rows(self.data, verdict.step)), batches)
        return finding.text

    def _evaluate(self, done: int) -> None:
        """Evaluate held-out documents, and report their losses and the training losses since the last evaluation."""
        # the first evaluation may take longer, since it compiles
        seconds = 0.0 if self._has_evaluated else self.config.supervision.starting_seconds
        set_activity("evaluation", seconds=seconds, key="evaluation")
        self._has_evaluated = True
        data, begin = held_out_data(self.config, self.data)
        sums = LossByPosition(data.context, [corpus.name for corpus in data.corpora], self.device)
        loader = self._loader(data, begin, begin + self.config.evaluation.steps)
        table = evaluate(self.engine.cp, self.engine.model, loader, sums, self.engine.evaluate)
        self.reporter.report_losses(done, table)
        self.reporter.report_losses(done, self.by_position.reduce(self.engine.cp.loss_group), TRAINING)
        self.by_position.reset()

    def _look_at_folder(self) -> Stop:
        """Return the reason to stop if the run's folder was moved or deleted, otherwise Stop.NO. Only rank 0 calls it."""
        if self.folder.is_in_place():
            return Stop.NO
        return Stop.FOLDER_LOST if self.folder.follow() is None else Stop.FOLDER_MOVED

    def check_folder(self) -> None:
        """Raise DistattnError on rank 0 if the run's folder was moved (naming its new path) or deleted."""
        if self.lock is not None:
            self.folder.hold().check()

    def _end(self, done: int, stop: Stop) -> None:
        """End the run early, after `done` steps. Raises RunStopped, or DistattnError if its folder was moved or deleted."""
        begin = self.run_checkpoints.finish_early(done)
        if stop != Stop.ASKED:
            sentence = self.stop.text_of_rank_0(self._end_of_moved(done, stop, begin) if self.lock is not None else "")
            raise DistattnError(sentence)
        self.reporter.report_event(done, "stopped", "Stopped as requested.")
        place = "from there" if begin == done else f"from step {begin:,}" if begin else "from the first step"
        raise RunStopped(
            f"stopped after step {done}, asked by a file in {self.folder.folder}; distattn resume goes on {place}."
        )

    def _end_of_moved(self, done: int, stop: Stop, begin: int) -> str:
        """Record on rank 0 that the folder was moved or deleted, and return the sentence with which the run ends.

        begin: the step from which a resume continues; equal to `done` if the run was saved.
        """
        event = self.folder.hold().what_happened()
        self.reporter.report_event(done, "stopped", event)
        if stop == Stop.FOLDER_LOST or self.config.checkpoint.every_steps < 0:
            return f"{event}; the run ends after step {done:,}, which is not saved."
        place = self.folder.follow() or "its new name"
        if begin != done:
            # the save failed, or the state had changed
            since = f"step {begin:,}" if begin else "the first step"
            return f"{event}; the run ends after step {done:,}, which is not saved: distattn resume {place} goes on from {since}."
        return f"{event}; the run was saved there after step {done:,} and ends: distattn resume {place} goes on."

    def _seed(self, step: int) -> None:
        """Set the seed of a step's random numbers, such as dropout's, so that it depends only on run.seed, step and rank."""
        torch.manual_seed(derived_key(self.config.run.seed, step, dist.get_rank()))

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


def _write_shape(run: RunFolder, shape: Any) -> None:
    """Write the model's transformers configuration, which exports need. Warn if that fails."""
    file, text = run.folder / "config.json", f"{shape.to_json_string()}"
    try:
        if not file.exists() or file.read_text("utf-8") != text:
            write_whole(file, text)
    except OSError as error:
        print_message(f"{file}: cannot be written: {error.strerror}; checkpoints cannot be exported without it.")
