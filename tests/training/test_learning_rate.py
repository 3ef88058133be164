"""Learning rates depend only on the step, and norms and biases do not decay."""

import math

import pytest
import torch
from processes import run_on_ranks
from small import build
from torch.distributed.device_mesh import init_device_mesh

from distattn.adapters import pytorch
from distattn.ir.errors import DistattnError
from distattn.training.learning_rate import (
    SCHEDULES,
    ScheduleSettings,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)


def rates(name, steps=100, **settings):
    settings_ = ScheduleSettings(2.0, steps, name, **settings)
    return [learning_rate(settings_, step) for step in range(steps)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("warmup", [0, 1, 4, 60])
def test_every_schedule_rises_to_its_peak_and_ends_at_its_minimum(name, steps, warmup):
    if warmup > steps or (name == "wsd" and warmup > steps - max(round(0.1 * steps), 1)):
        with pytest.raises(DistattnError, match="warmup_steps"):
            rates(name, steps, warmup_steps=warmup)
        return
    all_rates = rates(name, steps, warmup_steps=warmup, min_learning_rate=0.5)
    assert all(0 < rate <= 2.0 for rate in all_rates)
    rising, falling = all_rates[:warmup], all_rates[warmup:]
    assert rising == [2.0 * (step + 1) / warmup for step in range(warmup)]
    assert all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    if name == "constant":
        assert set(falling) <= {2.0}
    elif len(falling) > 1:
        assert falling[-1] == 0.5 and falling[0] == 2.0
    if steps - warmup > 10:
        assert 2.0 in all_rates


def test_rates_match_the_formulas():
    cosine = rates("cosine", 101, warmup_steps=0, min_learning_rate=1.0)
    assert cosine[50] == pytest.approx(1.5) and cosine[25] == pytest.approx(1 + (1 + math.cos(math.pi / 4)) / 2)
    assert rates("linear", 101)[25] == pytest.approx(1.5)
    wsd = rates("wsd", 100, warmup_steps=10, decay_share=0.2)
    assert wsd[9:80] == [2.0] * 71 and wsd[80] == pytest.approx(1.9) and wsd[-1] == 0.0
    # if a run is longer than its schedule, the last rate stays
    settings = ScheduleSettings(2.0, 100, "linear", min_learning_rate=0.25)
    assert learning_rate(settings, 10_000) == 0.25


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(learning_rate=-1, steps=1), "learning_rate: at least 0, not "),
        (dict(learning_rate=math.nan, steps=1), "learning_rate: at least 0, not "),
        (dict(learning_rate=1, steps=0), "steps: at least 1, not 0"),
        (dict(learning_rate=1, steps=1, name="step"), "name: there is no 'step'; there are constant, cosine"),
        (dict(learning_rate=1, steps=1, min_learning_rate=2), "min_learning_rate: at most learning_rate = 1, not 2"),
        (dict(learning_rate=1, steps=10, name="wsd", decay_share=0), "decay_share: above 0, not 0"),
        (dict(learning_rate=1, steps=10, name="wsd", decay_share=0.5, warmup_steps=6), "begins at step 5; use fewer"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, sentence):
    with pytest.raises(DistattnError, match=sentence):
        ScheduleSettings(**settings)


class Experts(torch.nn.Module):
    """A module with stacked experts, a norm, a frozen layer and a shared weight."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 4)
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 8))
        self.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(2, 8))
        self.norm = torch.nn.LayerNorm(4)
        self.frozen = torch.nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.head = torch.nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


def test_norms_biases_and_vectors_do_not_decay():
    model = Experts()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = (
        [names[id(parameter)] for parameter in group["params"]] for group in parameter_groups(model, 0.1)
    )
    assert decayed == ["gate_up_proj", "embedding.weight"]
    assert others == ["gate_up_proj_bias", "norm.weight", "norm.bias", "head.bias"]
    (only,) = parameter_groups(torch.nn.LayerNorm(3), 0.1)
    assert only["weight_decay"] == 0.0
    with pytest.raises(DistattnError, match="Linear has no parameter that is trained"):
        parameter_groups(model.frozen, 0.1)


def test_an_optimizer_takes_groups_and_rates():
    model = Experts()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=torch.tensor(1.0), capturable=False, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    assert held is optimizer.param_groups[0]["lr"] and [float(g["lr"]) for g in optimizer.param_groups] == [0.25, 0.25]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def _sharded_groups(rank):
    model = build(torch.float32)
    whole = [[parameter.shape for parameter in group["params"]] for group in parameter_groups(model, 0.1)]
    pytorch.shard_parameters(model, init_device_mesh("cpu", (2,), mesh_dim_names=("cp",)))
    groups = parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.5)
    return (
        whole,
        [[parameter.shape for parameter in group["params"]] for group in groups],
        optimizer.param_groups[1]["lr"],
    )


def test_sharded_parameters_are_judged_by_their_global_shapes():
    for whole, sharded, rate in run_on_ranks(2, _sharded_groups):
        assert whole == sharded and all(len(shape) == 1 for shape in sharded[1]) and len(sharded[1]) == 5
        assert rate == 0.5
