"""Blends keep every corpus at its share, read every document once per epoch, and do not depend on how they are
computed.
"""

from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.data.packing.blend import BlendSource, DocumentColumns, blend_documents, weight_units
from distattn.ir.errors import DistattnError

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any).map(lambda x: np.array(x, np.int32))
CORPORA = st.lists(st.tuples(LENGTHS, st.floats(0.05, 5), st.floats(0.1, 3)), min_size=1, max_size=4)


def sources_of(corpora):
    return [
        BlendSource(f"corpus {i}", len(lengths), int(lengths.sum()), weight, max_epochs)
        for i, (lengths, weight, max_epochs) in enumerate(corpora)
    ]


def gathered(sources, lengths, seed, **more):
    blocks = list(blend_documents(sources, lengths, seed, **more))
    return DocumentColumns(*map(np.concatenate, zip(*blocks, strict=True))) if blocks else None


@given(CORPORA, st.integers(0, 9))
def test_every_document_is_read_once_an_epoch_until_its_corpus_ends(corpora, seed):
    sources = sources_of(corpora)
    read = gathered(sources, [lengths for lengths, _, _ in corpora], seed)
    for number, (lengths, _, _) in enumerate(corpora):
        mine = read.rows(read.corpus == number) if read else DocumentColumns(*[np.empty(0, np.int64)] * 4)
        assert np.array_equal(mine.length, lengths[mine.document])
        assert (np.diff(mine.epoch) >= 0).all()
        whole_epochs, rest = divmod(sources[number].most_documents, len(lengths))
        full = np.flatnonzero(lengths).tolist()
        for epoch in range(whole_epochs):
            assert sorted(mine.document[mine.epoch == epoch].tolist()) == full
        last = mine.document[mine.epoch == whole_epochs].tolist()
        assert len(set(last)) == len(last) <= rest
        assert mine.epoch.max(initial=0) <= whole_epochs


@given(CORPORA, st.integers(0, 9), st.integers(1, 50))
def test_the_order_does_not_depend_on_the_size_of_blocks(corpora, seed, block):
    sources, lengths = sources_of(corpora), [lengths for lengths, _, _ in corpora]
    first, second = gathered(sources, lengths, seed), gathered(sources, lengths, seed, block_documents=block)
    assert (first is None) == (second is None)
    assert first is None or all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=30)
@given(st.lists(st.tuples(LENGTHS, st.floats(0.05, 5)), min_size=2, max_size=4), st.integers(0, 9))
def test_the_corpus_that_is_furthest_behind_comes_next_and_shares_are_kept_to_a_document(corpora, seed):
    sources = sources_of([(lengths, weight, None) for lengths, weight in corpora])
    blocks = blend_documents(sources, [lengths for lengths, _ in corpora], seed, block_documents=7)
    units, read, longest = weight_units(sources), [0] * len(sources), [int(lengths.max()) for lengths, _ in corpora]
    for columns in islice(blocks, 20):
        for number, length in zip(columns.corpus.tolist(), columns.length.tolist(), strict=True):
            turns = [tokens * (1 << 20) // unit for tokens, unit in zip(read, units, strict=True)]
            assert number == turns.index(min(turns))
            read[number] += length
            for tokens, unit, longest_document in zip(read, units, longest, strict=True):
                share = Fraction(unit, sum(units))
                # rounding shifts a share by less than one token
                assert -share * sum(longest) - 1 <= tokens - share * sum(read) <= longest_document + 1


def test_the_others_keep_their_proportion_when_a_corpus_has_ended():
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 100, 400).astype(np.int32) for _ in range(3)]
    sources = [
        BlendSource("ends", 400, int(lengths[0].sum()), 0.5, 1.0),
        BlendSource("twice", 400, int(lengths[1].sum()), 0.4, 50.0),
        BlendSource("once", 400, int(lengths[2].sum()), 0.2, 50.0),
    ]
    read = gathered(sources, lengths, 0)
    last = np.flatnonzero(read.corpus == 0)[-1]
    after = read.rows(slice(last + 1, last + 4000))
    ratio = after.length[after.corpus == 1].sum() / after.length[after.corpus == 2].sum()
    assert abs(ratio - 2) < 0.01


def test_epochs_corpora_and_seeds_have_orders_of_their_own():
    lengths = [np.arange(1, 200, dtype=np.int32)] * 2
    sources = sources_of([(of_corpus, 1.0, 2.0) for of_corpus in lengths])
    orders = set()
    for seed in (0, 1):
        read = gathered(sources, lengths, seed)
        orders |= {
            tuple(read.document[(read.corpus == corpus) & (read.epoch == epoch)].tolist())
            for corpus in (0, 1)
            for epoch in (0, 1)
        }
    assert len(orders) == 8


def test_a_blend_of_large_numbers_does_not_overflow():
    # 14 documents of 2^31 - 1 tokens, and the smallest possible weight
    long = np.full(14, (1 << 31) - 1, np.int32)
    short = np.full(1000, 3, np.int32)
    sources = [
        BlendSource("long", 14, int(long.sum(dtype=np.int64)), 1e-9, 2.0),
        BlendSource("short", 1000, 3000, 1.0, 3.0),
    ]
    read = gathered(sources, [long, short], 0)
    assert len(read.corpus) == 28 + 3000
    assert read.corpus[:2].tolist() == [0, 1]
    assert (read.corpus[1:3001] == 1).all()
    assert (read.length > 0).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weight": 0.0}, "weight is 0.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"max_epochs": -1.0}, "max_epochs is -1.0"),
        ({"max_epochs": 1e9}, "at most 65,535"),
        ({"documents": 0}, "0 documents"),
        ({"documents": 1 << 32}, "4,294,967,296 documents"),
        ({"tokens": 0}, "are empty"),
    ],
)
def test_an_impossible_source_is_refused_by_name(arguments, sentence):
    with pytest.raises(DistattnError, match=f"corpus books: .*{sentence}"):
        BlendSource(**{"name": "books", "documents": 10, "tokens": 100, "weight": 1.0} | arguments)


def test_a_blend_of_nothing_is_refused():
    with pytest.raises(DistattnError, match="a blend of 0 corpora"):
        next(blend_documents([], [], 0))
