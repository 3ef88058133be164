"""`distattn ckpt`: what a user sees of checkpoints, in a process without torch."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from distattn.checkpoints.checkpoint_folder import judge_checkpoint, keep_newest_good
from distattn.checkpoints.checkpoints import Checkpoints
from distattn.checkpoints.retention import KeepRule
from distattn.checkpoints.verdicts import GOOD, REFUSED
from distattn.launch import cli, resume_command
from distattn.training.config import run_file as configuration


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Create a run with three checkpoints."""
    run = tmp_path_factory.mktemp("run")
    facts = {"config": "0123", "plan": "4567"}
    saver = Checkpoints(run / "checkpoints", group=None, facts=facts, keep=KeepRule(), warn=lambda line: None)
    for step in (10, 20, 30):
        saver.save(step, {"w": torch.full((2000,), step)})
    saver.close()
    return run


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def said(capsys, *arguments, code=0):
    assert cli.main(["ckpt", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_list_names_the_checkpoints_of_a_run_and_of_a_folder(run, capsys):
    for folder in (run, run / "checkpoints"):
        lines = said(capsys, "list", folder).out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["10", "20", "30"]
        assert "damaged" not in "".join(lines)
    os.truncate(run / "checkpoints/step-00000020/__0_0.distcp", 3)
    (run / "checkpoints/step-00000010/manifest.json").unlink()
    lines = said(capsys, "list", run).out.splitlines()
    assert ["damaged" in line for line in lines[1:]] == [True, False, True]
    rows = [json.loads(line) for line in said(capsys, "list", run, "--json").out.splitlines()]
    assert [row["step"] for row in rows] == [20, 30, 10]
    assert rows[1]["problem"] is None and rows[1]["ranks"] == 1 and "is missing" in rows[2]["problem"]


def test_list_shows_loss_and_verdict_and_verify_what_is_in_doubt(tmp_path, capsys):
    run, folder = tmp_path, tmp_path / "checkpoints"
    saver = Checkpoints(folder, group=None, facts={}, keep=KeepRule(), warn=lambda line: None)
    for step in (10, 20, 30):
        saver.save(step, {"w": torch.zeros(9)}, facts={"loss": f"{step / 8}"})
    saver.close()
    judge_checkpoint(folder, 20, GOOD)
    keep_newest_good(folder, 30)
    judge_checkpoint(folder, 30, REFUSED, "step 31, computed from it, was refused: the loss is nan")
    head, *lines = map(str.rstrip, said(capsys, "list", run).out.splitlines())
    assert head.split()[:2] == ["step", "loss"] and "verdict" in head
    assert [line.split()[1] for line in lines] == ["1.25", "2.5", "3.75"]
    assert [line.split()[7] for line in lines] == ["untested", "good", "refused"]
    assert lines[1].endswith("kept: the newest good one before step 31, which was refused")
    assert lines[2].endswith("was refused: the loss is nan")
    rows = [json.loads(line) for line in said(capsys, "list", run, "--json").out.splitlines()]
    assert [row["loss"] for row in rows] == [1.25, 2.5, 3.75]
    assert [row["verdict"]["kind"] for row in rows] == ["untested", "good", "refused"]
    assert "(refused: step 31, computed from it, was refused" in said(capsys, "verify", run).out
    assert "verdict: refused, step 31" in said(capsys, "show", run).out


def test_resume_continues_from_the_requested_step(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(resume_command, "resume_locally", lambda run, config, **others: asked.append(others) or 0)
    configuration.save(configuration.Config(), run / "config.toml")
    for arguments in (["--step", "1,020"], ["--step=1020", "--json"]):
        assert cli.main(["resume", *arguments, str(run)]) == 0
    assert cli.main(["resume", str(run), "--train.steps", "70"]) == 0
    assert [others["step"] for others in asked] == [1020, 1020, None]
    assert [others["json_lines"] for others in asked] == [False, True, False]
    for arguments in (["--step"], ["--step", "last"], ["--step=-1"]):
        assert cli.main(["resume", str(run), *arguments]) == 2
        assert "is not the step of a checkpoint" in capsys.readouterr().err


def test_verify_names_what_is_damaged_with_exit_code_3(run, capsys):
    assert said(capsys, "verify", run).out.count("good") == 3
    file = run / "checkpoints/step-00000020/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[2000] ^= 4
    file.write_bytes(content)
    out = said(capsys, "verify", run, code=3).out
    assert out.count("good") == 2 and out.count("damaged") == 1
    assert f"{file}: bytes 0 to {len(content):,} are not what was written." in out
    # verify a single checkpoint
    assert said(capsys, "verify", run / "checkpoints/step-00000030").out.count("good") == 1
    (row,) = map(json.loads, said(capsys, "verify", file.parent, "--json", code=3).out.splitlines())
    assert row["problems"][0]["file"] == "__0_0.distcp" and row["problems"][0]["offset"] == 0
    # verify a copy with another name
    file.parent.rename(run / "copy")
    assert "copy" in said(capsys, "verify", run / "copy", code=3).out


def test_show_describes_the_newest_checkpoint(run, capsys):
    out = said(capsys, "show", run).out
    assert "step-00000030: step 30, saved at 20" in out and "by 1 ranks with torch" in out
    assert "  config: 0123\n  plan: 4567\n" in out and "__0_0.distcp" in out
    facts = json.loads(said(capsys, "show", run / "checkpoints/step-00000010", "--json").out)
    assert facts["step"] == 10 and facts["facts"] == {"config": "0123", "plan": "4567"}
    assert {file["name"] for file in facts["files"]} == {".metadata", "__0_0.distcp"}
    shutil.rmtree(run / "checkpoints/step-00000020")
    (run / "checkpoints/step-00000010/manifest.json").write_text("{}")
    assert "was altered" in said(capsys, "show", run / "checkpoints/step-00000010", code=3).err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["export"], "there is no command 'export'"),
        (["list"], "required: folder"),
        (["verify", "nowhere"], "nowhere: is no folder"),
        (["list", "."], "has no checkpoints"),
        (["list", ".", "--al"], "unrecognized arguments: --al"),
    ],
)
def test_mistakes_give_one_sentence(arguments, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    err = said(capsys, *arguments, code=2).err
    assert why in err and err.count("\n") == 1 and err.startswith("distattn: ")


def test_help_is_there_for_every_command(capsys):
    for arguments in ([], ["list", "--help"], ["--help"]):
        assert "usage: distattn ckpt" in said(capsys, *arguments, code=0 if arguments else 2).out


def test_verifying_needs_no_torch(run):
    program = (
        "import sys; sys.modules['torch'] = None; from distattn.launch import cli; "
        f"sys.exit(cli.main(['ckpt', 'verify', {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
