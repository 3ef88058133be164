"""Runs whose micro-batches take turns (`parallel.overlap`) match runs without turns and a single process."""

import dataclasses
import re
import shutil
from types import SimpleNamespace

import pytest
from planned_data import small_plan, write_corpus
from processes import run_on_ranks, run_survivors
from tiny_runs import new_run, tiny_config, train_on_rank

from distattn.data.packing.shares import check_pairs
from distattn.ir.errors import DistattnError, LostRankError
from distattn.training.config import run_file as configuration
from distattn.training.config.checks import problems_of
from distattn.training.config.run_file import Config
from distattn.training.config.sections import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    MemoryConfig,
    TrainConfig,
)
from distattn.training.engines.fsdp2 import Fsdp2Engine, _check_overlap
from distattn.training.run_folder import EVALUATION, TRAINING, RunFolder
from distattn.training.run_memory import memory_of_config

STEPS = 12


@pytest.fixture(scope="module")
def config(texts, tmp_path_factory) -> Config:
    """Return the configuration of a run with four micro-batches per step, clipping in some steps, and evaluations."""
    return tiny_config(
        texts,
        tmp_path_factory.mktemp("runs") / "run",
        data=dict(context_length=64, max_document_tokens=60),
        model=dict(dtype="float64"),
        train=TrainConfig(steps=STEPS, schedule="cosine", warmup_steps=2, max_grad_norm=2.0, weight_decay=0.1),
        checkpoint=CheckpointConfig(every_steps=5, keep_last=9),
        evaluation=EvaluationConfig(every_steps=4, steps=1),
    )


def overlapped(config: Config, **changes) -> Config:
    parallel = dataclasses.replace(config.parallel, overlap=True)
    return dataclasses.replace(config, parallel=parallel, **changes)


def trained(config: Config) -> RunFolder:
    assert not problems_of(config)
    run = new_run(config)
    run_on_ranks(config.parallel.ranks, train_on_rank, run.folder, config)
    return run


def curve(run: RunFolder) -> list[tuple[float, float]]:
    return [(step.loss, step.grad_norm) for step in run.metrics()]


def assert_same_curve(run: RunFolder, expected: RunFolder) -> None:
    for step, expected_step in zip(curve(run), curve(expected), strict=True):
        assert step == pytest.approx(expected_step, rel=1e-9)
    for split in (TRAINING, EVALUATION):
        for row, expected_row in zip(run.losses(split), expected.losses(split), strict=True):
            assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-9)
            assert (row["step"], row["tokens"]) == (expected_row["step"], expected_row["tokens"])


@pytest.fixture(scope="module")
def plain(config) -> RunFolder:
    return trained(config)


def test_many_steps_match_one_process_and_a_run_without_turns(config, plain):
    one_process = trained(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, ranks=1)))
    norms = [norm for _, norm in curve(one_process)]
    assert len(norms) == STEPS and min(norms) < 2.0 < max(norms)
    assert_same_curve(plain, one_process)
    run = trained(overlapped(config))
    assert_same_curve(run, one_process)
    assert_same_curve(run, plain)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "changes",
    [
        dict(memory=MemoryConfig(activation_checkpointing="save_attention", offload=True, mlp_tile_tokens=16)),
        dict(memory=MemoryConfig(activation_checkpointing="full")),
        dict(memory=MemoryConfig(state_on_host=True), engine=EngineConfig(shard_size=1)),
        dict(parallel=dict(ranks=4, strategy="cad", data="per_rank", context_parallel_size=2)),
    ],
    ids=["offloaded", "checkpointed", "copies", "per rank"],
)
def test_other_settings_leave_the_curve(config, plain, changes):
    if "parallel" in changes:
        changes = {"parallel": dataclasses.replace(config.parallel, **changes["parallel"])}
    assert_same_curve(trained(overlapped(dataclasses.replace(config, **changes))), plain)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(config, tmp_path):
    config = overlapped(config, memory=MemoryConfig(activation_checkpointing="full"))
    run = trained(config)
    again = RunFolder(tmp_path / "again")
    shutil.copytree(run.folder, again.folder)
    for checkpoint in again.checkpoints.glob("step-*"):
        if checkpoint.name != "step-00000005":
            shutil.rmtree(checkpoint)
    run_on_ranks(2, train_on_rank, again.folder, config)
    assert curve(again) == curve(run)
    for split in (TRAINING, EVALUATION):
        assert again.losses(split) == run.losses(split)


def _raising_run(rank: int, folder, config: Config) -> str:
    """Train until rank 1 raises before the attention of a pair's second micro-batch. Return the other rank's error."""
    backward, calls = Fsdp2Engine.backward, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyError("a mistake")

    def failing_backward(engine, *arguments):
        if rank == 1 and not calls:
            engine.model.model.layers[1].self_attn.q_proj.register_forward_hook(fail)
        return backward(engine, *arguments)

    Fsdp2Engine.backward = failing_backward
    with pytest.raises(LostRankError) as error:
        train_on_rank(rank, folder, config)
    return str(error.value)


@pytest.mark.waits(1)
def test_a_rank_that_raises_in_its_turn_is_named_by_the_others(config):
    config = overlapped(config, evaluation=EvaluationConfig())
    (error,) = run_survivors(2, 1, _raising_run, new_run(config).folder, config).values()
    assert re.search(r"\brank 1\b", error), error


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["--engine.name=deepspeed"],
            "parallel.overlap: engine deepspeed does not support it here; use it with fsdp2.",
        ),
        (["--engine.name=megatron"], "parallel.overlap: engine megatron does not support it here; use it with fsdp2."),
        (["--engine.compile=True"], "parallel.overlap: compiled layers do not take turns; use engine.compile = false."),
        (
            ["--data.context_length=8192"],
            "parallel.overlap: pairs of micro-batches take turns, and 8192 tokens of a step are 1 packs of 8192 for each "
            "share of the ranks; use a multiple of 16384 as data.tokens_per_step.",
        ),
    ],
)
def test_runs_that_cannot_take_turns_are_refused_by_name(overrides, sentence, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("")
    with pytest.raises(DistattnError) as error:
        configuration.load(file, ["--parallel.overlap=True", "--data.context_length=4096", *overrides])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["--parallel.ranks=2", "--parallel.context_parallel_size=4"], "parallel.context_parallel_size"),
        (["--parallel.ranks=0"], "parallel.ranks"),
        (["--parallel.tensor_parallel_size=0"], "parallel.tensor_parallel_size"),
        (["--data.context_length=-1"], "data.context_length"),
    ],
)
def test_a_wrong_number_of_ranks_is_named_with_overlap_as_well(overrides, key, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("")
    with pytest.raises(DistattnError, match=re.escape(key)):
        configuration.load(file, ["--parallel.overlap=True", *overrides])


def test_models_whose_layers_do_not_take_turns_are_refused_by_name():
    class Shape:
        model_type = "mixtral"
        output_router_logits = True

    with pytest.raises(DistattnError, match="parallel.overlap: RoPE of type longrope"):
        _check_overlap(SimpleNamespace(model_type="phi3", rope_scaling={"rope_type": "longrope"}))
    with pytest.raises(DistattnError, match="parallel.overlap: a router loss"):
        _check_overlap(Shape)
    Shape.layer_types = ["linear_attention"]
    with pytest.raises(DistattnError, match="parallel.overlap: mixtral has recurrent layers"):
        _check_overlap(Shape)


def test_a_plan_without_pairs_of_packs_is_refused_before_the_first_step(tmp_path):
    corpus = write_corpus(tmp_path, "web", [[60, 5, 33, 48, 1, 20, 64, 9, 40, 11, 30, 30, 2] * 3], "uint8")
    plan = small_plan(tmp_path, [corpus], packs=4, steps=2)
    check_pairs(plan, 2, 0, 2)
    with pytest.raises(DistattnError, match="step 0 of .* has 4 packs for 4 shares; plan a multiple of 8 packs a step"):
        check_pairs(plan, 4, 0, 2)


def test_the_memory_of_a_pair_is_counted():
    overrides = ["--data.context_length=4096", "--memory.activation_checkpointing=full"]
    alone, pair, saved = (
        memory_of_config(configuration.load("configs/tiny.toml", [*overrides, *more]), [[1024]])
        for more in ([], ["--parallel.overlap=True"], ["--memory.activation_checkpointing=save_attention"])
    )
    for one_rank, pair_rank, saved_rank in zip(alone, pair, saved, strict=True):
        assert one_rank.counts.saved < saved_rank.counts.saved
        assert pair_rank.counts == saved_rank.counts.times(2) and pair_rank.total < 2 * saved_rank.total
