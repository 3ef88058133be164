"""The doctor names planted mistakes, reports nothing for healthy scripts, and checks the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import script
from processes import run_on_ranks
from transformers import LlamaConfig
from waiting import LIMIT_SECONDS

from distattn.doctor.diagnosis import diagnose
from distattn.doctor.environment import check_machine
from distattn.doctor.rank_run import run_on_this_rank
from distattn.doctor.target import Target
from distattn.ir.errors import DistattnError
from distattn.launch import doctor_command as doctor

pytestmark = pytest.mark.sampled(4)

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_the_rank_that_failed_first_is_blamed(tmp_path):
    body = """
def forward(model, part):
    if dist.is_initialized() and dist.get_rank() == 1:
        raise RuntimeError("the real cause")
    return pytorch.forward(model, part)
"""
    path = tmp_path / "target.py"
    path.write_text(script("llama", more=body))
    # the other rank ends as well when it loses its connection, as it would with the command
    (finding,) = doctor.examine_target(str(path), 2).findings
    assert finding.cause == "failed" and "rank 1: RuntimeError: the real cause (target.py, line" in finding.observed


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distattn.launch.cli", "doctor", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)


@pytest.mark.full
def test_the_command_examines_a_configuration_and_says_so(tmp_path):
    tiny = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    LlamaConfig(**tiny, bos_token_id=None, eos_token_id=None).save_pretrained(tmp_path)
    done = run(str(tmp_path), "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert "2 ranks compute what one process does" in done.stdout
    path = tmp_path / "target.py"
    path.write_text(script("llama", "loop", "averaged"))
    done = run(str(path), "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["findings"][0]["cause"] == "gradient factor" and report["measured"]["gradient"] == pytest.approx(0.5)
    done = run(str(path))
    assert "wrong gradient factor: all gradients are 0.5 times the right ones on 2 ranks" in " ".join(
        done.stdout.split()
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.py"], "there is no script nowhere.py"),
        (["nowhere"], "neither a script"),
        (["--ranks", "0"], "at least 1, not 0"),
        (["--rank", "2"], "'--rank' is not known. Did you mean --ranks?"),
    ],
)
def test_bad_arguments_give_one_sentence(arguments, sentence, capsys):
    from distattn.launch import cli

    assert cli.main(["doctor", *arguments]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_a_script_without_a_model_or_with_strange_functions_is_refused(tmp_path):
    path = tmp_path / "target.py"
    path.write_text("x = 1")
    with pytest.raises(DistattnError, match="has no function model"):
        Target(str(path))
    path.write_text("def model(): pass\ndef loss(logits): pass")
    with pytest.raises(DistattnError, match="loss is a function that takes logits, part"):
        Target(str(path))
    path.write_text("import torch\ndef model(): return torch.nn.Linear(2, 2)")
    target = Target(str(path))
    with pytest.raises(DistattnError, match="has to define reference"):
        target.reference(target.model(), torch.zeros(1, 2))
    for text, sentence in (
        ("def model(:", "cannot be imported: SyntaxError: .* .target.py, line 1."),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError"),
        ("def model(): pass\nloss = 3.0", "loss is a function that takes logits, part"),
        ("def model(): pass\ndef prepare(cp, model): pass", "Did you mean setup.cp, model.[?]"),
        ("def model(): pass\nbatch = {}", "batch is a function that takes nothing"),
    ):
        path.write_text(text)
        with pytest.raises(DistattnError, match=sentence):
            Target(str(path))
    path.write_text("def model(): pass\ndef forward(model, part, **more): pass")
    Target(str(path))
    path.write_text("def model(): raise ValueError('no weights')")
    with pytest.raises(DistattnError, match="model.. fails in one process.*ValueError: no weights .target.py, line 1."):
        diagnose(Target(str(path)), [{}])
    # a script's exit code must not become the doctor's
    path.write_text("def model(): raise SystemExit(0)")
    with pytest.raises(DistattnError, match="model.. fails in one process.*SystemExit"):
        diagnose(Target(str(path)), [{}])
    path.write_text("raise SystemExit(0)")
    with pytest.raises(DistattnError, match="cannot be imported: SystemExit"):
        Target(str(path))


def _refusals(rank: int, paths: list[str]) -> list[str]:
    return [(result := run_on_this_rank(Target(path))).get("refusal", result.get("failure")) for path in paths]


def test_a_script_that_cannot_be_examined_is_named_with_its_own_line(tmp_path):
    cases = {
        'def context_parallel():\n    return da.ContextParallel(strategy="cad", data="per_rank")': 'use data="replicated"',
        "def batch():\n    return [pack(), pack()]\ndef shard(cp, batches):\n    return cp.shard(batches[0])": "1 parts of 2",
        "def loss(logits, part):\n    return F.cross_entropy(logits, 3)": "LINE; raised in functional.py, line",
        "def loss(logits, part):\n    raise SystemExit(0)": "SystemExit: 0 (target3.py, line LINE)",
    }
    paths = []
    for number, body in enumerate(cases):
        paths.append(str(tmp_path / f"target{number}.py"))
        Path(paths[-1]).write_text(script("llama", more=body))
    for refusals in run_on_ranks(2, _refusals, paths):
        for path, sentence, part in zip(paths, refusals, cases.values(), strict=True):
            last = len(Path(path).read_text().splitlines())
            assert part.replace("LINE", str(last)) in sentence, (sentence, part)


def test_the_machine_is_inspected(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    checks = {check.name: check for check in check_machine()}
    assert {"python", "torch", "triton", "ports", "host name", "/dev/shm"} <= checks.keys()
    assert checks["torch"].ok and checks["ports"].ok
    assert checks["CUDA_DEVICE_MAX_CONNECTIONS"].ok is None
    assert checks["MASTER_ADDR"].ok is False and checks["MASTER_ADDR"].advice
