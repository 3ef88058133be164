"""distattn train on a plan of packs, from text to the comparison with plain transformers, and the documents of each
step.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_once import made_once
from waiting import LIMIT_SECONDS

from distattn.data.packing.pack_plan import PackPlan
from distattn.launch import cli
from distattn.training.config import run_file as configuration
from distattn.training.config.run_file import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceCheckConfig,
    RunConfig,
    TrainConfig,
)
from distattn.training.reporting.step_documents import append_documents
from distattn.training.run_data import open_data, piece_rows
from distattn.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
STEPS = 4
SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, dtype="float64"
)
PLAN = f"""plan = "run.packs"
steps = {STEPS}
[rule]
context = [[0, 64], [2, 128]]
tokens_per_step = 256
window = 8
[[corpus]]
name = "web"
files = ["web"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a plan with cut documents and a context length that doubles, and train a run of two ranks on it."""
    return made_once(tmp_path_factory, "planned", plan_and_train)


@pytest.fixture
def run(folder, tmp_path):
    """Copy the run, since some tests add to it."""
    shutil.copytree(folder / "out", tmp_path / "out")
    return RunFolder(tmp_path / "out")


def plan_and_train(folder: Path) -> None:
    lines = [json.dumps({"text": paragraph}) for paragraph in (ROOT / "LICENSE").read_text().split("\n\n")]
    (folder / "web.jsonl").write_text("\n".join(lines))
    (folder / "packs.toml").write_text(PLAN)
    tokenize = [str(folder / "web.jsonl"), "--out", str(folder / "web"), "--tokenizer", "bytes", "--processes", "1"]
    assert cli.main(["data", "tokenize", *tokenize]) == 0
    assert cli.main(["data", "pack", str(folder / "packs.toml")]) == 0
    config = Config(
        run=RunConfig(folder="out", seed=3),
        data=DataConfig(path=str(folder / "packs.toml")),
        model=ModelConfig(**SHAPE),
        parallel=ParallelConfig(ranks=2, layout="document_zigzag", min_chunk=8),
        train=TrainConfig(steps=STEPS),
        reference_check=ReferenceCheckConfig(steps=STEPS),
    )
    configuration.save(config, folder / "run.toml")
    command = [sys.executable, "-m", "distattn.launch.cli", "train", "run.toml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
def test_a_run_on_a_plan_trains_as_plain_transformers(folder, run):
    checked = json.loads(run.reference_check_file.read_text())
    assert checked["passed"] and len(checked["steps"]) == STEPS and max(checked["loss"], checked["grad_norm"]) < 1e-8
    # the plan cuts documents, and has another context length from step 2 on
    plan = PackPlan.open(folder / "run.packs")
    assert [len(plan.step(step).packs) for step in range(STEPS)] == [4, 4, 2, 2]
    assert any(not pack.ends_document.all() for pack in plan.step(0).packs)


def test_the_documents_of_a_step_of_a_run_are_shown(folder, run, capsys):
    assert cli.main(["data", "show", str(run.folder), "2", "--json"]) == 0
    rows_shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    config = configuration.load(run.config_file)
    assert [{**row, "attempt": 0} for row in piece_rows(open_data(run, config), 2)] == rows_shown
    # the text equals that of the plan
    for arguments in (["2", "--tokens", "0"], ["1", "--pack", "3", "--tokens", "4"]):
        texts = []
        for source in (run.folder, folder / "packs.toml"):
            assert cli.main(["data", "show", str(source), *arguments]) == 0
            texts.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("----")])
        assert texts[0] == texts[1] and "==== step" in texts[0][0]
    # another attempt appends its own rows
    rows = [row | {"epoch": 7} for row in piece_rows(open_data(run, config), 1)]
    append_documents(run.documents_file, rows)
    assert cli.main(["data", "show", str(run.folder), "1", "--tokens", "2"]) == 0
    assert "epoch 7: " in capsys.readouterr().out
    assert cli.main(["data", "show", str(run.folder), "3", "--tokens", "2"]) == 0
    assert "epoch 0: " in capsys.readouterr().out


def test_a_run_on_text_is_shown_as_text(tmp_path, capsys):
    run = RunFolder(tmp_path)
    Path(f"{run.corpus_prefix}.bin").write_bytes("viele Wörter\x07 und mehr".encode())
    row = {"corpus": "text", "document": 3, "epoch": 1, "start": 0, "length": 14, "dtype": "uint8", "byte": 6}
    append_documents(run.documents_file, [{"step": 0, "pack": 0, **row, "file": f"{run.corpus_prefix}.bin"}])
    assert cli.main(["data", "show", str(tmp_path), "0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("==== step 0, pack 0: 1 document, 14 tokens ==")
    assert (
        out[1].startswith(f"---- text 3 ({run.corpus_prefix}.bin), epoch 1: 14 tokens ")
        and out[2] == "Wörter\\x07 und m"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["-1"], 2, "data show: there is no step -1; steps are counted from 0."),
        (["4"], 2, "documents.jsonl: has no step 4, counted from 0; the last row is of step "),
        (["0", "--pack", "4"], 2, "data show: --pack: step 0 has packs 0 to 3."),
    ],
)
def test_things_that_a_run_does_not_have_are_refused(run, capsys, arguments, code, sentence):
    assert cli.main(["data", "show", str(run.folder), *arguments]) == code
    assert sentence in capsys.readouterr().err


def test_a_file_that_is_no_longer_what_the_run_read_is_named(run, folder, tmp_path, capsys):
    moved = RunFolder(tmp_path)
    row = {
        "step": 0,
        "pack": 0,
        "corpus": "web",
        "document": 0,
        "epoch": 0,
        "start": 0,
        "length": 9,
        "dtype": "uint8",
        "byte": 0,
    }
    append_documents(moved.documents_file, [row | {"file": str(tmp_path / "nix.bin")}])
    assert cli.main(["data", "show", str(tmp_path), "0"]) == 3
    assert "nix.bin: cannot be read: No such file" in capsys.readouterr().err
    np.zeros(5, np.uint8).tofile(tmp_path / "short.bin")
    append_documents(moved.documents_file, [row | {"file": str(tmp_path / "short.bin")}])
    assert cli.main(["data", "show", str(tmp_path), "0"]) == 3
    assert "short.bin: byte 0: is not what the run has read" in capsys.readouterr().err
