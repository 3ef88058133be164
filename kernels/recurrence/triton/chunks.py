"""Device functions shared by the recurrence kernels: rows of a chunk, tiles of states, sums of log decays."""

# C tokens per chunk, K key dim, V value dim

import triton
import triton.language as tl

# smaller log decays are clamped: their exp is 0 even in fp64, and differences of sums stay finite (see `transitions`)
LEAST_DECAY = tl.constexpr(-1000.0)


@triton.jit
def chunk_rows(chunks_, chunk, C: tl.constexpr):
    """Return C row numbers (int64) from the chunk's first token on, and whether each belongs to the chunk."""
    row = tl.load(chunks_ + 2 * chunk).to(tl.int64) + tl.arange(0, C)
    return row, row < tl.load(chunks_ + 2 * chunk + 1)


@triton.jit
def load_rows(x_, row, row_stride, inside, column, width):
    """Load a tile of a matrix. Elements outside the chunk or the matrix are 0."""
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(x_ + row[:, None] * row_stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x_, row, row_stride, inside, column, width, value):
    """Store a tile of a matrix, without the elements outside the chunk or the matrix."""
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(x_ + row[:, None] * row_stride + column[None, :], value, mask=mask)


@triton.jit
def state_places(number, K, V, channel, column):
    """Return the offsets of a tile of state `number` in a tensor (..., K, V), and which of them exist."""
    place = tl.cast(number, tl.int64) * (K * V) + channel[:, None] * V + column[None, :]
    return place, (channel < K)[:, None] & (column < V)[None, :]


@triton.jit
def decay_sums(g_, row, g_row, inside, DECAY: tl.constexpr, C: tl.constexpr):
    """Return the cumulative sums of log decays, including each token, (C,), and their total, in fp64.

    In fp32 the difference between two large sums would lose its significant digits.
    """
    if DECAY:
        g = tl.load(g_ + row * g_row, mask=inside, other=0.0).to(tl.float64)
        g = tl.maximum(g, LEAST_DECAY)
        return tl.cumsum(g, 0), tl.sum(g, 0)
    return tl.zeros([C], tl.float64), tl.sum(tl.zeros([C], tl.float64), 0)


@triton.jit
def decays_between(total, C: tl.constexpr):
    """Return the decay from token i to token t, (t, i): 0 if i is later than t."""
    i = tl.arange(0, C)
    difference = (total[:, None] - total[None, :]).to(tl.float32)
    return tl.exp(tl.where(i[:, None] >= i[None, :], difference, -float("inf")))


@triton.jit
def product(a, b):
    """Return a @ b in fp32, for tiles of one dtype. fp32 tiles take three TF32 products, with negligible loss."""
    return tl.dot(a, b, input_precision="tf32x3")
