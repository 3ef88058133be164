"""Ray Train's `TorchTrainer` on a real Ray cluster: a killed worker does not change what the model learns."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_script_on_ranks
from ray_cluster import RayCluster

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_a_worker_that_is_killed_costs_no_step_and_checkpoints_are_reported(tmp_path):
    # packages that Ray Train needs
    for name in ("ray", "pandas", "pyarrow"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    cluster = RayCluster(3, "node1")
    try:
        environment = os.environ | cluster.environment | {"RAY_ADDRESS": cluster.address}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(ROOT / "tests/support/launching/ray_train_run.py"), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    finally:
        cluster.stop()
    assert done.returncode == 0, done.stdout + done.stderr
    reported = json.loads(re.search(r"^reported (.*)", done.stdout, re.M)[1])
    # no step was repeated
    assert (tmp_path / "killed").exists() and (tmp_path / "steps").read_text().split() == ["2", "4", "6", "8"]
    # the controller polls every two seconds, so it may have missed what was reported just before the failure
    steps = [step for step, _, _ in reported]
    assert steps[-2:] == [6, 8] and steps == sorted({2, 4, 6, 8} & set(steps))
    for step, _, path in reported:
        assert (
            Path(path) == tmp_path / f"ray_train/checkpoints/step-{step:08d}" and Path(path, "manifest.json").exists()
        )
    # the same training loop without Ray, uninterrupted
    output = run_script_on_ranks(2, ROOT / "examples/fsdp2.py", "--steps", "8")[0]
    wanted = [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)", output, re.M)]
    assert len(wanted) == 8
    # float32 sums depend on the number of threads
    differences = [abs(loss - wanted[step - 1]) / wanted[step - 1] for step, loss, _ in reported]
    assert max(differences) <= 1e-4, differences
