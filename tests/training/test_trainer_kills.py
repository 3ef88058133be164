"""A training run that is killed and resumed ends as one that nobody disturbed."""

import trainer_kills


def test_a_run_that_is_killed_and_resumed_ends_as_an_undisturbed_one(tmp_path):
    # benchmarks/trainer_kills.py does this 200 times; it raises for whatever differs
    found = trainer_kills.run_kills(3, seed=5, folder=tmp_path / "runs")
    assert len(found.kills) == 3 and found.runs
