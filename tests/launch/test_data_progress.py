"""Progress of data commands: an occasional line without a terminal, and remaining time estimated from this command's
rate.
"""

import re

import pytest

from distattn.launch.data import progress as data_progress
from distattn.launch.data.progress import ProgressReporter


def test_lines_show_progress_and_remaining_time(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 10.0, 11.0, 20.0, 20.0])
    monkeypatch.setattr(data_progress.time, "monotonic", lambda: next(clock))
    with ProgressReporter("verify", 1000) as reporter:
        reporter.begin_at(500)
        reporter.advance(100, "7 tokens/s")
        # too soon for another line
        reporter.advance(100)
        reporter.advance(100)
    lines = capsys.readouterr().err.splitlines()
    # 100 units in 10 seconds with 400 left, then 300 in 20 seconds with 200 left
    assert lines == ["verify: 60.0%  7 tokens/s  about 40 s left", "verify: 80.0%  about 13 s left"]


@pytest.mark.parametrize("total", [0, 1000])
def test_a_terminal_has_a_bar(monkeypatch, capsys, total):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressReporter("tokenize", total) as reporter:
        reporter.begin_at(0)
        reporter.advance(total, "9 tokens/s")
    shown = capsys.readouterr().err
    assert re.search("tokenize .*100%.* 9 tokens/s", shown) or not total
