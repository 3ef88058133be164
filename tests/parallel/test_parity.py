"""Every strategy against the dense fp64 oracle, forward and backward, all ranks in lock step."""

import functools

import pytest
from cases import LENGTHS, layouts, masks
from oracle import Record, assert_close, dense, planned_bytes, random_inputs, run_all_ranks

from distattn.parallel.make_plan import STRATEGIES, make_plan
from distattn.parallel.verify import verify
from distattn.plan import POLICIES

TOLERANCE = {"float64": 1e-11, "float32": 2e-5}
LONG = (1, 7, 129, 1000)


@functools.cache
def case(lengths, mask, heads, head_dim=8):
    inputs = random_inputs(sum(lengths), *heads, head_dim)
    return inputs, dense(masks(lengths)[mask], inputs)


@functools.cache
def all_layouts(lengths, ranks):
    return layouts(lengths, ranks)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=lambda h: f"H{h[0]}-K{h[1]}")
@pytest.mark.parametrize("ranks", [1, 2, 4], ids=lambda r: f"R{r}")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mask", masks())
def test_outputs_and_gradients_equal_the_oracle(mask, strategy, ranks, heads):
    inputs, wanted = case(LENGTHS, mask, heads)
    for layout in all_layouts(LENGTHS, ranks).values():
        for dtype, kernel in (
            ("float64", "reference"),
            ("float64", "cpu"),
            ("float32", "cpu"),
            ("float32", "reference"),
        ):
            shape = dict(heads=heads[0], kv_heads=heads[1], head_dim=8, dtype=dtype)
            plan = make_plan(masks(LENGTHS)[mask], layout, strategy=strategy, **shape)
            assert_close(run_all_ranks(plan, inputs, kernel), wanted, TOLERANCE[dtype])


SPREAD = [
    ("causal", "ring", 4, (8, 2), "zigzag"),
    ("causal", "allgather", 2, (8, 8), "contiguous"),
    ("causal", "ulysses", 4, (8, 2), "document_zigzag"),
    ("full", "ring", 2, (8, 8), "from_chunks"),
    ("full", "ulysses", 2, (8, 2), "contiguous"),
    ("documents", "ring", 4, (8, 8), "document_zigzag"),
    ("documents", "allgather", 4, (8, 2), "zigzag"),
    ("documents", "ulysses", 4, (8, 8), "from_chunks"),
    ("window", "ring", 4, (8, 2), "contiguous"),
    ("window", "allgather", 4, (8, 8), "document_zigzag"),
    ("odd", "allgather", 4, (8, 2), "from_chunks"),
]


@pytest.mark.parametrize(("mask", "strategy", "ranks", "heads", "layout"), SPREAD)
def test_longer_axes_equal_the_oracle_too(mask, strategy, ranks, heads, layout):
    inputs, wanted = case(LONG, mask, heads)
    for dtype in TOLERANCE:
        shape = dict(heads=heads[0], kv_heads=heads[1], head_dim=8, dtype=dtype)
        plan = make_plan(masks(LONG)[mask], all_layouts(LONG, ranks)[layout], strategy=strategy, **shape)
        assert_close(run_all_ranks(plan, inputs, "cpu"), wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_policy_is_right_moves_what_it_says_and_stays_in_memory(strategy, policy):
    for mask in ("causal", "documents", "window"):
        inputs, wanted = case(LENGTHS, mask, (6, 2))
        for ranks in (2, 4):
            for layout in all_layouts(LENGTHS, ranks).values():
                shape = dict(heads=6, kv_heads=2, head_dim=8, dtype="float64", backward=policy)
                plan = make_plan(masks(LENGTHS)[mask], layout, strategy=strategy, **shape)
                record = Record()
                assert_close(run_all_ranks(plan, inputs, "reference", record), wanted, 1e-11)
                assert record.bytes == planned_bytes(plan)
                proof = verify(plan)
                for rank in range(ranks):
                    # tensors the pass received and PyTorch had not freed yet
                    assert record.received["forward", rank, None] <= proof.forward_peak[rank] + proof.kept[rank]
                    assert record.received["backward", rank, None] <= proof.backward_peak[rank]
                # the executor's own count, which includes partial results for others, is exact
                assert record.peak == {"forward": proof.forward_peak.tolist(), "backward": proof.backward_peak.tolist()}


def test_value_heads_may_be_wider_than_key_heads():
    inputs = random_inputs(sum(LENGTHS), 4, 2, 8, 12)
    wanted = dense(masks()["documents"], inputs)
    for strategy in STRATEGIES:
        shape = dict(heads=4, kv_heads=2, head_dim=8, v_head_dim=12, dtype="float64")
        plan = make_plan(masks()["documents"], all_layouts(LENGTHS, 4)["zigzag"], strategy=strategy, **shape)
        assert_close(run_all_ranks(plan, inputs, "reference"), wanted, 1e-11)


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_stays_close(strategy, kernel):
    inputs, wanted = case(LENGTHS, "documents", (8, 2))
    shape = dict(heads=8, kv_heads=2, head_dim=8, dtype="bfloat16")
    plan = make_plan(masks()["documents"], all_layouts(LENGTHS, 4)["zigzag"], strategy=strategy, **shape)
    # inputs alone are rounded to 2^-9
    assert_close(run_all_ranks(plan, inputs, kernel), wanted, 2e-2)


def test_results_are_the_same_bits_every_time():
    inputs, _ = case(LENGTHS, "causal", (8, 2))
    for strategy in STRATEGIES:
        shape = dict(heads=8, kv_heads=2, head_dim=8, dtype="float32")
        plan = make_plan(masks()["causal"], all_layouts(LENGTHS, 4)["zigzag"], strategy=strategy, **shape)
        first, second = (run_all_ranks(plan, inputs, "cpu") for _ in range(2))
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))
