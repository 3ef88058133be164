"""Kernel trials run next to a kernel that holds multiprocessors if a rank computes while messages are in flight."""

import json
import logging
import types
from contextlib import contextmanager

import pytest
import torch
from cases import LENGTHS, layouts, masks
from test_trials import NEEDED, SHAPE, planted

import distattn as da
from distattn.ir.mask import Mask
from distattn.kernels import cpu, registry, trials
from distattn.kernels.launch_mask import LaunchMask
from distattn.kernels.trials import median_seconds, mostly_overlap_messages, try_kernels
from distattn.ops.executable import kernel_requirements
from distattn.ops.kernel_choice import local_kernel_trials

CPU = torch.device("cpu")


class Machine:
    """A fake clock. It counts how often multiprocessors are held, which changes the time of a forward call."""

    def __init__(self):
        self.now, self.is_held, self.times_held = 0.0, False, 0

    @contextmanager
    def held(self, device):
        self.is_held, self.times_held = True, self.times_held + 1
        yield
        self.is_held = False

    def kernel(self, name, monkeypatch, alone, beside):
        def forward(*args):
            self.now += beside if self.is_held else alone
            return cpu.forward(*args)

        return planted(name, monkeypatch, forward=forward)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Register two correct kernels: "dealt" is faster alone, "single" is faster next to messages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine = Machine()
    monkeypatch.setattr(trials, "time", types.SimpleNamespace(perf_counter=lambda: machine.now))
    monkeypatch.setattr(trials, "multiprocessors_held", machine.held)
    names = (
        machine.kernel("dealt", monkeypatch, alone=1.0, beside=2.0),
        machine.kernel("single", monkeypatch, alone=1.1, beside=1.2),
    )
    monkeypatch.setitem(registry.CANDIDATES, "cpu", names)
    return machine


def launch(rows, overlaps):
    return LaunchMask.from_mask(Mask.causal(rows), 4, 2)._replace(overlaps_messages=overlaps)


def test_a_plan_is_of_the_kind_of_most_of_its_cells():
    assert not mostly_overlap_messages([])
    assert not mostly_overlap_messages([launch(100, False), launch(60, True)])
    assert mostly_overlap_messages([launch(100, False)] + [launch(60, True)] * 3)


@pytest.mark.parametrize("overlaps", [False, True])
def test_kernels_are_timed_for_the_kind_of_step(machine, overlaps):
    # the largest launch is of the other kind, but the launches of this kind have more cells in total
    cells = [launch(100, not overlaps), *[launch(80, overlaps)] * 3]
    by_kernel = try_kernels(["dealt", "single"], cells, NEEDED)
    assert machine.times_held == (6 if overlaps else 0)
    assert [by_kernel[name].seconds for name in ("dealt", "single")] == pytest.approx(
        [2.0, 1.2] if overlaps else [1.0, 1.1]
    )


def test_a_plan_with_messages_gets_another_kernel_and_its_own_line_in_the_cache(machine, tmp_path):
    chosen = {}
    for strategy in ("ring", "ulysses"):
        plan = da.make_plan(masks()["causal"], layouts(LENGTHS, 2)["zigzag"], strategy=strategy, **SHAPE)
        by_kernel = local_kernel_trials(plan, 0, kernel_requirements(plan.call, CPU))
        chosen[strategy] = min(by_kernel, key=lambda name: by_kernel[name].seconds)
    assert chosen == {"ring": "single", "ulysses": "dealt"}
    kept = json.loads((tmp_path / "distattn" / "kernels.json").read_text())
    assert sorted(key.endswith(", messages in flight") for key in kept) == [False, True]


def test_the_compiling_run_is_neither_timed_nor_held(machine):
    ran = []
    assert median_seconds(lambda: ran.append(machine.is_held), CPU, machine.held) == 0.0
    assert ran == [False, True, True, True]


@pytest.fixture
def imitated_device(monkeypatch):
    """Replace the torch.cuda stream functions that a trial calls. Return the list of waits."""
    waits = []
    stream = types.SimpleNamespace(synchronize=lambda: waits.append("current stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waits.append("device"))
    return waits


def test_a_held_run_is_waited_for_on_its_own_stream_only(imitated_device):
    @contextmanager
    def held(device):
        imitated_device.append("held")
        yield
        imitated_device.append("let go")

    median_seconds(lambda: imitated_device.append("run"), torch.device("cuda", 0), held)
    assert imitated_device == ["run", *["device", "held", "run", "current stream", "let go"] * 3]


def test_kernels_are_timed_without_it_and_a_warning_says_so_if_multiprocessors_cannot_be_held(monkeypatch, caplog):
    pytest.importorskip("triton", reason="Triton is not installed")
    from distattn.kernels.triton import spinner

    def refuses(device):
        raise TimeoutError("3 of 16 programs have started in 1.0 s")

    monkeypatch.setattr(spinner, "Spinner", refuses)
    trials._warn_of_spinner.cache_clear()
    with caplog.at_level(logging.WARNING, "distattn"):
        for _ in range(2):
            with trials.multiprocessors_held(torch.device("cuda", 0)):
                pass
    assert [record.getMessage() for record in caplog.records] == [
        "kernels are timed as if no messages were in flight: the kernel that imitates messages failed "
        "(TimeoutError: 3 of 16 programs have started in 1.0 s)"
    ]


def test_the_kernel_that_holds_multiprocessors_ends_by_itself_and_when_it_is_told():
    pytest.importorskip("triton", reason="Triton is not installed")
    from distattn.kernels.triton import spinner

    flags, numbers = torch.zeros(2, dtype=torch.int32), torch.zeros(3 * spinner._NUMBERS)
    for told, turns in ((0, 5), (1, 1)):
        flags.zero_()[1] = told
        launch = spinner.spin_launch(flags, numbers.zero_(), 3, most=5)
        launch.kernel[launch.grid](**launch.arguments, **launch.options)
        assert flags.tolist() == [3, told]
        # each turn computes x * 0.5 + 1
        assert (numbers == 2 - 2 * 0.5**turns).all()


class Device:
    """A device with 132 multiprocessors. Programs start when their index is read, and streams hold the queued work."""

    def __init__(self, monkeypatch, spinner, starts):
        self.log, self.starts = [], starts
        monkeypatch.setattr(spinner, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(spinner, "time", types.SimpleNamespace(monotonic=self.monotonic))
        monkeypatch.setattr(spinner, "spin_kernel", self)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "current")
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        self.now = 0.0

    def __getitem__(self, grid):
        return lambda flags_, **how: (
            self.log.append(f"{grid[0]} programs on {self.on}"),
            setattr(self, "flags", flags_),
        )

    @contextmanager
    def stream(self, stream):
        self.on = "its own stream"
        yield
        self.on = "current"

    def monotonic(self):
        self.now += 0.3
        self.flags[0] += self.starts
        return self.now

    def wait_stream(self, other):
        self.log.append(f"after {other}")

    def synchronize(self):
        self.log.append(f"waits, told {int(self.flags[1])}")


@pytest.mark.parametrize("starts", [8, 2])
def test_the_host_waits_until_all_programs_run_or_gives_up(starts, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from distattn.kernels.triton import spinner

    device = Device(monkeypatch, spinner, starts)
    monkeypatch.setattr(device, "flags", torch.zeros(2), raising=False)
    queued = ["after current", "16 programs on its own stream"]
    if starts == 2:
        with pytest.raises(TimeoutError, match=r"of 16 programs have started in 1.0 s"):
            spinner.Spinner(CPU)
        assert device.log == [*queued, "waits, told 1"]
    else:
        held = spinner.Spinner(CPU)
        assert device.log == queued and int(held.flags[0]) >= 16
        held.stop()
        assert device.log == [*queued, "waits, told 1"]
