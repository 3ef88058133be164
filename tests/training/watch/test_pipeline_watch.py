"""With pipeline stages, the watch and the replay check name the first wrong tensor, its layer in the full model, and
the rank.
"""

import math
import os

import pytest

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import small  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from planted_changes import ChangedGradient, change_output, with_number  # noqa: E402
from processes import run_on_ranks  # noqa: E402

from distattn.training.config.checks import problems_of  # noqa: E402
from distattn.training.config.sections import (  # noqa: E402
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    WatchConfig,
)
from distattn.training.engines import megatron  # noqa: E402, F401
from distattn.training.engines.engine import PipelineStage, open_engine  # noqa: E402
from distattn.training.watch.numerics_watch import NumericsWatch, WatchSettings  # noqa: E402
from distattn.training.watch.replay_check import ReplayCheck  # noqa: E402

# ranks 0 and 1 have layers 0 and 1, ranks 2 and 3 have layers 2 and 3, and each pair splits documents
CONFIG = Config(
    data=DataConfig(context_length=2048, max_document_tokens=1000),
    model=ModelConfig(num_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48),
    parallel=ParallelConfig(
        ranks=4,
        context_parallel_size=2,
        pipeline_parallel_size=2,
        layout="document_zigzag",
        min_chunk=4,
        kernel="reference",
    ),
    engine=EngineConfig(name="megatron"),
    watch=WatchConfig(replay_every=2),
)


def _forward(value):
    """Return a hook that changes one element of a linear layer's output, which is returned with a bias."""
    return lambda out: (with_number(out[0], 3, value), *out[1:])


def _backward(value):
    """Return a hook that changes one element of the gradient of a linear layer's output."""
    return lambda out: (ChangedGradient.apply(out[0], lambda gradient: with_number(gradient, 5, value)), *out[1:])


# (rank, module with its layer as numbered on its stage, change of its output)
FAULTS = {
    "first stage": (1, "decoder.layers.1.mlp.linear_fc2", _forward),
    "second stage": (2, "decoder.layers.0.mlp.linear_fc2", _forward),
    # the second stage runs its backward pass first
    "second stage backward": (3, "decoder.layers.1.mlp.linear_fc2", _backward),
    "first stage backward": (0, "decoder.layers.0.mlp.linear_fc2", _backward),
}


def _found(rank: int, folder: str) -> dict[str, str]:
    os.environ["LOCAL_RANK"] = str(rank)
    import megatron_on_cpu  # noqa: F401

    engine, texts = open_engine(CONFIG, torch.device("cpu"), small.VOCABULARY, 128), {}
    watch = NumericsWatch(
        engine.model, WatchSettings(), dist.group.WORLD, folder, engine.cp.messages, engine, engine.stage
    )
    check = ReplayCheck(engine.model, 2, dist.group.WORLD, engine.cp.messages, engine.stage)

    def explained(number, batches):
        losses, norm = engine.backward(batches), engine.clip(1.0)
        verdict = watch.judge(number, engine.cp.mean_loss(losses), norm)
        engine.drop()
        assert not verdict.applies
        finding = watch.find(number, lambda index: engine.backward([batches[index]])[0], len(batches))
        engine.drop()
        return finding.text

    def replayed(batches):
        difference = check.check(2, lambda: engine.backward(batches[:1]), engine.drop)
        engine.drop()
        return difference and difference.text

    step = [small.micro_batch([13, 9]), small.micro_batch([11, 14])]
    cases = [*((kind, name) for kind in ("find", "replay") for name in FAULTS), ("replay", ""), ("find", "weight")]
    for number, batches in enumerate(engine.cp.steps([step] * len(cases))):
        kind, name = cases[number]
        fault = None
        if name in FAULTS and FAULTS[name][0] == rank:
            _, module, spoil = FAULTS[name]
            # change only the second of the two compared runs
            in_calls = None if kind == "find" else (1,)
            fault = change_output(
                engine.model.get_submodule(module), spoil(math.nan if kind == "find" else 7.0), in_calls
            )
        if name == "weight" and rank == 2:
            engine.model.get_parameter("decoder.layers.1.mlp.linear_fc2.weight").data[0, 0] = math.nan
        texts[f"{kind} {name}"] = explained(number, batches) if kind == "find" else replayed(batches)
        if fault is not None:
            fault.remove()
    engine.close()
    return texts


@pytest.mark.full
def test_the_first_tensor_layer_and_rank_are_named_over_the_stages_of_a_pipeline(tmp_path):
    results = run_on_ranks(4, _found, str(tmp_path))
    assert all(result == results[0] for result in results)
    texts = results[0]
    for kind, module, rank, tensor in (
        ("first stage", "decoder.layers.1.mlp.linear_fc2", 1, "{} output"),
        ("second stage", "decoder.layers.2.mlp.linear_fc2", 2, "{} output"),
        ("second stage backward", "decoder.layers.3.mlp.linear_fc2", 3, "gradient of {} "),
        ("first stage backward", "decoder.layers.0.mlp.linear_fc2", 0, "gradient of {} "),
    ):
        text = texts[f"find {kind}"]
        assert text.startswith(tensor.format(module)) and f", rank {rank}, micro-batch 0" in text, text
        text = texts[f"replay {kind}"]
        assert text.startswith(f"rank {rank} computed another result") and tensor.format(module) in text, text
    assert texts["replay "] is None
    assert texts["find weight"].startswith("weight model.layers.3.mlp.down_proj.weight, rank 2: 1 of ")


def test_replays_are_not_refused_with_pipelines():
    assert not problems_of(CONFIG)


def test_a_stage_has_its_turns_and_counts_layers_in_the_whole_model():
    first, last = PipelineStage(0, 2, 0), PipelineStage(1, 2, 4)
    turns = [first.turn(False), last.turn(False), last.turn_of_loss, last.turn(True), first.turn(True)]
    assert turns == sorted(set(turns)) and last.is_last and not first.is_last
    assert last.module_name("decoder.layers.3.mlp") == "decoder.layers.7.mlp"
    assert last.module_name("output_layer") == "output_layer"
