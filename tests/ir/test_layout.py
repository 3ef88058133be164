"""Layouts: ownership and order of tokens, shards, positions and labels."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from distattn.ir.errors import DistattnError
from distattn.ir.layout import LAYOUTS, Layout, make_layout
from distattn.ir.layout_cost import layout_cost
from distattn.ir.mask import Mask
from distattn.parallel.make_plan import make_plan

lengths_ = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@pytest.mark.parametrize("name", LAYOUTS)
@given(lengths=lengths_, ranks=st.integers(1, 9))
def test_every_token_has_one_owner_and_comes_back(name, lengths, ranks):
    options = {"min_chunk": 3} if name == "document_zigzag" else {}
    layout = LAYOUTS[name](lengths, ranks, **options)
    owned = np.concatenate([layout.tokens(rank) for rank in range(ranks)])
    assert sorted(owned.tolist()) == list(range(sum(lengths)))
    assert layout.shard_sizes().sum() == sum(lengths)
    if name in ("contiguous", "zigzag"):
        assert np.ptp(layout.shard_sizes()) <= 1
    x = np.arange(sum(lengths) * 2).reshape(-1, 2)
    assert (layout.unshard([layout.shard(x, rank) for rank in range(ranks)]) == x).all()
    y = torch.from_numpy(x.T.copy())
    assert torch.equal(layout.unshard([layout.shard(y, rank, dim=-1) for rank in range(ranks)], dim=-1), y)


def test_zigzag_pairs_early_chunks_with_late_ones():
    layout = Layout.zigzag([16], 4)
    assert layout.tokens(0).tolist() == [0, 1, 14, 15]
    assert layout.tokens(3).tolist() == [6, 7, 8, 9]


def test_document_zigzag_deals_each_document_and_fills_the_emptiest_rank():
    layout = Layout.document_zigzag([40, 3, 3, 3, 3, 40], 4, min_chunk=5)
    # each short document is one chunk, assigned to the rank with the fewest tokens; ties go to the lowest rank
    assert [int(layout.chunks["rank"][np.searchsorted(layout.chunks["t1"], t, "right")]) for t in (40, 43, 46, 49)] == [
        0,
        1,
        2,
        3,
    ]
    assert layout.shard_sizes().tolist() == [23, 23, 23, 23]


def balance(layout):
    """Return the tokens and the causal work of the busiest rank, each divided by the mean over ranks."""
    ranks, t0, t1 = (layout.chunks[name] for name in ("rank", "t0", "t1"))
    positions = layout.positions_of(np.arange(layout.n)) + 1
    work = np.add.reduceat(positions, t0)
    loads = (np.bincount(ranks, weights, layout.ranks) for weights in (t1 - t0, work))
    return [load.max() / load.mean() for load in loads]


@pytest.mark.parametrize(
    ("lengths", "ranks"),
    [([300], 8), ([4096, 1024, 3072], 8), ([300] * 20, 8), ([300] * 9, 8), ([300] * 100, 8), ([500, 20, 20], 4)],
)
def test_document_zigzag_balances_documents_of_any_length_by_default(lengths, ranks):
    assert max(balance(Layout.document_zigzag(lengths, ranks))) <= 1.1


def test_document_zigzag_never_cuts_below_the_smallest_chunk():
    layout = Layout.document_zigzag([1000, 600, 90], 8, min_chunk=100)
    cuts = {0, 1000, 1600, 1690}
    sizes = [t1 - t0 for t0, t1 in zip(layout.chunks["t0"], layout.chunks["t1"], strict=True) if not {t0, t1} <= cuts]
    assert min(sizes) >= 100


def test_more_ranks_than_tokens_leaves_ranks_without_tokens():
    for make in (Layout.contiguous, Layout.zigzag, Layout.document_zigzag):
        sizes = make([2], 5).shard_sizes()
        assert sizes.sum() == 2 and (sizes == 0).sum() >= 3


def test_from_chunks_keeps_the_local_order_given():
    layout = Layout.from_chunks([8], [[(6, 8), (0, 2)], [], [(2, 6)]])
    assert layout.tokens(0).tolist() == [6, 7, 0, 1] and layout.tokens(1).tolist() == []
    assert layout.position_ids(0).tolist() == [6, 7, 0, 1]


def test_positions_restart_and_targets_cross_shards_but_not_documents():
    layout = Layout.contiguous([3, 1, 4], 2)
    assert layout.position_ids(0).tolist() == [0, 1, 2, 0]
    assert layout.position_ids(1).tolist() == [0, 1, 2, 3]
    labels = torch.arange(8)[None]
    assert layout.shift_labels(labels).tolist() == [[1, 2, -100, -100, 5, 6, 7, -100]]
    # the label of a shard's last token is the next rank's first token
    whole = Layout.contiguous([8], 2)
    assert whole.shard(whole.shift_labels(np.arange(8)), 0).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Layout.contiguous([4], 0), "at least 1 rank"),
        (lambda: Layout.contiguous([4], 1.5), "ranks must be a whole number, not 1.5"),
        (lambda: Layout.from_chunks([4], [[(0, 2.5)], [(2.9, 4)]]), "whole numbers"),
        (lambda: Layout.from_chunks([4], []), "at least 1 rank"),
        (lambda: Layout.zigzag([4, 0], 2), "document 1 has length 0"),
        (lambda: Layout.document_zigzag([4], 2, min_chunk=0), "min_chunk"),
        (lambda: Layout.from_chunks([4], [[(0, 2)], [(3, 4)]]), r"\[2, 3\) are owned by no rank"),
        (lambda: Layout.from_chunks([4], [[(0, 3)], [(2, 4)]]), r"\[2, 3\) are owned twice"),
        (lambda: Layout.from_chunks([4], [[(0, 5)]]), "outside the 4 tokens"),
        (lambda: Layout.contiguous([4], 2).shard(np.zeros(5), 0), "5 entries"),
        (lambda: Layout.contiguous([4], 2).unshard([np.zeros(3), np.zeros(1)]), "this layout gives"),
        (lambda: Layout.contiguous([4], 2).tokens(2), "rank 2 is outside"),
    ],
)
def test_impossible_layouts_are_refused_with_a_sentence(make, sentence):
    with pytest.raises(DistattnError, match=sentence):
        make()


def test_block_cyclic_deals_blocks_round_and_round():
    layout = Layout.block_cyclic([10, 7], 3, block=4)
    assert [layout.tokens(rank).tolist() for rank in range(3)] == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 16],
        [8, 9, 10, 11],
    ]
    with pytest.raises(DistattnError, match="a block must have at least 1 token"):
        Layout.block_cyclic([4], 2, block=0)


def packs(seed: int, heavy: bool, tokens: int = 1 << 20) -> list[int]:
    """Draw a pack of documents with log-normal lengths, as in long-context mixes, or with a much heavier tail."""
    rng = np.random.default_rng(seed)
    raw = (rng.pareto(0.9, 4000) + 1) * 400 if heavy else rng.lognormal(6.6, 1.6, 4000)
    lengths = np.clip(raw.astype(int), 1, tokens)
    ends = np.minimum(np.cumsum(lengths), tokens)
    lengths = np.diff(ends, prepend=0)
    lengths = lengths[lengths > 0].tolist()
    return lengths + ([tokens - sum(lengths)] if sum(lengths) < tokens else [])


@pytest.mark.parametrize("heavy", [False, True])
def test_balanced_in_chunks_has_equal_work_and_nearly_equal_tokens(heavy):
    for seed in range(10):
        lengths = packs(seed, heavy)
        masks = Mask.documents(lengths, (4096, 0)), Mask.documents(lengths, "full"), Mask.causal(1 << 20)
        for mask in (None, *masks):
            layout = Layout.balanced(lengths, 64, mask=mask, chunk=(1 << 20) // (8 * 64))
            plan = make_plan(
                mask or Mask.documents(lengths),
                layout,
                strategy="allgather",
                heads=1,
                kv_heads=1,
                head_dim=8,
                dtype="bfloat16",
            )
            area, tokens = plan.area_by_rank(), layout.shard_sizes()
            # with windows or full documents, a much heavier tail leaves chunks of almost equal work, which ranks cannot
            # exchange to balance their work. No rank may get more than 1.25 times the mean number of tokens
            alike = heavy and mask is not None and len(mask.pieces) > 1
            assert area.max() <= (1.06 if alike else 1.02) * area.mean()
            assert tokens.max() <= 1.25 * tokens.mean()
            assert len(layout.chunks["t0"]) <= 8 * 64


@pytest.mark.parametrize("heavy", [False, True])
def test_balanced_costs_no_more_than_the_other_layouts_and_crowds_no_rank(heavy):
    for seed in range(3):
        lengths = packs(seed, heavy)
        for mask in (Mask.documents(lengths), Mask.documents(lengths, (4096, 0)), Mask.causal(1 << 20)):

            def cost(layout, mask=mask):
                return layout_cost(mask, 64, *(layout.chunks[name] for name in ("rank", "t0", "t1")))

            balanced = Layout.balanced(lengths, 64, mask=mask)
            assert balanced.shard_sizes().max() <= 1.25 * (1 << 20) / 64
            for name in ("contiguous", "zigzag", "document_zigzag", "placed"):
                other = make_layout(name, lengths, 64, mask)
                if other.shard_sizes().max() <= 1.25 * (1 << 20) / 64:
                    assert cost(balanced) <= cost(other), name


def test_the_cost_of_a_layout_counts_short_chunks_received_keys_and_tokens():
    mask, columns = Mask.documents([4, 4]), ("rank", "t0", "t1")
    whole, cut = Layout.contiguous([4, 4], 2), Layout.zigzag([4, 4], 2)
    # each rank has 4 tokens in one chunk with 10 cells, and receives no keys
    assert layout_cost(mask, 2, *(whole.chunks[name] for name in columns)) == 10 * (1 + 550 / 4) + 4 * 10_000
    # rank 1 owns the documents' ends, so chunks [2, 4) and [4, 6) are joined. Rank 0 has [0, 2) and [6, 8), and
    # receives 2 keys
    rows = 3 * (1 + 550 / 2) + 7 * (1 + 550 / 2)
    assert layout_cost(mask, 2, *(cut.chunks[name] for name in columns)) == rows + 2 * 1_000 + 4 * 10_000


def test_balanced_serves_any_number_of_tokens_and_ranks():
    for lengths, ranks in (([1], 3), ([1] * 5000, 8), ([5, 1, 9], 4), ([700], 1)):
        layout = Layout.balanced(lengths, ranks)
        assert layout.shard_sizes().sum() == sum(lengths)
    by_head = Mask.by_head([(1, Mask.causal(64)), (3, Mask.full(64))])
    assert Layout.balanced([64], 4, mask=by_head).shard_sizes().sum() == 64
    for wrong in ({"chunk": 0}, {"mask": Mask.causal(5)}, {"tolerance": -1.0}):
        with pytest.raises(DistattnError, match="balanced needs"):
            Layout.balanced([64], 4, **wrong)


@given(st.lists(st.one_of(st.integers(1, 5), st.integers(1, 3000)), min_size=1, max_size=40), st.integers(1, 9))
@example([1597, 262, 379, 93], 8)
def test_placed_keeps_tokens_within_a_hundredth_of_the_mean(lengths, ranks):
    layout = Layout.placed(lengths, ranks)
    assert layout.shard_sizes().max() <= np.ceil(1.01 * sum(lengths) / ranks)


def test_placed_deals_long_documents_and_leaves_others_whole():
    lengths = [20000, *[500] * 200]
    layout = Layout.placed(lengths, 8)
    owners = [
        np.unique(layout.chunks["rank"][(layout.chunks["t0"] < b) & (layout.chunks["t1"] > a)])
        for a, b in spans(lengths)
    ]
    # the long document has 200 million cells and the others 25 million in total, so every rank gets a share of the long
    # document
    assert len(owners[0]) == 8
    assert sum(len(owner) == 1 for owner in owners[1:]) >= 190
    work = [sum(Mask.documents(lengths).area((a, b)) for a, b in chunk_spans(layout, rank)) for rank in range(8)]
    assert max(work) < 1.02 * np.mean(work)


def spans(lengths):
    ends = np.cumsum(lengths)
    return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))


def chunk_spans(layout, rank):
    mine = layout.chunks["rank"] == rank
    return list(zip(layout.chunks["t0"][mine].tolist(), layout.chunks["t1"][mine].tolist(), strict=True))
