"""Prepare a run before ranks start: find its data, create its folder, plan and prove the first step. Needs no torch."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from distattn.checkpoints.checkpoint_folder import check_step, preferred_step, set_aside_since
from distattn.checkpoints.run_lock import RunLock
from distattn.cluster.spec import resolve_cluster
from distattn.ir.errors import DistattnError
from distattn.ir.text_format import print_message, readable_bytes
from distattn.parallel.analysis.explain import explain
from distattn.training.config import run_file as configuration
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config
from distattn.training.held_out import check_held_out
from distattn.training.job_secret import write_secret
from distattn.training.proposal import Proposal
from distattn.training.run_data import RunData, find_text, first_packs, open_data, pack_config, plan_longer, write_text
from distattn.training.run_facts import check_steps_left
from distattn.training.run_folder import RunFolder


def start_run(config: Config, report_progress: Callable[[str], None]) -> RunFolder:
    """Create the folder of a new run, with the first step's plan and its explanation.

    Raises DistattnError for all mistakes that can be found before ranks start, and then leaves nothing behind.
    """
    text = None if pack_config(config) else find_text(config)
    run = RunFolder.create(config)
    try:
        if text is not None:
            write_text(run, config, text)
        data = open_data(run, config)
        _check_evaluation(config, data)
        _explain_first_step(run, config, data)
        _check_plans(config, data, after=0)
        if text is not None:
            others = {"empty": text.empty_files, "binary": text.binary_files}
            counts = ", ".join(f"{count} {kind}" for kind, count in others.items() if count)
            skipped = f" ({counts} skipped)" if counts else ""
            size = sum(document.length for document in text.documents)
            amount = f"{text.files:,} files{skipped}, {readable_bytes(size)}, {len(text.documents):,} documents"
        else:
            corpora = ", ".join(corpus.name for corpus in data.corpora)
            amount = f"{data.plan.steps:,} planned steps of {corpora}, {data.plan.tokens:,} tokens"
        report_progress(f"data: {amount}")
        report_progress(run.explanation_file.read_text("utf-8").splitlines()[0])
        report_progress(f"run folder: {run.folder}")
    except BaseException:
        # suppress errors here, so that the original error is raised
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return run


def preflight_alone(config: Config) -> Config:
    """Return the configuration to start with: a preflight alone is not restarted or requeued, and gets its own run folder.

    The training run can then use the configured folder.
    """
    if config.preflight.action != "only":
        return config
    return replace(
        config,
        run=replace(config.run, folder=f"{config.run.folder.rstrip('/')}-preflight"),
        supervision=replace(config.supervision, max_restarts=0),
        slurm=replace(config.slurm, max_requeues=0),
    )


def resume_run(
    run: RunFolder, config: Config, report_progress: Callable[[str], None], proposal: Proposal, step: int | None = None
) -> None:
    """Prepare a run's folder for continuing the run, and write the launcher's proposal if anything has to change.

    step: step of the checkpoint to continue from; None for the newest good checkpoint. Raises DistattnError for all mistakes
    that can be found before ranks start, and then changes nothing.
    """
    if step is not None:
        check_step(run.checkpoints, step)
    with _prepared(run, config, step) as first:
        proposal.remove_of_dead()
        if step is not None or config != configuration.load(run.config_file):
            try:
                proposal.write(config, step)
            except OSError as error:
                raise DistattnError(f"{proposal.file}: cannot be written: {error.strerror}; make room.") from None
        run.forget_requests()
    begin = f"checkpoint of step {first:,}" if first else "no checkpoint yet"
    if first and step is None and (aside := set_aside_since(run.checkpoints, first)):
        begin += f"; later ones are set aside: --step {aside[-1].step} continues from the last of them"
    report_progress(f"run folder: {run.folder}, {begin}")


def change_config(run: RunFolder, config: Config) -> None:
    """Replace the configuration of a run that no job holds, and keep the previous configuration next to it.

    Raises the same errors as `resume_run`. Does not remove a request to stop.
    """
    with _prepared(run, config) as step:
        try:
            run.accept_config(config, step)
        except OSError as error:
            raise DistattnError(f"{run.config_file}: cannot be written: {error.strerror}; make room.") from None


@contextmanager
def _prepared(run: RunFolder, config: Config, step: int | None = None) -> Iterator[int]:
    """Check a configuration for a run that no process works on, and hold the run's lock while the block writes it.

    step: step of the checkpoint to continue from; None for the checkpoint that the run prefers. Yields that step, or 0 if there
    is no checkpoint. Raises DistattnError without changing anything.
    """
    data = open_data(run, config)
    begin = preferred_step(run.checkpoints) if step is None else step
    check_steps_left(run, config, begin)
    # lock the run, which fails if a process is working on it
    with RunLock(run.folder), _removed_afterwards(run.packs_file.with_name("corpus.longer.packs")) as longer:
        # only a run on text needs a longer plan: `open_data` refuses a user's plan that is too short
        if data.plan.steps < config.train.steps:
            data = plan_longer(run, config, data, longer)
        _check_evaluation(config, data)
        _check_plans(config, data)
        try:
            _renew_secret(run)
        except OSError as error:
            raise DistattnError(f"{run.secret_file}: cannot be written: {error.strerror}; make room.") from None
        yield begin
        # the longer plan begins with the same steps, so it can replace the old one
        if longer.exists():
            longer.replace(run.packs_file)


def _renew_secret(run: RunFolder) -> None:
    """Write a new secret. If that fails, keep the old secret with a warning, or raise OSError if there is no old secret."""
    try:
        write_secret(run.secret_file)
    except OSError as error:
        if not run.secret_file.exists():
            raise
        print_message(f"{run.secret_file}: cannot be written: {error.strerror}; the run keeps its secret.")


def _check_plans(config: Config, data: RunData, after: int = -1) -> None:
    """Plan the first step of each context length, so that an impossible strategy or layout fails before ranks start.

    after: plan only steps after this step.
    """
    settings = PlanSettings.of_config(config)
    for step, _ in data.plan.rule.context:
        if after < step < min(data.plan.steps, config.train.steps):
            settings.plan(*first_packs(data.plan, config, step))


def _check_evaluation(config: Config, data: RunData) -> None:
    """Raise DistattnError if held-out documents are missing or also trained on. Days into the run would be too late."""
    if config.evaluation.every_steps:
        check_held_out(config, data)


@contextmanager
def _removed_afterwards(file: Path) -> Iterator[Path]:
    """Yield `file`, and remove the file afterwards. A file that a killed process left there is removed first."""
    file.unlink(missing_ok=True)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _explain_first_step(run: RunFolder, config: Config, data: RunData) -> None:
    """Plan the first step's first micro-batch, and write the plan and its explanation to the run folder."""
    settings = PlanSettings.of_config(config)
    explanation = explain(settings.plan(*first_packs(data.plan, config)), resolve_cluster(settings.config.cluster))
    explanation.plan.save(run.plan_file)
    run.explanation_file.write_text(f"{explanation}\n", "utf-8")


def require_packages(*names: str, extra: str = "train") -> None:
    """Raise DistattnError if a package that training needs is not installed. extra: distattn's extra that installs it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DistattnError(f"training needs {', '.join(missing)}: pip install 'distattn[{extra}]'.")
