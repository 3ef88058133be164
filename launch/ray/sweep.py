"""Runs a sweep on a Ray cluster: as many runs at a time as the cluster has room for, each with its own attempts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from distattn.ir.errors import RunStopped
from distattn.ir.text_format import print_message
from distattn.launch.ray.head import resume_command, watch_head
from distattn.launch.ray.placement import node_slots
from distattn.launch.ray.run import RayRun, new_job, note_launcher, note_state, stopping
from distattn.launch.stop_signals import stopped
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder

# seconds between checks of the runs, the cluster and the stop file
_LOOK_SECONDS = 1.0


class RaySweep:
    """The runs of a sweep, started in order."""

    def __init__(self, folder: RunFolder, runs: Sequence[RayRun]):
        """Prepare the sweep without starting a run. folder: the sweep's folder; a file `stop` in it stops all runs."""
        self._folder, self._runs, self._waiting = folder, runs, list(runs)
        self._threads: dict[RayRun, threading.Thread] = {}
        self._codes: dict[RayRun, int] = {}
        self._stopped = False

    def stop(self, number: int) -> None:
        """Ask all ranks to save and end, and start no more runs. This is a signal handler."""
        self._stopped = True
        for run, thread in self._threads.items():
            # include a run that is about to start
            if thread.is_alive() or run not in self._codes:
                run.stop(number)

    def train(self) -> int:
        """Run the entire sweep. Return the exit code of the first failed run, else 75 if a run was stopped, else 0."""
        for folder in (self._folder, *(run.run for run in self._runs)):
            folder.forget_requests()
        while (self._waiting and not self._stopped) or self._running():
            if self._waiting and not self._stopped and self._has_room(self._waiting[0]):
                self._begin(self._waiting.pop(0))
            if self._folder.stop_file.exists():
                self._stop_as_asked()
            time.sleep(_LOOK_SECONDS)
        codes = [self._codes.get(run, RunStopped.exit_code) for run in self._runs]
        for run, code in zip(self._runs, codes, strict=True):
            # record an end even for runs that were never started
            note_state(run.run, f"ended {code}")
            print_message(f"{run.run.folder} ended with exit code {code}.")
        return next((code for code in codes if code not in (0, RunStopped.exit_code)), max(codes, default=0))

    def _running(self) -> list[RayRun]:
        return [run for run, thread in self._threads.items() if thread.is_alive()]

    def _has_room(self, run: RayRun) -> bool:
        """Return whether the cluster has room for another run. True if no run is active, so that an autoscaler sees it."""
        running = self._running()
        return not running or node_slots(run.needs) >= sum(other.most_nodes for other in [*running, run])

    def _begin(self, run: RayRun) -> None:
        """Start a run unless it was cancelled while it waited."""
        if run.run.stop_file.exists():
            return
        # a daemon thread, so that a second Ctrl-C ends this process even if a run has not ended
        self._threads[run] = threading.Thread(target=self._train, args=(run,), daemon=True)
        self._threads[run].start()

    def _train(self, run: RayRun) -> None:
        self._codes[run] = 1
        self._codes[run] = run.train()

    def _stop_as_asked(self) -> None:
        """Pass the stop request in the sweep's folder on to the runs."""
        self._stopped = True
        reason = self._folder.stop_file.read_text("utf-8").strip()
        for run in self._running():
            run.run.ask_to_stop(reason)


def run_sweep(folder: RunFolder, runs: Sequence[tuple[RunFolder, Config]]) -> int:
    """Run those runs of a sweep that have not ended well, on the connected cluster. Return the exit code."""
    job = new_job()
    sweep = RaySweep(folder, [RayRun(run, config, job) for run, config in runs if not _has_ended_well(run)])
    note_launcher(folder, "running")
    code = 1
    try:
        then = f"{resume_command(folder.folder)} continues the runs that have not ended well"
        with stopped("on Ray", then), stopping(sweep.stop), watch_head(folder.folder):
            code = sweep.train()
    finally:
        note_state(folder, f"ended {code}")
    return code


def _has_ended_well(run: RunFolder) -> bool:
    return run.state_file.exists() and run.state_file.read_text("utf-8").split() == ["ended", "0"]
