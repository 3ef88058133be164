"""Plans of recurrences are proven, and as small as designed."""

import numpy as np
import pytest
from recurrences import RECURRENT

from distattn.ir.errors import DistattnError, PlanError
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Payload, Plan, Table, move_bytes
from distattn.parallel.analysis.verify import verify
from distattn.parallel.make_plan import make_plan
from distattn.parallel.strategies.scan_schedules import SCHEDULES

LENGTHS = (1, 7, 129, 63)


def plan_of(layout: Layout, op: str = "gated_delta_rule", strategy: str = "scan", **changes) -> Plan:
    shape = dict(heads=4, kv_heads=2, head_dim=8, v_head_dim=16, dtype="float32", op=op) | changes
    return make_plan(Mask.documents(layout.lengths), layout, strategy=strategy, **shape)


def layouts(ranks: int, lengths: tuple[int, ...] = LENGTHS) -> list[Layout]:
    return [
        Layout.contiguous(lengths, ranks),
        Layout.zigzag(lengths, ranks),
        Layout.document_zigzag(lengths, ranks, min_chunk=8),
        Layout.block_cyclic(lengths, ranks, block=13),
        Layout.balanced(lengths, ranks),
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_schedule_is_proven(ranks, schedule):
    for layout in layouts(ranks):
        for options in ({}, {"state_first": True}, {"head_groups": 4}):
            plan = plan_of(layout, options={"schedule": schedule, **options})
            proof = verify(plan)
            assert (ranks == 1) == (not len(plan.forward.moves["step"]))
            # no tokens are sent, only states
            assert set(np.unique(plan.forward.moves["payload"])) <= {int(Payload.S)}
            assert set(np.unique(plan.backward.moves["payload"])) <= {int(Payload.dS)}
            assert proof.digest == plan.digest


def test_states_in_turn_move_once_per_hop_and_in_the_fewest_bytes():
    layout = Layout.zigzag((1024,), 8)
    plan = plan_of(layout, heads=32, kv_heads=32, head_dim=128, v_head_dim=128, options={"schedule": "sequential"})
    # 14 states move between the 15 segments of the document, all of them prefix states
    assert move_bytes(plan.call, plan.forward.moves).tolist() == [32 * 65536] * 14
    assert move_bytes(plan.call, plan.backward.moves).tolist() == [32 * 65536] * 14


@pytest.mark.parametrize("op, megabytes", [("gla", (28, 6.8)), ("gated_delta_rule", (55, 9.7))])
def test_bytes_are_as_designed(op, megabytes):
    layout = Layout.zigzag((8192 * 8,), 8)
    for schedule, most in zip(("allgather_states", "head_sharded"), megabytes, strict=True):
        shape = dict(heads=32, kv_heads=32, head_dim=128, v_head_dim=128, dtype="bfloat16")
        plan = plan_of(layout, op, options={"schedule": schedule}, **shape)
        received = np.zeros(8)
        np.add.at(received, plan.forward.moves["dst"], move_bytes(plan.call, plan.forward.moves))
        assert received.max() / 1e6 == pytest.approx(most, rel=0.06), schedule


def test_ulysses_plans_recurrences_with_fewer_heads_of_keys():
    for op in ("gla", "ssd", "gated_delta_rule"):
        for ranks in (1, 2, 4):
            for layout in layouts(ranks):
                plan = plan_of(layout, op, "ulysses")
                verify(plan)
                assert not {int(Payload.S), int(Payload.dS)} & set(plan.bytes()["payload"].tolist())


def test_steps_of_the_schedules():
    plan = lambda schedule: plan_of(Layout.contiguous((64,), 8), options={"schedule": schedule})  # noqa: E731
    assert plan("sequential").forward.steps == 15
    assert plan("allgather_states").forward.steps == 3
    assert plan("head_sharded").forward.steps == 4
    assert plan("tree").forward.steps <= 7


def test_unsupported_plans_are_refused_with_a_supported_alternative():
    layout = Layout.contiguous(LENGTHS, 2)
    with pytest.raises(DistattnError, match="does not exist for gla; there are scan, ulysses"):
        plan_of(layout, "gla", "ring")
    with pytest.raises(DistattnError, match="'scan' does not exist"):
        plan_of(layout, "attention")
    with pytest.raises(DistattnError, match="schedule must be one of auto"):
        plan_of(layout, options={"schedule": "ring"})
    with pytest.raises(DistattnError, match='its backward must be "keep"'):
        plan_of(layout, backward="refetch-home")


# rows that a proof must refuse, in a hand-written plan of two segments of one document on two ranks
S, DS = int(Payload.S), int(Payload.dS)
FORWARD = [(0, 0, 0, 0, 6, 0, 6, 0, 2), (2, 1, 0, 6, 10, 0, 10, 0, 2)], [(1, 0, 1, S, 0, 6, 0, 2)]
BACKWARD = [(0, 1, 0, 6, 10, 0, 10, 0, 2), (2, 0, 0, 0, 10, 0, 6, 0, 2)], [(1, 1, 0, DS, 6, 10, 0, 2)]


def by_hand(forward=FORWARD, backward=BACKWARD) -> Plan:
    call = plan_of(Layout.from_chunks([10], [[(0, 6)], [(6, 10)]]), "gla", heads=2, kv_heads=2).call
    return Plan(call, Table.from_rows(*forward), Table.from_rows(*backward), "keep")


def test_a_plan_by_hand_is_accepted():
    proof = verify(by_hand())
    size = 2 * 8 * 16 * 4
    assert proof.kept.tolist() == [0, size]
    # a state is live where it was computed until it has been sent, and at its destination until it has been read
    assert proof.forward_peak.tolist() == [size, size] and proof.backward_peak.tolist() == [size, size]


@pytest.mark.parametrize(
    "forward, backward, why",
    [
        ((FORWARD[0], []), BACKWARD, "is missing"),
        ((FORWARD[0], [(2, 0, 1, S, 0, 6, 0, 2)]), BACKWARD, "too late"),
        ((FORWARD[0], [(1, 0, 1, S, 0, 5, 0, 2)]), BACKWARD, "is missing"),
        ((FORWARD[0], [*FORWARD[1], (1, 0, 1, S, 0, 6, 0, 2)]), BACKWARD, "arrives more than once"),
        (([FORWARD[0][0], (2, 1, 0, 6, 10, 6, 10, 0, 2)], []), BACKWARD, "cells x heads are allowed"),
        (([*FORWARD[0], (0, 0, 0, 0, 0, 0, 3, 0, 2)], FORWARD[1]), BACKWARD, "never used"),
        (([FORWARD[0][0], (2, 1, 0, 6, 10, 0, 9, 0, 2)], FORWARD[1]), BACKWARD, "not a segment"),
        (FORWARD, ([BACKWARD[0][0], (2, 0, 0, 0, 6, 0, 6, 0, 2)], []), "cells x heads are allowed"),
        (FORWARD, (BACKWARD[0], []), "dS of tokens .6, 10. is missing"),
        (FORWARD, (BACKWARD[0], [(1, 1, 0, S, 6, 10, 0, 2)]), "is missing"),
    ],
)
def test_a_wrong_plan_by_hand_is_refused(forward, backward, why):
    with pytest.raises(PlanError, match=why):
        verify(by_hand(forward, backward))


def test_every_recurrence_is_planned():
    for name in RECURRENT:
        verify(plan_of(Layout.zigzag(LENGTHS, 4), name))
