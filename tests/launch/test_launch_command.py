"""`distattn launch` on this machine, and as a Slurm script, which test_slurm_runs.py submits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distattn.launch import cli, finish_run
from distattn.launch.slurm import jobs as slurm
from distattn.planning.compare_strategies import cluster_for_run
from distattn.training.config import run_file as configuration
from distattn.training.run_folder import RunFolder

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


def test_a_local_dry_run_names_ranks_devices_steps_memory_and_folder(capsys, tmp_path):
    arguments = ["launch", "local", "tiny", "--dry-run", f"--run.folder={tmp_path}/run", "--train.steps=7"]
    assert cli.main([*arguments, "--gpus=2"]) == 0
    ranks, steps, memory, folder = capsys.readouterr().out.splitlines()
    assert ranks.startswith("2 ranks here, on the CPU, ") and steps == "7 steps of at most 8,192 tokens each"
    assert memory.endswith("MB of weights, gradients and optimizer a rank")
    assert folder == f"run folder: {tmp_path}/run; logs in its folder logs" and not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    assert cli.main([*arguments, "--preflight.action=warn"]) == 0
    assert "it exists already, so a number is added" in capsys.readouterr().out


def test_a_dry_run_of_a_folder_alone_leaves_the_ranks_to_another_scheduler(capsys, tmp_path):
    code, out, _ = run(capsys, "folder", "tiny", "--dry-run", f"--run.folder={tmp_path}/run")
    assert code == 0 and out.startswith("4 ranks that another scheduler starts, ") and "Ray" not in out
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_sweep_on_ray_tells_of_all_runs_and_refuses_a_folder_that_is_there(capsys, tmp_path):
    arguments = ("tiny", "--dry-run", f"--run.folder={tmp_path}/rates")
    code, out, _ = run(capsys, "ray", *arguments, "--array=train.learning_rate=1e-3,3e-3,1e-2")
    number, facts, folders = out.splitlines()
    assert code == 0 and number == "3 runs, one for each value of --array" and not list(tmp_path.iterdir())
    assert facts.startswith("runs 0, 1, 2: 4 ranks on nodes of Ray, ") and facts.endswith("optimizer a rank")
    assert folders == f"run folders: 0 to 2 in {tmp_path}/rates; logs in the folder logs of each"
    code, out, _ = run(capsys, "ray", *arguments, "--array=train.steps=7,9,7")
    _, short, long, _ = out.splitlines()
    assert short.startswith("runs 0, 2: ") and "; 7 steps of " in short
    assert long.startswith("run 1: ") and "; 9 steps of " in long
    (tmp_path / "rates").mkdir()
    for where in ("ray", "slurm"):
        code, out, err = run(capsys, where, *arguments, "--array=train.learning_rate=1e-3,3e-3")
        assert (code, out) == (2, "") and f"{tmp_path}/rates exists already; name another one for the sweep" in err


def test_a_dry_run_prints_the_script_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        capsys, "slurm", str(ROOT / "configs/llama-8b-128k-h100.toml"), "--dry-run", "--run.folder=/runs/a run"
    )
    assert code == 0 and out == GOLDEN.read_text() and not list(tmp_path.iterdir())
    code, out, _ = run(capsys, "slurm", str(ROOT / "configs/tiny.toml"), "--dry-run", "--json", "--nodes=2", "--gpus=2")
    assert code == 0 and "#SBATCH --nodes=2" in json.loads(out)["script"] and "gpus-per-node" not in out


def test_spare_nodes_containers_and_sweeps_are_in_the_script(capsys):
    tiny = str(ROOT / "configs/tiny.toml")
    code, out, _ = run(
        capsys, "slurm", tiny, "--dry-run", "--nodes=33", "--spare=1", "--gpus=2", "--run.folder=/runs/a"
    )
    assert code == 0 and "#SBATCH --nodes=33\n" in out and "  --nodes=32 --max-restarts=3" in out and "--no-kill" in out
    code, out, _ = run(capsys, "slurm", tiny, "--dry-run", "--slurm.container-image=/i.sqsh", "--run.folder=/runs/a")
    assert code == 0 and "--container-image=/i.sqsh --container-mounts=/runs/a:/runs/a \\\n" in out
    container = (
        "--slurm.container-image=/i.sif",
        "--slurm.container-runtime=apptainer",
        "--slurm.container-mounts=/data:/data:ro",
    )
    code, out, _ = run(capsys, "slurm", tiny, "--dry-run", *container, "--run.folder=/runs/a")
    assert code == 0 and "  apptainer exec --bind=/runs/a:/runs/a,/data:/data:ro /i.sif python -m" in out
    sweep = "--array=train.learning_rate=1e-3,3e-3"
    code, out, _ = run(capsys, "slurm", tiny, "--dry-run", sweep, "--run.folder=/runs/a", "--checkpoint.every-steps=-1")
    assert code == 0 and "#SBATCH --array=0-1\n" in out and 'run=/runs/a/"$SLURM_ARRAY_TASK_ID"\n' in out
    code, _, err = run(capsys, "slurm", tiny, "--dry-run", "--array=parallel.ranks=2,4", "--run.folder=/runs/a")
    assert code == 2 and "--array: parallel.ranks=2 needs another batch script" in err
    assert "#SBATCH --no-requeue" in out and "--max-requeues=0" in out and "slurm-%A_%a.out" in out


def test_a_preflight_alone_has_a_folder_of_its_own_and_is_neither_repeated_nor_reported(capsys, tmp_path):
    arguments = (str(ROOT / "configs/tiny.toml"), f"--run.folder={tmp_path}/run/", "--preflight.action=only", *SHORT)
    code, out, _ = run(capsys, "slurm", *arguments, "--dry-run")
    assert code == 0 and f"run={tmp_path}/run-preflight\n" in out and "#SBATCH --no-requeue" in out
    assert "--max-restarts=0 --max-requeues=0" in out
    code, out, _ = run(capsys, "folder", *arguments, "--json")
    folder = Path(json.loads(out)["run"])
    assert code == 0 and list(tmp_path.iterdir()) == [folder] and folder.name == "run-preflight"
    # a scheduler runs this once the ranks have ended
    assert finish_run.main(str(folder)) == 0 and not RunFolder(folder).report_file.exists()
    assert cli.main(["resume", str(folder)]) == 2
    assert f"distattn preflight {folder}/config.toml" in capsys.readouterr().err


def test_each_task_of_a_sweep_has_a_run_folder(capsys, slurm_that):
    folder = slurm_that(sbatch="echo 7", squeue='echo "PENDING"')
    arguments = (
        "slurm",
        str(ROOT / "configs/tiny.toml"),
        "--array=train.learning_rate=1e-3,3e-3",
        f"--run.folder={folder}",
    )
    assert run(capsys, *arguments, *SHORT)[0] == 0
    rates = [configuration.load(folder / task / "config.toml").train.learning_rate for task in "01"]
    assert rates == [1e-3, 3e-3] and json.loads((folder / "1/job.json").read_text()) == {"job": "7_1"}
    code, out, _ = run(capsys, "status", str(folder))
    assert code == 0 and out == "job 7_0: PENDING, 0 steps done\njob 7_1: PENDING, 0 steps done\n"
    code, _, err = run(capsys, "logs", str(folder))
    assert code == 2 and f"name one of its runs, such as {folder}/0" in err
    code, _, err = run(capsys, *arguments, *SHORT)
    assert code == 2 and "exists already; name another one for the sweep" in err


@pytest.mark.sampled(6)
@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*-*.toml")), ids=lambda path: path.stem)
def test_real_configurations_are_planned_and_submitted_dry(capsys, config):
    code = cli.main(["plan", str(config), "--json"])
    rows = json.loads(capsys.readouterr().out)["candidates"]
    strategy = configuration.load(config).parallel.strategy
    chosen = next(row for row in rows if row["strategy"] == strategy)
    assert code == 0 and chosen["forward"]["tflops"] > 0
    assert cli.main(["plan", str(config), "--memory", "--json"]) == 0
    device = cluster_for_run(configuration.load(config), configuration.load(config).cluster.description).device
    most = max(rank["total"] for rank in json.loads(capsys.readouterr().out))
    # the remaining tenth is for the kernels, NCCL and the allocator
    assert most < 0.9 * device.memory_gb * 1e9
    code, out, _ = run(capsys, "slurm", str(config), "--dry-run")
    assert code == 0 and "#SBATCH --gpus-per-node=8" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("slurm", "configs/tiny.toml", "--nodes=0"), "--nodes: must be at least 1, not 0"),
        (("local", "configs/tiny.toml", "--nodes=2"), "--nodes must be 1 on this machine, not 2"),
        (("slurm", "configs/tiny.toml", "--cluster.description=h200-1x2"), "4 ranks need more devices than h200-1x2"),
        (("slurm", "configs/tiny.toml", "--cluster.description=h900-1x4"), "there is no cluster 'h900-1x4'"),
        (("slurm", "configs/tiny.toml", "--cluster.description=h200-2x2"), "the run has 4 ranks on a node"),
        (("slurm", "configs/tiny.toml", "--parallel.strategy=rong"), "there is no 'rong'"),
        (("slurm", "configs/tiny.toml", "--slurm.setup=a\nb", "--dry-run"), "cannot hold a line break"),
        (("slurm", "configs/tiny.toml", "--slurm.time=1\n2", "--dry-run"), "is not a time limit"),
        (("slurm", "configs/tiny.toml", "--run.folder=a\\b", "--dry-run"), "a path with a backslash"),
        (("slurm", "configs/tiny.toml", "--nodes=2", "--spare=2"), "--nodes=2: 2 spare nodes leave no node for ranks"),
        (("slurm", "configs/tiny.toml", "--array=learning_rate"), "write a key and its values"),
        (("slurm", "configs/tiny.toml", "--slurm.container-mounts=data"), "'data' is not a mount"),
        (("local", "configs/tiny.toml", "--spare=1"), "--spare is for Slurm"),
        (("local", "configs/tiny.toml", "--array=run.seed=1,2"), "--array is for Slurm and Ray"),
        (("ray", "configs/tiny.toml", "--array=ray.address=a:1,b:1"), "--array: ray.address=a:1 names another cluster"),
        (("ray", "configs/tiny.toml", "--array=ray.min_nodes=0,1"), "ray.min_nodes: all ranks split one pack"),
        (("ray", "configs/tiny.toml", "--spare=1"), "--spare is for Slurm"),
        (("ray", "configs/tiny.toml", "--ray.waiting-seconds=-1"), "ray.waiting_seconds: must be at least 0, not -1"),
        (("slurm",), "CONFIG is missing; for example: distattn launch slurm tiny"),
        (("moon", "configs/tiny.toml"), "there is no 'moon'"),
        (("status", "configs"), "this is not a run folder"),
    ],
)
def test_a_mistake_gives_one_sentence(capsys, arguments, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and sentence in err and "Traceback" not in err


def test_a_default_cluster_does_not_restrict_a_launch(capsys):
    config = str(ROOT / "configs/llama-8b-1m-h200.toml")
    code, out, _ = run(capsys, "slurm", config, "--nodes=8", "--gpus=4", "--dry-run")
    assert code == 0 and "--gpus-per-node=4" in out


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == "distattn 0.1.0\n"


def test_a_run_that_is_not_there_is_not_submitted_dry(capsys):
    code, _, err = run(capsys, "slurm", "configs/tiny.toml", "--data.path=/nowhere", "--dry-run")
    assert code == 2 and "/nowhere" in err
    code, _, err = run(capsys, "slurm", "configs/tiny.toml", "--gpus=3", "--dry-run")
    assert code == 2 and "4 ranks do not fill nodes of 3; give --nodes, too" in err


@pytest.fixture
def slurm_that(tmp_path, monkeypatch):
    """Return a function that puts Slurm commands into PATH, given the script of each."""

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


def test_without_ray_one_sentence_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, "ray", str(ROOT / "configs/tiny.toml"), f"--run.folder={tmp_path}/run")
    assert code == 2 and "launch ray needs ray: pip install 'distattn[ray]'" in err and not list(tmp_path.iterdir())


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


@pytest.mark.full
def test_local_keeps_a_log_of_every_rank(tmp_path):
    command = [sys.executable, "-m", "distattn.launch.cli", "launch", "local", "configs/tiny.toml", "--gpus=2"]
    command += [f"--run.folder={tmp_path}/run", *SHORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = {file.name: file.read_text() for file in (tmp_path / "run/logs").iterdir()}
    assert set(logs) == {"rank-0.log", "rank-1.log"} and "loss" in logs["rank-0.log"] in done.stdout


def test_an_empty_log_and_a_run_without_logs_are_reported(capsys, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True)
    folder.config_file.touch()
    folder.log_file(0).touch()
    for more in ((), ("--rank", "0")):
        code, out, err = run(capsys, "logs", str(folder.folder), *more)
        assert (code, out) == (0, "") and f"{folder.log_file(0)}: empty, nothing was printed yet" in err
    folder.log_file(0).write_text("step 1/60\n")
    assert run(capsys, "logs", str(folder.folder)) == (0, "step 1/60\n", "")
    folder.log_file(0).unlink()
    code, _, err = run(capsys, "logs", str(folder.folder))
    assert code == 2 and "there are no logs of the job yet" in err
    code, _, err = run(capsys, "logs", str(folder.folder), "--rank", "7")
    assert code == 2 and f"launch logs: --rank 7: {folder.folder} has ranks 0 to 3." in err
    folder.logs.rmdir()
    code, _, err = run(capsys, "logs", str(folder.folder))
    assert code == 2 and "the run has no logs: distattn train prints to the console" in err


def test_the_script_is_short_enough_to_read():
    text = slurm.batch_script(configuration.load(ROOT / "configs/tiny.toml"), Path("/runs/tiny"))
    assert len(text.splitlines()) <= 60
