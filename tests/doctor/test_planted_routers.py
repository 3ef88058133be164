"""Planted mistakes in router losses are named, and healthy mixtures of experts have no findings."""

import pytest
from planted import plant, script
from set_ups import FAMILIES
from test_planted import BF16, diagnoses

from distattn.doctor.reference import reference_result
from distattn.doctor.target import Target
from distattn.ir.errors import DistattnError

FAMILIES["experts"] = """
from transformers import MixtralConfig
from distattn.adapters.router_loss import router_loss_of_tokens
COEFFICIENT = 0.5
CONFIG = MixtralConfig(**SIZE, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
                       router_aux_loss_coef=COEFFICIENT)
"""
# the script calls the model itself and computes its own loss
OUTPUT = """
OUTPUT = []


def forward(model, part):
    OUTPUT[:] = [(model, model(**pytorch.inputs(part)))]
    return OUTPUT[0][1].logits


def loss(logits, part):
    return pytorch.loss_of(logits, part) + COEFFICIENT * extra(*OUTPUT[0], part)


def everywhere(x):
    # of all ranks; only this rank's part has a gradient
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.detach())
    parts[dist.get_rank()] = x
    return torch.cat(parts)
"""
PADDED = """
def context_parallel():
    return da.ContextParallel(strategy="ring", kernel="reference", pad_to=16)
"""
Z_LOSS = """
def router_loss(model, router_logits):
    return COEFFICIENT * torch.stack([layer.logsumexp(-1).square().mean() for layer in router_logits]).mean()


def z_loss(output, tokens, divisor):
    layers = torch.stack(output.router_logits)[:, :tokens]
    return layers.logsumexp(-1).square().sum() / divisor / len(layers)
"""
plant(
    {
        "aux_loss": OUTPUT + "def extra(model, output, part):\n    return output.aux_loss / 2",
        "aux_loss by labels": OUTPUT
        + "def extra(model, output, part):\n"
        + "    return output.aux_loss * part['loss_scale'] * (part['labels'] != -100).sum()",
        "none": OUTPUT + "def extra(model, output, part):\n    return 0.0",
        "whole loss on each rank": OUTPUT
        + "def extra(model, output, part):\n"
        + "    return 2 * router_loss_of_tokens(model, [everywhere(one) for one in output.router_logits]) / COEFFICIENT",
        "all tokens and padding": PADDED
        + OUTPUT
        + "def extra(model, output, part):\n"
        + "    return router_loss_of_tokens(model, [everywhere(one) for one in output.router_logits]) / COEFFICIENT",
        "logits alone": "def forward(model, part):\n    return pytorch.forward(model, part)",
        "z-loss of own tokens": Z_LOSS
        + OUTPUT
        + "def extra(model, output, part):\n    own = part['context_parallel'].own_tokens\n"
        + "    return z_loss(output, own, own) / 2",
        "padded ranks": PADDED,
        "z-loss": Z_LOSS
        + OUTPUT
        + "def extra(model, output, part):\n    return z_loss(output, part['context_parallel'].own_tokens, 97)",
        "two micro-batches": "def batch():\n    return [pack(1), pack(2)]",
    }
)
PLANTED = [
    ("loop", "aux_loss", "router loss of own tokens"),
    ("loop", "aux_loss by labels", "router loss of own tokens"),
    ("loop", "none", "router loss missing"),
    ("loop", "whole loss on each rank", "router loss factor"),
    ("loop", "all tokens and padding", "padding in router loss"),
    ("loop", "logits alone", "refused"),
    ("loop", "z-loss of own tokens", "router loss of own tokens"),
    ("loop", None, None),
    ("loop", None, None, BF16),
    ("loop", "padded ranks", None),
    ("loop", "z-loss", None),
    ("DDP", "two micro-batches", None),
]


@pytest.mark.full
def test_mistakes_of_router_losses_are_named_and_right_scripts_have_no_finding(tmp_path):
    texts = [
        script("experts", on, *filter(None, [name]), dtype=(*dtype, "float32")[0]) for on, name, _, *dtype in PLANTED
    ]
    # also test the model's own loss with padding
    texts.append(script("experts", "loop", "padded ranks", "aux_loss"))
    *results, padded = diagnoses(tmp_path, texts)
    wrong = []
    for (on, name, cause, *dtype), result in zip(PLANTED, results, strict=True):
        if (result.findings[0].cause if result.findings else None) != cause:
            wrong.append(f"{on} {name} {dtype}: {result}")
    assert not wrong, "\n".join(wrong)
    assert "of its own tokens and padding" in padded.findings[0].observed
    assert "call pytorch.local_loss" in results[5].findings[0].observed


def test_a_router_loss_of_a_model_without_router_logits_is_refused(tmp_path):
    path = tmp_path / "target.py"
    path.write_text(script("llama", more="COEFFICIENT = 1.0\n" + Z_LOSS))
    target = Target(str(path))
    model = target.model()
    with pytest.raises(DistattnError, match="the model's output has no router_logits"):
        reference_result(target, model, target.batches(model))
