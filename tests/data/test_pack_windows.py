"""Steps contain every document once, in packs within their caps, after a bounded wait, under any rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_best_fit import web_like

from distattn.data.packing.blend import BlendSource, blend_documents
from distattn.data.packing.cut_documents import CorpusSpans
from distattn.data.packing.pack_rule import PackCost, PackRule
from distattn.data.packing.pack_windows import plan_windows
from distattn.ir.errors import DistattnError

COST = PackCost(token_cells=2, document_cells=30)


def documents_of(corpora, seed, max_epochs=1.0):
    sources = [
        BlendSource(str(number), len(lengths), int(lengths.sum()), 1.0 + number, max_epochs)
        for number, lengths in enumerate(corpora)
    ]
    return blend_documents(sources, corpora, seed)


def packs_of(rule, documents, seed, spans=None):
    """Return (step, pieces, waits) of each pack, and the number of steps in each window."""
    packs, sizes, step = [], [], 0
    for window in plan_windows(rule, documents, seed, spans or {}):
        assert window.packs.min() > 0
        assert window.packs.sum() == len(window.pieces)
        assert window.pieces.min() > 0
        assert window.pieces.sum() == len(window.rows) == len(window.waited)
        ends = np.cumsum(window.pieces)
        steps = step + np.repeat(np.arange(len(window.packs)), window.packs)
        packs += [
            (int(step_of_pack), window.rows[end - size : end], window.waited[end - size : end])
            for step_of_pack, size, end in zip(steps, window.pieces, ends, strict=True)
        ]
        sizes.append(len(window.packs))
        step += len(window.packs)
    return packs, sizes


def slots_of(pack, rule, step):
    longest = int(pack["length"].max())
    return max(1, -(-longest // rule.context_at(step)))


CORPORA = st.lists(
    st.lists(st.integers(0, 70), min_size=1, max_size=80).filter(any).map(lambda lengths: np.array(lengths, np.int32)),
    min_size=1,
    max_size=3,
)
CONTEXTS = st.sampled_from(
    [((0, 1),), ((0, 8),), ((0, 48),), ((0, 8), (2, 16)), ((0, 48), (3, 16), (4, 96)), ((0, 96), (1, 4))]
)


@st.composite
def rules(draw):
    return PackRule(
        context=draw(CONTEXTS),
        tokens_per_step=96 * draw(st.integers(1, 4)),
        window=draw(st.integers(1, 60)),
        max_documents=draw(st.none() | st.integers(1, 5)),
        max_cost=draw(st.none() | st.floats(0.05, 3)),
        cost=COST,
        long_documents=draw(st.sampled_from(["cut", "keep"])),
        level=draw(st.booleans()),
    )


@settings(max_examples=60)
@given(CORPORA, rules(), st.integers(0, 5), st.sampled_from([1.0, 2.5]))
def test_every_token_of_every_document_is_there_once_an_epoch_and_packs_keep_their_caps(corpora, rule, seed, epochs):
    packs, _ = packs_of(rule, documents_of(corpora, seed, epochs), seed)
    read = {
        (int(corpus), int(document), int(epoch)): int(length)
        for block in documents_of(corpora, seed, epochs)
        for corpus, document, epoch, length in zip(*block, strict=True)
    }
    pieces_read: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    slots_of_step: dict[int, int] = {}
    for step, pack, _ in packs:
        limits, slots = rule.limits_at(step), slots_of(pack, rule, step)
        lengths = pack["length"].astype(np.int64)
        assert lengths.min() > 0
        assert lengths.sum() <= limits.tokens * slots
        assert slots == 1 or rule.long_documents == "keep"
        # a pack of several slots starts with its longest document, which needs the slots
        assert slots == 1 or lengths[0] == lengths.max()
        if limits.max_documents is not None:
            assert len(pack) <= limits.max_documents * slots
        if limits.max_cells is not None:
            assert len(pack) == 1 or COST.of(lengths).sum() <= limits.max_cells * slots
        slots_of_step[step] = slots_of_step.get(step, 0) + slots
        for document, start, length, corpus, epoch, ends_document in pack.tolist():
            pieces_read.setdefault((corpus, document, epoch), []).append((start, start + length))
            assert ends_document == (start + length == read[corpus, document, epoch])
    for key, pieces in pieces_read.items():
        ends = [0]
        for start, end in sorted(pieces):
            assert start == ends[-1]
            ends.append(end)
        assert ends[-1] == read[key]
        assert rule.long_documents == "cut" or len(pieces) == 1
    assert pieces_read.keys() == read.keys()
    assert sorted(slots_of_step) == list(range(len(slots_of_step)))
    for step, slots in slots_of_step.items():
        assert slots <= rule.packs_at(step)
        # slots stay free only in the last step, or where long documents are kept whole
        assert slots == rule.packs_at(step) or step == len(slots_of_step) - 1 or rule.long_documents == "keep"


@st.composite
def spanned_corpora(draw):
    """Draw corpora, and spans of at most 8 tokens in some documents. Many spans start where the previous span ends."""
    corpora, spans = draw(CORPORA), {}
    for number, lengths in enumerate(corpora):
        for document, length in enumerate(lengths.tolist()):
            limits, at = [], draw(st.integers(0, 20)) if draw(st.booleans()) else length
            while at < length:
                end = min(at + draw(st.integers(1, 8)), length)
                limits.append((at, end))
                at = end + draw(st.sampled_from([0, 0, 1, 5, 30]))
            spans[number, document] = np.array(limits, np.int64).reshape(-1, 2)
    return corpora, spans


CUTTING = [((0, 8),), ((0, 48),), ((0, 8), (2, 16)), ((0, 48), (3, 16), (4, 96)), ((0, 96), (1, 8))]


@settings(max_examples=100)
@given(spanned_corpora(), rules(), st.sampled_from(CUTTING), st.integers(0, 5))
def test_spans_are_never_cut_and_steps_are_still_full(corpora_and_spans, rule, context, seed):
    corpora, spans = corpora_and_spans
    rule = PackRule(**{**vars(rule), "context": context, "long_documents": "cut"})
    of_corpus = {
        number: CorpusSpans(str(number), lambda document, number=number: spans[number, document])
        for number in range(len(corpora))
    }
    packs, _ = packs_of(rule, documents_of(corpora, seed, 2.0), seed, of_corpus)
    pieces_read: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    packs_of_step: dict[int, int] = {}
    for step, pack, waited in packs:
        assert pack["length"].sum() <= rule.context_at(step)
        assert waited.max() <= 12
        packs_of_step[step] = packs_of_step.get(step, 0) + 1
        for document, start, length, corpus, epoch, ends_document in pack.tolist():
            pieces_read.setdefault((corpus, document, epoch), []).append((start, start + length))
            assert ends_document == (start + length == corpora[corpus][document])
            limits = spans[corpus, document]
            assert not ((limits[:, 0] < start + length) & (start + length < limits[:, 1])).any()
    assert len(pieces_read) == 2 * sum(np.count_nonzero(lengths) for lengths in corpora)
    for (corpus, document, _), pieces in pieces_read.items():
        begins, ends = zip(*sorted(pieces), strict=True)
        assert begins == (0, *ends[:-1]) and ends[-1] == corpora[corpus][document]
    for step in range(len(packs_of_step) - 1):
        assert packs_of_step[step] == rule.packs_at(step)


def test_pieces_end_before_a_span_and_are_as_long_as_they_can_be():
    spans = np.array([[5, 90], [90, 100], [195, 230], [230, 300]])
    rule = PackRule(context=((0, 100),), tokens_per_step=400, window=8)
    packs, _ = packs_of(rule, documents_of([np.array([500, 30])], 0), 0, {0: CorpusSpans("web", lambda _: spans)})
    pieces = sorted(
        (row["start"].item(), row["length"].item()) for _, pack, _ in packs for row in pack[pack["document"] == 0]
    )
    assert pieces == [(0, 100), (100, 95), (195, 35), (230, 100), (330, 100), (430, 70)]


def test_steps_are_full_where_pieces_that_end_before_spans_cost_less_than_full_ones():
    rule = PackRule(((0, 96),), 16 * 96, window=64, max_cost=1.0, cost=PackCost(0, 500))
    limits = np.cumsum(np.resize([49, 48], 20))
    spans = {
        0: CorpusSpans("web", lambda document: np.stack([limits[:-1], limits[1:]], 1)[: 0 if document % 100 else None])
    }
    lengths = np.where(np.arange(6000) % 100, 1, limits[-1])
    packs, _ = packs_of(rule, documents_of([lengths], 0), 0, spans)
    counts = np.bincount([step for step, _, _ in packs])
    assert len(counts) > 20 and set(counts[:-1]) == {16}


def test_a_span_that_no_pack_holds_is_refused_by_name():
    rule = PackRule(context=((0, 100),), tokens_per_step=400, window=8)
    spans = {0: CorpusSpans("web", lambda _: np.array([[130, 231]]))}
    with pytest.raises(
        DistattnError, match=r"web: document 1 has a span of 101 tokens \(130 to 231\), which no pack of 100"
    ):
        packs_of(rule, documents_of([np.array([30, 250])], 0), 0, spans)
    # spans of a document that is not cut may have any length
    kept = PackRule(**{**vars(rule), "long_documents": "keep"})
    assert len(packs_of(kept, documents_of([np.array([30, 250])], 0), 0, spans)[0]) == 1


@settings(max_examples=60)
@given(CORPORA, rules(), st.integers(0, 5))
def test_a_document_waits_for_two_windows_at_most_and_for_six_where_packs_are_capped(corpora, rule, seed):
    fixed = PackRule(**{**vars(rule), "context": rule.context[:1], "window": max(rule.window, 4)})
    packs, _ = packs_of(fixed, documents_of(corpora, seed, 3.0), seed)
    capped = fixed.max_documents is not None or fixed.max_cost is not None
    assert max(int(waited.max()) for _, _, waited in packs) <= (6 if capped else 2)


def test_windows_end_where_the_context_length_changes():
    corpora = [web_like(3000)]
    rule = PackRule(context=((0, 8192), (7, 32_768), (20, 16_384)), tokens_per_step=1 << 17, window=64)
    packs, sizes = packs_of(rule, documents_of(corpora, 0), 0)
    # 64 packs fill 4, 16 and 8 steps
    assert sizes[:3] == [4, 3, 13]
    assert set(sizes[3:-1]) == {8}
    for step, pack, _ in packs:
        assert pack["length"].sum() <= rule.context_at(step)


@pytest.mark.parametrize("tokens", [32_768, 131_072])
def test_steps_are_full_and_documents_hardly_wait(tokens):
    lengths = web_like(100_000)
    rule = PackRule(context=((0, tokens),), tokens_per_step=32 * tokens, window=512)
    packs, _ = packs_of(rule, documents_of([lengths], 0), 0)
    # leave out the last window, which contains the remaining packs
    steps = packs[-1][0] - 32
    inside = [(pack, waited) for step, pack, waited in packs if step < steps]
    assert sum(int(pack["length"].sum(dtype=np.int64)) for pack, _ in inside) / (len(inside) * tokens) > 0.995
    assert max(int(waited.max()) for _, waited in inside) == 1
    carried = sum(int((waited > 0).sum()) for _, waited in inside)
    assert carried < 0.03 * len(lengths)


def test_steps_are_not_sorted_by_length():
    tokens = 32_768
    rule = PackRule(context=((0, tokens),), tokens_per_step=16 * tokens, window=1024)
    packs, sizes = packs_of(rule, documents_of([web_like(40_000)], 0), 0)
    assert sizes[0] == 64
    longest = [np.mean([pack["length"].max() for step, pack, _ in packs if step == number]) for number in range(64)]
    place = [np.mean([pack["length"].max() for pack in [p for s, p, _ in packs if s < 64][i::16]]) for i in range(16)]
    # correlations of 64 independent pairs have a standard deviation of 1/8
    assert abs(np.corrcoef(longest, np.arange(64))[0, 1]) < 0.6
    # means of 64 packs differ only by chance
    assert max(place) < 2 * min(place)


def test_levelled_steps_have_packs_of_nearly_equal_work():
    tokens, worst = 32_768, {}
    for level in (False, True):
        rule = PackRule(context=((0, tokens),), tokens_per_step=16 * tokens, window=512, level=level)
        packs, _ = packs_of(rule, documents_of([web_like(40_000)], 0), 0)
        works: dict[int, list[int]] = {}
        for step, pack, _ in packs:
            works.setdefault(step, []).append(int((pack["length"].astype(np.int64) ** 2).sum()))
        worst[level] = np.mean([max(work) / np.mean(work) for work in works.values()])
    assert worst[True] < 1.15 < 2 < worst[False]


def test_packs_that_take_several_places_stay_within_their_step():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(1, 100, 3000), rng.integers(100, 801, 300)]).astype(np.int32)
    rule = PackRule(context=((0, 100),), tokens_per_step=800, window=64, long_documents="keep")
    packs, _ = packs_of(rule, documents_of([lengths], 0), 0)
    slots = np.zeros(packs[-1][0] + 1, np.int64)
    for step, pack, _ in packs:
        slots[step] += slots_of(pack, rule, step)
    assert slots.max() == 8
    # long documents fill half of the slots, and short documents the rest of their steps
    assert slots[:-8].mean() > 7.9


def test_equal_seeds_give_equal_packs_and_others_give_others():
    rule = PackRule(context=((0, 64),), tokens_per_step=256, window=8)
    first, _ = packs_of(rule, documents_of([web_like(50) // 20], 3), 3)
    again, _ = packs_of(rule, documents_of([web_like(50) // 20], 3), 3)
    other, _ = packs_of(rule, documents_of([web_like(50) // 20], 3), 4)
    as_bytes = lambda packs: [(step, pack.tobytes()) for step, pack, _ in packs]  # noqa: E731
    assert as_bytes(first) == as_bytes(again) != as_bytes(other)
