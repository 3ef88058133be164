"""Device functions that the kernels of recurrences share: tokens of a chunk, tiles of states, sums of decays."""

# C tokens of a chunk, K key dim, V value dim

import triton
import triton.language as tl

# exp of less is 0 in fp64, too; and differences of sums stay finite (see `transitions`)
LEAST_DECAY = tl.constexpr(-1000.0)


@triton.jit
def chunk_rows(chunks_, chunk, C: tl.constexpr):
    """Return the rows of a chunk's tokens in the tensors (int64), and whether each is a token of the chunk."""
    row = tl.load(chunks_ + 2 * chunk).to(tl.int64) + tl.arange(0, C)
    return row, row < tl.load(chunks_ + 2 * chunk + 1)


@triton.jit
def load_rows(x_, row, row_stride, inside, column, width):
    """Load columns of rows of a matrix; what is no token, or right of the matrix, is 0."""
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(x_ + row[:, None] * row_stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x_, row, row_stride, inside, column, width, value):
    """Store columns of rows of a matrix; what is no token, or right of the matrix, is left out."""
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(x_ + row[:, None] * row_stride + column[None, :], value, mask=mask)


@triton.jit
def state_places(number, K, V, channel, column):
    """Return the places of a tile of state `number` in a tensor (..., K, V), and which of them there are."""
    place = tl.cast(number, tl.int64) * (K * V) + channel[:, None] * V + column[None, :]
    return place, (channel < K)[:, None] & (column < V)[None, :]


@triton.jit
def decay_sums(g_, row, g_row, inside, DECAY: tl.constexpr, C: tl.constexpr):
    """Return sums of the logarithms of decays up to and with each token, and of all tokens, in fp64.

    The difference of two large sums would lose in fp32 what matters.
    """
    if DECAY:
        g = tl.load(g_ + row * g_row, mask=inside, other=0.0).to(tl.float64)
        g = tl.maximum(g, LEAST_DECAY)
        return tl.cumsum(g, 0), tl.sum(g, 0)
    return tl.zeros([C], tl.float64), tl.sum(tl.zeros([C], tl.float64), 0)


@triton.jit
def decays_between(total, C: tl.constexpr):
    """Return what is left of token i at token t, (t, i): 0 where i is later than t."""
    i = tl.arange(0, C)
    difference = (total[:, None] - total[None, :]).to(tl.float32)
    return tl.exp(tl.where(i[:, None] >= i[None, :], difference, -float("inf")))


@triton.jit
def product(a, b):
    """Return a @ b of tiles of one dtype, in fp32; of fp32 tiles as three products of TF32, which lose nothing that matters."""
    return tl.dot(a, b, input_precision="tf32x3")
