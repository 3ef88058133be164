"""`distattn calibrate` measures this machine; what it writes is read by `plan`."""

import json
from pathlib import Path

import pytest
from nccl_output import text

from distattn.cluster import spec as describe
from distattn.launch import cli
from distattn.planning import measure_machine as calibrate


@pytest.fixture
def quick(monkeypatch):
    """A small table, measured for moments, in this process."""
    monkeypatch.setattr(calibrate, "_SIDES", {"cpu": (64, 256)})
    monkeypatch.setattr(calibrate, "_HEAD_DIMS", (64,))
    monkeypatch.setattr(calibrate, "_STRETCH", 0.005)
    monkeypatch.setattr(
        "distattn.launch.calibrate_command.measure_with_ranks",
        lambda ranks, name: calibrate.measure_machine(1, name, lambda line: None),
    )


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["calibrate", *arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_what_is_measured_is_written_and_planned_with(capsys, tmp_path, quick):
    file = tmp_path / "mine.toml"
    code, out, err = run(capsys, "--out", str(file), "--ranks", "1", "--json")
    assert code == 0 and json.loads(out)["ranks"] == 1 and "links by nccl-tests: sendrecv_perf" in err
    found = describe.load(file)
    assert found.name == "mine" and len(found.attention) == 8 and all(row.tflops > 0 for row in found.attention)
    assert found.device.copy_gbs > 0.1 and found.device.gemm_tflops > 1e-4
    given = ("--docs", "512", "--cluster", str(file), "--strategy", "ring", "--heads", "4:4", "--head-dim", "64")
    assert cli.main(["plan", *given]) == 0 and "simulated on mine" in capsys.readouterr().out


def test_links_are_taken_from_nccl_tests(capsys, tmp_path, quick):
    (tmp_path / "across.txt").write_text(text("sendrecv", 2))
    given = ("--out", str(tmp_path / "mine.toml"), "--ranks", "1", "--nodes", "4")
    assert run(capsys, *given, "--nccl-across", str(tmp_path / "across.txt"))[0] == 0
    found = describe.load(tmp_path / "mine.toml")
    assert (
        found.nodes == 4
        and found.inter_node.gbs == pytest.approx(350, rel=0.02)
        and found.intra_node != found.inter_node
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ranks", "2"), "--out FILE.toml is wanted"),
        (("--out", "mine.json"), "--out FILE.toml is wanted"),
        (("--out", "x.toml", "--ranks", "0"), "--ranks: at least 1, not 0"),
        (("--out", "x.toml", "--nodes", "2"), "several nodes need --nccl-across FILE"),
        (("--out", "x.toml", "--nccl-inside", "missing.txt"), "missing.txt: the nccl-tests output cannot be read"),
        (("--out", "x.toml", "--colour", "red"), "unrecognized arguments: --colour red"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out and sentence in err and "Traceback" not in err


@pytest.mark.full
def test_two_processes_measure_together(tmp_path, monkeypatch):
    from distattn.launch.ranks.local import run_ranks

    tests = Path(__file__).parents[1] / "support"
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{tests.parents[1]}")
    file = tmp_path / "two.toml"
    assert run_ranks(2, "quick_calibration", str(file)) == 0
    found = describe.load(file)
    assert found.devices == 2 and found.intra_node.shared and 0.01 < found.intra_node.gbs < 1000
