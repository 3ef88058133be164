"""Unit tests of the doctor: explaining changed values, explaining gradient sums, and printing a verdict."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from distattn.doctor.attention_mistakes import search_factor
from distattn.doctor.changed_values import common_change, describe_change
from distattn.doctor.comparison import Diagnosis, Finding, name_ranks, name_tokens
from distattn.doctor.emulated_model import EmulatedModel
from distattn.doctor.environment import Check
from distattn.doctor.gradient_sums import LocalGradients
from distattn.doctor.logit_mistakes import RIGHT
from distattn.doctor.rank_mistakes import explain_errors
from distattn.doctor.replay import LocalError, Place
from distattn.launch import doctor_command

EXPECTED = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
DROPPED = EXPECTED * (torch.rand(12, 6, generator=torch.Generator().manual_seed(1)) > 0.2) / 0.8


@pytest.mark.parametrize(
    ("got", "kind", "description"),
    [
        (torch.zeros(12, 6), "zero", "zero"),
        (EXPECTED.bfloat16().float(), "rounded", "bfloat16"),
        (EXPECTED.half().float(), "rounded", "float16"),
        (1.25 * EXPECTED, "scaled", "1.25 times"),
        (EXPECTED + torch.arange(6), "offset", "the same vector"),
        (EXPECTED.roll(1, 0), "moved", "of the token 1 before"),
        (EXPECTED.flip(0), "moved", "another order of tokens"),
        (EXPECTED.flip(1), "moved", "another order of features"),
        (DROPPED, "dropped", "1.25 times"),
    ],
)
def test_a_change_of_values_is_recognised(got, kind, description):
    change = describe_change(EXPECTED, got, bound=1e-4)
    assert change.kind == kind and description in change.description
    assert describe_change(EXPECTED, torch.randn(12, 6, generator=torch.Generator().manual_seed(2)), 1e-4) is None
    assert common_change([change, change]) == change and common_change([change, None]) is None


def test_a_factor_is_found_by_search():
    assert search_factor(lambda factor: abs(factor - 3.3)) == pytest.approx(3.3, rel=1e-6)


def _explained(factors: list[list[float]], of_rank: list[list[list[float]]] | None = None) -> Finding | None:
    """Explain gradients of two ranks. factors: the factor of each gradient in the sum, by rank and micro-batch.
    of_rank: the factors in each rank's sum, if the sums differ.
    """
    count = len(factors[0])
    generator = torch.Generator().manual_seed(0)
    local = [[{"weight": torch.randn(20, generator=generator)} for _ in range(count)] for _ in range(2)]
    expected = sum(gradients["weight"] for of_one_rank in local for gradients in of_one_rank)
    ranks = []
    for rank in range(2):
        rank_factors = factors if of_rank is None else of_rank[rank]
        total = sum(
            factor * gradients["weight"]
            for row, of_one_rank in zip(rank_factors, local, strict=True)
            for factor, gradients in zip(row, of_one_rank, strict=True)
        )
        parts = [{"parameter_gradients": gradients} for gradients in local[rank]]
        ranks.append({"parts": parts, "gradients": {"weight": total}})
    reference = SimpleNamespace(gradients={"weight": expected}, packs=[None] * count)
    return LocalGradients(reference, ranks).explain()


def test_factors_of_local_gradients_are_found_and_named():
    assert _explained([[1.0], [1.0]]) is None and _explained([[0.5, 0.5], [0.5, 0.5]]) is None
    assert "rank 1 are not in the sum" in _explained([[1.0], [0.0]]).observed
    assert "as 1, 0.3" in _explained([[1.0], [0.3]]).observed
    assert "only the last of 3" in _explained([[0.0, 0.0, 1.0]] * 2).observed
    assert "micro-batch 2 of 3" in _explained([[1.0, 0.0, 1.0]] * 2).observed
    assert _explained([[1.0, 0.5]] * 2).cause == "micro-batches weighted unequally"
    finding = _explained([[1.0], [1.0]], [[[1.0], [0.0]], [[0.0], [1.0]]])
    assert finding.cause == "gradients not reduced"


def test_ranks_and_tokens_are_named_by_segments():
    assert name_ranks([2]) == "rank 2" and name_ranks([0, 1, 3]) == "ranks 0, 1 and 3"
    assert name_tokens([5]) == "token 5" and name_tokens([3, 4, 5, 9]) == "tokens 3 to 5 and 9"
    assert name_tokens(range(0, 20, 2)) == "tokens 0, 2, 4 and 7 more segments"


REMEDY = "look at what this rank does there, and the others do not, and at all that it is given by the ranks before it"
CHECKS = [
    Check("python", True, "3.11.7"),
    Check("ports", True, "free"),
    Check("GPUs", None, "none", "kernels run on the CPU"),
]


def test_the_verdict_comes_first_and_wraps_like_prose(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(doctor_command, "check_machine", lambda: CHECKS)
    diagnosis = Diagnosis(
        {"logits": 0.1, "rounding": 1e-6}, "layer", [Finding("softmax scale", "it is 2", REMEDY)], "here"
    )
    monkeypatch.setattr(doctor_command, "examine_target", lambda *_: diagnosis)
    assert doctor_command.main(["config.json"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrong softmax scale: it is 2." and "first to differ: here." in lines[1]
    assert all(len(line) <= 60 for line in lines), lines
    first = next(number for number, line in enumerate(lines) if "what to do" in line)
    paragraph = " ".join(" ".join(lines[first : first + 3]).split())
    assert paragraph.startswith(f"what to do: {REMEDY}.")
    # the summary of the machine follows, in at most two lines
    assert (
        lines[-2] == "machine: python 3.11.7; noteworthy: GPUs. distattn doctor" and "--json, shows more." in lines[-1]
    )
    # without a script, the output describes the machine: first the noteworthy facts, then the rest in one line
    assert doctor_command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("note GPUs: none") and lines[1] == "machine: python 3.11.7, ports free."


def test_ok_in_low_precision_says_what_could_hide_and_proposes_fp32(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(doctor_command, "check_machine", lambda: CHECKS)
    coarse, fine = ({"hidden": hidden, "hidden in gradients": 8 * hidden} for hidden in (0.0094, 1e-6))
    for measured, is_coarse in ((coarse, True), (fine, False)):
        monkeypatch.setattr(
            doctor_command, "examine_target", lambda *_, measured=measured: Diagnosis(measured, None, [])
        )
        assert doctor_command.main(["config.json"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.startswith("ok 2 ranks compute what one process does")
        assert is_coarse == ("by less than 0.94 %" in out and "less than 7.5 %" in out and "in float32" in out)


@pytest.mark.parametrize("command", ["doctor", "calibrate"])
def test_help_does_not_import_torch(command):
    code = f"import sys; from distattn.launch import cli; cli.main(['{command}', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: distattn {command}"), done.stderr


def test_the_reason_why_a_lookup_was_not_tried_is_recorded():
    noted, place = [], Place(0, "output", "embed")

    def fail(hypothesis):
        raise ValueError("of the model's own")

    replay = SimpleNamespace(calls=[], computed=fail, bound=lambda rank, place: 0.0)
    batch = SimpleNamespace(right=lambda: [torch.arange(2)], tokens=[torch.arange(2)])
    emulation = SimpleNamespace(micro_batches=[batch], note_failure=noted.append)
    error = LocalError(place, 0, [0, 1], 9.0, 1.0, torch.zeros(2, 3), torch.ones(2, 3))
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3)})
    explain_errors(replay, [error], emulation, model, [{"settings": {}}])
    assert [str(error) for error in noted] == ["of the model's own"]


@pytest.mark.parametrize("works", ["_script_forward", ""], ids=["by the script", "in no way"])
def test_the_reason_why_a_model_cannot_run_is_recorded(works, monkeypatch):
    def run(self, forward, *arguments):
        if forward.__name__ != works:
            raise TypeError(f"{forward.__name__} does not work")
        return torch.zeros(1)

    monkeypatch.setattr(EmulatedModel, "_logits", run)
    target = SimpleNamespace(describe_error=str)
    emulation = EmulatedModel(target, torch.nn.Linear(1, 1), SimpleNamespace(packs=[]), [])
    assert (emulation(RIGHT, False) is not None) == bool(works)
    finding = emulation.with_failures(Finding("unknown", "it differs", "look"))
    note = "" if works else "; not all mistakes could be tried in one process: _script_forward does not work"
    assert finding.observed == f"it differs{note}"
