"""The mask algebra matches its definition, cell by cell."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distattn.ir.errors import DistattnError
from distattn.ir.mask import Mask


def cells(n: int, piece) -> np.ndarray:
    """Return a band's cells, by definition."""
    q0, q1, k0, k1, lo, hi, bq, bk, oq, ok = piece
    q, k = np.arange(n)[:, None], np.arange(n)[None]
    distance = (k - ok) // bk - (q - oq) // bq
    return (q0 <= q) & (q < q1) & (k0 <= k) & (k < k1) & (lo <= distance) & (distance <= hi)


@st.composite
def intervals(draw, n: int) -> tuple[int, int]:
    a, b = draw(st.integers(0, n - 1)), draw(st.integers(1, n))
    return (a, b) if a < b else (b - 1, a + 1)


def blocks(n: int):
    """Draw block sizes and origins (bq, bk, oq, ok)."""
    return st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(-9, n), st.integers(-9, n))


@st.composite
def bands(draw, n: int):
    lo = draw(st.one_of(st.integers(-n, n), st.just(-(1 << 40))))
    hi = draw(st.one_of(st.integers(-n, n), st.just(1 << 40)))
    return (*draw(intervals(n)), *draw(intervals(n)), lo, hi, *draw(st.one_of(st.just((1, 1, 0, 0)), blocks(n))))


@st.composite
def any_bands(draw):
    """Draw (n, pieces): bands that may overlap or be empty."""
    n = draw(st.integers(1, 48))
    return n, draw(st.lists(bands(n), min_size=1, max_size=4))


@st.composite
def masks(draw):
    """Draw (n, pieces): disjoint, non-empty bands on a grid of rectangles."""
    n = draw(st.integers(1, 48))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for _ in range(2)]
    pieces = []
    for q0, q1 in pairwise(cuts[0]):
        for k0, k1 in pairwise(cuts[1]):
            if pieces and draw(st.booleans()):
                continue
            bq, bk, oq, ok = draw(st.one_of(st.just((1, 1, 0, 0)), blocks(n)))
            q, k = draw(st.integers(q0, q1 - 1)), draw(st.integers(k0, k1 - 1))
            distance = (k - ok) // bk - (q - oq) // bq
            lo = draw(st.one_of(st.integers(distance - n, distance), st.just(-(1 << 40))))
            hi = draw(st.one_of(st.integers(distance, distance + n), st.just(1 << 40)))
            pieces.append((q0, q1, k0, k1, lo, hi, bq, bk, oq, ok))
            # add a second band in the same rectangle, entirely beyond the first, so that the bands share no cell
            if (bq, bk) == (1, 1) and hi + oq - ok < k1 - 1 - q0 and draw(st.booleans()):
                pieces.append((q0, q1, k0, k1, hi + 1, 1 << 40, 1, 1, oq, ok))
    return n, draw(st.permutations(pieces))


@settings(max_examples=1500)
@given(masks(), st.data())
def test_any_mask_answers_like_its_cells(mask_case, data):
    n, pieces = mask_case
    dense = np.any([cells(n, piece) for piece in pieces], 0)
    mask = Mask.from_pieces(pieces, n)
    assert (mask.dense() == dense).all()
    assert mask.area() == dense.sum()
    q, k = data.draw(intervals(n)), data.draw(intervals(n))
    inside = np.zeros_like(dense)
    inside[q[0] : q[1], k[0] : k[1]] = True
    assert mask.area(q, k) == (dense & inside).sum()
    assert (mask.cut(q, k).dense() == (dense & inside)).all()
    several = [q, data.draw(intervals(n))]
    rows = np.zeros(n, bool)
    for a, b in several:
        rows[a:b] = True
    assert as_booleans(mask.needed_keys(several), n).tolist() == dense[rows].any(0).tolist()


@settings(max_examples=1000)
@given(any_bands())
def test_bands_are_refused_exactly_when_they_are_empty_or_overlap(case):
    n, pieces = case
    each = [cells(n, piece) for piece in pieces]
    empty, overlap = any(not band.any() for band in each), (np.sum(each, 0) > 1).any()
    with_blocks = any(piece[6:8] != (1, 1) for piece in pieces)
    try:
        Mask.from_pieces(pieces, n)
        assert not empty and not overlap
    except DistattnError as refusal:
        assert empty or overlap or (with_blocks and "rectangles" in str(refusal))


@settings(max_examples=300)
@given(masks(), st.integers(1, 17), st.integers(1, 17))
def test_tile_runs_name_every_tile_with_its_kind(mask_case, bm, bn):
    n, pieces = mask_case
    mask = Mask.from_pieces(pieces, n)
    runs = mask.tiles(bm, bn)
    for piece in range(len(pieces)):
        allowed = cells(n, pieces[piece])
        for tile in range(-(-n // bm)):
            rows = allowed[tile * bm : (tile + 1) * bm]
            some = {j for j in range(-(-n // bn)) if rows[:, j * bn : (j + 1) * bn].any()}
            full = {j for j in some if rows[:, j * bn : (j + 1) * bn].all()}
            mine = [i for i in range(len(runs["tile"])) if runs["tile"][i] == tile and runs["piece"][i] == piece]
            named = [{name: int(column[i]) for name, column in runs.items()} for i in mine]
            assert some <= {j for run in named for j in range(run["begin"], run["end"])}
            assert full == {j for run in named for j in range(run["full_begin"], run["full_end"])}
            # a run starts and ends with a non-empty tile
            assert all({run["begin"], run["end"] - 1} <= some for run in named)


def test_constructors_mean_what_their_docstrings_say():
    q, k = np.arange(40)[:, None], np.arange(40)[None]
    same = np.repeat(np.arange(3), [1, 30, 9])[:, None] == np.repeat(np.arange(3), [1, 30, 9])[None]
    assert (Mask.full(40).dense() == 1).all()
    assert (Mask.causal(40).dense() == (k <= q)).all()
    assert (Mask.sliding_window(40, 5).dense() == ((q - 5 <= k) & (k <= q))).all()
    assert (Mask.sliding_window(40, 5, 3).dense() == ((q - 5 <= k) & (k <= q + 3))).all()
    assert (Mask.documents([1, 30, 9]).dense() == (same & (k <= q))).all()
    assert (Mask.documents([1, 30, 9], document_mask="full").dense() == same).all()
    assert (Mask.documents([1, 30, 9], document_mask=(2, 1)).dense() == (same & (q - 2 <= k) & (k <= q + 1))).all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Mask.documents([3, 0, 2]), "document 1 has length 0"),
        (lambda: Mask.documents([3, -1]), "document 1 has length -1"),
        (lambda: Mask.documents([]), "at least one"),
        (lambda: Mask.documents([2.5]), "whole numbers"),
        (lambda: Mask.documents([2], document_mask="sideways"), "document_mask must be"),
        (lambda: Mask.documents([2], document_mask=None), "document_mask must be"),
        (lambda: Mask.documents([2**63 - 1, 2**63 - 1, 6]), "at most"),
        (lambda: Mask.sliding_window(10, 2.7), "left must be a whole number, not 2.7"),
        (lambda: Mask.from_pieces([[0, 4.9, 0, 4, -1.9, 0.5]]), "whole numbers"),
        (lambda: Mask.from_pieces([[0, 4, 0, 4, -9, 9, 1, 1, -(1 << 63), 0]]), "origin"),
        (lambda: Mask.sliding_window(8, -1), "window reaches"),
        (lambda: Mask.causal(1 << 31), "at most"),
        (lambda: Mask.from_pieces([[0, 4, 0, 4, -9, 0], [2, 6, 2, 6, 0, 9]]), "pieces 0 and 1 overlap"),
        (lambda: Mask.from_pieces([[0, 9, 0, 4, -9, 9]], n=8), "outside the axis"),
        (lambda: Mask.from_pieces([[-1, 4, 0, 4, -9, 9]]), "outside the axis"),
        (lambda: Mask.from_pieces([[4, 4, 0, 4, -9, 9]]), "is empty"),
        (lambda: Mask.from_pieces([[0, 2, 6, 8, -9, 0]]), "allows no cell"),
        (lambda: Mask.from_pieces([[0, 2, 6]]), "columns"),
        (lambda: Mask.from_pieces([[0, 2, 6], [1]]), "rows of equal length"),
        (lambda: Mask.from_pieces([[0, 4, 0, 4, 0, 0, 0, 1, 0, 0]]), "block size"),
    ],
)
def test_impossible_masks_are_refused_with_a_sentence(make, sentence):
    with pytest.raises(DistattnError, match=sentence):
        make()


def test_disjoint_bands_may_share_a_rectangle_and_touch():
    lower, upper = [0, 9, 0, 9, -99, 0], [0, 9, 0, 9, 1, 99]
    assert Mask.from_pieces([lower, upper]).area() == 81


def test_masks_are_immutable_values():
    mask = Mask.causal(5)
    assert mask == Mask.documents([5]) and hash(mask) == hash(Mask.documents([5])) and mask != Mask.full(5)
    with pytest.raises(ValueError):
        mask.pieces[0, 0] = 1


def test_a_million_tokens_in_hundreds_of_documents_answer_at_once():
    lengths = np.random.default_rng(0).integers(1, 5_000, 400)
    lengths[0] += (1 << 20) - lengths.sum()
    began = time.thread_time()
    mask = Mask.documents(lengths)
    assert mask.area() == (lengths.astype(object) * (lengths + 1) // 2).sum()
    mask.cut((1000, 900_000), (0, 1 << 19))
    mask.needed_keys([(5, 90_000), (500_000, 700_000)])
    runs = mask.tiles(128, 128)
    assert len(runs["tile"]) < 10_000
    # this takes milliseconds of CPU time; the limit only catches time quadratic in the number of tokens
    assert time.thread_time() - began < 1.0


def as_booleans(intervals_: np.ndarray, n: int) -> np.ndarray:
    out = np.zeros(n, bool)
    for a, b in intervals_:
        assert 0 <= a < b <= n and not out[a:b].any()
        out[a:b] = True
    return out


LENGTHS = (3, 8, 1, 12)
START = np.repeat(np.cumsum(LENGTHS) - LENGTHS, LENGTHS)
DOC = np.repeat(np.arange(4), LENGTHS)
N = sum(LENGTHS)
q, k = np.arange(N)[:, None], np.arange(N)[None]
same, s = DOC[:, None] == DOC[None], START[None]

# the twelve static masks of the long-context attention benchmark, and sink tokens, each with its dense definition
PATTERNS = {
    "full": (Mask.full(N), (q == q) & (k == k)),
    "causal": (Mask.causal(N), k <= q),
    "full document": (Mask.documents(LENGTHS, "full"), same),
    "causal document": (Mask.documents(LENGTHS), same & (k <= q)),
    "shared question": (Mask.shared_question(LENGTHS), (same & (k <= q)) | ((DOC[None] == 0) & (DOC[:, None] != 0))),
    "token shift": (Mask.token_shift(LENGTHS, 2), same & (q - k == 2)),
    "token shift back": (Mask.token_shift(LENGTHS, -3), same & (k - q == 3)),
    "causal blockwise": (Mask.causal_blockwise(LENGTHS), (k <= q) & (same | (DOC[:, None] == 3))),
    "prefix": (Mask.prefix_lm(N, 5), (k <= q) | (k < 5)),
    "prefix document": (Mask.prefix_lm_documents(LENGTHS, 4), same & ((k <= q) | (k - s < 4))),
    "prefixes of documents": (
        Mask.prefix_lm_documents(LENGTHS, (0, 3, 9, 5)),
        same & ((k <= q) | (k - s < np.array([0, 3, 9, 5])[DOC][None])),
    ),
    "window": (Mask.sliding_window(N, 4, 4), abs(q - k) <= 4),
    "causal window": (Mask.sliding_window(N, 4), (q - k >= 0) & (q - k <= 4)),
    "global window": (
        Mask.global_sliding_window(N, 3, 2, 2),
        (q < 2) | (k < 2) | ((q - 3 <= k) & (k <= q + 2)),
    ),
    "block causal": (Mask.block_causal(N, 5), k // 5 <= q // 5),
    "block causal document": (
        Mask.block_causal_documents(LENGTHS, 5),
        same & ((k - s) // 5 <= (q - START[:, None]) // 5),
    ),
    "sink tokens": (Mask.sliding_window(N, 4, sink_tokens=3), (k <= q) & ((k >= q - 4) | (k < 3))),
    "sink tokens of documents": (
        Mask.documents(LENGTHS, (2, 1), sink_tokens=2),
        same & (k <= q + 1) & ((k >= q - 2) | (k - s < 2)),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_what_their_formulas_say(name):
    mask, wanted = PATTERNS[name]
    assert (mask.dense() == wanted).all() and mask.area() == wanted.sum()


def test_patterns_at_their_ends():
    assert Mask.prefix_lm(9, 0) == Mask.causal(9) and Mask.prefix_lm(9, 9).dense().all()
    assert Mask.global_sliding_window(9, 2, 0, 0).dense().tolist() == Mask.sliding_window(9, 2).dense().tolist()
    assert Mask.global_sliding_window(9, 2, 0, 50).dense().all()
    assert Mask.sliding_window(9, 2, sink_tokens=50).dense().tolist() == Mask.causal(9).dense().tolist()
    assert Mask.shared_question([4]) == Mask.causal(4) == Mask.causal_blockwise([4])
    for wrong in (
        lambda: Mask.prefix_lm(9, -1),
        lambda: Mask.prefix_lm(9, 10),
        lambda: Mask.prefix_lm_documents([3, 4], [1, 2, 3]),
        lambda: Mask.block_causal(9, 0),
        lambda: Mask.global_sliding_window(9, -1, 0, 1),
        lambda: Mask.sliding_window(9, 2, sink_tokens=-1),
    ):
        with pytest.raises(DistattnError):
            wrong()


def test_masks_may_differ_by_head_group():
    window, causal = Mask.documents(LENGTHS, (2, 0)), Mask.documents(LENGTHS)
    mask = Mask.by_head([(2, causal), (1, window), (1, causal)])
    dense = mask.dense()
    assert dense.shape == (4, N, N) and mask.heads == 4
    for head, part in enumerate((causal, causal, window, causal)):
        assert (dense[head] == part.dense()).all()
    assert mask.area() == dense.sum() and mask.area((5, 15), (2, 9)) == dense[:, 5:15, 2:9].sum()
    cut = mask.cut((5, 15), (2, 9)).dense()
    assert (cut[:, 5:15, 2:9] == dense[:, 5:15, 2:9]).all() and cut.sum() == dense[:, 5:15, 2:9].sum()
    assert mask != Mask.by_head([(2, causal), (2, window)]) and mask.digest != causal.digest


def test_pieces_that_neighbouring_groups_share_are_one():
    lengths = [50, 60]
    joined = Mask.by_head([(4, Mask.documents(lengths)), (4, Mask.documents(lengths))])
    assert joined.pieces.tolist() == Mask.documents(lengths).pieces.tolist()
    assert joined.piece_heads.tolist() == [[0, 8]] * 2
    apart = [(2, Mask.full(5)), (2, Mask.causal(5)), (2, Mask.full(5))]
    assert Mask.by_head(apart).piece_heads.tolist() == [[0, 2], [2, 4], [4, 6]]


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([], "pairs"),
        ([(2, Mask.causal(4)), (2, Mask.causal(5))], "one axis"),
        ([(0, Mask.causal(4))], "at least 1 head"),
        ([(1, Mask.by_head([(1, Mask.causal(4))]))], "do not differ by head"),
    ],
)
def test_impossible_head_groups_are_refused(groups, sentence):
    with pytest.raises(DistattnError, match=sentence):
        Mask.by_head(groups)
