"""The numerics watch: the steps it refuses, the tensor that a second run of the step blames, and the evidence it saves."""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from planted_changes import ChangedGradient, change_output, with_number
from processes import run_on_ranks
from small import STEPS, build, micro_batch
from torch.distributed.device_mesh import init_device_mesh

from distattn.adapters import pytorch
from distattn.ir.errors import DistattnError
from distattn.training.watch.numerics_watch import NumericsWatch, Verdict, WatchSettings
from distattn.training.watch.spike_detector import SpikeDetector

NAN = float("nan")


def watch_of(folder=".", **settings):
    return NumericsWatch(torch.nn.Linear(2, 2), WatchSettings(**settings), None, folder)


def falling(step, scatter):
    """Return a loss that falls from 11 to 2.5 with noise."""
    return 2.5 + 8.5 * math.exp(-step / 2000) + scatter.gauss(0, 0.05)


def heavy_tailed(scatter):
    """Return a log-normal gradient norm around 0.5 that rarely changes by more than a factor of three."""
    return 0.5 * math.exp(scatter.gauss(0, 0.35))


def test_a_long_run_without_faults_is_left_alone():
    scatter, watch = random.Random(1), watch_of()
    for step in range(20_000):
        assert watch.judge(step, falling(step, scatter), heavy_tailed(scatter)).applies, step


@pytest.mark.parametrize("at", [0, 1, 500, 5000])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_non_finite_steps_are_refused_at_any_step_and_do_not_become_usual(at, value):
    scatter, watch = random.Random(2), watch_of()
    for step in range(at):
        watch.judge(step, falling(step, scatter), heavy_tailed(scatter))
    before = watch.state_dict()["loss"]
    verdict = watch.judge(at, value, 1.0)
    assert (verdict.action, verdict.applies, verdict.reason) == ("skip", False, f"the loss is {value}.")
    assert watch.judge(at, 2.5, value).reason == f"the gradient norm is {value}."
    assert watch.state_dict()["loss"] == [*before, 2.5][-128:]


def test_spikes_are_found_where_they_are_and_nowhere_else():
    scatter, watch = random.Random(3), watch_of()
    planted = {step: kind for step, kind in zip(range(300, 9000, 333), ["loss", "norm"] * 20, strict=False)}
    for step in range(9000):
        loss, norm = falling(step, scatter), heavy_tailed(scatter)
        loss, norm = (loss + 4, norm) if planted.get(step) == "loss" else (loss, norm)
        verdict = watch.judge(step, loss, norm * 30 if planted.get(step) == "norm" else norm)
        assert verdict.applies == (step not in planted), (step, verdict)
        if step == 300:
            assert (
                verdict.reason.startswith("the loss is 1") and "20 median absolute deviations above" in verdict.reason
            )


def test_a_new_level_becomes_usual_and_a_constant_curve_has_no_spikes_of_rounding():
    detector = SpikeDetector(16, 10)
    for step in range(40):
        assert 1 + step % 2 * 1e-7 <= detector.limit()
        detector.add(1 + step % 2 * 1e-7)
    seen = 0
    while detector.limit() < 50:
        detector.add(50)
        seen += 1
    assert seen == 8
    assert SpikeDetector(0, 1).limit() == math.inf


@pytest.mark.parametrize(
    ("steps", "loss", "norm"), [(1, 100.0, 150.0), (4, 60.0, 30.0), (20, 20.0, 12.0), (127, 16.0, 9.0)]
)
def test_spikes_are_refused_from_the_first_steps_on(steps, loss, norm):
    """Check that the limit falls as more steps are seen, while the curves of a new run remain below the limit."""
    for value, reason in (((loss, 0.5), "the loss is "), ((9.0, norm), "the gradient norm is ")):
        scatter, watch = random.Random(5), watch_of()
        for step in range(steps):
            assert watch.judge(step, falling(step, scatter), heavy_tailed(scatter)).applies
        assert watch.judge(steps, 11.5, 1.5).applies
        verdict = watch.judge(steps + 1, *value)
        assert not verdict.applies and verdict.reason.startswith(reason), verdict


def test_refused_steps_in_a_row_are_a_streak_that_says_how_it_ended():
    watch = watch_of(spike_window=8, spike_threshold=5)
    for step in range(20):
        assert watch.judge(step, 2.0, 1.0).streak is None
    first, second = watch.judge(20, NAN, 1.0), watch.judge(21, 9.0, 1.0)
    assert first.begins_streak and not second.begins_streak
    assert (second.streak.first, second.streak.last, second.streak.count) == (20, 21, 2)
    assert second.streak.reason == "the loss is nan." and watch.streak == second.streak
    last = watch.judge(22, 2.0, 1.0)
    assert last.applies and last.recovered and last.streak == second.streak and watch.streak is None
    # accepting a new usual level is not a recovery
    verdicts = [watch.judge(step, 9.0, 1.0) for step in range(23, 40)]
    ended = next(verdict for verdict in verdicts if verdict.applies)
    assert ended.streak.count == verdicts.index(ended) > 1 and not ended.recovered


def test_a_state_goes_on_as_the_run_would_have():
    scatter, whole_watch = random.Random(4), watch_of(spike_window=32)
    curve = [(falling(step, scatter) + 9 * (step % 97 == 96), heavy_tailed(scatter)) for step in range(400)]
    curve[150] = (NAN, 1.0)
    whole = [whole_watch.judge(step, *values) for step, values in enumerate(curve)]
    for cut in (1, 20, 151, 300):
        first, second = watch_of(spike_window=32), watch_of(spike_window=32)
        parts = [first.judge(step, *values) for step, values in enumerate(curve[:cut])]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        parts += [second.judge(step, *values) for step, values in enumerate(curve[cut:], cut)]
        assert parts == whole
    assert sum(not verdict.applies for verdict in whole) >= 4


def test_a_step_that_is_bad_again_after_going_back_is_left_out():
    watch = watch_of(action="rollback")
    saved = watch.state_dict()
    assert watch.judge(7, NAN, 1).action == "rollback"
    # the training loop goes back to its checkpoint
    watch.load_state_dict(saved)
    assert watch.judge(6, 1, 1).applies and watch.judge(7, NAN, 1).action == "skip"
    # a new process starts from the last state written
    other = watch_of(action="rollback")
    other.load_state_dict(watch.state_dict())
    assert other.judge(7, NAN, 1).action == "skip" and other.judge(8, NAN, 1).action == "rollback"


def test_a_run_of_nothing_but_bad_steps_stops():
    watch = watch_of(most_in_a_row=3)
    assert [watch.judge(step, NAN, 1).action for step in range(2)] == ["skip", "skip"]
    assert watch.judge(2, 1, 1).applies
    last = [watch.judge(step, 1, math.inf) for step in range(3, 6)][-1]
    assert last == Verdict(5, "stop", "the gradient norm is inf; 3 steps in a row were not finite.")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(action="ignore"), "action: there is no 'ignore'; there are skip, stop, rollback"),
        (dict(spike_window=3), "spike_window: must be 0, or at least 8 steps, not 3"),
        (dict(spike_threshold=NAN), "spike_threshold: must be at least 0, not nan"),
        (dict(evidence=0), "evidence: must be at least 1, not 0"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(DistattnError, match=sentence):
        WatchSettings(**settings)


# ---- a model on ranks that share attention, with planted faults


def some(value, count):
    """Return a hook that sets the first `count` elements of an output to `value`."""

    def spoil(out):
        first = torch.arange(out.numel()).view(out.shape) < count
        return torch.where(first, torch.full_like(out, value), out)

    return spoil


def bad_backward(out):
    """Make one element of an output's gradient infinite."""
    return ChangedGradient.apply(out, lambda gradient: with_number(gradient, 5, math.inf))


# for each fault: the rank, the module, the change to its output, and the calls in which the change happens
FAULTS = {
    "mlp": (3, "model.layers.1.mlp", some(NAN, 17), (1, 3)),
    "key": (2, "model.layers.0.self_attn.k_proj", some(math.inf, 1), None),
    "gradient": (1, "model.layers.0.mlp.up_proj", bad_backward, None),
    "once": (0, "model.layers.1.mlp", some(NAN, 1), (0,)),
    "large": (2, "model.layers.1.mlp", lambda out: out * 1e5, (1, 3)),
}


def _found(rank, folder):
    model, findings = build(torch.float32), {}
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
    pytorch.shard_parameters(model, mesh)
    with pytorch.context_parallel(mesh, strategy="ring", layout="zigzag") as cp:
        cp.loss_scale(pytorch.ProbeTarget(model))
        step = [micro_batch(lengths) for lengths in STEPS[0]]
        for batches in cp.steps([step] * (len(FAULTS) + 2)):
            number = len(findings)
            kind = [*FAULTS, "weight", "loss"][number]
            settings = WatchSettings(spike_window=8, spike_threshold=3)
            watch = NumericsWatch(model, settings, dist.group.WORLD, folder, cp.messages)
            for before in range(8):
                watch.judge(before, 4.2, 1.0)
            spoilt, module, spoil, runs = FAULTS.get(kind, (-1, "", None, None))
            fault = change_output(model.get_submodule(module), spoil, runs) if rank == spoilt else None
            if kind == "weight" and rank == 1:
                weight = model.model.layers[1].mlp.up_proj.weight.to_local()
                kept = weight[0, 0].clone()
                weight.data[0, 0] = NAN

            def run(index, batches=batches, kind=kind):
                loss = pytorch.local_loss(model, batches[index])
                if kind == "loss" and rank == 2 and index == 1:
                    loss = loss * NAN
                loss.backward()
                return loss

            losses = [run(index).detach() for index in range(len(batches))]
            norm = pytorch.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            verdict = watch.judge(number + 8, cp.mean_loss(losses), float(norm))
            model.zero_grad()
            finding = watch.find(number, run, len(batches)) if not verdict.applies else None
            model.zero_grad()
            findings[kind] = (
                verdict.reason,
                finding and (finding.kind, finding.text, finding.ranks, finding.micro_batch),
            )
            watch.keep_evidence(verdict, finding, [{"document": number, "rank": rank}], batches)
            if fault is not None:
                fault.remove()
            if kind == "weight" and rank == 1:
                weight.data[0, 0] = kept
    return findings


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def findings(evidence):
    results = run_on_ranks(4, _found, evidence)
    assert all(result == results[0] for result in results)
    return results[0]


def test_the_first_tensor_its_rank_and_micro_batch_are_named(findings):
    for kind, (reason, finding) in findings.items():
        assert finding is not None and reason, kind
    text = {kind: finding[1] for kind, (_, finding) in findings.items()}
    assert text["mlp"] == ("model.layers.1.mlp output, rank 3, micro-batch 1: 17 of 256 values are not finite.")
    # rank 2's keys have travelled around the ring
    assert text["key"] == (
        "model.layers.0.self_attn.k_proj output, rank 2, micro-batch 0: 1 of 112 values is not finite."
    )
    assert text["gradient"] == (
        "gradient of model.layers.0.mlp.up_proj weight, rank 1, micro-batch 0: 32 of 1,536 values are not finite."
    )
    assert text["weight"].startswith("weight model.layers.1.mlp.up_proj.weight, rank 1: 1 of ")
    assert text["loss"] == "loss, rank 2, micro-batch 1: 1 of 1 value is not finite."


def test_a_fault_that_does_not_repeat_is_reported_as_such(findings):
    reason, finding = findings["once"]
    assert reason == "the loss is nan."
    assert finding[:2] == ("clean", "all values are finite in a second run: the fault did not repeat.")


def test_the_output_that_stands_out_is_named_for_a_finite_spike(findings):
    reason, (kind, text, ranks, micro_batch) = findings["large"]
    assert "median absolute deviations" in reason
    assert (kind, ranks, micro_batch) == ("large", (2,), 1), text
    assert "the largest output compared with others is that of model.layers.1.mlp, rank 2, micro-batch 1" in text


def test_evidence_contains_the_documents_tokens_and_weights(findings, evidence):
    folders = sorted((evidence / "evidence").iterdir())
    assert len(folders) == len(findings)
    kinds = list(findings)
    for folder in folders:
        verdict = json.loads((folder / "verdict.json").read_text())
        kind = kinds[verdict["finding"]["step"]]
        assert verdict["finding"]["text"] == findings[kind][1][1] and verdict["verdict"]["reason"] == findings[kind][0]
        assert [json.loads(line)["rank"] for line in (folder / "documents.jsonl").open()] == [0]
        ids = [[], []]
        for rank in range(4):
            with np.load(folder / f"tokens-{rank}.npz") as tokens:
                for number in range(2):
                    assert tokens[f"{number}.labels"].shape == tokens[f"{number}.input_ids"].shape
                    ids[number] += tokens[f"{number}.input_ids"][0].tolist()
        # all ranks' tokens together are those of the micro-batches
        for got, lengths in zip(ids, STEPS[0], strict=True):
            assert sorted(i for i in got if i) == sorted(i for i in micro_batch(lengths)["input_ids"][0].tolist() if i)
    # the weights were the same in all steps except the step in which a weight was corrupted
    digests = {folder: [(folder / f"weights-{rank}.json").read_text() for rank in range(4)] for folder in folders}
    usual = digests[evidence / "evidence" / "step-8"]
    others = {folder.name for folder, texts in digests.items() if texts != usual}
    assert others == {f"step-{8 + kinds.index('weight')}"}
    assert "model.layers.1.mlp.up_proj.weight" in json.loads(usual[0])


def test_evidence_is_bounded_and_a_full_disk_ends_no_run(tmp_path, caplog):
    watch = watch_of(tmp_path, evidence=3)
    for step in (1, 2, 3, 4, 2, 900):
        watch.keep_evidence(Verdict(step, "skip", "nan"), None, [], [])
    assert {path.name for path in (tmp_path / "evidence").iterdir()} == {"step-4", "step-2", "step-900"}
    (tmp_path / "file").write_text("")
    watch_of(tmp_path / "file").keep_evidence(Verdict(1, "skip", "nan"), None, [], [])
    assert "the evidence of step 1 was not written" in caplog.text
