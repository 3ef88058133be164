"""Prefix maxima over ranks match a single process for any plan. Plans with changed rows are refused or correct."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from cases import layouts
from mutants import check_mutants
from oracle import Record, RecordingTransport, planned_bytes
from random_recurrences import random_recurrent_plan

from distattn.ir.errors import DistattnError, PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import PREFIX_MAX
from distattn.ir.plan import Payload, Plan, Table
from distattn.kernels.recurrence import cummax
from distattn.parallel.analysis.explain import explain
from distattn.parallel.analysis.simulate import simulate
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import make_plan
from distattn.parallel.runtime.communication.transport import InProcessNetwork
from distattn.parallel.runtime.execution import state_pass
from distattn.parallel.runtime.execution.execute import run_in_lock_step
from distattn.parallel.runtime.execution.execute_prefix_max import forward
from distattn.parallel.runtime.execution.state_tensors import HeldStateTensors
from distattn.parallel.runtime.lowering.lower import lower
from distattn.parallel.runtime.lowering.memory import backward_memory
from distattn.parallel.strategies.scan_schedules import SCHEDULES

LENGTHS = (1, 7, 129, 63)
VALUES = 4


def plan_of(layout, strategy="scan", **changes):
    shape = dict(heads=4, kv_heads=4, head_dim=1, v_head_dim=VALUES, dtype="float64", op="prefix_max")
    return make_plan(Mask.documents(layout.lengths), layout, strategy=strategy, **shape | changes)


def case_of(call, seed=0):
    """Return (x_THV, initial maxima_MHV), and (the maximum before each token, the final maximum of each document)."""
    generator = torch.Generator().manual_seed(seed)
    n, documents, heads, dim = call.mask.n, len(call.documents), call.heads, call.v_head_dim
    x = torch.randn(n, heads, dim, generator=generator, dtype=torch.float64)
    initial = torch.randn(documents, heads, dim, generator=generator, dtype=torch.float64)
    before, final = torch.empty_like(x), torch.empty_like(initial)
    for number, (t0, t1) in enumerate(call.documents.tolist()):
        state = initial[number]
        for t in range(t0, t1):
            before[t], state = state, torch.maximum(state, x[t])
        final[number] = state
    return (x, initial), (before, final)


def run(plan, x, initial, record=None):
    """Run all ranks of a plan in one process. Return the gathered results. Check that the proof predicts the live
    states.
    """
    proof, ranks, network = verify(plan), range(plan.call.ranks), InProcessNetwork()
    record = Record() if record is None else record
    programs = record.programs = [lower(plan, rank, lambda mask: mask, proof) for rank in ranks]
    passes = [
        forward(program, RecordingTransport(network.transport(rank), rank, record), cummax, part, initial)
        for rank, program in enumerate(programs)
        for part in [plan.call.layout.shard(x, rank)]
    ]
    # live states, by rank
    held = []

    def noted(*args):
        held.append(HeldStateTensors(*args))
        return held[-1]

    with patch.object(state_pass, "HeldStateTensors", noted):
        results = run_in_lock_step(passes)
    if (plan.forward.moves["payload"] == Payload.S).all():
        assert [states.peak_bytes for states in held] == proof.forward_peak.tolist()
    assert not proof.kept.any() and not proof.backward_peak.any()
    return plan.call.layout.unshard([result.before_THV for result in results]), sum(r.final_MHV for r in results)


def assert_right(plan, seed=0, record=None):
    inputs, wanted = case_of(plan.call, seed)
    for got, right in zip(run(plan, *inputs, record), wanted, strict=True):
        assert torch.equal(got, right)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("ranks", [4, 8, 2, 1])
@pytest.mark.parametrize("schedule", [*SCHEDULES, "tokens move"])
def test_every_schedule_and_layout_equals_one_process(schedule, ranks):
    for layout in layouts(LENGTHS, ranks).values():
        if schedule != "tokens move":
            plan = plan_of(layout, options={"schedule": schedule, "state_first": ranks == 4})
        else:
            plan = plan_of(layout, "ulysses", heads=8, kv_heads=2)
        record = Record()
        assert_right(plan, record=record)
        assert record.bytes == planned_bytes(plan)


def random_case(rng, seed):
    plan, _ = random_recurrent_plan(rng, ["prefix_max"])
    assert_right(plan, seed)
    return plan, partial(assert_right, seed=seed)


@pytest.mark.parametrize(("mutants", "seed"), [(300, 0), pytest.param(1300, 1000, marks=pytest.mark.full)])
def test_random_plans_are_right_and_mutants_refused_or_right(mutants, seed):
    refused, right = check_mutants(mutants, seed, random_case)
    assert refused > 10 * right > 0


def test_a_state_is_one_number_a_value_and_there_is_no_backward_table():
    plan = plan_of(Layout.zigzag(LENGTHS, 4), cluster="h100-1x4")
    assert not len(plan.backward.tasks["step"]) and not len(plan.backward.moves["step"])
    moves = plan.forward.moves
    assert plan.bytes()["bytes"].sum() == 8 * VALUES * (moves["h1"] - moves["h0"]).sum()
    assert simulate(plan, "h100-1x4").backward.seconds == 0
    assert f"prefix_max, 4 states of {VALUES} maxima" in str(explain(plan))
    programs = [lower(plan, rank, lambda mask: mask) for rank in range(4)]
    assert not any(backward_memory(program, None).peak for program in programs)
    again = Plan(plan.call, plan.forward, plan.forward, plan.policy)
    with pytest.raises(PlanError, match="prefix_max has no gradient"):
        verify(again)
    row = [(0, 0, 1, 6, 0, 1, 0, 1)]
    with pytest.raises(PlanError, match="prefix_max has no gradient"):
        verify(Plan(plan.call, plan.forward, Table.from_rows([], row), plan.policy))


def test_meaningless_arguments_are_refused():
    with pytest.raises(DistattnError, match="its head_dim is 1, not 3"):
        plan_of(Layout.zigzag(LENGTHS, 2), head_dim=3)
    assert PREFIX_MAX.is_recurrent and not PREFIX_MAX.has_gradient
