"""A training run whose ranks are killed and hang ends as one that nobody disturbed."""

import sys

import pytest
import trainer_kills


@pytest.mark.full
def test_a_run_whose_ranks_are_killed_and_hang_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capfd):
    # 200 kills and 20 hangs are for benchmarks/trainer_kills.py by itself; it raises for whatever differs
    words = ["--kills", "2", "--hangs", "1", "--seed", "5", "--folder", str(tmp_path / "runs")]
    # no loaded machine is to be taken for a hang
    words += ["--patience", "20"]
    monkeypatch.setattr(sys, "argv", ["trainer_kills.py", *words])
    assert trainer_kills.main() == 0
    found = capfd.readouterr()
    assert found.out.startswith("2 kills: ") and "1 hangs: " in found.out and "nothing was left over" in found.out
    assert "3: Fault(" in found.err
