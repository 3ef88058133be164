"""Layer calls at full size on meta tensors: no sync, no copy between host and device; launches, bytes and peak within budgets."""

import random

import pytest
from meta_run import layer_call

import distattn as da
from distattn.ir.plan import Payload

GB = 1e9
STRATEGIES = ["ring", "allgather", "ulysses", "usp", "cad"]


def packed(tokens):
    """Documents of ever other lengths, as packs have them."""
    lengths, left, source = [], tokens, random.Random(0)
    while left:
        lengths.append(min(left, int(source.lognormvariate(7.5, 1.3)) + 1))
        left -= lengths[-1]
    return lengths


def plan_of(strategy, lengths, heads, kv_heads, **how):
    mask = da.Mask.documents(lengths)
    layout = da.Layout.contiguous(lengths, 8) if strategy == "cad" else da.Layout.zigzag(lengths, 8)
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=128, dtype="bfloat16")
    return da.make_plan(mask, layout, strategy=strategy, **shape, **how)


# of a pack of 8 x 8K tokens, 64:8 heads: operators a pass, and GB that they move; what was measured, and a little more
PACK = {
    "ring": ((2, 0.41), (12, 0.95)),
    "allgather": ((9, 0.75), (24, 1.7)),
    "ulysses": ((48, 1.3), (66, 2.0)),
    "usp": ((48, 1.3), (88, 2.3)),
    "cad": ((70, 1.4), (104, 2.45)),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_glue_of_a_pack_stays_in_its_budget(strategy):
    plan = plan_of(strategy, packed(65536), 64, 8)
    for found, (launches, size) in zip(layer_call(plan, 1)[:2], PACK[strategy], strict=True):
        assert found.kernels and sum(found.launches.values()) <= launches
        assert sum(found.bytes.values()) <= size * GB


# of a million tokens: GB of new tensors that are alive at once
MILLION = {
    (32, 8): {
        "ring": (6.8, 10.3),
        "allgather": (12.4, 27.5),
        "ulysses": (8.9, 14.1),
        "usp": (8.9, 14.1),
        "cad": (16.8, 32.1),
    },
    # 70B, on one tensor-parallel rank of 8
    (8, 1): {"ring": (1.6, 1.9), "allgather": (2.1, 3.9), "ulysses": (3.0, 5.9), "usp": (1.6, 1.9), "cad": (3.2, 5.8)},
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("heads", MILLION)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_million_tokens_take_so_much_memory(strategy, heads):
    plan = plan_of(strategy, [1 << 20], *heads)
    forward, backward, _ = layer_call(plan, 1)
    assert (forward.peak <= MILLION[heads][strategy][0] * GB) and (backward.peak <= MILLION[heads][strategy][1] * GB)


def test_results_that_no_two_kernels_add_to_are_held_and_sent_in_half_precision():
    lengths = packed(65536)
    once = {strategy: plan_of(strategy, lengths, 64, 8).call.written_once for strategy in STRATEGIES}
    assert once["ulysses"] == (Payload.O, Payload.dQ, Payload.dKV)
    assert once["ring"] == ()
    plan = plan_of("ulysses", lengths, 64, 8)
    moved = {Payload(int(payload)): 0 for payload in plan.bytes()["payload"]}
    for payload, size in zip(plan.bytes()["payload"], plan.bytes()["bytes"], strict=True):
        moved[Payload(int(payload))] += int(size)
    # outputs take as many bytes as queries, and a log-sum-exp of four bytes for each 256; gradients as many as what they are of
    assert moved[Payload.O] * 64 == moved[Payload.Q] * 65 and moved[Payload.dQ] == moved[Payload.Q]
    assert moved[Payload.dKV] == moved[Payload.KV]
