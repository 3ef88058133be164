"""One run in every engine: the same data, order, model and AdamW give the curve of a single process."""

import dataclasses
import math
import os
import sys

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("megatron.core", reason="megatron-core is not installed")

# import it once here, not in every rank: DeepSpeed needs it, and the import takes 3 s
import functorch.compile  # noqa: E402, F401
import small  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from processes import run_on_ranks  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from distattn.ir.errors import DistattnError  # noqa: E402
from distattn.training.config.checks import problems_of  # noqa: E402
from distattn.training.config.run_settings import build_model, configured_model  # noqa: E402
from distattn.training.config.sections import (  # noqa: E402
    Config,
    DataConfig,
    EngineConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from distattn.training.engines import deepspeed, megatron  # noqa: E402, F401
from distattn.training.engines.engine import EngineState, open_engine  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.sampled(6)]

STEPS = 20
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# only in some steps is the gradient norm below this
CLIP = 2.0


def config_of(
    engine: str, ranks: int = 4, size: int = 2, dtype: str = "float32", stage: int = 2, memory=None, **parallel
) -> Config:
    # packs of a single rank have no layout
    spread = dict(layout="document_zigzag", min_chunk=4) if size > 1 else {}
    return Config(
        data=DataConfig(context_length=2048, max_document_tokens=1000),
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            dtype=dtype,
        ),
        parallel=ParallelConfig(
            ranks=ranks,
            context_parallel_size=size,
            kernel="reference",
            **spread,
            **parallel,
        ),
        engine=EngineConfig(name=engine, zero_stage=stage),
        memory=memory or MemoryConfig(),
        train=TrainConfig(steps=STEPS, learning_rate=3e-3, weight_decay=0.1),
    )


def micro_batches(step: int, replica: int) -> list[dict]:
    """Return one to three micro-batches for a step of one of two replicas. All documents differ."""
    return [
        small.micro_batch([5 + step, 3 + 7 * number, 11 + 2 * replica + step % 3], masked=replica == 1)
        for number in range(1 + step % 3)
    ]


def steps(first: int, last: int, replica: int, replicas: int) -> list[list[dict]]:
    """Return the steps of one replica. A single replica has both replicas' batches."""
    mine = range(replica, 2, replicas)
    return [
        [batch for batch_replica in mine for batch in micro_batches(step, batch_replica)] for step in range(first, last)
    ]


def learning_rate(step: int) -> float:
    return 3e-3 * min(1.0, (step + 1) / 5)


def opened(config: Config):
    # torchrun sets LOCAL_RANK, and DeepSpeed reads it
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    if config.engine.name == "megatron":
        # import it only in rank processes, since the import patches torch
        import megatron_on_cpu  # noqa: F401
    return open_engine(config, torch.device("cpu"), small.VOCABULARY, 128)


def train(engine, first: int, last: int) -> list[tuple[float, float]]:
    """Train. Return (loss, gradient norm) of each step."""
    curve = []
    cp = engine.cp
    loader = steps(first, last, cp.data_parallel_rank, cp.data_parallel_size)
    for number, batches in enumerate(cp.steps(loader)):
        loss = cp.mean_loss(engine.backward(batches))
        curve.append((loss, engine.clip(CLIP)))
        engine.update(learning_rate(first + number))
    return curve


def _curve(rank: int, config: Config, count: int = STEPS) -> list[tuple[float, float]]:
    engine = opened(config)
    try:
        return train(engine, 0, count)
    finally:
        engine.close()


def plain_curve(config: Config, count: int = STEPS) -> list[tuple[float, float]]:
    """Train in a plain PyTorch loop in a single process. Return (loss, gradient norm) of each step."""
    model = build_model(config, configured_model(config, small.VOCABULARY, 128))
    kinds = [
        [parameter for parameter in model.parameters() if (parameter.dim() > 1) == decays] for decays in (True, False)
    ]
    groups = [
        {"params": parameters, "weight_decay": decay} for parameters, decay in zip(kinds, (0.1, 0.0), strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    curve = []
    for step, (batches,) in enumerate(zip(steps(0, count, 0, 1), strict=True)):
        loss, gradients = small.in_one_process(model, batches)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        curve.append((float(loss), float(norm)))
    return curve


@pytest.fixture(scope="module")
def wanted() -> list[tuple[float, float]]:
    curve = plain_curve(config_of("fsdp2"))
    assert curve[-1][0] < curve[0][0]
    assert {norm > CLIP for _, norm in curve} == {True, False}, curve
    return curve


RUNS = {
    "fsdp2": config_of("fsdp2"),
    "fsdp2, copies, shared attention": dataclasses.replace(
        config_of("fsdp2", data="per_rank", strategy="cad"), engine=EngineConfig(shard_size=2)
    ),
    "deepspeed 3": config_of("deepspeed", stage=3),
    "deepspeed 0": config_of("deepspeed", stage=0),
    "deepspeed 1": config_of("deepspeed", stage=1),
    "megatron tp 2, cp 2": config_of("megatron", tensor_parallel_size=2),
    "deepspeed 2": config_of("deepspeed", stage=2),
    "megatron cp 2": config_of("megatron"),
    "megatron tp 2, pp 2": config_of("megatron", size=1, tensor_parallel_size=2, pipeline_parallel_size=2),
    "megatron pp 2, cp 2": config_of("megatron", pipeline_parallel_size=2),
    "deepspeed 2, shared attention": config_of("deepspeed", data="per_rank", strategy="cad"),
    "megatron, shared attention": config_of("megatron", data="per_rank", strategy="cad"),
}


@pytest.mark.sampled(20)
@pytest.mark.parametrize("run", RUNS)
def test_an_engine_has_the_curve_of_one_process(run, wanted):
    for curve in run_on_ranks(RUNS[run].parallel.ranks, _curve, RUNS[run]):
        assert torch.allclose(torch.tensor(curve), torch.tensor(wanted), rtol=1e-4, atol=0)


SPARING = {
    "deepspeed 3": config_of(
        "deepspeed", stage=3, memory=MemoryConfig(loss_tile_tokens=7, activation_checkpointing="save_attention")
    ),
    "deepspeed 2": config_of(
        "deepspeed", stage=2, memory=MemoryConfig(loss_tile_tokens=7, activation_checkpointing="full")
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("run", SPARING)
def test_tiles_and_checkpointed_layers_have_the_same_curve(run, wanted):
    for curve in run_on_ranks(SPARING[run].parallel.ranks, _curve, SPARING[run], 5):
        assert torch.allclose(torch.tensor(curve), torch.tensor(wanted[:5]), rtol=1e-4, atol=0)


def spoil(model: torch.nn.Module) -> list:
    """Make the embeddings' outputs NaN on the stage that has them. Return the hooks' handles."""
    ends = ("embed_tokens", "word_embeddings")
    embeddings = [module for name, module in model.named_modules() if name.endswith(ends)]
    return [module.register_forward_hook(lambda module, inputs, output: output * math.nan) for module in embeddings]


def _dropped(rank: int, config: Config):
    """Compare parameters before and after steps that are clipped and dropped, one of them with non-finite gradients."""
    engine = opened(config)
    try:
        train(engine, 0, 2)
        before = engine.state()
        cp = engine.cp
        for number, batches in enumerate(cp.steps(steps(2, 4, cp.data_parallel_rank, cp.data_parallel_size))):
            broken = spoil(engine.model) if number else []
            engine.backward(batches)
            for hook in broken:
                hook.remove()
            assert math.isnan(engine.clip(CLIP)) == (number == 1)
            engine.drop()
        after = engine.state()
        assert after.updates == before.updates == 2
        same = all(
            torch.equal(part_before[name], part_after[name])
            for part_before, part_after in zip(before[:3], after[:3], strict=True)
            for name in part_before
        )
        return same, train(engine, 2, 4)
    finally:
        engine.close()


@pytest.mark.sampled(20)
@pytest.mark.parametrize("run", RUNS)
def test_a_dropped_step_leaves_nothing_behind(run, wanted):
    for same, curve in run_on_ranks(RUNS[run].parallel.ranks, _dropped, RUNS[run]):
        assert same
        assert torch.allclose(torch.tensor(curve), torch.tensor(wanted[2:4]), rtol=1e-4, atol=0)


def _evaluated(rank: int, config: Config):
    """Return a step's loss computed without gradients, with gradients, and from its token losses."""
    engine = opened(config)
    try:
        cp, sums = engine.cp, []

        def add(losses: torch.Tensor, batch: dict) -> None:
            assert losses.shape == batch["labels"].flatten().shape and not losses.requires_grad
            sums.append(losses.double().sum() * batch["loss_scale"])

        for batches in cp.steps(steps(2, 3, cp.data_parallel_rank, cp.data_parallel_size)):
            losses_ = [engine.evaluate(batches, add)]
            assert engine.model.training
            losses_.append(engine.backward(batches, add))
            engine.drop()
        return [cp.mean_loss(values) for values in (*losses_, sums[: len(batches)])]
    finally:
        engine.close()


@pytest.mark.parametrize("run", RUNS)
def test_evaluation_has_the_loss_of_training_and_of_its_tokens(run):
    for losses in run_on_ranks(RUNS[run].parallel.ranks, _evaluated, RUNS[run]):
        assert losses == pytest.approx(losses[:1] * 3, rel=1e-6)


def _moved(rank: int, config: Config, middle: int, folder: str):
    engine = opened(config)
    try:
        train(engine, 0, middle)
        dcp.save(saved(engine.state()), checkpoint_id=folder)
        names = [name for name, _ in engine.named_parameters()]
        return train(engine, middle, middle + 2), names
    finally:
        engine.close()


def saved(state: EngineState) -> dict:
    return {kind: tensors for kind, tensors in state._asdict().items() if kind != "updates"}


def _gone_on(rank: int, config: Config, middle: int, folder: str):
    engine = opened(config)
    try:
        state = engine.state()
        assert state.updates == 0
        dcp.load(saved(state), checkpoint_id=folder)
        engine.load(state._replace(updates=middle))
        again = engine.state()
        assert again.updates == middle
        for part, part_again in zip(state[:3], again[:3], strict=True):
            assert part.keys() == part_again.keys() and all(torch.equal(part[name], part_again[name]) for name in part)
        return train(engine, middle, middle + 2)
    finally:
        engine.close()


# (engine that saves, engine that loads)
MOVES = [
    ("deepspeed 3", "megatron tp 2, cp 2"),
    ("deepspeed 0", "deepspeed 3"),
    ("deepspeed 3", "deepspeed 1"),
    ("megatron tp 2, pp 2", "deepspeed 0"),
    ("megatron pp 2, cp 2", "deepspeed 2"),
]


@pytest.mark.full
@pytest.mark.parametrize(("first", "second"), MOVES)
def test_another_engine_continues_from_the_state_of_one(first, second, tmp_path):
    every = run_on_ranks(RUNS[first].parallel.ranks, _moved, RUNS[first], 2, str(tmp_path))
    wanted = every[0][0]
    model = build_model(RUNS[first], configured_model(RUNS[first], small.VOCABULARY, 128))
    assert {name for _, names in every for name in names} == {name for name, _ in model.named_parameters()}
    for got in run_on_ranks(RUNS[second].parallel.ranks, _gone_on, RUNS[second], 2, str(tmp_path)):
        assert got[0][0] == pytest.approx(wanted[0][0], rel=1e-6)
        assert torch.allclose(torch.tensor(got), torch.tensor(wanted), rtol=1e-5, atol=0)


HALF = {
    "deepspeed 3": config_of("deepspeed", stage=3, dtype="bfloat16"),
    "megatron tp 2, cp 2": config_of("megatron", tensor_parallel_size=2, dtype="bfloat16"),
    "deepspeed 2": config_of("deepspeed", stage=2, dtype="bfloat16"),
    "deepspeed 1": config_of("deepspeed", stage=1, dtype="bfloat16"),
}


def _half(rank: int, config: Config):
    """Return a curve, whether a dropped step left the state unchanged, and the dtypes of the saved state."""
    engine = opened(config)
    try:
        curve = train(engine, 0, 4)
        before = engine.state()
        cp = engine.cp
        for batches in cp.steps(steps(4, 5, cp.data_parallel_rank, cp.data_parallel_size)):
            engine.backward(batches)
            engine.clip(CLIP)
            engine.drop()
        engine.load(before)
        after = engine.state()
        same = all(
            torch.equal(part_before[name], part_after[name])
            for part_before, part_after in zip(before[:3], after[:3], strict=True)
            for name in part_before
        )
        return curve + train(engine, 4, 10), same, {tensor.dtype for kept in after[:3] for tensor in kept.values()}
    finally:
        engine.close()


@pytest.mark.full
@pytest.mark.parametrize("run", HALF)
def test_bfloat16_follows_the_curve_and_keeps_weights_in_float32(run, wanted):
    for curve, same, dtypes in run_on_ranks(4, _half, HALF[run]):
        # the errors of 8-bit mantissas, summed over tokens and layers
        assert torch.allclose(torch.tensor(curve), torch.tensor(wanted[:10]), rtol=5e-2, atol=0)
        assert same and dtypes <= {torch.float32}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            config_of("deepspeed", dtype="float64"),
            "model.dtype: engine deepspeed does not train in float64; fsdp2 does.",
        ),
        (
            config_of("megatron", dtype="float64"),
            "model.dtype: engine megatron does not train in float64; fsdp2 does.",
        ),
        (config_of("deepspeed", stage=0, dtype="bfloat16"), "engine.zero_stage: with model.dtype = bfloat16"),
        (config_of("fsdp2", tensor_parallel_size=2), "parallel.tensor_parallel_size: engine fsdp2 does not support it"),
        (
            config_of("megatron", tensor_parallel_size=4, size=1),
            "model.num_key_value_heads: 2 do not divide among 4 tensor",
        ),
        (
            config_of("megatron", pipeline_parallel_size=4, size=1),
            "model.num_layers: 2 do not divide among 4 pipeline stages",
        ),
        (
            config_of("megatron", memory=MemoryConfig(loss_tile_tokens=8)),
            "memory.loss_tile_tokens: engine megatron does not",
        ),
    ],
)
def test_settings_that_an_engine_does_not_support_are_refused_by_name(config, sentence):
    assert any(str(problem).startswith(sentence) for problem in problems_of(config)), problems_of(config)


def test_the_runs_of_these_tests_are_not_refused():
    for config in (*RUNS.values(), *SPARING.values(), *HALF.values()):
        assert not problems_of(config)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tie_word_embeddings": True}, "tied embeddings"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"attention_bias": True}, "attention_bias"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rotary embeddings of type yarn",
        ),
    ],
)
def test_models_that_megatron_computes_otherwise_are_refused_by_name(changes, sentence, tmp_path):
    shape = configured_model(config_of("megatron"), small.VOCABULARY, 128)
    for key, value in changes.items():
        setattr(shape, key, value)
    shape.save_pretrained(tmp_path)
    config = config_of("megatron")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path)))
    with pytest.raises(DistattnError, match=sentence):
        open_engine(config, torch.device("cpu"), small.VOCABULARY, 128)


KINDS = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "llama": {"rope_parameters": LLAMA3},
}


@pytest.mark.sampled(20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pipeline", [2, 1])
def test_models_that_megatron_knows_have_transformers_curve(kind, pipeline, tmp_path):
    shape = configured_model(config_of("megatron"), small.VOCABULARY, 128).to_dict()
    for key in ("model_type", "architectures", "rope_parameters", "head_dim", "transformers_version", "attention_bias"):
        shape.pop(key, None)
    AutoConfig.for_model(kind, **{**shape, **KINDS[kind]}).save_pretrained(tmp_path)
    config = config_of("megatron", tensor_parallel_size=2, pipeline_parallel_size=pipeline, size=2 // pipeline)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path)))
    wanted = torch.tensor(plain_curve(config, 4))
    for curve in run_on_ranks(4, _curve, config, 4):
        assert torch.allclose(torch.tensor(curve), wanted, rtol=1e-4, atol=0)


def test_an_engine_that_is_not_installed_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "distattn.training.engines.deepspeed")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(DistattnError, match=r'needs the package deepspeed; run pip install "distattn\[deepspeed\]"'):
        open_engine(config_of("deepspeed"), torch.device("cpu"), small.VOCABULARY, 128)
