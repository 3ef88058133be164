"""Runs of models with recurrent layers, latents and experts match plain transformers computing one document at a time."""

import dataclasses
from pathlib import Path
from unittest import mock

import hybrid_models
import pytest
import torch
from processes import run_on_ranks
from tiny_runs import new_run

from distattn.batch import recurrent_span
from distattn.cluster.spec import Link, load
from distattn.ir.errors import DistattnError
from distattn.training.config.checks import problems_of
from distattn.training.config.run_file import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ReferenceCheckConfig,
    RunConfig,
    TrainConfig,
)
from distattn.training.config.run_settings import configured_model
from distattn.training.config.sections import ClusterConfig
from distattn.training.loop import train
from distattn.training.reporting.model_flops import ModelFlops
from distattn.training.run_folder import RunFolder
from distattn.training.watch import reference_replay
from distattn.training.watch.reference_check import compare_with_reference, write_initial_weights

# the byte values, plus the tokens that begin and end a document
VOCABULARY = 258


def config_of(texts: Path, folder: Path, name: str, **changes: object) -> Config:
    hybrid_models.config(name, vocab_size=VOCABULARY, **changes).save_pretrained(folder / name)
    latents = name in hybrid_models.LATENT
    # PyTorch's CPU kernel requires equal widths of keys and values
    parallel = ParallelConfig(ranks=2, latents=latents, kernel="reference" if latents else "cpu")
    return Config(
        run=RunConfig(folder=str(folder / "run"), seed=3),
        data=DataConfig(path=str(texts), tokens_per_step=192, max_document_tokens=100),
        model=ModelConfig(path=str(folder / name), dtype="float32"),
        parallel=parallel,
        train=TrainConfig(steps=3),
        reference_check=ReferenceCheckConfig(steps=3),
    )


def _train(rank: int, folder: Path, config: Config) -> int:
    """Train. Return how often rows moved for a span of recurrent layers."""
    with mock.patch.object(recurrent_span, "move_rows", wraps=recurrent_span.move_rows) as moved:
        train(RunFolder(folder), config, True, torch.device("cpu"))
    return moved.call_count


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("name", "relaid"), [("qwen3_next", True), ("nemotron_h", False), ("mamba2", False), ("deepseek_v3", False)]
)
def test_a_run_has_the_curve_of_plain_transformers(texts, tmp_path, name, relaid):
    # use large states in narrow layers
    wide = dict(linear_key_head_dim=32, linear_value_head_dim=32) if relaid else {}
    config = config_of(texts, tmp_path, name, **wide)
    if relaid:
        # use links so slow that sending the states of many segments takes longer than moving all tokens twice
        slow = dataclasses.replace(load("laptop-1x2"), intra_node=Link(1e-5, 10.0))
        slow.save(tmp_path / "slow.toml")
        config = dataclasses.replace(
            config,
            cluster=ClusterConfig(str(tmp_path / "slow.toml")),
            parallel=dataclasses.replace(config.parallel, layout="document_zigzag", min_chunk=1),
            memory=dataclasses.replace(config.memory, activation_checkpointing="full"),
        )
    assert not problems_of(config)
    run = new_run(config)
    # rows move in and out in each of the three steps
    assert run_on_ranks(2, _train, run.folder, config) == [6 if relaid else 0] * 2
    write_initial_weights(run, config)
    reference_replay.main(run.folder)
    verdict = compare_with_reference(run, config)
    assert verdict["passed"], verdict


def test_unsupported_runs_are_refused_by_name(texts, tmp_path):
    config = config_of(texts, tmp_path, "mixtral", output_router_logits=True)
    with pytest.raises(
        DistattnError, match="reference_check.steps: the replay in plain transformers has no router loss"
    ):
        configured_model(config, VOCABULARY, 100)
    megatron = dataclasses.replace(config, engine=dataclasses.replace(config.engine, name="megatron"))
    megatron = dataclasses.replace(megatron, parallel=ParallelConfig(ranks=2, latents=True))
    assert any(str(problem).startswith("parallel.latents: engine megatron") for problem in problems_of(megatron))


def test_layers_without_attention_have_no_score_matrix_and_latent_keys_all_their_width():
    assert ModelFlops.of_model(hybrid_models.build("nemotron_h")).layers == ((None, 4 * (8 + 8)),)
    assert ModelFlops.of_model(hybrid_models.build("mamba2")).layers == ()
    # two layers with keys of 8 + 4 and values of 6 elements
    assert ModelFlops.of_model(hybrid_models.build("deepseek_v3")).layers == ((None, 2 * 4 * (12 + 6)),)
