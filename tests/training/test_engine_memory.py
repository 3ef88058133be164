"""While an engine opens, a rank holds its share of the weights and little more, counted in tensor bytes."""

import math
import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("megatron.core", reason="megatron-core is not installed")

import torch  # noqa: E402
from live_bytes import LiveBytes  # noqa: E402
from processes import run_on_ranks  # noqa: E402

from distattn.driver.context_parallel import ContextParallel  # noqa: E402
from distattn.training.config.sections import Config, EngineConfig, ModelConfig, ParallelConfig  # noqa: E402
from distattn.training.engines import deepspeed, fsdp2, megatron  # noqa: E402
from distattn.training.engines.engine import open_engine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# 8 layers with the proportions of Llama 3 70B, 64 times narrower
SHAPE = ModelConfig(num_layers=8, hidden_size=128, num_attention_heads=8, num_key_value_heads=8, intermediate_size=448)
VOCABULARY = 2048


class _WeightsAreThere(Exception):
    """Raised once an engine has its weights, so that opening it goes no further."""


def _opened(rank: int, name: str, how: EngineConfig, parallel: dict[str, int]) -> tuple[int, int]:
    """Return two peaks, in bytes above the initial memory: while the model is built, and from then until the engine has
    its weights.
    """
    module = {"fsdp2": fsdp2, "deepspeed": deepspeed, "megatron": megatron}[name]
    os.environ["LOCAL_RANK"] = str(rank)
    if name == "megatron":
        import megatron_on_cpu  # noqa: F401
    live, build, counted = LiveBytes(), module.build_model, []

    def counting(*args, **named):
        counted.append(live.now)
        live.peak = live.now
        model = build(*args, **named)
        counted.append(live.peak)
        live.peak = live.now
        return model

    def end(*args, **named):
        raise _WeightsAreThere

    module.build_model = counting
    ContextParallel.loss_scale = end
    deepspeed.deepspeed.initialize = end
    config = Config(model=SHAPE, parallel=ParallelConfig(ranks=4, kernel="reference", **parallel), engine=how)
    with live, pytest.raises(_WeightsAreThere):
        open_engine(config, torch.device("cpu"), VOCABULARY, 128)
    before, building = counted
    return building - before, live.peak - before


def _sizes() -> tuple[int, int]:
    """Return the float32 bytes of the model and of its largest module."""
    layer = 4 * SHAPE.hidden_size**2 + 3 * SHAPE.hidden_size * SHAPE.intermediate_size + 2 * SHAPE.hidden_size
    embedding = VOCABULARY * SHAPE.hidden_size
    return 4 * (SHAPE.num_layers * layer + 2 * embedding + SHAPE.hidden_size), 4 * embedding


ENGINES = {
    "fsdp2": ("fsdp2", {}, {}),
    "deepspeed 3": ("deepspeed", {"zero_stage": 3}, {}),
    "deepspeed 2": ("deepspeed", {"zero_stage": 2}, {}),
    "megatron": (
        "megatron",
        {},
        {"context_parallel_size": 1, "tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_holds_its_share_and_one_module_while_an_engine_opens(engine):
    name, how, parallel = ENGINES[engine]
    whole, largest = _sizes()
    for building, handing_over in run_on_ranks(4, _opened, name, EngineConfig(name=name, **how), parallel):
        # norms and rotary frequencies add a few bytes
        assert whole / 4 + largest <= building < 1.01 * (whole / 4 + largest)
        if engine == "deepspeed 2":
            # stage 2 keeps the full weights on every device by design, and frees a rank's rows as they are gathered
            assert whole <= handing_over < whole + 2 * largest
        else:
            # the rank's part, plus a gathered embedding and a copy of it
            assert math.ceil(whole / 4) <= handing_over < 1.01 * whole / 4 + 2.5 * largest


def _held_by_a_state(rank: int, name: str, how: EngineConfig) -> int:
    """Return the peak bytes above the initial memory while an engine builds its state and gathered tensors are copied
    elsewhere.
    """
    os.environ["LOCAL_RANK"] = str(rank)
    if name == "megatron":
        import megatron_on_cpu  # noqa: F401
    config = Config(model=SHAPE, parallel=ParallelConfig(ranks=2, kernel="reference"), engine=how)
    kept: list[str] = []

    def keep(name, tensor):
        kept.append(name)
        return torch.empty(0)

    with LiveBytes() as live:
        engine = open_engine(config, torch.device("cpu"), VOCABULARY, 128)
        try:
            before = live.peak = live.now
            state = engine.state(keep)
            # both ranks have weights to save, and no name occurs twice
            assert len(set(kept)) == len(kept) == sum(map(len, state[:3])) > 10
            return live.peak - before
        finally:
            engine.close()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("engine", ["deepspeed 3", "deepspeed 2", "megatron"])
def test_a_rank_holds_few_gathered_tensors_while_its_state_is_saved(engine):
    name, how, _ = ENGINES[engine]
    _, largest = _sizes()
    for held in run_on_ranks(2, _held_by_a_state, name, EngineConfig(name=name, **how)):
        # one gathered tensor and its parts, although all tensors that a rank saves are 14 times as large as the largest
        assert largest <= held < 5 * largest
