"""The runs of a sweep on a Ray cluster: as many at a time as it has room for, each with attempts of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from distattn.ir.errors import RunStopped
from distattn.launch.command_line import print_message
from distattn.launch.ray.head import resume_command, watch_head
from distattn.launch.ray.placement import node_slots
from distattn.launch.ray.run import RayRun, new_job, note_launcher, note_state, stopping
from distattn.launch.stop_signals import stopped
from distattn.training.config.run_file import Config
from distattn.training.run_folder import RunFolder

# between two looks at the runs, at the cluster, and at the file that asks to stop
_LOOK_SECONDS = 1.0


class RaySweep:
    """Runs of a sweep, of which the first ones begin first."""

    def __init__(self, folder: RunFolder, runs: Sequence[RayRun]):
        """folder: of the sweep; a file `stop` in it is for all runs."""
        self._folder, self._runs, self._waiting = folder, runs, list(runs)
        self._threads: dict[RayRun, threading.Thread] = {}
        self._codes: dict[RayRun, int] = {}
        self._stopped = False

    def stop(self, number: int) -> None:
        """Have all ranks save and end, and begin no other run: a handler of signals."""
        self._stopped = True
        for one, thread in self._threads.items():
            # also one that is about to begin
            if thread.is_alive() or one not in self._codes:
                one.stop(number)

    def train(self) -> int:
        """Run all. Returns the exit code: that of the first run that failed, else 75 where one was stopped, else 0."""
        for place in (self._folder, *(one.run for one in self._runs)):
            place.forget_requests()
        while (self._waiting and not self._stopped) or self._running():
            if self._waiting and not self._stopped and self._has_room(self._waiting[0]):
                self._begin(self._waiting.pop(0))
            if self._folder.stop_file.exists():
                self._stop_as_asked()
            time.sleep(_LOOK_SECONDS)
        codes = [self._codes.get(one, RunStopped.exit_code) for one in self._runs]
        for one, code in zip(self._runs, codes, strict=True):
            # also of those that were never begun
            note_state(one.run, f"ended {code}")
            print_message(f"{one.run.folder} ended with exit code {code}.")
        return next((code for code in codes if code not in (0, RunStopped.exit_code)), max(codes, default=0))

    def _running(self) -> list[RayRun]:
        return [one for one, thread in self._threads.items() if thread.is_alive()]

    def _has_room(self, one: RayRun) -> bool:
        """Whether the cluster holds another run; the first begins in any case, so that an autoscaler knows what is missing."""
        running = self._running()
        return not running or node_slots(one.needs) >= sum(other.most_nodes for other in [*running, one])

    def _begin(self, one: RayRun) -> None:
        """Begin a run, unless it was cancelled while it waited."""
        if one.run.stop_file.exists():
            return
        # what a second Ctrl-C leaves ends with this process
        self._threads[one] = threading.Thread(target=self._train, args=(one,), daemon=True)
        self._threads[one].start()

    def _train(self, one: RayRun) -> None:
        self._codes[one] = 1
        self._codes[one] = one.train()

    def _stop_as_asked(self) -> None:
        """Pass the request of a person on to the runs."""
        self._stopped = True
        reason = self._folder.stop_file.read_text("utf-8").strip()
        for one in self._running():
            one.run.ask_to_stop(reason)


def run_sweep(folder: RunFolder, runs: Sequence[tuple[RunFolder, Config]]) -> int:
    """Run those of a sweep that have not ended well, on the cluster that this process is connected to. Returns the exit code."""
    job = new_job()
    sweep = RaySweep(folder, [RayRun(run, config, job) for run, config in runs if not _has_ended_well(run)])
    note_launcher(folder, "running")
    code = 1
    try:
        then = f"{resume_command(folder.folder)} goes on with runs that have not ended well"
        with stopped("on Ray", then), stopping(sweep.stop), watch_head(folder.folder):
            code = sweep.train()
    finally:
        note_state(folder, f"ended {code}")
    return code


def _has_ended_well(run: RunFolder) -> bool:
    return run.state_file.exists() and run.state_file.read_text("utf-8").split() == ["ended", "0"]
