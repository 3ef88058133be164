"""A strategy that uses its own layout is correct and proven, and moves no more than its tasks need."""

import pytest
from cases import LENGTHS, layouts, masks
from oracle import Record, assert_close, dense, planned_bytes, random_inputs, run_all_ranks

from distattn.cluster.topology import Cluster
from distattn.ir.errors import DistattnError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import POLICIES
from distattn.parallel.analysis.lower_bounds import lower_bound, plan_traffic
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import STRATEGIES, make_plan

pytestmark = pytest.mark.sampled(3)

SHAPE = dict(heads=8, kv_heads=2, head_dim=4, dtype="float64", cluster=Cluster(2, 2))
CHANGES = [("contiguous", "zigzag"), ("zigzag", "from_chunks"), ("from_chunks", "document_zigzag")]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_works_on_a_layout_of_its_own(strategy, policy):
    by_head = Mask.by_head([(2, Mask.causal(200)), (1, Mask.sliding_window(200, 9)), (5, Mask.full(200))])
    inputs, here = random_inputs(200, 8, 2, 4), layouts(LENGTHS, 4)
    for mask in (masks()["odd"], masks()["documents"], by_head):
        wanted = dense(mask, inputs)
        for own_layout, other in CHANGES:
            plan = make_plan(
                mask, here[own_layout], strategy=strategy, backward=policy, working_layout=here[other], **SHAPE
            )
            assert verify(plan).digest == plan.digest
            assert plan_traffic(plan, Cluster(2, 2)).total_bytes == lower_bound(plan, Cluster(2, 2)).total_bytes
            record = Record()
            assert_close(run_all_ranks(plan, inputs, "reference", record), wanted, 1e-11)
            assert record.bytes == planned_bytes(plan)


def test_the_work_is_where_the_working_layout_puts_it():
    own_layout, other = Layout.contiguous([64], 4), Layout.zigzag([64], 4)
    there = make_plan(Mask.causal(64), other, strategy="allgather", **SHAPE)
    bent = make_plan(Mask.causal(64), own_layout, strategy="allgather", working_layout=other, **SHAPE)
    assert bent.area_by_rank().tolist() == there.area_by_rank().tolist()
    same = make_plan(Mask.causal(64), own_layout, strategy="allgather", working_layout=own_layout, **SHAPE)
    assert same.digest == make_plan(Mask.causal(64), own_layout, strategy="allgather", **SHAPE).digest


def test_a_working_layout_of_other_ranks_is_refused():
    with pytest.raises(DistattnError, match="the working layout has 8 ranks, the layout 4"):
        make_plan(
            Mask.causal(64), Layout.zigzag([64], 4), strategy="ring", working_layout=Layout.zigzag([64], 8), **SHAPE
        )
