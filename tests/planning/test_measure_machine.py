"""`distattn calibrate` measures this machine and writes a description that `plan` can read."""

import json
from pathlib import Path

import pytest
from nccl_output import text

from distattn.cluster import spec as describe
from distattn.launch import cli
from distattn.planning import measure_machine as calibrate


@pytest.fixture
def quick(monkeypatch):
    """Limit calibration to a small table, measured for a few moments in this process."""
    monkeypatch.setattr(calibrate, "_SIDES", {"cpu": (64, 256)})
    monkeypatch.setattr(calibrate, "_HEAD_DIMS", (64,))
    monkeypatch.setattr(calibrate, "_BATCH_SECONDS", 0.005)
    monkeypatch.setattr(
        "distattn.launch.calibrate_command.measure_with_ranks",
        lambda ranks, name: calibrate.measure_machine(1, name, lambda line: None),
    )


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["calibrate", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_measurements_are_written_and_used_for_plans(capsys, tmp_path, quick):
    file = tmp_path / "mine.toml"
    code, out, err = run(capsys, "--out", str(file), "--ranks", "1", "--json")
    assert code == 0 and json.loads(out)["ranks"] == 1 and "links by nccl-tests: sendrecv_perf" in err
    cluster = describe.load(file)
    assert cluster.name == "mine" and len(cluster.attention) == 8 and all(row.tflops > 0 for row in cluster.attention)
    assert cluster.device.copy_gbs > 0.1 and cluster.device.gemm_tflops > 1e-4
    options = ("--docs", "512", "--cluster", str(file), "--strategy", "ring", "--heads", "4:4", "--head-dim", "64")
    assert cli.main(["plan", *options]) == 0 and "simulated on mine" in capsys.readouterr().out


def test_links_are_taken_from_nccl_tests(capsys, tmp_path, quick):
    (tmp_path / "across.txt").write_text(text("sendrecv", 2))
    options = ("--out", str(tmp_path / "mine.toml"), "--ranks", "1", "--nodes", "4")
    assert run(capsys, *options, "--nccl-across", str(tmp_path / "across.txt"))[0] == 0
    cluster = describe.load(tmp_path / "mine.toml")
    assert cluster.nodes == 4 and cluster.inter_node.gbs == pytest.approx(350, rel=0.02)
    assert cluster.intra_node != cluster.inter_node


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ranks", "2"), "--out FILE.toml is required"),
        (("--out", "mine.json"), "--out FILE.toml is required"),
        (("--out", "x.toml", "--ranks", "0"), "--ranks: must be at least 1, not 0"),
        (("--out", "x.toml", "--nodes", "2"), "several nodes need --nccl-across FILE"),
        (("--out", "x.toml", "--nccl-inside", "missing.txt"), "missing.txt: the nccl-tests output cannot be read"),
        (("--out", "x.toml", "--colour", "red"), "unrecognized arguments: --colour red"),
    ],
)
def test_a_mistake_gives_one_sentence(capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and sentence in err and "Traceback" not in err


@pytest.mark.full
def test_two_processes_measure_together(tmp_path, monkeypatch):
    from distattn.launch.ranks.local import run_ranks

    tests = Path(__file__).parents[1] / "support"
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{tests.parents[1]}")
    file = tmp_path / "two.toml"
    assert run_ranks(2, "quick_calibration", str(file)) == 0
    cluster = describe.load(file)
    assert cluster.devices == 2 and cluster.intra_node.shared and 0.01 < cluster.intra_node.gbs < 1000
