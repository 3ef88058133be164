"""A training run whose ranks are killed and hang ends like an undisturbed one."""

import sys

import pytest
import trainer_kills


@pytest.mark.full
def test_a_run_whose_ranks_are_killed_and_hang_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capfd):
    # benchmarks/trainer_kills.py makes 200 kills and 20 hangs by default, and raises on any difference
    arguments = ["--kills", "2", "--hangs", "1", "--seed", "5", "--folder", str(tmp_path / "runs")]
    # patient enough for a loaded machine
    arguments += ["--patience", "20"]
    monkeypatch.setattr(sys, "argv", ["trainer_kills.py", *arguments])
    assert trainer_kills.main() == 0
    output = capfd.readouterr()
    assert output.out.startswith("2 kills: ") and "1 hangs: " in output.out and "nothing was left over" in output.out
    assert "3: Fault(" in output.err
