"""Packs stay within their limits, are almost full, and resemble each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.data.packing.best_fit import BestFitPacks
from distattn.data.packing.pack_rule import PackCost, PackLimits

COST = PackCost(token_cells=3, document_cells=50)


def web_like(documents, seed=0):
    """Return log-normal lengths with a heavy tail, like those of a corpus of web pages, books and code."""
    rng = np.random.default_rng(seed)
    lengths = 575 + rng.lognormal(7.2, 1.0, documents)
    tail = rng.random(documents) < 0.002
    return np.where(tail, 20_000 * (1 + rng.pareto(1.5, documents)), lengths).astype(np.int64).clip(max=500_000)


def pieces(lengths, tokens):
    whole, rest = np.divmod(lengths, tokens)
    cut = np.concatenate([np.full(whole.sum(), tokens), rest[rest > 0]])
    return np.random.default_rng(1).permutation(cut)


LISTS = st.lists(st.integers(1, 60), max_size=60).map(lambda lengths: np.array(lengths, np.int64))


@given(
    st.lists(LISTS, min_size=1, max_size=3),
    st.integers(1, 40),
    st.none() | st.integers(1, 6),
    st.none() | st.integers(1, 3000),
)
def test_no_pack_exceeds_its_limits_except_for_a_single_piece(groups, tokens, max_documents, max_cells):
    limits = PackLimits(tokens, COST, max_documents, max_cells)
    packs = BestFitPacks(limits)
    pack = np.concatenate([packs.add(lengths) for lengths in groups])
    lengths = np.concatenate(groups)
    assert np.array_equal(np.unique(pack), np.arange(len(packs.slots)))
    for number, (slots, room) in enumerate(zip(packs.slots.tolist(), packs.room.tolist(), strict=True)):
        mine = lengths[pack == number]
        assert room == slots * tokens - mine.sum() >= 0
        # only a piece longer than a pack occupies several slots, and no more than it needs
        assert slots == max(1, -(-int(mine.max()) // tokens))
        if max_documents is not None:
            assert len(mine) <= max_documents * slots
        if max_cells is not None and len(mine) > 1:
            assert COST.of(mine).sum() <= max_cells * slots


@given(LISTS.filter(len), st.integers(10, 60))
def test_a_pack_is_opened_only_for_what_fits_in_none_of_those_before(lengths, tokens):
    packs = BestFitPacks(PackLimits(tokens, COST))
    pack = packs.add(lengths)
    filled = np.bincount(pack, lengths)
    slots = packs.slots
    # any two packs together hold more than one pack's tokens, and no earlier pack had room for a later pack's longest
    # piece
    for later in range(len(filled)):
        for earlier in range(later):
            assert filled[earlier] + filled[later] > tokens * max(slots[earlier], slots[later]) - tokens * (
                slots[later] > 1
            )


@given(LISTS.filter(len), st.integers(8, 60))
def test_long_pieces_go_where_best_fit_decreasing_puts_them(lengths, tokens):
    # make all pieces longer than one eighth of a pack
    lengths = np.minimum(np.maximum(lengths, tokens // 8 + 1), tokens)
    pack = BestFitPacks(PackLimits(tokens, COST)).add(lengths)
    rooms: list[int] = []
    for number in np.argsort(-lengths, kind="stable").tolist():
        fitting = [(room, place) for place, room in enumerate(rooms) if room >= lengths[number]]
        place = min(fitting)[1] if fitting else len(rooms)
        if not fitting:
            rooms.append(tokens)
        rooms[place] -= int(lengths[number])
        assert pack[number] == place


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_longest_document_of_a_cost_is_the_longest(cells, token_cells, document_cells):
    cost = PackCost(token_cells, document_cells)
    longest = cost.longest(cells)
    assert cost.of(longest + 1) > cells
    assert longest == 0 or cost.of(longest) <= cells


@pytest.mark.parametrize("tokens", [32_768, 131_072])
def test_packs_of_real_lengths_are_full_and_alike(tokens):
    lengths = pieces(web_like(60_000), tokens)
    packs = BestFitPacks(PackLimits(tokens, PackCost()))
    documents = np.bincount(packs.add(lengths))
    assert 1 - packs.room.sum() / tokens / len(packs.room) > 0.995
    # if packed by length alone, the last packs would hold only the shortest documents, more than five times the mean
    # number
    assert documents.max() < 3 * documents.mean()


def test_a_cap_of_documents_leaves_packs_full():
    tokens = 131_072
    lengths = pieces(web_like(60_000), tokens)
    mean = len(lengths) * tokens / lengths.sum()
    packs = BestFitPacks(PackLimits(tokens, PackCost(), max_documents=int(2 * mean)))
    assert np.bincount(packs.add(lengths)).max() <= int(2 * mean)
    assert 1 - packs.room.sum() / tokens / len(packs.room) > 0.99
