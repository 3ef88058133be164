"""Records of a run's steps in JSON lines, TensorBoard and Weights & Biases, and where a step's seconds and FLOPs come
from.
"""

import json
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from small import build, micro_batch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import distattn as da
from distattn.adapters import pytorch
from distattn.ir.errors import DistattnError
from distattn.training.config import run_file as configuration
from distattn.training.reporting.json_lines import read_rows
from distattn.training.reporting.loss_by_position import LossByPosition
from distattn.training.reporting.metrics import MetricsReporter
from distattn.training.reporting.model_flops import ModelFlops, flops_utilisation
from distattn.training.reporting.step_clock import StepClock
from distattn.training.run_folder import RunFolder, StepMetrics


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.folder.mkdir()
    configuration.save(configuration.Config(), run.config_file)
    return run


def table():
    losses = LossByPosition(8, ["web", "books"])
    losses.add(torch.arange(8.0), torch.ones(8), torch.arange(8), torch.tensor([0, 0, 0, 1, 1, 1, 1, -1]))
    return losses.reduce()


STEP = StepMetrics(1, 2.5, 0.5, 100, 0.25, 1e-3, 0.4, 0.01, 0.02, memory_resident=1 << 30)


def write_all(run, **more):
    model = torch.nn.Linear(2, 3)
    model(torch.ones(1, 2)).sum().backward()
    model.weight.grad[0, 0] = float("nan")
    model.bias.grad[:] = float("nan")
    plan = da.make_plan(
        da.Mask.causal(64), da.Layout.zigzag([64], 2), strategy="ring", heads=2, kv_heads=2, head_dim=8, dtype="float32"
    )
    with MetricsReporter(run, 3, json_lines=False, visible=True, **more) as reporter:
        reporter.report_plan(plan)
        reporter.report(STEP)
        reporter.report(StepMetrics(2, float("nan"), 0.5, 100, 0.25, skipped="the loss is nan."))
        reporter.report_losses(2, table())
        reporter.report_losses(2, table(), "training")
        reporter.report_histograms(2, model)
        reporter.report_event(2, "refused", "the loss is nan.", {"ranks": [3]})


def test_json_lines_and_tensorboard_hold_everything(run, capsys):
    write_all(run)
    assert read_rows(run.metrics_file)[0] == STEP.as_dict() and run.metrics()[0] == STEP
    assert "mfu" not in read_rows(run.metrics_file)[1] and run.metrics()[1].skipped == "the loss is nan."
    evaluation, training = read_rows(run.losses_file)
    assert (evaluation["split"], training["split"]) == ("evaluation", "training")
    assert evaluation["by_corpus"][0] == {"name": "web", "tokens": 3, "loss": 1.0}
    assert read_rows(run.events_file) == [{"step": 2, "kind": "refused", "text": "the loss is nan.", "ranks": [3]}]
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    wanted = {"loss", "learning_rate", "mfu", "tokens_per_second", "data_seconds", "wait_seconds", "memory_resident"}
    assert wanted | {"evaluation/loss", "evaluation_by_corpus/web", "training_by_position/4"} <= set(tags["scalars"])
    assert "memory_allocated" not in tags["scalars"]
    assert [event.value for event in events.Scalars("tokens_per_second")] == [400, 400]
    assert [event.value for event in events.Scalars("skipped")] == [0, 1]
    # a gradient without finite values has no histogram
    assert set(tags["histograms"]) == {"weights/weight", "weights/bias", "gradients/weight"}
    assert set(tags["images"]) == {
        "score matrix of the first plan",
        "evaluation loss by position",
        "training loss by position",
    }
    shown = capsys.readouterr().out
    assert "step 1/3  loss 2.500  400 tokens/s" in shown and "s left; not applied: the loss is nan.\n" in shown
    # training losses by position are only written to files, not shown
    assert shown.count("evaluation loss") == 1 and "step 2/3  evaluation loss 3.500  of 8 held-out tokens\n" in shown


def test_evaluations_are_json_lines_if_all_output_is(run, capsys):
    with MetricsReporter(run, 3, json_lines=True, visible=True) as reporter:
        reporter.report_losses(2, table())
    assert json.loads(capsys.readouterr().out) == {"step": 2, "evaluation_loss": 3.5, "evaluation_tokens": 8}


def test_the_last_row_of_a_repeated_step_counts(run):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 9.0), (2, 1.0)):
        run.append(run.metrics_file, StepMetrics(step, loss, 1.0, 1, 1.0).as_dict())
    assert [(step.step, step.loss) for step in run.metrics()] == [(1, 3.0), (2, 1.0), (3, 9.0)]


def test_weights_and_biases_gets_the_same(run, monkeypatch):
    seen = []
    stand_in = types.SimpleNamespace(
        init=lambda **settings: types.SimpleNamespace(
            log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append(("end", settings))
        )
    )
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    write_all(run, wandb="long-documents")
    assert seen[0][0] == 1 and seen[0][1]["loss"] == 2.5 and seen[0][1]["tokens_per_second"] == 400
    assert any(values.get("evaluation_by_corpus/books") == 4.5 for step, values in seen[:-1])
    kind, settings = seen[-1]
    seen.clear()
    write_all(run, wandb="long-documents")
    # a resumed run continues the same wandb run
    assert seen[-1][1]["id"] == settings["id"] == run.wandb_file.read_text() and settings["resume"] == "allow"
    assert (kind, settings["project"], settings["name"]) == ("end", "long-documents", "run") and "[train]" in settings[
        "config"
    ]["configuration"]


def test_a_missing_package_gives_one_sentence_and_other_ranks_do_nothing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(DistattnError, match="train.wandb: 'mine', but the package wandb is not installed; pip install"),
        MetricsReporter(run, 3, False, visible=True, wandb="mine"),
    ):
        pass
    with MetricsReporter(run, 3, True, visible=False, wandb="mine") as reporter:
        reporter.report(STEP)
        reporter.report_losses(1, table())
        reporter.report_event(1, "refused", "")
        reporter.report_histograms(1, torch.nn.Linear(1, 1))
    assert not run.metrics_file.exists()


def test_a_clock_tells_data_from_the_rest():
    clock = StepClock(torch.device("cpu"))

    def slow():
        for number in range(2):
            time.sleep(0.05)
            yield number

    costs = []
    for _ in clock.steps(slow()):
        time.sleep(0.02)
        costs.append(clock.lap())
    for cost in costs:
        assert cost.data_seconds >= 0.05 and cost.seconds - cost.data_seconds >= 0.02 and cost.wait_seconds == 0
        assert cost.memory_resident > 1 << 20 and cost.memory_allocated is None
    assert clock.lap().data_seconds == 0


def _waited(rank):
    model = build(torch.float32)
    with da.ContextParallel(strategy="ring") as cp:
        clock, out = StepClock(torch.device("cpu"), cp.messages), []
        for batches in clock.steps(cp.steps([micro_batch([40])] * 3)):
            if rank == 1 and len(out) == 2:
                # sleep in the third step, when the ranks have already agreed on the plans of a new shape
                time.sleep(5.0)
            losses = [pytorch.local_loss(model, batch) for batch in batches]
            losses[0].backward()
            cp.mean_loss(losses)
            out.append(clock.lap().wait_seconds)
    return out


def test_the_waiting_rank_reports_the_time_spent_on_a_slow_rank():
    (*_, first), _ = run_on_ranks(2, _waited)
    # rank 0 waited for rank 1, which slept for five seconds
    assert first > 0.1


@pytest.mark.parametrize("kind", ["llama", "tied", "experts"])
def test_flops_match_pytorchs_count(kind):
    sizes = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    config = LlamaConfig(**sizes, tie_word_embeddings=kind == "tied")
    if kind == "experts":
        config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    # PyTorch's counter omits grouped products of several experts, so compute one expert at a time
    one_by_one = {"experts_implementation": "eager"} if kind == "experts" else {}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **one_by_one)
    flops, tokens = ModelFlops.of_model(model), 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None], use_cache=False)
    # count the forward pass only. Eager attention computes the full square, and a matrix product the rotary angles
    ((_, width),) = flops.layers
    matrices, square = 2 * flops.parameters * tokens, 2 * width * tokens**2
    rotary = 2 * tokens * 4
    assert counter.get_total_flops() == pytest.approx(matrices + square, abs=2 * rotary)
    assert flops.of_documents([tokens]) == 6 * flops.parameters * tokens + 6 * width * tokens * (tokens + 1) / 2


def test_documents_count_by_their_real_lengths_and_windows_cut_them():
    flops = ModelFlops(1000, ((None, 64), (4, 64)))
    whole, window = 6 * 7 / 2 + 3 * 4 / 2, (1 + 2 + 3 + 4 + 4 + 4) + (1 + 2 + 3)
    assert flops.of_documents([6, 3]) == 6 * 1000 * 9 + 6 * 64 * (whole + window)
    assert flops.of_documents([6, 3]) < flops.of_documents([9])
    assert flops_utilisation(4e12, 2.0, 4, 1.0) == 0.5
    with pytest.raises(DistattnError, match="Linear has no config with num_attention_heads"):
        ModelFlops.of_model(torch.nn.Linear(2, 2))


def test_a_sharded_model_has_the_flops_of_the_whole():
    assert run_on_ranks(2, _sharded_flops) == [True, True]


def _sharded_flops(rank):
    model = build(torch.float32)
    whole = ModelFlops.of_model(model)
    pytorch.shard_parameters(model, dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)))
    return ModelFlops.of_model(model) == whole
