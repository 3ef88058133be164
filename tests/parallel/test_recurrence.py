"""Recurrences over ranks match a single process: outputs, final states and all gradients, for any layout and schedule."""

import pytest
import torch
from cases import layouts
from oracle import Record, planned_bytes
from recurrences import RECURRENT, assert_same, by_definition, recurrence_case, run_recurrence

from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.op import OPS
from distattn.ir.plan import POLICIES
from distattn.parallel.make_plan import make_plan
from distattn.parallel.strategies.scan_schedules import SCHEDULES

LENGTHS = (1, 7, 129, 63)


def plan_of(layout, op, strategy="scan", dtype="float64", heads=4, kv_heads=2, **changes):
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=3, v_head_dim=5, dtype=dtype, op=op)
    return make_plan(Mask.documents(layout.lengths), layout, strategy=strategy, **shape, **changes)


@pytest.fixture(scope="module")
def cases():
    """Return a function that maps an op to its case and the results by definition."""
    cache = {}

    def case_of(name, **changes):
        key = name, tuple(sorted(changes.items()))
        if key not in cache:
            case = recurrence_case(OPS[name], LENGTHS, **changes)
            cache[key] = case, by_definition(case)
        return cache[key]

    return case_of


@pytest.mark.sampled(5)
@pytest.mark.parametrize("ranks", [4, 8, 2, 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RECURRENT)
def test_every_schedule_and_layout_equals_the_definition(cases, name, schedule, ranks):
    case, wanted = cases(name)
    # run half of the layouts for each op; the next op or schedule runs the other half
    first = (RECURRENT.index(name) + list(SCHEDULES).index(schedule)) % 2
    for layout in list(layouts(LENGTHS, ranks).values())[first::2]:
        plan = plan_of(layout, name, options={"schedule": schedule, "state_first": ranks == 4})
        record = Record()
        assert_same(run_recurrence(plan, case, record), wanted, 1e-10)
        assert record.bytes == planned_bytes(plan)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ranks", [4, 3, 2, 1])
@pytest.mark.parametrize("name", RECURRENT)
def test_tokens_may_move_instead(cases, name, ranks):
    case, wanted = cases(name)
    for index, layout in enumerate(layouts(LENGTHS, ranks).values()):
        plan = plan_of(layout, name, "ulysses", backward=POLICIES[index % len(POLICIES)])
        record = Record()
        assert_same(run_recurrence(plan, case, record), wanted, 1e-10)
        assert record.bytes == planned_bytes(plan)


def test_groups_of_heads_follow_each_other_to_the_same_result():
    case = recurrence_case(OPS["kda"], LENGTHS, heads=6, key_heads=2)
    wanted = by_definition(case)
    layout = layouts(LENGTHS, 4)["zigzag"]
    # with six heads, four head groups separate heads that share keys
    options = {"schedule": "sequential", "head_groups": 4}
    assert_same(run_recurrence(plan_of(layout, "kda", heads=6, options=options), case), wanted, 1e-10)


@pytest.mark.parametrize("lengths", [(256,), (256, 64)])
def test_results_in_turn_have_the_same_bits_on_any_number_of_ranks(lengths):
    # in blocks of 64 tokens, all segments consist of complete chunks
    case = recurrence_case(OPS["gated_delta_rule"], lengths)
    results = []
    for ranks in (1, 2, 4):
        layout = Layout.block_cyclic(lengths, ranks, block=64)
        results.append(run_recurrence(plan_of(layout, "gated_delta_rule", options={"schedule": "sequential"}), case))
    for other in results[1:]:
        assert torch.equal(other.o, results[0].o) and torch.equal(other.final, results[0].final)
        # with several documents in a launch, gradients may differ, since they are computed by products of other shapes
        if len(lengths) == 1:
            assert all(map(torch.equal, other.dx.by_token().values(), results[0].dx.by_token().values()))


@pytest.mark.parametrize("strategy", ["scan", "ulysses"])
def test_tokens_may_be_computed_where_another_layout_has_them(cases, strategy):
    case, wanted = cases("gated_delta_rule")
    laid_out = layouts(LENGTHS, 4)
    for name in ("zigzag", "from_chunks"):
        plan = plan_of(laid_out[name], "gated_delta_rule", strategy, working_layout=laid_out["contiguous"])
        record = Record()
        assert_same(run_recurrence(plan, case, record), wanted, 1e-10)
        assert record.bytes == planned_bytes(plan)


@pytest.mark.parametrize("name", ["ssd", "gated_delta_rule"])
def test_packs_of_very_many_documents(name):
    lengths = (1,) * 70 + (2, 300, 1) + (3,) * 70
    case = recurrence_case(OPS[name], lengths)
    wanted = by_definition(case)
    for ranks in (1, 3):
        record = Record()
        assert_same(run_recurrence(plan_of(Layout.zigzag(lengths, ranks), name), case, record), wanted, 1e-10)
        # no launch has more states than allowed
        sizes = [
            len(launch.schedule.tasks)
            for program in record.programs
            for step in program.forward
            for launch in step.launches
        ]
        assert max(sizes) <= 64 and sum(sizes) >= len(lengths)
