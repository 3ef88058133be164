"""Plans as values: saving, loading, hashing and counting."""

import numpy as np
import pytest
from cases import layouts, masks, small_plans

from distattn.ir.errors import DamagedDataError, DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Call, Payload, Plan, Table
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import STRATEGIES, make_plan

SHAPE = dict(heads=8, kv_heads=2, head_dim=16, dtype="bfloat16")


def plan_for(strategy="ring", **changes) -> Plan:
    lengths = (1, 7, 129, 63)
    return make_plan(Mask.documents(lengths), Layout.zigzag(lengths, 4), strategy=strategy, **(SHAPE | changes))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_plan_survives_its_file_and_equal_plans_give_equal_bytes(strategy, tmp_path):
    for mask in masks().values():
        for layout in layouts((1, 7, 129, 63), 4).values():
            a, b = (make_plan(mask, layout, strategy=strategy, **SHAPE) for _ in range(2))
            a.save(tmp_path / "a")
            b.save(tmp_path / "b")
            assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
            loaded = Plan.load(tmp_path / "a")
            assert loaded.digest == a.digest == b.digest
            assert loaded.strategy == strategy and loaded.call.layout == layout and loaded.call.mask == mask


def test_digests_differ_when_anything_that_matters_differs():
    plans = [plan_for(), plan_for("allgather"), plan_for(dtype="float32"), plan_for(heads=4), plan_for(head_dim=8)]
    plans += [plan_for(backward="keep"), plan_for(v_head_dim=8)]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_row_order_does_not_matter():
    plan = plan_for()
    shuffle = np.random.default_rng(0).permutation(len(plan.forward.tasks["step"]))
    tasks = {name: column[shuffle] for name, column in plan.forward.tasks.items()}
    assert Plan(plan.call, Table(tasks, plan.forward.moves), plan.backward, plan.policy).digest == plan.digest


def test_a_damaged_plan_file_is_never_loaded_as_something_else(tmp_path):
    plan = plan_for()
    path = tmp_path / "plan"
    plan.save(path)
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    # every byte of the first zip header and of the directory's end, where readers fail most often, and a sample of the
    # rest
    positions = [*range(60), *range(len(content) - 150, len(content)), *rng.integers(0, len(content), 400)]
    for position in positions:
        damaged = content.copy()
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert Plan.load(path).digest == plan.digest
        except DamagedDataError as error:
            assert str(path) in str(error)
    for size in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DamagedDataError):
            Plan.load(path)
    with pytest.raises(DistattnError, match="cannot be read") as refusal:
        Plan.load(tmp_path)
    assert not isinstance(refusal.value, DamagedDataError)
    with pytest.raises(DistattnError, match="no such plan"):
        Plan.load(tmp_path / "nowhere")


def test_work_and_bytes_are_counted_from_the_tables():
    plan = make_plan(Mask.full(8), Layout.contiguous([8], 2), strategy="allgather", **SHAPE)
    assert plan.area_by_rank().tolist() == [4 * 8 * 8, 4 * 8 * 8]
    moved = plan.bytes()
    # 4 tokens x 2 heads x (16 + 16) bf16, in both directions, forward and backward; dKV once, in fp32
    by_payload = {
        Payload(p).name: int(moved["bytes"][moved["payload"] == p].sum()) for p in np.unique(moved["payload"])
    }
    assert by_payload == {"KV": 2 * 2 * 4 * 2 * 32 * 2, "dKV": 2 * 4 * 2 * 32 * 4}


def test_strategies_are_pure_functions():
    for a, b in zip(small_plans(), small_plans(), strict=True):
        assert a.digest == b.digest


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(strategy="star"), "strategy 'star' does not exist; there are ring"),
        (dict(backward="never"), "policy 'never'"),
        (dict(dtype="int8"), "dtype 'int8'"),
        (dict(heads=2.5, kv_heads=2.5), "heads is a whole number, not 2.5"),
        (dict(heads=1 << 20, kv_heads=1), "heads is 1 to"),
        (dict(heads=7), "7 query heads do not divide among 2"),
        (dict(head_dim=0), "head_dim is 1 to 16384, not 0"),
        (dict(options={"depth": 3}), "no option 'depth'"),
        (dict(cluster="h100"), "there is no cluster 'h100'; there are a100-NODESxDEVICES"),
        (dict(cluster=8), "cluster is a Cluster"),
        (dict(cluster="h100-1x4"), "the cluster has 1 x 4 ranks, the layout 2"),
    ],
)
def test_calls_that_cannot_be_planned_are_refused(change, sentence):
    with pytest.raises(DistattnError, match=sentence):
        make_plan(Mask.causal(8), Layout.contiguous([8], 2), **({"strategy": "ring"} | SHAPE | change))


def test_ulysses_refuses_more_ranks_than_heads_and_says_what_works():
    with pytest.raises(DistattnError, match="at most 8 ranks"):
        make_plan(Mask.causal(64), Layout.contiguous([64], 9), strategy="ulysses", **SHAPE)


def test_mask_and_layout_of_different_axes_are_refused():
    with pytest.raises(DistattnError, match="one axis"):
        make_plan(Mask.causal(9), Layout.contiguous([8], 2), strategy="ring", **SHAPE)


def test_a_table_needs_its_columns():
    with pytest.raises(DistattnError, match="exactly the columns"):
        Table({"step": np.zeros(1, np.int64)}, Table.from_rows([]).moves)
    with pytest.raises(DistattnError, match="policy"):
        Plan(
            Call(Mask.full(1), Layout.contiguous([1], 1), 1, 1, 1, 1, "float32"),
            Table.from_rows([]),
            Table.from_rows([]),
            "x",
        )


def test_work_beyond_int64_is_counted_exactly():
    n = 1 << 30
    shape = dict(heads=32, kv_heads=1, head_dim=1, dtype="bfloat16")
    plan = make_plan(Mask.causal(n), Layout.contiguous([n], 2), strategy="allgather", **shape)
    assert sum(plan.area_by_rank().tolist()) == n * (n + 1) // 2 * 32
    verify(plan)
