"""What each strategy promises beyond being right: what it moves, when, and how much it holds."""

import numpy as np
import pytest
from cases import LENGTHS, layouts, masks
from oracle import Record, random_inputs, run_all_ranks

from distattn.layout import Layout
from distattn.mask import Mask
from distattn.parallel.make_plan import STRATEGIES, make_plan
from distattn.plan import Payload, Plan

SHAPE = dict(heads=8, kv_heads=2, head_dim=8, dtype="float64")


def received(plan: Plan, payload: Payload, rank: int) -> np.ndarray:
    """The tokens of a payload that reach a rank in the forward pass, with repetitions."""
    moves = plan.forward.moves
    rows = (moves["payload"] == payload) & (moves["dst"] == rank)
    spans = [np.arange(a, b) for a, b in zip(moves["t0"][rows], moves["t1"][rows], strict=True)]
    return np.sort(np.concatenate([np.zeros(0, int), *spans]))


@pytest.mark.parametrize("mask", masks())
def test_allgather_sends_each_needed_key_once_and_nothing_else(mask):
    for layout in layouts(LENGTHS, 4).values():
        plan = make_plan(masks()[mask], layout, strategy="allgather", **SHAPE)
        dense = masks()[mask].dense()
        for rank in range(4):
            own = layout.tokens(rank)
            needed = np.setdiff1d(np.flatnonzero(dense[own].any(0)), own)
            assert received(plan, Payload.KV, rank).tolist() == needed.tolist()


@pytest.mark.parametrize("mask", masks())
def test_ring_moves_one_hop_a_step_and_no_further_than_used(mask):
    for name, layout in layouts(LENGTHS, 4).items():
        plan = make_plan(masks()[mask], layout, strategy="ring", **SHAPE)
        members = np.unique(layout.chunks["rank"])
        moves = plan.forward.moves
        seat = np.searchsorted(members, moves["src"])
        assert (moves["dst"] == members[(seat + 1) % len(members)]).all(), name
        # verify has no word on leanness beyond "used or forwarded": the last receiver of every key uses it
        for rank in range(4):
            tokens = received(plan, Payload.KV, rank)
            assert len(tokens) == len(set(tokens.tolist()))


def test_packed_documents_travel_far_less_than_a_causal_axis():
    lengths = [50] * 16
    layout = Layout.contiguous(lengths, 8)
    causal, packed = (
        make_plan(mask, layout, strategy="ring", **SHAPE).bytes()["bytes"].sum()
        for mask in (Mask.causal(800), Mask.documents(lengths))
    )
    assert packed == 0 < causal


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_moves_nothing(strategy):
    for mask in masks().values():
        assert not len(make_plan(mask, Layout.zigzag(LENGTHS, 1), strategy=strategy, **SHAPE).bytes()["bytes"])


@pytest.mark.parametrize("mask", ["causal", "full", "documents"])
def test_a_rank_of_a_ring_never_holds_more_than_three_ranks_keys_and_values(mask):
    inputs = random_inputs(sum(LENGTHS), 8, 2, 8)
    for ranks in (4, 6):
        for layout in layouts(LENGTHS, ranks).values():
            plan = make_plan(masks()[mask], layout, strategy="ring", **SHAPE)
            record = Record()
            run_all_ranks(plan, inputs, "reference", record)
            shard = int(layout.shard_sizes().max()) * SHAPE["kv_heads"] * plan.call.cell_bytes(Payload.KV)
            # its own, the one it computes on, the one that arrives
            for direction in ("forward", "backward"):
                assert max(record.received[direction, rank, Payload.KV] for rank in range(ranks)) <= 2 * shard


def test_ulysses_splits_uneven_heads_and_replicates_key_value_heads():
    layout = Layout.zigzag(LENGTHS, 4)
    plan = make_plan(masks()["causal"], layout, strategy="ulysses", heads=6, kv_heads=2, head_dim=8, dtype="float64")
    tasks = plan.forward.tasks
    assert sorted(set(zip(tasks["rank"].tolist(), tasks["h0"].tolist(), tasks["h1"].tolist(), strict=True))) == [
        (0, 0, 1),
        (1, 1, 3),
        (2, 3, 4),
        (3, 4, 6),
    ]
    # ranks 0 and 1 share key/value head 0: both get all of its foreign tokens
    for rank in (0, 1):
        assert len(received(plan, Payload.KV, rank)) == sum(LENGTHS) - layout.shard_sizes()[rank]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_moves_are_issued_before_the_compute_they_can_overlap(strategy):
    plan = make_plan(Mask.causal(64), Layout.zigzag([64], 4), strategy=strategy, **SHAPE)
    record = Record()
    run_all_ranks(plan, random_inputs(64, 8, 2, 8), "reference", record)
    overlapped = 0
    for rank in range(4):
        events = [event for who, event in record.events if who == rank]
        waiting = False
        for event, following in zip(events, [*events[1:], None], strict=True):
            if event == "post":
                # never two steps in flight, and the next thing is this step's compute, or the wait if it has none
                assert not waiting and following in ("compute", "wait")
                overlapped += following == "compute"
                waiting = True
            elif event == "wait":
                assert waiting
                waiting = False
        assert not waiting
    # a ring computes under every hop, an all-gather under its fetch; Ulysses has nothing to compute meanwhile
    assert (overlapped > 0) == (strategy != "ulysses")
