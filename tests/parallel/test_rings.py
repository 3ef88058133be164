"""Rings of ranks that exchange tokens."""

import numpy as np

from distattn.cluster.spec import load
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.parallel.analysis.simulate import simulated_seconds
from distattn.parallel.make_plan import make_plan
from distattn.parallel.tables.rings import connected_members, hops_in_rings


def test_members_that_no_pairs_connect_are_in_rings_of_their_own():
    src, dst = np.array([0, 2, 5, 5, 4, 0]), np.array([2, 0, 4, 5, 5, 0])
    assert connected_members(src, dst, 6).tolist() == [0, 1, 0, 3, 4, 4]
    assert hops_in_rings(src, dst, 6).tolist() == [1, 1, 1, 0, 1, 0]


def test_a_ring_of_two_documents_on_four_ranks_each_has_four_steps():
    lengths = [4096, 4096]
    for strategy in ("ring", "double_ring"):
        plan = make_plan(
            Mask.documents(lengths),
            Layout.placed(lengths, 8),
            strategy=strategy,
            heads=4,
            kv_heads=4,
            head_dim=16,
            dtype="bfloat16",
            options={"inner_ring_size": 8} if strategy == "double_ring" else {},
        )
        assert plan.forward.steps == 4


def test_balanced_is_within_a_twentieth_of_the_fastest_layout_on_one_node():
    """Compare simulated times. `cad` is left out, since it balances the work itself."""
    cluster, tokens = load("h200-1x8"), 1 << 16
    mixes = ([tokens], [tokens // 4] * 4, [tokens // 2] + [tokens // 128] * 64, [tokens // 256] * 256)
    for lengths in mixes:
        mask = Mask.documents(lengths)
        for strategy in ("ring", "double_ring", "allgather", "ulysses", "usp"):

            def seconds(layout, mask=mask, strategy=strategy):
                shape = dict(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
                plan = make_plan(mask, layout, strategy=strategy, cluster=cluster, **shape)
                return simulated_seconds(plan, cluster)

            others = [Layout.contiguous, Layout.zigzag, Layout.document_zigzag, Layout.placed, Layout.block_cyclic]
            best = min(seconds(make(lengths, 8)) for make in others)
            assert seconds(Layout.balanced(lengths, 8)) <= 1.05 * best, (lengths[:2], strategy)
