"""The cost of a pack on a device: attention as in the cluster's cost model, plus the matrix products of the model's
shape.
"""

import json

import numpy as np
import pytest
from planned_data import write_corpus

from distattn.cluster.cost import attention_speed, flops_per_cell, overhead_keys, padded_cells
from distattn.data.packing.pack_config import load_pack_config, make_configured_plan, open_configured_plan, open_corpora
from distattn.data.packing.pack_rule import PackCost, PackRule
from distattn.data.packing.training_cost import ModelShape, load_device, training_cost
from distattn.ir.errors import DistattnError

LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
HEAD = 'plan = "run.packs"\nsteps = 3\n'
RULE = "[rule]\ncontext = [[0, 64]]\ntokens_per_step = 256\nmax_cost = 0.8\n"
CORPUS = '[[corpus]]\nname = "web"\nfiles = ["web-0"]\n'
SIZES = "num_layers = 2\nhidden_size = 64\nnum_attention_heads = 4\nintermediate_size = 96\nvocab_size = 300\n"


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path, "web", [[5, 3, 60, 9, 20, 64, 1, 30] * 6])
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": None, "rope_theta": 5e5}))
    return tmp_path


def load(folder, cost, rule=RULE):
    (folder / "packs.toml").write_text(HEAD + rule + cost + CORPUS)
    return load_pack_config(folder / "packs.toml")


def test_products_and_pairs_match_the_shape():
    """Compare an 8B Llama on an H100 with a count by hand.

    It has 7.5e9 weights and 2 x 32 x 32 x 128 multiplications per query-key pair. The backward pass of attention takes
    2.5 times as many.
    """
    shape = ModelShape(32, 4096, 32, 14336, 128256, 8)
    assert shape.multiplications == 32 * 4096 * (2 * 40 * 128 + 3 * 14336) + 4096 * 128256
    cost = training_cost(shape, load_device("h100"))
    pairs, products = 131072**2 / 2, 6 * shape.multiplications * 131072
    expected = pairs * 4 * 32 * 32 * 128 * (1 / 701e12 + 2.5 / 601e12) + products / 750e12
    assert cost.seconds(131072) == pytest.approx(expected, rel=0.05)
    # overheads are a larger share for short documents
    assert 1024 * cost.seconds(128) < cost.seconds(131072) < 1.2 * 1024 * cost.seconds(128) + pairs * 7e-9


@pytest.mark.parametrize("device", ["h100", "b200", "laptop"])
def test_attention_matches_the_cost_model_of_clusters(device):
    """Compare attention's seconds with those computed from `padded_cells`, averaged over lengths that fill their last
    tiles to varying degrees.
    """
    cluster = load_device(device)
    shape = ModelShape(1, 1, 16, 1, 1, head_dim=128)
    cost = training_cost(shape, cluster)
    ours = theirs = 0.0
    for length in range(1024, 1024 + 4 * cluster.device.tile[0]):
        ours += cost.seconds(length)
        theirs += _kernel_seconds(cluster, length)
    assert ours == pytest.approx(theirs, rel=0.02)


def _kernel_seconds(cluster, length):
    # a causal band: each row sees all keys up to its own
    bands = np.array([[0, length, 0, length, -length, 0, 1, 1, 0, 0]])
    long = np.array([1 << 20])
    return sum(
        16
        * float(padded_cells(bands, cluster.device.tile[0], overhead_keys(cluster, direction, 128)).sum())
        * flops_per_cell(direction, 128, 128)
        / float(attention_speed(cluster, direction, 128, long, long)[0])
        for direction in ("forward", "backward")
    )


def test_a_plan_keeps_the_numbers_of_the_device(folder):
    config = load(folder, '[cost]\ndevice = "h100"\nmodel = "config.json"\n')
    cost = training_cost(ModelShape(32, 4096, 32, 14336, 128256, 8), load_device("h100"))
    assert config.rule == PackRule(((0, 64),), 256, max_cost=0.8, cost=cost)
    corpora = open_corpora(config)
    plan = make_configured_plan(config, corpora)
    assert open_configured_plan(config, corpora).rule.cost == plan.rule.cost == cost
    most = 0.8 * cost.seconds(64)
    for step in range(plan.steps):
        for pack in plan.step(step).packs:
            assert len(pack.lengths) == 1 or sum(map(cost.seconds, pack.lengths)) <= most * (1 + 1e-9)
    other = load(folder, '[cost]\ndevice = "b200"\nmodel = "config.json"\n')
    with pytest.raises(DistattnError, match="was made with rule.cost ="):
        open_configured_plan(other, corpora)


def test_devices_are_names_clusters_and_files_and_sizes_may_be_named(folder):
    by_name = load(folder, f'[cost]\ndevice = "h200"\n{SIZES}').rule.cost
    load_device("h200").save(folder / "mine.toml")
    assert load(folder, f'[cost]\ndevice = "mine.toml"\n{SIZES}').rule.cost == by_name
    assert load(folder, f'[cost]\ndevice = "h200-2x8"\n{SIZES}head_dim = 16\n').rule.cost == by_name
    assert load(folder, f'[cost]\ndevice = "h200"\n{SIZES}head_dim = 32\n').rule.cost != by_name


def test_a_plan_without_a_device_is_the_file_that_it_was():
    rule = PackRule(((0, 64),), 256)
    assert rule.as_dict()["cost"] == {"token_cells": 26_600, "document_cells": 131_072}
    assert PackRule.from_dict(rule.as_dict()) == rule and rule.cost.seconds(64) == 0
    rule_with_cost = PackRule(((0, 64),), 256, cost=PackCost(1, 2, 3))
    assert PackRule.from_dict(json.loads(json.dumps(rule_with_cost.as_dict()))) == rule_with_cost


@pytest.mark.parametrize(
    ("cost", "sentence"),
    [
        ('[cost]\ndevice = "h10"\nmodel = "config.json"\n', ":8: cost.device: there is no cluster 'h10'; there are a100-"),
        ('[cost]\ndevice = "nix.toml"\nmodel = "config.json"\n', ":8: cost.device: .*nix.toml: cannot be read: No such file"),
        ('[cost]\ndevice = "h100"\nmodel = "nix.json"\n', ":9: cost.model: .*nix.json: cannot be read: No such file"),
        ('[cost]\ndevice = "h100"\nmodel = "packs.toml"\n', ":9: cost.model: .*packs.toml: cannot be read: it is not JSON"),
        ('[cost]\ndevice = "h100"\nmodel = "moe.json"\n', ":9: cost.model: .*moe.json: num_experts: the configuration of a"),
        ('[cost]\ndevice = "h100"\nmodel = "some.json"\n', ":9: cost.model: .*some.json: hidden_size is missing"),
        ('[cost]\ndevice = "h100"\nmodel = "list.json"\n', ":9: cost.model: .*list.json: is not a model's configuration"),
        ('[cost]\ndevice = "h100"\nmodel = "config.json"\nhead_dim = 3\n', ":10: cost.head_dim: is given in addition to model"),
        ('[cost]\ndevice = "h100"\nhead_dim = 3\n', ":7: cost.num_layers: is missing; name all sizes of the model, or model"),
        (f'[cost]\ndevice = "h100"\n{SIZES.replace("64", "65")}', ":11: cost.num_attention_heads: hidden_size 65 cannot be div"),
        (f'[cost]\ndevice = "h100"\n{SIZES.replace("96", "0")}', ":12: cost.intermediate_size: must be at least 1, not 0"),
        (f"[cost]\n{SIZES}", ":7: cost.device: is missing"),
        ('[cost]\ndevice = "h100"\nmodle = 1\n', ":9: cost.modle: unknown key. Did you mean cost.model?"),
        ('[rule.cost]\ntoken_cells = 5\n[cost]\ndevice = "h100"\nmodel = "config.json"\n', ":9: cost: is estimated for a dev"),
    ],
)  # fmt: skip
def test_devices_and_models_that_cannot_be_estimated_are_refused_with_line_and_key(folder, cost, sentence):
    (folder / "moe.json").write_text(json.dumps(LLAMA | {"num_experts": 8}))
    (folder / "some.json").write_text(json.dumps({"num_hidden_layers": 3}))
    (folder / "list.json").write_text("[]")
    with pytest.raises(DistattnError, match=f"packs.toml{sentence}"):
        load(folder, cost)
