"""Results that several launches sum up are returned in the inputs' dtype by the last launch of each row."""

import numpy as np
import pytest
import torch
from cases import LENGTHS, layouts
from meta_run import layer_call
from oracle import Record, assert_close, dense, random_inputs, run_all_ranks

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Payload
from distattn.kernels.registry import KERNELS
from distattn.kernels.spec import MOST_TURNS
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.lowering.lower import lower

BOTH = ("forward", "backward")
SHAPE = dict(heads=4, kv_heads=2, head_dim=8, dtype="bfloat16")


def plan_of(strategy, mask, ranks=4, layout="zigzag", **how):
    return make_plan(mask, layouts(LENGTHS, ranks)[layout], strategy=strategy, **SHAPE, **how)


@pytest.mark.parametrize("mask", [Mask.causal(sum(LENGTHS)), Mask.documents(LENGTHS)], ids=["causal", "documents"])
@pytest.mark.parametrize("strategy", ["ring", "double_ring", "cad", "usp"])
def test_results_equal_the_dense_oracle_if_launches_finish_them(monkeypatch, strategy, mask):
    monkeypatch.setitem(KERNELS, "in_place", "in_place_kernel")
    plan, inputs, record = plan_of(strategy, mask), random_inputs(sum(LENGTHS), 4, 2, 8), Record()
    got = run_all_ranks(plan, inputs, "in_place", record)
    assert_close(got, dense(mask, inputs, 8**-0.5), 2e-2)
    finished = {payload for program in record.programs for payload in program.turns}
    assert strategy != "ring" or finished == {Payload.O, Payload.dQ}


def test_each_row_is_finished_by_the_last_launch_that_writes_it():
    plan = plan_of("ring", Mask.causal(sum(LENGTHS)))
    for rank in range(4):
        program = lower(plan, rank, lambda mask: mask, finishes=BOTH)
        assert set(program.turns) == {Payload.O, Payload.dQ}
        for payload, steps in ((Payload.O, program.forward), (Payload.dQ, program.backward)):
            writes = [[] for _ in range(program.tokens)]
            for launch in (launch for step in steps for launch in step.launches):
                for row in np.arange(program.tokens)[launch.results[payload].slices[0].rows]:
                    writes[row].append(launch.number)
            assert max(map(len, writes)) > 1
            expected = [numbers[0] * MOST_TURNS + numbers[-1] for numbers in writes]
            assert program.turns[payload].tolist() == expected


def test_rows_that_no_launch_writes_are_zero(monkeypatch):
    monkeypatch.setitem(KERNELS, "in_place", "in_place_kernel")
    # the first 20 queries have no key; other rows are summed by several launches
    n = sum(LENGTHS)
    mask, inputs = Mask.from_pieces([[20, n, 0, n, -n, 0]], n), random_inputs(n, 4, 2, 8)
    record = Record()
    got = run_all_ranks(plan_of("ring", mask), inputs, "in_place", record)
    assert any(program.blank and program.turns for program in record.programs)
    assert_close(got, dense(mask, inputs, 8**-0.5), 2e-2)
    assert (got.o[:20] == 0).all() and (got.dq[:20] == 0).all()


def test_launches_do_not_finish_what_messages_add_to_or_other_dtypes():
    mask = Mask.causal(sum(LENGTHS))
    rotating_queries = plan_of("ring", mask, options=dict(rotate="queries"))
    assert all(not lower(rotating_queries, rank, lambda cells: cells, finishes=BOTH).turns for rank in range(1, 3))
    plan = make_plan(mask, layouts(LENGTHS, 4)["zigzag"], strategy="ring", **{**SHAPE, "dtype": "float32"})
    assert not lower(plan, 1, lambda cells: cells, finishes=BOTH).turns
    # a kernel that does not take `final` finishes no rows
    assert not lower(plan_of("ring", mask), 1, lambda cells: cells).turns
    assert set(lower(plan_of("ring", mask), 1, lambda cells: cells, finishes=("forward",)).turns) == {Payload.O}


def test_no_pass_converts_what_launches_finish():
    lengths = [8192] * 8
    shape = dict(heads=64, kv_heads=8, head_dim=128, dtype="bfloat16")
    plan = make_plan(Mask.documents(lengths), Layout.zigzag(lengths, 8), strategy="ring", **shape)
    forward, backward, _ = layer_call(plan, 3)
    # only gradients of keys and values, with an eighth of the heads, are converted, since other ranks add to them
    tokens, row = 8192, 128 * torch.float32.itemsize
    assert forward.bytes["_to_copy"] == 0
    assert backward.bytes["_to_copy"] == 1.5 * 2 * tokens * 8 * row
    assert forward.peak <= forward.predicted_peak and backward.peak <= backward.predicted_peak


def test_launches_finish_gradients_of_queries_only_where_their_conversion_takes_long():
    # finished rows take memory in addition to the sums
    for lengths, finished in (([8192] * 8, {Payload.O, Payload.dQ}), ([65536], {Payload.O})):
        plan = make_plan(Mask.documents(lengths), Layout.zigzag(lengths, 8), strategy="ring", **SHAPE)
        assert set(lower(plan, 3, lambda cells: cells, finishes=BOTH).turns) == finished
