"""A training run that is killed and resumed ends as one that nobody disturbed."""

import sys

import trainer_kills


def test_a_run_that_is_killed_and_resumed_ends_as_an_undisturbed_one(tmp_path, monkeypatch, capfd):
    # 200 kills are for benchmarks/trainer_kills.py by itself; it raises for whatever differs
    monkeypatch.setattr(
        sys, "argv", ["trainer_kills.py", "--kills", "3", "--seed", "5", "--folder", str(tmp_path / "runs")]
    )
    assert trainer_kills.main() == 0
    found = capfd.readouterr()
    assert found.out.startswith("3 kills in ") and "nothing was left over" in found.out and "kill 3: " in found.err
