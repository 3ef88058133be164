"""The runs of a sweep: how many run at a time, and how the sweep is stopped. Stand-ins replace the attempts."""

import importlib.util
import threading
from pathlib import Path

import pytest
from waiting import eventually

from distattn.launch.node_needs import NodeNeeds
from distattn.training.run_folder import RunFolder

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

from distattn.launch.ray import sweep as ray_sweep


class Run:
    """A run on two nodes that continues until a test lets it end."""

    def __init__(self, folder: Path, code: int):
        folder.mkdir()
        self.run, self.needs, self.most_nodes, self.code = RunFolder(folder), NodeNeeds(1, 0, 1), 2, code
        self.may_end, self.began, self.signals = threading.Event(), threading.Event(), []

    def train(self) -> int:
        self.began.set()
        eventually(lambda: self.may_end.is_set() or self.signals or self.run.stop_file.exists(), "the run is not ended")
        return self.code if self.may_end.is_set() else 75

    def stop(self, number: int) -> None:
        self.signals.append(number)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Return a function that starts a sweep on a cluster of five nodes, and a function that waits for its exit code."""
    monkeypatch.setattr(ray_sweep, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(ray_sweep, "node_slots", lambda needs: 5)
    outcome = {}

    def begin(*codes: int):
        runs = [Run(tmp_path / str(number), code) for number, code in enumerate(codes)]
        whole = ray_sweep.RaySweep(RunFolder(tmp_path), runs)
        thread = threading.Thread(target=lambda: outcome.update(code=whole.train()), daemon=True)
        thread.start()
        return whole, runs

    def end() -> int:
        return eventually(lambda: outcome, "the sweep does not end")["code"]

    return begin, end


def states(runs) -> list[str]:
    return [run.run.state_file.read_text().strip() for run in runs]


def test_as_many_runs_continue_as_have_room_and_a_failure_gives_the_exit_code(sweep):
    begin, end = sweep
    _, runs = begin(0, 2, 0)
    assert runs[0].began.wait(60) and runs[1].began.wait(60) and not runs[2].began.is_set()
    runs[1].may_end.set()
    assert runs[2].began.wait(60)
    for run in runs:
        run.may_end.set()
    assert end() == 2 and states(runs) == ["ended 0", "ended 2", "ended 0"]


def test_a_run_can_be_cancelled_while_it_waits_and_the_whole_by_its_folder(sweep, tmp_path):
    begin, end = sweep
    _, runs = begin(0, 0, 0, 0)
    assert runs[1].began.wait(60)
    runs[2].run.ask_to_stop("a person")
    runs[0].may_end.set()
    assert runs[3].began.wait(60) and not runs[2].began.is_set()
    RunFolder(tmp_path).ask_to_stop("distattn launch cancel")
    assert end() == 75 and states(runs) == ["ended 0", "ended 75", "ended 75", "ended 75"]
    assert runs[3].run.stop_file.read_text() == "distattn launch cancel\n"


def test_a_signal_stops_the_runs_that_go_on_and_begins_no_other(sweep):
    begin, end = sweep
    whole, runs = begin(0, 0, 0)
    assert runs[1].began.wait(60)
    whole.stop(15)
    assert end() == 75 and [run.signals for run in runs] == [[15], [15], []] and not runs[2].began.is_set()
