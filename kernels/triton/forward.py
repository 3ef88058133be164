"""Forward kernel in plain Triton: each program owns a query tile of one head and loops over its runs of key tiles.

It uses online softmax in base 2 (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao 2023, arXiv 2307.08691) and no
atomics, so it is deterministic. The result is written, or merged into a running (o, lse) so that a ring step needs no
second kernel.
"""

# BM query rows, BN keys; head dim D = D0 + D1, value head dim E = E0 + E1, each part a power of two (or 0 for D1 and E1)

import triton
import triton.language as tl

from distattn.kernels.triton.tiles import (
    LN2,
    LOG2E,
    capped,
    is_last,
    load_run,
    load_tile,
    merge_shares,
    row_keys,
    was_written,
)


@triton.jit
def _visit(
    acc0, acc1, m, l, q0, q1, k_, k1_, v_, v1_, n, keys, k_stride, v_stride, k_col, v_col,
    scale2, cap, slope2, low, high, row_shift,
    BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Visit one key tile. Return the updated (acc0, acc1, m, l): weighted sums of values, row maxima and row sums."""
    k0 = load_tile(k_, n, k_col, keys, k_stride, BN, D0, TMA)
    s = tl.dot(q0, k0.T, input_precision=PRECISION)
    if D1 > 0:
        k1 = load_tile(k1_, n, k_col + D0, keys, k_stride, BN, D1, TMA)
        s = tl.dot(q1, k1.T, s, input_precision=PRECISION)
    column = n + tl.arange(0, BN)
    # scale plain scores after the maximum is known: one instruction then multiplies and subtracts. Not in fp32, where
    # this would take more registers than large tiles leave
    late = scale2
    if CAP:
        bent, _ = capped(s * scale2, cap)
        s = bent * LOG2E
        late = 1.0
    elif ALIBI or q0.dtype == tl.float32:
        s = s * scale2
        late = 1.0
    if ALIBI:
        s -= slope2 * tl.abs(column[None, :] - row_shift[:, None]).to(tl.float32)
    if MASK:
        s = tl.where((column[None, :] >= low[:, None]) & (column[None, :] < high[:, None]), s, -float("inf"))
    top = tl.maximum(m, tl.max(s, 1) * late)
    # a row without keys so far: avoid -inf - -inf, which is NaN
    safe = tl.where(top == -float("inf"), 0.0, top) if MASK else top
    p = tl.math.exp2(s * late - safe[:, None])
    shrink = tl.math.exp2(m - safe)
    l = l * shrink + tl.sum(p, 1)
    v0 = load_tile(v_, n, v_col, keys, v_stride, BN, E0, TMA)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
    if E1 > 0:
        v1 = load_tile(v1_, n, v_col + E0, keys, v_stride, BN, E1, TMA)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    return acc0, acc1, top, l


@triton.jit
def _store(
    acc, inverse, old, fresh, o_, final_, row, head, rows, o_row, o_head, column, turn, number,
    BM: tl.constexpr, WIDTH: tl.constexpr, MERGE: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Write columns [column, column + WIDTH) of the result, or with MERGE merge them into the stored result."""
    r = row + tl.arange(0, BM)
    c = column + tl.arange(0, WIDTH)
    inside = (r < rows)[:, None]
    at = r.to(tl.int64)[:, None] * o_row + head * o_head + c[None, :]
    o = acc * inverse[:, None]
    if MERGE:
        held = inside & was_written(turn, number)[:, None] if FINAL else inside
        o = o * fresh[:, None] + tl.load(o_ + at, mask=held, other=0.0) * old[:, None]
    if FINAL:
        last = is_last(turn, number)
        # one branch after the other: both at once would take more registers
        if tl.max(last.to(tl.int32), 0) > 0:
            tl.store(final_ + at, o, mask=inside & last[:, None])
        if tl.max((~last).to(tl.int32), 0) > 0:
            tl.store(o_ + at, o, mask=inside & ~last[:, None])
    else:
        tl.store(o_ + at, o, mask=inside)


@triton.jit(
    do_not_specialize=["rows", "keys", "heads", "tiles", "shift", "number"],
    do_not_specialize_on_alignment=["lse_", "turn_"],
)
def forward_kernel(
    q_, k_, v_, q1_, k1_, v1_, o_, lse_, final_, turn_, slopes_,
    first_, run_, band_, row_band_, group_, order_,
    rows, keys, heads, tiles, shift, number,
    q_row, q_head, k_row, k_head, v_row, v_head, o_row, o_head, lse_row, lse_head, scale, cap,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, MERGE: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """Compute o (rows, heads, E) and natural lse (rows, heads). Query head h uses KV head (h + shift) // GROUP."""
    # programs for the heads of one tile run next to each other and share keys and values in the L2 cache
    pid = tl.program_id(0)
    # a head's offset may exceed 32 bits
    head = tl.cast(pid % heads, tl.int64)
    tile = tl.load(order_ + pid // heads)
    kv_head = (head + shift) // GROUP
    row = tile * BM
    r = row + tl.arange(0, BM)
    q_col, k_col, v_col = head * q_head, kv_head * k_head, kv_head * v_head
    q0 = load_tile(q_, row, q_col, rows, q_row, BM, D0, TMA)
    q1 = q0
    if D1 > 0:
        q1 = load_tile(q1_, row, q_col + D0, rows, q_row, BM, D1, TMA)
    acc0 = tl.zeros([BM, E0], tl.float32)
    acc1 = acc0
    if E1 > 0:
        acc1 = tl.zeros([BM, E1], tl.float32)
    m = tl.full([BM], -float("inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    # soft-capped scores are scaled before the cap and converted to base 2 after it
    scale2 = scale if CAP else scale * LOG2E
    slope2 = 0.0
    if ALIBI:
        slope2 = tl.load(slopes_ + head).to(tl.float32) * LOG2E
    at = first_ + tl.load(group_ + head) * tiles + tile
    for i in range(tl.load(at), tl.load(at + 1)):
        begin, full, rest, end, band, rows_at = load_run(run_, i)
        low, high, distance = row_keys(band_, row_band_, band, rows_at, row, tl.arange(0, BM))
        # key - row + distance = key - row_shift
        row_shift = r - distance
        for n in range(full, rest, BN):
            acc0, acc1, m, l = _visit(
                acc0, acc1, m, l, q0, q1, k_, k1_, v_, v1_, n, keys, k_row, v_row, k_col, v_col,
                scale2, cap, slope2, low, high, row_shift, BN, D0, D1, E0, E1, TMA, PRECISION, CAP, ALIBI, False,
            )  # fmt: skip
        left = (full - begin) // BN
        for j in range(left + tl.cdiv(end - rest, BN)):
            n = tl.where(j < left, begin + j * BN, rest + (j - left) * BN)
            acc0, acc1, m, l = _visit(
                acc0, acc1, m, l, q0, q1, k_, k1_, v_, v1_, n, keys, k_row, v_row, k_col, v_col,
                scale2, cap, slope2, low, high, row_shift, BN, D0, D1, E0, E1, TMA, PRECISION, CAP, ALIBI, True,
            )  # fmt: skip

    some = l > 0
    inverse = tl.where(some, 1.0 / tl.where(some, l, 1.0), 0.0)
    lse = tl.where(some, (m + tl.math.log2(tl.where(some, l, 1.0))) * LN2, -float("inf"))
    inside = r < rows
    lse_at = lse_ + r.to(tl.int64) * lse_row + head * lse_head
    # weights of the stored result and of this launch's result
    old, fresh = inverse, inverse
    if MERGE:
        before = tl.load(lse_at, mask=inside, other=-float("inf"))
        old, fresh, lse = merge_shares(before, lse)
    tl.store(lse_at, lse, mask=inside)
    turn = r
    if FINAL:
        turn = tl.load(turn_ + r, mask=inside, other=0)
    _store(
        acc0, inverse, old, fresh, o_, final_, row, head, rows, o_row, o_head, 0, turn, number,
        BM, E0, MERGE, FINAL,
    )  # fmt: skip
    if E1 > 0:
        _store(
            acc1, inverse, old, fresh, o_, final_, row, head, rows, o_row, o_head, E0, turn, number,
            BM, E1, MERGE, FINAL,
        )  # fmt: skip
