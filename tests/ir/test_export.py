"""Masks converted for other kernels describe the same cells, or are refused."""

import numpy as np
import pytest
import torch
from oracle import dense, random_inputs
from test_mask import PATTERNS
from torch.nn.attention.flex_attention import flex_attention

import distattn as da

pytestmark = pytest.mark.sampled(3)

LENGTHS = (3, 8, 1, 12)
N = sum(LENGTHS)


@pytest.mark.parametrize("block", [4, 8, 128])
@pytest.mark.parametrize("name", PATTERNS)
def test_block_masks_have_the_masks_cells(name, block):
    mask, wanted = PATTERNS[name]
    exported = da.block_mask(mask, block)
    q, k = torch.arange(N)[:, None], torch.arange(N)
    assert (exported.mask_mod(0, 0, q, k).numpy() == wanted).all()
    side = -(-N // block)
    padded = np.zeros((side * block, side * block), bool)
    padded[:N, :N] = wanted
    tiles = padded.reshape(side, block, side, block).transpose(0, 2, 1, 3)
    assert (exported.to_dense()[0, 0].numpy().astype(bool) == tiles.any((2, 3))).all()
    for row in range(side):
        whole = exported.full_kv_indices[0, 0, row, : exported.full_kv_num_blocks[0, 0, row]].tolist()
        inside = np.ones((side * block, side * block), bool)
        inside[N:], inside[:, N:] = False, False
        real = inside.reshape(side, block, side, block).transpose(0, 2, 1, 3)
        assert all((tiles[row, column] == real[row, column]).all() for column in whole)


def test_flex_attention_computes_the_same_attention():
    mask = da.Mask.by_head([(1, da.Mask.causal(N)), (3, da.Mask.documents(LENGTHS, (4, 1), sink_tokens=2))])
    inputs = random_inputs(N, 4, 4, 16)
    q, k, v = (x.transpose(0, 1)[None] for x in inputs[:3])
    o = flex_attention(q, k, v, block_mask=da.block_mask(mask, 8))
    assert (o[0].transpose(0, 1) - dense(mask, inputs).o).abs().max() < 1e-12


def test_rows_of_too_many_pieces_are_refused():
    mask = da.Mask.from_pieces([[0, 40, 2 * i, 2 * i + 1, -99, 99] for i in range(20)])
    with pytest.raises(da.DistattnError, match="a row of this mask has 20 pieces"):
        da.block_mask(mask)


def varlen_cells(varlen) -> np.ndarray:
    """Return the cells that a varlen kernel computes according to flash-attn's documentation."""
    q, k = np.arange(N)[:, None], np.arange(N)[None]
    document = np.searchsorted(varlen.cu_seqlens, np.arange(N), "right")
    cells = document[:, None] == document[None]
    left, right = varlen.window
    if left >= 0:
        cells &= k >= q - left
    if right >= 0:
        cells &= k <= q + right
    return cells & (k <= q) if varlen.causal else cells


EXACT = {"full", "causal", "full document", "causal document", "window", "causal window"}


@pytest.mark.parametrize("name", PATTERNS)
def test_varlen_arguments_have_the_masks_cells_or_are_refused(name):
    mask, wanted = PATTERNS[name]
    if name not in EXACT:
        with pytest.raises(da.DistattnError, match="not one square band"):
            da.cu_seqlens(mask)
        return
    varlen = da.cu_seqlens(mask)
    assert (varlen_cells(varlen) == wanted).all()
    assert varlen.cu_seqlens.dtype == np.int32 and varlen.max_seqlen == np.diff(varlen.cu_seqlens).max()


def test_documents_in_any_order_and_with_origins_are_understood():
    pieces = da.Mask.documents(LENGTHS, (3, 1)).pieces.copy()
    pieces[:, 8] += 5
    pieces[:, 4:6] -= [[-5, -5]]
    varlen = da.cu_seqlens(da.Mask.from_pieces(pieces[::-1]))
    assert (varlen_cells(varlen) == da.Mask.documents(LENGTHS, (3, 1)).dense()).all()


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (da.Mask.by_head([(1, da.Mask.causal(5)), (1, da.Mask.full(5))]), "differs by head"),
        (da.Mask.from_pieces([[0, 5, 0, 5, -1, 0], [5, 9, 5, 9, -2, 0]]), "different windows on the left"),
        (da.Mask.from_pieces([[0, 5, 0, 5, -9, 0], [5, 9, 5, 9, -9, 9]]), "different windows on the right"),
        (da.Mask.from_pieces([[0, 5, 0, 5, -9, -1]]), "always allow the diagonal"),
    ],
)
def test_masks_that_varlen_cannot_express_are_refused(mask, sentence):
    with pytest.raises(da.DistattnError, match=sentence):
        da.cu_seqlens(mask)
