"""Nodes tell each other when their ranks were last heard from, independently of the clocks of their hosts."""

import time
from types import SimpleNamespace

import pytest

from distattn.supervision import node_reports
from distattn.supervision.heartbeats import Heartbeat
from distattn.supervision.node_reports import NodeReport, NodeReports


@pytest.mark.parametrize("days", [-2, 0, 2])
def test_the_clock_of_another_host_does_not_shift_the_times_of_its_heartbeats(days, tmp_path, monkeypatch):
    here, there = NodeReports(tmp_path, 0, 2), NodeReports(tmp_path, 1, 2)
    asked, now = here.ask(), time.monotonic()
    # the other host booted an hour later, and its time of day is wrong
    other = SimpleNamespace(time=lambda: time.time() + 86400.0 * days, monotonic=lambda: time.monotonic() - 3600.0)
    told = Heartbeat(1, 1, now - 3600.0 - 42.0, 5, 7, 0.0, False, "forward and backward")
    with monkeypatch.context() as patched:
        patched.setattr(node_reports, "time", other)
        there.answer(NodeReport({3: told, 4: None}, {3: "S"}, [], 42.0))
    report = here.answers(asked)[1]
    assert report.beats[4] is None and report.beats[3].activity == told.activity
    # 42 s ago, although the clocks differ by days or an hour
    assert now - report.beats[3].at == pytest.approx(42.0, abs=20.0)
