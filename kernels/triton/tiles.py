"""Device functions shared by the Triton kernels: loading tiles and runs, the keys each row may attend to, softcap, merging."""

import triton
import triton.language as tl

from distattn.kernels import spec

# whether kernels run in the interpreter is fixed when Triton is first imported
INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
MOST_TURNS = tl.constexpr(spec.MOST_TURNS)


@triton.jit
def load_tile(x, row, column, rows, stride, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Load rows [row, row + BLOCK) and columns [column, column + WIDTH) of a matrix. Rows past its end are zero."""
    if TMA:
        tile = x.load([row, column.to(tl.int32)])
    else:
        r = row + tl.arange(0, BLOCK)
        place = r.to(tl.int64)[:, None] * stride + (column + tl.arange(0, WIDTH))[None, :]
        tile = tl.load(x + place, mask=(r < rows)[:, None], other=0.0)
    return tile


@triton.jit
def load_run(runs, i):
    """Load the six columns of run i. See kernels/tile_runs.py."""
    at = runs + i * 6
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def row_keys(bands, row_bands, band, rows_at, row, i):
    """Return (low, high, shift): row + i may attend to keys [low_i, high_i), at axis distance key - (row + i) + shift_i."""
    number = i * 0 + band
    if rows_at >= 0:
        number = tl.load(row_bands + rows_at + i)
    at = bands + number * 10
    r = row + i
    climbed = tl.load(at + 7) * ((r - tl.load(at + 8)) // tl.load(at + 6))
    low = tl.maximum(tl.load(at + 2), tl.load(at + 4) + climbed)
    high = tl.minimum(tl.load(at + 3), tl.load(at + 5) + climbed)
    inside = (r >= tl.load(at)) & (r < tl.load(at + 1))
    return low, tl.where(inside, high, low), tl.load(at + 9)


@triton.jit
def was_written(turn, number):
    """Return which rows an earlier launch has written. turn: their turns (see `FinalRows`). number: this launch's."""
    return turn // MOST_TURNS < number


@triton.jit
def is_last(turn, number):
    """Return which rows this launch is the last to write. For the arguments see `was_written`."""
    return turn % MOST_TURNS == number


@triton.jit
def capped(s, cap):
    """Return (cap * tanh(s / cap), tanh(s / cap)), computed by exponentials because not every target has tanh."""
    t = 1.0 - 2.0 / (1.0 + tl.math.exp2(s * (2.0 * LOG2E / cap)))
    return cap * t, t


@triton.jit
def merge_shares(before, lse):
    """Return (weight of the stored result, weight of the new result, merged log-sum-exp) per row; 0 and -inf without keys."""
    top = tl.maximum(before, lse)
    top = tl.where(top == -float("inf"), 0.0, top)
    old, fresh = tl.math.exp2((before - top) * LOG2E), tl.math.exp2((lse - top) * LOG2E)
    total = old + fresh
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    merged = tl.where(total > 0, top + tl.math.log2(tl.where(total > 0, total, 1.0)) * LN2, -float("inf"))
    return old * share, fresh * share, merged
