"""Backward kernels in plain Triton: one computes dK and dV, the other dQ, so that no two programs write the same gradients.

Each program of the first kernel owns a tile of keys of one KV head and loops over the query tiles of all query heads in
its group; each program of the second owns a query tile of one head, like the forward. Scores are computed twice, but
there are no atomics and the results are deterministic (Dao 2023, arXiv 2307.08691). Both kernels read the final
log-sum-exp and delta = rowsum(dO * O), so they can process any subset of the keys. With ACC they add to existing
gradients, as the steps of a ring need.
"""

# BM query rows, BN keys; head dim D = D0 + D1, value head dim E = E0 + E1, each part a power of two (or 0 for D1 and E1)

import triton
import triton.language as tl

from distattn.kernels.triton.tiles import LOG2E, capped, is_last, load_run, load_tile, row_keys, was_written


@triton.jit
def weights_of(s, lse2, distance, slope2, scale, cap, CAP: tl.constexpr, ALIBI: tl.constexpr):
    """Return (softmax weights, d score / d<q, k>) for the products s = <q, k>. distance: key minus query on the axis.

    lse2: log-sum-exp in base 2. slope2: the ALiBi slope in base 2.
    """
    if CAP:
        bent, t = capped(s * scale, cap)
        s = bent * LOG2E
        slope = (1.0 - t * t) * scale
    else:
        s = s * (scale * LOG2E)
        slope = scale
    if ALIBI:
        s -= slope2 * tl.abs(distance).to(tl.float32)
    return tl.math.exp2(s - lse2), slope


@triton.jit(do_not_specialize=["rows", "heads"], do_not_specialize_on_alignment=["lse_", "delta_"])
def row_numbers_kernel(
    lse_, delta_, numbers_, rows, heads, padded, plane, lse_row, lse_head, delta_row, delta_head, BLOCK: tl.constexpr
):  # fmt: skip
    """Write lse in base 2 and delta to numbers (2, heads, padded). Rows without keys get lse = inf, so their weights are 0."""
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    r = (tl.program_id(0) // heads) * BLOCK + tl.arange(0, BLOCK)
    far = r.to(tl.int64)
    lse = tl.load(lse_ + far * lse_row + head * lse_head, mask=r < rows, other=-float("inf"))
    delta = tl.load(delta_ + far * delta_row + head * delta_head, mask=r < rows, other=0.0)
    at = numbers_ + head * padded + r
    tl.store(at, tl.where(lse == -float("inf"), float("inf"), lse * LOG2E))
    tl.store(at + plane, delta)


@triton.jit
def _numbers_of(lse2_, delta_, row, BLOCK: tl.constexpr):
    r = tl.multiple_of(row, 16) + tl.arange(0, BLOCK)
    return tl.load(lse2_ + r), tl.load(delta_ + r)


@triton.jit
def _deposit(x_, x, row, column, rows, x_row, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    r = row + tl.arange(0, BLOCK)
    at = r.to(tl.int64)[:, None] * x_row + (column + tl.arange(0, WIDTH))[None, :]
    inside = (r < rows)[:, None]
    if ACC:
        x += tl.load(x_ + at, mask=inside, other=0.0)
    tl.store(x_ + at, x, mask=inside)


@triton.jit
def _finish(
    x_, final_, x, row, column, rows, x_row, turn_, number,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Write rows that this launch is the last to add to, to `final_`, and other rows to `x_`, which has earlier sums."""
    r = row + tl.arange(0, BLOCK)
    c = column + tl.arange(0, WIDTH)
    inside = r < rows
    at = r.to(tl.int64)[:, None] * x_row + c[None, :]
    turn = tl.load(turn_ + r, mask=inside, other=0)
    if ACC:
        x += tl.load(x_ + at, mask=(inside & was_written(turn, number))[:, None], other=0.0)
    last = is_last(turn, number)
    # one branch after the other: both at once would take more registers
    if tl.max(last.to(tl.int32), 0) > 0:
        tl.store(final_ + at, x, mask=(inside & last)[:, None])
    if tl.max((~last).to(tl.int32), 0) > 0:
        tl.store(x_ + at, x, mask=(inside & ~last)[:, None])


@triton.jit
def _visit_rows(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_, q1_, do_, do1_, lse2_, delta_, row, rows, column,
    q_row, q_col, do_row, do_col, slope2, scale, cap, low, high, distance,
    BM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one query tile to dK and dV of a key tile.

    Scores are computed transposed (keys first), so that neither product needs a transpose.
    """
    q0 = load_tile(q_, row, q_col, rows, q_row, BM, D0, TMA)
    lse2, delta = _numbers_of(lse2_, delta_, row, BM)
    s = tl.dot(k0, q0.T, input_precision=PRECISION)
    if D1 > 0:
        q1 = load_tile(q1_, row, q_col + D0, rows, q_row, BM, D1, TMA)
        s = tl.dot(k1, q1.T, s, input_precision=PRECISION)
    r = row + tl.arange(0, BM)
    apart = column[:, None] - r[None, :] + distance[:, None]
    p, slope = weights_of(s, lse2[None, :], apart, slope2, scale, cap, CAP, ALIBI)
    if MASK:
        p = tl.where((r[None, :] >= low[:, None]) & (r[None, :] < high[:, None]), p, 0.0)
    do0 = load_tile(do_, row, do_col, rows, do_row, BM, E0, TMA)
    weights = p.to(do0.dtype)
    dv0 = tl.dot(weights, do0, dv0, input_precision=PRECISION)
    dp = tl.dot(v0, do0.T, input_precision=PRECISION)
    if E1 > 0:
        do1 = load_tile(do1_, row, do_col + E0, rows, do_row, BM, E1, TMA)
        dv1 = tl.dot(weights, do1, dv1, input_precision=PRECISION)
        dp = tl.dot(v1, do1.T, dp, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    if CAP:
        ds = ds * slope
    ds = ds.to(q0.dtype)
    dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
    if D1 > 0:
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["rows", "keys", "heads", "kv_heads", "tiles", "shift"])
def dkdv_kernel(
    q_, k_, v_, do_, q1_, k1_, v1_, do1_, numbers_, dk_, dv_, slopes_,
    first_, run_, band_, row_band_, group_, order_, part_, parts_,
    rows, keys, heads, kv_heads, tiles, shift,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, padded, plane,
    dk_row, dk_head, dv_row, dv_head, scale, cap,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute dk (keys, kv_heads, D) and dv (keys, kv_heads, E) in fp32. For split tiles, write the sums of each part to parts.

    See kernels/split_tiles.py.
    """
    pid = tl.program_id(0)
    # a head's offset may exceed 32 bits
    kv_head = tl.cast(pid % kv_heads, tl.int64)
    part = tl.load(order_ + pid // kv_heads)
    start = tl.load(part_ + 2 * part) * BN
    slot = tl.load(part_ + 2 * part + 1)
    column = start + tl.arange(0, BN)
    k_col, v_col = kv_head * k_head, kv_head * v_head
    k0 = load_tile(k_, start, k_col, keys, k_row, BN, D0, TMA)
    v0 = load_tile(v_, start, v_col, keys, v_row, BN, E0, TMA)
    dk0 = tl.zeros([BN, D0], tl.float32)
    dv0 = tl.zeros([BN, E0], tl.float32)
    k1, v1, dk1, dv1 = k0, v0, dk0, dv0
    if D1 > 0:
        k1 = load_tile(k1_, start, k_col + D0, keys, k_row, BN, D1, TMA)
        dk1 = tl.zeros([BN, D1], tl.float32)
    if E1 > 0:
        v1 = load_tile(v1_, start, v_col + E0, keys, v_row, BN, E1, TMA)
        dv1 = tl.zeros([BN, E1], tl.float32)
    slope2 = 0.0
    for head in range(tl.maximum(kv_head * GROUP - shift, 0), tl.minimum((kv_head + 1) * GROUP - shift, heads)):
        if ALIBI:
            slope2 = tl.load(slopes_ + head).to(tl.float32) * LOG2E
        far_head = tl.cast(head, tl.int64)
        q_col, do_col = far_head * q_head, far_head * do_head
        lse2_ = numbers_ + far_head * padded
        delta_ = lse2_ + plane
        at = first_ + tl.load(group_ + head) * tiles + part
        for i in range(tl.load(at), tl.load(at + 1)):
            begin, full, rest, end, band, rows_at = load_run(run_, i)
            low, high, distance = row_keys(band_, row_band_, band, rows_at, start, tl.arange(0, BN))
            for n in range(full, rest, BM):
                dk0, dk1, dv0, dv1 = _visit_rows(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_, q1_, do_, do1_, lse2_, delta_, n, rows, column,
                    q_row, q_col, do_row, do_col, slope2, scale, cap, low, high, distance,
                    BM, D0, D1, E0, E1, TMA, PRECISION, CAP, ALIBI, False,
                )  # fmt: skip
            left = (full - begin) // BM
            for j in range(left + tl.cdiv(end - rest, BM)):
                n = tl.where(j < left, begin + j * BM, rest + (j - left) * BM)
                dk0, dk1, dv0, dv1 = _visit_rows(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q_, q1_, do_, do1_, lse2_, delta_, n, rows, column,
                    q_row, q_col, do_row, do_col, slope2, scale, cap, low, high, distance,
                    BM, D0, D1, E0, E1, TMA, PRECISION, CAP, ALIBI, True,
                )  # fmt: skip
    # with a softcap the factor differs between cells and ds already contains it
    factor = 1.0 if CAP else scale
    dk0, dk1 = dk0 * factor, dk1 * factor
    if slot < 0:
        dk_at, dv_at = dk_ + kv_head * dk_head, dv_ + kv_head * dv_head
        _deposit(dk_at, dk0, start, 0, keys, dk_row, BN, D0, ACC)
        _deposit(dv_at, dv0, start, 0, keys, dv_row, BN, E0, ACC)
        if D1 > 0:
            _deposit(dk_at, dk1, start, D0, keys, dk_row, BN, D1, ACC)
        if E1 > 0:
            _deposit(dv_at, dv1, start, E0, keys, dv_row, BN, E1, ACC)
    else:
        width: tl.constexpr = D0 + D1 + E0 + E1
        row = kv_heads * width
        at = parts_ + (slot.to(tl.int64) * BN * kv_heads + kv_head) * width
        _deposit(at, dk0, 0, 0, BN, row, BN, D0, False)
        _deposit(at, dv0, 0, D0 + D1, BN, row, BN, E0, False)
        if D1 > 0:
            _deposit(at, dk1, 0, D0, BN, row, BN, D1, False)
        if E1 > 0:
            _deposit(at, dv1, 0, D0 + D1 + E0, BN, row, BN, E1, False)


@triton.jit
def _visit_keys(
    dq0, dq1, q0, q1, do0, do1, lse2, delta, k_, k1_, v_, v1_, n, keys, k_row, v_row, k_col, v_col,
    slope2, scale, cap, low, high, row_shift,
    BN: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one key tile to dQ of a query tile."""
    k0 = load_tile(k_, n, k_col, keys, k_row, BN, D0, TMA)
    v0 = load_tile(v_, n, v_col, keys, v_row, BN, E0, TMA)
    s = tl.dot(q0, k0.T, input_precision=PRECISION)
    if D1 > 0:
        k1 = load_tile(k1_, n, k_col + D0, keys, k_row, BN, D1, TMA)
        s = tl.dot(q1, k1.T, s, input_precision=PRECISION)
    column = n + tl.arange(0, BN)
    apart = column[None, :] - row_shift[:, None]
    p, slope = weights_of(s, lse2[:, None], apart, slope2, scale, cap, CAP, ALIBI)
    if MASK:
        p = tl.where((column[None, :] >= low[:, None]) & (column[None, :] < high[:, None]), p, 0.0)
    dp = tl.dot(do0, v0.T, input_precision=PRECISION)
    if E1 > 0:
        v1 = load_tile(v1_, n, v_col + E0, keys, v_row, BN, E1, TMA)
        dp = tl.dot(do1, v1.T, dp, input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    if CAP:
        ds = ds * slope
    ds = ds.to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit(
    do_not_specialize=["rows", "keys", "heads", "tiles", "shift", "number"], do_not_specialize_on_alignment=["turn_"]
)
def dq_kernel(
    q_, k_, v_, do_, q1_, k1_, v1_, do1_, numbers_, dq_, final_, turn_, slopes_,
    first_, run_, band_, row_band_, group_, order_,
    rows, keys, heads, tiles, shift, number,
    q_row, q_head, k_row, k_head, v_row, v_head, do_row, do_head, padded, plane,
    dq_row, dq_head, scale, cap,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D0: tl.constexpr, D1: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, ACC: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """Compute dq (rows, heads, D) in fp32."""
    pid = tl.program_id(0)
    head = tl.cast(pid % heads, tl.int64)
    tile = tl.load(order_ + pid // heads)
    kv_head = (head + shift) // GROUP
    row = tile * BM
    r = row + tl.arange(0, BM)
    q_col, k_col, v_col, do_col = head * q_head, kv_head * k_head, kv_head * v_head, head * do_head
    q0 = load_tile(q_, row, q_col, rows, q_row, BM, D0, TMA)
    do0 = load_tile(do_, row, do_col, rows, do_row, BM, E0, TMA)
    dq0 = tl.zeros([BM, D0], tl.float32)
    q1, do1, dq1 = q0, do0, dq0
    if D1 > 0:
        q1 = load_tile(q1_, row, q_col + D0, rows, q_row, BM, D1, TMA)
        dq1 = tl.zeros([BM, D1], tl.float32)
    if E1 > 0:
        do1 = load_tile(do1_, row, do_col + E0, rows, do_row, BM, E1, TMA)
    lse2_ = numbers_ + head * padded
    lse2, delta = _numbers_of(lse2_, lse2_ + plane, row, BM)
    slope2 = 0.0
    if ALIBI:
        slope2 = tl.load(slopes_ + head).to(tl.float32) * LOG2E
    at = first_ + tl.load(group_ + head) * tiles + tile
    for i in range(tl.load(at), tl.load(at + 1)):
        begin, full, rest, end, band, rows_at = load_run(run_, i)
        low, high, distance = row_keys(band_, row_band_, band, rows_at, row, tl.arange(0, BM))
        row_shift = r - distance
        for n in range(full, rest, BN):
            dq0, dq1 = _visit_keys(
                dq0, dq1, q0, q1, do0, do1, lse2, delta, k_, k1_, v_, v1_, n, keys, k_row, v_row, k_col, v_col,
                slope2, scale, cap, low, high, row_shift, BN, D0, D1, E0, E1, TMA, PRECISION, CAP, ALIBI, False,
            )  # fmt: skip
        left = (full - begin) // BN
        for j in range(left + tl.cdiv(end - rest, BN)):
            n = tl.where(j < left, begin + j * BN, rest + (j - left) * BN)
            dq0, dq1 = _visit_keys(
                dq0, dq1, q0, q1, do0, do1, lse2, delta, k_, k1_, v_, v1_, n, keys, k_row, v_row, k_col, v_col,
                slope2, scale, cap, low, high, row_shift, BN, D0, D1, E0, E1, TMA, PRECISION, CAP, ALIBI, True,
            )  # fmt: skip
    factor = 1.0 if CAP else scale
    dq_at = dq_ + head * dq_head
    if FINAL:
        final_at = final_ + head * dq_head
        _finish(dq_at, final_at, dq0 * factor, row, 0, rows, dq_row, turn_, number, BM, D0, ACC)
        if D1 > 0:
            _finish(dq_at, final_at, dq1 * factor, row, D0, rows, dq_row, turn_, number, BM, D1, ACC)
    else:
        _deposit(dq_at, dq0 * factor, row, 0, rows, dq_row, BM, D0, ACC)
        if D1 > 0:
            _deposit(dq_at, dq1 * factor, row, D0, rows, dq_row, BM, D1, ACC)
