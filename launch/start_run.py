"""Prepare a run before ranks start: find the data, plan and prove the first step, make the run folder. Needs no torch."""

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
from distattn.ir.text_format import readable_bytes
from distattn.launch.command_line import print_message
from distattn.parallel.analysis.explain import explain
from distattn.training.config import run_file as configuration
from distattn.training.config.plan_settings import PlanSettings
from distattn.training.config.run_file import Config
from distattn.training.held_out import check_held_out
from distattn.training.job_secret import write_secret
from distattn.training.proposal import Proposal
from distattn.training.run_data import (
    RunData,
    find_text,
    first_packs,
    open_data,
    pack_config,
    plan_longer,
    write_text,
)
from distattn.training.run_facts import check_steps_left
from distattn.training.run_folder import RunFolder


def start_run(config: Config, report_progress: Callable[[str], None]) -> RunFolder:
    """Make the folder of a new run, with the first step's plan and its explanation in it.

    Raises DistattnError for everything that can go wrong before ranks start, and leaves nothing behind then.
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
        # raise the first error, not one about the rest of the folder
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return run


def preflight_alone(config: Config) -> Config:
    """Return the configuration to start with: a run that ends after its preflight is not restarted or queued again.

    It gets another folder, so that the training run can have its own.
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
    run: RunFolder,
    config: Config,
    report_progress: Callable[[str], None],
    proposal: Proposal,
    step: int | None = None,
) -> None:
    """Prepare the folder of a run for continuing, and write its launcher's proposal if anything has to change.

    step: of the checkpoint to continue from, None for the newest good one. Raises DistattnError for everything that can go wrong
    before ranks start, and changes nothing then.
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
    """Give a run that no job holds another configuration; the previous one is kept next to it.

    Raises DistattnError as `resume_run` does. A request to stop stays.
    """
    with _prepared(run, config) as step:
        try:
            run.accept_config(config, step)
        except OSError as error:
            raise DistattnError(f"{run.config_file}: cannot be written: {error.strerror}; make room.") from None


@contextmanager
def _prepared(run: RunFolder, config: Config, step: int | None = None) -> Iterator[int]:
    """Check a configuration for a run that no process works on, and hold the run's lock while the block writes it.

    step: of the checkpoint to continue from, None for the one that the run tries first. Yields that step, or 0. Raises
    DistattnError, and changes nothing then.
    """
    data = open_data(run, config)
    begin = preferred_step(run.checkpoints) if step is None else step
    check_steps_left(run, config, begin)
    # lock the run: no process may be working on it
    with RunLock(run.folder), _removed_afterwards(run.packs_file.with_name("corpus.longer.packs")) as longer:
        # a plan file of the user is long enough, or was refused
        if data.plan.steps < config.train.steps:
            data = plan_longer(run, config, data, longer)
        _check_evaluation(config, data)
        _check_plans(config, data)
        try:
            _renew_secret(run)
        except OSError as error:
            raise DistattnError(f"{run.secret_file}: cannot be written: {error.strerror}; make room.") from None
        yield begin
        # the longer plan begins like the one before
        if longer.exists():
            longer.replace(run.packs_file)


def _renew_secret(run: RunFolder) -> None:
    """Draw a new secret; if the disk cannot be written, keep the old one with a warning. Raises OSError without one."""
    try:
        write_secret(run.secret_file)
    except OSError as error:
        if not run.secret_file.exists():
            raise
        print_message(f"{run.secret_file}: cannot be written: {error.strerror}; the run keeps its secret.")


def _check_plans(config: Config, data: RunData, after: int = -1) -> None:
    """Plan the first step of each context length, to refuse an impossible strategy or layout before ranks start."""
    settings = PlanSettings.of_config(config)
    for step, _ in data.plan.rule.context:
        if after < step < min(data.plan.steps, config.train.steps):
            settings.plan(*first_packs(data.plan, config, step))


def _check_evaluation(config: Config, data: RunData) -> None:
    """Raise DistattnError if held-out documents are missing or also trained, before a run trains for days."""
    if config.evaluation.every_steps:
        check_held_out(config, data)


@contextmanager
def _removed_afterwards(file: Path) -> Iterator[Path]:
    """Yield a file path that is removed afterwards; a file that a killed process left there is removed first."""
    file.unlink(missing_ok=True)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def _explain_first_step(run: RunFolder, config: Config, data: RunData) -> None:
    """Plan the first step's first micro-batch, and write the plan and its explanation into the run folder."""
    settings = PlanSettings.of_config(config)
    explanation = explain(settings.plan(*first_packs(data.plan, config)), resolve_cluster(settings.config.cluster))
    explanation.plan.save(run.plan_file)
    run.explanation_file.write_text(f"{explanation}\n", "utf-8")


def require_packages(*names: str, extra: str = "train") -> None:
    """Raise DistattnError if a package that training needs is not installed. extra: the extra of distattn that installs it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DistattnError(f"training needs {', '.join(missing)}: pip install 'distattn[{extra}]'.")
