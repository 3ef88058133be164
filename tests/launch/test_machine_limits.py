"""More ranks than the machine can hold are refused before any starts, with the arithmetic, and nothing is left behind."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from distattn.ir.errors import DistattnError
from distattn.launch import cli
from distattn.launch.ranks import machine_limits
from distattn.memory.host_memory import available_bytes
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import Config, ModelConfig, ParallelConfig
from distattn.training.config.run_settings import build_model, configured_model
from distattn.training.config.sections import EngineConfig
from distattn.training.state_bytes import model_parameters, state_bytes

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.toml")
GIB = 1 << 30


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("train", TINY, "--parallel.ranks=100000", "--run.folder={folder}/run"), "parallel.ranks"),
        (("launch", "local", TINY, "--gpus=100000", "--run.folder={folder}/run"), "parallel.ranks"),
        (("launch", "local", TINY, "--gpus=100000", "--dry-run"), "parallel.ranks"),
        (("doctor", "{folder}", "--ranks=100000"), "doctor: --ranks"),
        (("calibrate", "--out={folder}/machine.toml", "--ranks=100000"), "calibrate: --ranks"),
    ],
    ids=["train", "launch local", "launch local --dry-run", "doctor", "calibrate"],
)
def test_too_many_ranks_are_refused_with_the_arithmetic(capsys, tmp_path, monkeypatch, command, key):
    def started(*arguments):
        raise AssertionError("ranks are started")

    monkeypatch.setattr("distattn.launch.ranks.local.run_ranks", started)
    monkeypatch.setattr("distattn.launch.ranks.supervised.run_supervised", started)
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: 8_000_000_000)
    code = cli.main([word.replace("{folder}", str(tmp_path)) for word in command])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith(f"distattn: {key}: 100,000 ranks need ") and error.count("\n") == 1
    rank_mb = float(error.partition("GB of memory (")[2].split(" MB each: ")[0].replace(",", ""))
    total_gb = float(error.partition(" ranks need ")[2].split(" GB")[0].replace(",", ""))
    assert total_gb == pytest.approx(100_000 * rank_mb / 1e3, rel=2e-3)
    fit = int(error.partition(": at most ")[2].split(" ranks fit")[0])
    assert "this machine has 8.0 GB available" in error and fit == pytest.approx(8000 / rank_mb, abs=1)
    assert not list(tmp_path.iterdir())


def test_ranks_that_fit_are_not_refused(monkeypatch):
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: 4 * 500_000_000)
    machine_limits.check_run_fits(configuration.load(TINY))
    with pytest.raises(DistattnError, match="at most 4 ranks fit"):
        machine_limits.check_run_fits(configuration.load(TINY, ["--parallel.ranks=5"]))
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: 500_000_000)
    with pytest.raises(DistattnError, match="at most 1 rank fits"):
        machine_limits.check_run_fits(configuration.load(TINY))
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: 1_000_000)
    with pytest.raises(DistattnError, match="not even one fits"):
        machine_limits.check_run_fits(configuration.load(TINY))
    # on systems other than Linux the available memory is unknown
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: None)
    machine_limits.check_run_fits(configuration.load(TINY, ["--parallel.ranks=1000"]))


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(machine_limits, "available_bytes", lambda: 1000 * GIB)
    monkeypatch.setattr(machine_limits, "gpu_count", lambda: 4)
    config = Config(parallel=ParallelConfig(ranks=4, kernel="triton"))
    machine_limits.check_run_fits(config)
    config = dataclasses.replace(config, parallel=ParallelConfig(ranks=8, kernel="triton"))
    with pytest.raises(
        DistattnError, match="parallel.ranks: 8 ranks on a machine with 4 GPUs; kernel 'triton' needs one"
    ):
        machine_limits.check_run_fits(config)


@pytest.mark.parametrize("command", [("train",), ("launch", "local")], ids=["train", "launch local"])
def test_megatron_without_a_gpu_is_refused_before_ranks_start(capsys, tmp_path, monkeypatch, command):
    def started(*arguments):
        raise AssertionError("ranks are started")

    monkeypatch.setattr("distattn.launch.ranks.supervised.run_supervised", started)
    monkeypatch.setattr(machine_limits, "gpu_count", lambda: 0)
    assert cli.main([*command, TINY, "--engine.name=megatron", f"--run.folder={tmp_path}/run"]) == 2
    printed = capsys.readouterr().err
    assert (
        printed
        == "distattn: engine.name: megatron needs GPUs, and this machine has none; use engine fsdp2 or deepspeed.\n"
    )
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_not_installed_is_refused_before_ranks_start(capsys, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    assert cli.main(["train", TINY, "--engine.name=deepspeed", f"--run.folder={tmp_path}/run"]) == 2
    assert capsys.readouterr().err == "distattn: training needs deepspeed: pip install 'distattn[deepspeed]'.\n"
    assert not list(tmp_path.iterdir())


def test_slurm_s_login_node_needs_no_gpu_for_megatron(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_limits, "gpu_count", lambda: 0)
    command = ["launch", "slurm", TINY, "--engine.name=megatron", f"--run.folder={tmp_path}/run", "--dry-run"]
    assert cli.main(command) == 0 and "#SBATCH" in capsys.readouterr().out


SHAPE = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)


@pytest.mark.parametrize(
    ("dtype", "engine", "bytes_each"),
    [
        ("float32", EngineConfig(), 16 / 8),
        ("float64", EngineConfig(shard_size=2), 32 / 2),
        # the master weights are sharded
        ("bfloat16", EngineConfig(), 16 / 8),
        ("float32", EngineConfig(name="deepspeed", zero_stage=1), 4 + 4 + 8 / 8),
        ("bfloat16", EngineConfig(name="deepspeed", zero_stage=2), 2 + 4 / 8 + 12 / 8),
        ("float32", EngineConfig(name="deepspeed", zero_stage=3), 16 / 8),
    ],
)
def test_the_state_of_a_rank_is_counted_as_the_engine_shards_it(dtype, engine, bytes_each):
    config = Config(model=dataclasses.replace(SHAPE, dtype=dtype), engine=engine, parallel=ParallelConfig(ranks=8))
    model = build_model(config, configured_model(config, 256, 64), "sdpa")
    parameters = sum(p.numel() for p in model.parameters())
    assert model_parameters(config) == parameters
    assert state_bytes(config) == pytest.approx(parameters * bytes_each, abs=1)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 33554432 kB\nMemFree: 1048576 kB\nMemAvailable: 20971520 kB\n"}


def test_without_limits_the_machine_s_available_memory_counts(tmp_path):
    assert available_bytes(machine(tmp_path, MEMINFO)) == 20 * GIB
    assert available_bytes(tmp_path / "no such system") is None


def test_the_tightest_cgroup_of_version_2_counts_without_its_file_cache(tmp_path):
    files = MEMINFO | {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.current": "5\n",
        "sys/fs/cgroup/job/step/memory.stat": "inactive_file 0\n",
    }
    assert available_bytes(machine(tmp_path, files)) == 6 * GIB


def test_a_container_s_limit_of_version_1_counts_at_the_mount_point(tmp_path):
    files = MEMINFO | {
        # the path is the host's, but the mount shows the container's own group
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
    }
    assert available_bytes(machine(tmp_path, files)) == 3 * GIB
    files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"
    assert available_bytes(machine(tmp_path, files)) == 20 * GIB


def test_this_machine_reports_its_memory():
    available = available_bytes()
    assert available is None or 0 < available < 1 << 60
