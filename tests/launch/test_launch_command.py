"""`distattn launch`: here, as a script, and on a real Slurm of two nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, why_not
from waiting import eventually

from distattn.launch import cli, slurm
from distattn.planning.compare_strategies import cluster_for_run
from distattn.training import config as configuration

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden") / "job.sbatch"
SHORT = (
    "--train.steps=3",
    "--reference_check.steps=2",
    "--data.tokens_per_step=2048",
    "--data.max_document_tokens=900",
)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["launch", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_dry_run_prints_the_script_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        capsys, "slurm", str(ROOT / "configs/llama-8b-128k-h100.toml"), "--dry-run", "--run.folder=/runs/a run"
    )
    assert code == 0 and out == GOLDEN.read_text() and not list(tmp_path.iterdir())
    code, out, _ = run(capsys, "slurm", str(ROOT / "configs/tiny.toml"), "--dry-run", "--json", "--nodes=2", "--gpus=2")
    assert code == 0 and "#SBATCH --nodes=2" in json.loads(out)["script"] and "gpus-per-node" not in out


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*-*.toml")), ids=lambda path: path.stem)
def test_real_configurations_are_planned_and_submitted_dry(capsys, config):
    code = cli.main(["plan", str(config), "--json"])
    rows = json.loads(capsys.readouterr().out)["candidates"]
    strategy = configuration.load(config).parallel.strategy
    chosen = next(row for row in rows if row["strategy"] == strategy)
    assert code == 0 and chosen["forward"]["tflops"] > 0
    assert cli.main(["plan", str(config), "--memory", "--json"]) == 0
    device = cluster_for_run(configuration.load(config), configuration.load(config).cluster.description).device
    most = max(one["total"] for one in json.loads(capsys.readouterr().out))
    # what the kernels, NCCL and the allocator need beside it
    assert most < 0.9 * device.memory_gb * 1e9
    code, out, _ = run(capsys, "slurm", str(config), "--dry-run")
    assert code == 0 and "#SBATCH --gpus-per-node=8" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("slurm", "configs/tiny.toml", "--nodes=0"), "--nodes: at least 1, not 0"),
        (("local", "configs/tiny.toml", "--nodes=2"), "--nodes is 1 on this machine, not 2"),
        (("slurm", "configs/tiny.toml", "--cluster.description=h200-1x2"), "4 ranks want more devices than h200-1x2"),
        (("slurm", "configs/tiny.toml", "--cluster.description=h900-1x4"), "there is no cluster 'h900-1x4'"),
        (("slurm", "configs/tiny.toml", "--cluster.description=h200-2x2"), "the run has 4 ranks on a node"),
        (("slurm", "configs/tiny.toml", "--parallel.strategy=rong"), "there is no 'rong'"),
        (("slurm", "configs/tiny.toml", "--slurm.setup=a\nb", "--dry-run"), "cannot hold a line break"),
        (("slurm", "configs/tiny.toml", "--slurm.time=1\n2", "--dry-run"), "is no time limit"),
        (("slurm", "configs/tiny.toml", "--run.folder=a\\b", "--dry-run"), "a path with a backslash"),
        (("slurm",), "a configuration comes first"),
        (("moon", "configs/tiny.toml"), "there is no 'moon'"),
        (("status", "configs"), "this is no run folder"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and sentence in err and "Traceback" not in err


def test_a_cluster_that_nobody_named_does_not_bind_a_launch(capsys):
    config = str(ROOT / "configs/llama-8b-1m-h200.toml")
    code, out, _ = run(capsys, "slurm", config, "--nodes=8", "--gpus=4", "--dry-run")
    assert code == 0 and "--gpus-per-node=4" in out


def test_the_version_is_said(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == "distattn 0.1.0\n"


def test_a_run_that_is_not_there_is_not_submitted_dry(capsys):
    code, _, err = run(capsys, "slurm", "configs/tiny.toml", "--data.path=/nowhere", "--dry-run")
    assert code == 2 and "/nowhere" in err
    code, _, err = run(capsys, "slurm", "configs/tiny.toml", "--gpus=3", "--dry-run")
    assert code == 2 and "4 ranks do not fill nodes of 3; say --nodes, too" in err


@pytest.fixture
def slurm_that(tmp_path, monkeypatch):
    """Commands of a Slurm that says what a test wants."""

    def answers(**scripts: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, lines in scripts.items():
            (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return tmp_path / "run"

    return answers


def test_a_banner_above_the_jobs_number_and_a_controller_that_is_away(capsys, slurm_that):
    folder = slurm_that(sbatch="echo Welcome; echo '42;big'", squeue="echo cannot contact controller >&2; exit 1")
    code, out, _ = run(capsys, "slurm", str(ROOT / "configs/tiny.toml"), f"--run.folder={folder}", *SHORT)
    assert code == 0 and "job 42:" in out
    code, out, err = run(capsys, "status", str(folder))
    assert code == 2 and "squeue refused: cannot contact controller" in err and not out
    (folder / "job.json").write_text("{")
    assert run(capsys, "status", str(folder))[0] == 3


def test_an_answer_without_a_number_keeps_the_folder(capsys, slurm_that):
    folder = slurm_that(sbatch="echo submitted, good luck")
    code, _, err = run(capsys, "slurm", str(ROOT / "configs/tiny.toml"), f"--run.folder={folder}", *SHORT)
    assert code == 2 and "no job number; see squeue --me" in err and (folder / "job.sbatch").exists()


def test_without_slurm_nothing_is_left(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    code, _, err = run(capsys, "slurm", str(ROOT / "configs/tiny.toml"), f"--run.folder={tmp_path}/run", *SHORT)
    assert code == 2 and "there is no sbatch here" in err and not list(tmp_path.iterdir())


def test_planning_and_submitting_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from distattn.launch import cli\n"
        "assert cli.main(['launch', 'slurm', 'configs/tiny.toml', '--dry-run']) == 0\n"
        "assert cli.main(['plan', 'configs/tiny.toml', '--cluster', 'h100-1x4']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_local_keeps_a_log_of_every_rank(tmp_path):
    command = [sys.executable, "-m", "distattn.launch.cli", "launch", "local", "configs/tiny.toml", "--gpus=2"]
    command += [f"--run.folder={tmp_path}/run", *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = {file.name: file.read_text() for file in (tmp_path / "run/logs").iterdir()}
    assert set(logs) == {"rank-0.log", "rank-1.log"} and "loss" in logs["rank-0.log"] in done.stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    found = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


def distattn(cluster, *arguments: str) -> subprocess.CompletedProcess:
    # every node is this machine: its name need not resolve
    environment = os.environ | cluster.environment | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [sys.executable, "-m", "distattn.launch.cli", "launch", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def wait_for(cluster, folder: Path, *states: str) -> dict:
    """Wait until the job's state begins with one of these words; returns the whole status."""

    def status() -> dict:
        return json.loads(distattn(cluster, "status", str(folder), "--json").stdout)

    def arrived() -> dict | None:
        found = status()
        return found if found["state"].startswith(states) else None

    return eventually(arrived, lambda: f"{status()}\n{distattn(cluster, 'logs', str(folder)).stdout[-3000:]}")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_two_nodes_train_like_one_machine(cluster, tmp_path):
    done = distattn(
        cluster, "slurm", "configs/tiny.toml", "--nodes=2", "--gpus=2", f"--run.folder={tmp_path}/far", "--json", *SHORT
    )
    assert done.returncode == 0, done.stderr
    far = Path(json.loads(done.stdout)["run"])
    status = wait_for(cluster, far, "ended", "gone", "killed")
    log = distattn(cluster, "logs", str(far)).stdout
    assert status["state"] == "ended, exit code 0" and status["steps"] == 3, log
    assert "led by 127.0.0.1:" in log and "largest relative difference to plain transformers" in log
    assert {file.name for file in (far / "logs").iterdir()} == {f"rank-{rank}.log" for rank in range(4)}
    assert (far / "report.html").exists()
    # the same plan on one machine
    near = [sys.executable, "-m", "distattn.launch.cli", "train", "configs/tiny.toml", f"--run.folder={tmp_path}/near"]
    near += [
        "--parallel.devices_per_node=2",
        "--reference_check.steps=0",
        *(word for word in SHORT if "reference_check" not in word),
    ]
    assert subprocess.run(near, cwd=ROOT, capture_output=True).returncode == 0
    assert losses(far) == pytest.approx(losses(tmp_path / "near"), rel=1e-6)


@pytest.mark.full
def test_a_run_is_cancelled(cluster, tmp_path):
    folder = tmp_path / "long"
    long = (
        "--train.steps=100000",
        "--data.tokens_per_step=2048",
        "--data.max_document_tokens=900",
        "--reference_check.steps=0",
    )
    done = distattn(cluster, "slurm", "configs/tiny.toml", "--nodes=1", "--gpus=2", f"--run.folder={folder}", *long)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("job "), done.stderr
    wait_for(cluster, folder, "RUNNING")
    assert distattn(cluster, "cancel", str(folder)).returncode == 0
    assert wait_for(cluster, folder, "killed", "ended", "gone", "CANCELLED")["state"] != "ended, exit code 0"


def test_a_model_that_no_node_can_hold_is_not_submitted(cluster, tmp_path):
    large = ("--model.hidden_size=4096", "--model.num_layers=2", f"--run.folder={tmp_path}/never")
    done = distattn(cluster, "slurm", "configs/tiny.toml", *large, *SHORT)
    assert done.returncode == 2 and "the largest node has 2.1 GB. Take fewer ranks" in done.stderr, done.stderr
    assert not (tmp_path / "never").exists()


def test_a_job_that_slurm_rejects_leaves_nothing(cluster, tmp_path):
    folder = tmp_path / "never"
    done = distattn(cluster, "slurm", "configs/tiny.toml", "--slurm.partition=moon", f"--run.folder={folder}", *SHORT)
    assert done.returncode == 2 and "sbatch refused" in done.stderr and "partition" in done.stderr
    assert not folder.exists()


def test_the_script_is_short_enough_to_read():
    text = slurm.batch_script(configuration.load(ROOT / "configs/tiny.toml"), Path("/runs/tiny"))
    assert len(text.splitlines()) <= 60
