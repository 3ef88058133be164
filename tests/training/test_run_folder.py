"""The records of a run survive full disks and machines that fail in the middle of a line."""

import errno
import json
import math
from pathlib import Path

import pytest

from distattn.training.reporting import json_lines
from distattn.training.reporting.json_lines import append_lines, read_rows
from distattn.training.run_folder import RunFolder, StepMetrics


def test_a_partial_line_is_terminated_and_skipped(tmp_path):
    file = tmp_path / "rows.jsonl"
    append_lines(file, b'{"step": 1}\n')
    with open(file, "ab") as torn:
        torn.write(b'{"step": 2, "lo')
    assert read_rows(file) == [{"step": 1}]
    append_lines(file, b'{"step": 3}\n')
    assert read_rows(file) == [{"step": 1}, {"step": 3}]


def test_lines_wait_until_a_full_disk_has_room_and_this_is_reported_once(tmp_path, monkeypatch, capsys):
    run, room = RunFolder(tmp_path), False

    def limited(path, lines):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        append_lines(path, lines)

    monkeypatch.setattr(json_lines, "append_lines", limited)
    for step in (1, 2):
        run.append(run.metrics_file, {"step": step})
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "metrics.jsonl: cannot be written: No space left on device" in message
    room = True
    run.append(run.metrics_file, {"step": 3})
    assert [row["step"] for row in read_rows(run.metrics_file)] == [1, 2, 3]


def test_lines_that_cannot_be_written_completely_are_not_written(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        append_lines(Path("/dev/full"), b'{"step": 1}\n')


def test_numbers_that_are_not_finite_are_valid_json_and_read_as_they_were(tmp_path):
    run = RunFolder(tmp_path)
    run.append(run.metrics_file, StepMetrics(1, math.nan, math.inf, 10, 0.5).as_dict())
    run.append(run.losses_file, {"step": 1, "split": "training", "by_position": [{"loss": -math.inf}]})

    def refused(text):
        raise AssertionError(f"{text} is no JSON")

    for file in (run.metrics_file, run.losses_file):
        json.loads(file.read_text(), parse_constant=refused)
    (step,), (losses,) = run.metrics(), run.losses("training")
    assert math.isnan(step.loss) and step.grad_norm == math.inf
    assert losses["by_position"][0]["loss"] == -math.inf


def test_lines_still_waiting_at_the_end_are_added_or_reported_as_lost(tmp_path, capsys):
    full = [True]

    def append(path, rows):
        if full[0]:
            raise OSError(28, "No space left on device")
        json_lines.append_rows(path, rows)

    lines = json_lines.JsonLines(tmp_path / "rows.jsonl", append)
    lines.add(lambda: [{"step": 1}, {"step": 2}])
    lines.close()
    assert "its last 2 lines are lost" in capsys.readouterr().err
    full[0] = False
    lines.close()
    assert read_rows(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 2}] and not capsys.readouterr().err


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.toml"
    json_lines.write_whole(file, "before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json_lines.os, "fsync", full)
    with pytest.raises(OSError):
        json_lines.write_whole(file, "after")
    assert [path.name for path in tmp_path.iterdir()] == ["config.toml"] and file.read_text() == "before"
