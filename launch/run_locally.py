"""Run or resume a run on this machine, including its report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack

from distattn.checkpoints.checkpoint_folder import preferred_step
from distattn.checkpoints.folder_handle import FolderHandle
from distattn.checkpoints.run_lock import LAUNCHER, RunLock
from distattn.ir.errors import DistattnError
from distattn.launch.attempts import Attempts
from distattn.launch.command_line import no_progress, print_line
from distattn.launch.ranks.machine_limits import check_run_fits
from distattn.launch.ranks.rank import set_allocator
from distattn.launch.start_run import require_packages, resume_run, start_run
from distattn.launch.stop_signals import stopped
from distattn.supervision.rank_watch import Patience
from distattn.training.config.run_file import Config
from distattn.training.proposal import Proposal
from distattn.training.reporting.json_lines import json_text, parse_json
from distattn.training.run_folder import RunFolder

# the function that each rank runs
RANK = "distattn.launch.ranks.rank:run"
# modules that all ranks import
PRELOAD = ("distattn.training.rank", "transformers.models.auto.modeling_auto")
_PACKAGES = ("transformers", "tensorboard", "matplotlib", "safetensors")


def run_locally(config: Config, json_lines: bool, logs: bool = False) -> int:
    """Start a run on this machine, train, compare with plain transformers, and report. Return the exit code.

    logs: let each rank write a log file in the run folder. json_lines: print only JSON.
    """
    report_progress = no_progress if json_lines else print_line
    with ExitStack() as stack:
        with stopped("before training", "nothing is left behind"):
            _require_packages_of(config)
            check_run_fits(config)
            run = start_run(config, report_progress)
            try:
                stack.enter_context(RunLock(run.folder, LAUNCHER))
                if logs:
                    run.logs.mkdir()
            except BaseException:
                # ignore errors here, so that the first error is raised
                shutil.rmtree(run.folder, ignore_errors=True)
                raise
        return run_ranks_and_finish(run, config, report_progress, json_lines)


def resume_locally(run: RunFolder, config: Config, json_lines: bool, step: int | None = None) -> int:
    """Continue a run on this machine, possibly with another configuration. Return the exit code.

    step: step of the checkpoint to continue from; None for the newest good checkpoint. Raises DistattnError without any change
    if another launcher works on the run, even if its ranks have not begun.
    """
    report_progress = no_progress if json_lines else print_line
    proposal = Proposal.of_this_process(run)
    with ExitStack() as stack:
        with stopped("before training", "the run is unchanged"):
            # this may take half a minute, to find out if a launcher on another machine is alive
            stack.enter_context(RunLock(run.folder, LAUNCHER))
            # a proposal that the ranks refuse leaves the run's configuration unchanged
            stack.callback(proposal.remove)
            _require_packages_of(config)
            check_run_fits(config)
            resume_run(run, config, report_progress, proposal, step)
        return run_ranks_and_finish(run, config, report_progress, json_lines, proposal)


def run_ranks_and_finish(
    run: RunFolder,
    config: Config,
    report_progress: Callable[[str], None],
    json_lines: bool,
    proposal: Proposal | None = None,
) -> int:
    """Train in an existing run folder, then report. Return the exit code. For a preflight alone, only print its result.

    proposal: the proposal that the ranks continue with, if it was written.
    """
    alone = config.preflight.action == "only"
    with FolderHandle(run.folder) as held:
        with stopped("in the preflight") if alone else stopped("in training", lambda: _continue_command(run)):
            # these imports are slow, so do them only once the run is known to be possible
            from distattn.launch.finish_run import finish_run
            from distattn.launch.ranks.attempt import Ranks
            from distattn.launch.ranks.supervised import Restarts, run_supervised

            set_allocator()
            patience = Patience(config.supervision.starting_seconds, config.supervision.patience_seconds)
            arguments = [str(run.folder), json_lines, proposal.name if proposal and proposal.was_written else ""]
            code = run_supervised(
                Ranks(config.parallel.ranks, RANK, arguments, patience, run=str(run.folder)),
                Attempts(run.attempts),
                Restarts(config.supervision.max_restarts, lambda: _next_step(run, proposal), held),
                PRELOAD,
            )
        if alone and json_lines and run.preflight_file.exists():
            print_line(json_text(parse_json(run.preflight_file.read_bytes())))
        if alone or code:
            return code
        held.check()
        try:
            return finish_run(run, config, report_progress, json_lines)
        except (DistattnError, OSError):
            # if the folder is missing, raise `check`'s error, which names the cause
            held.check()
            raise


def _require_packages_of(config: Config) -> None:
    """Raise DistattnError if a package that the run needs is not installed."""
    require_packages(*_PACKAGES)
    if config.engine.name != "fsdp2":
        # distattn's extra that installs the package has the engine's name
        require_packages(config.engine.name, extra=config.engine.name)


def _next_step(run: RunFolder, proposal: Proposal | None) -> int:
    """Return the step that ranks would continue from: the proposed step, until the proposal has been applied."""
    step = None if proposal is None else proposal.step()
    return preferred_step(run.checkpoints) if step is None else step


def _continue_command(run: RunFolder) -> str:
    step = preferred_step(run.checkpoints)
    return f"distattn resume {run.folder} continues from " + (f"step {step:,}" if step else "the first step")
