"""Backward kernel in Gluon for Hopper: each program owns 128 keys of one KV head and computes dK, dV and a part of dQ.

Scores are computed once for all three gradients (five products instead of the seven of the split kernels). dQ of a
query tile is summed over programs in global memory, by whole tiles and in no fixed order, so results are not bitwise
reproducible. The split kernels in distattn.kernels.triton are the deterministic alternative. Two warpgroups own 64 keys
each and hold their dK and dV. For dQ they exchange dS through shared memory, and each computes half of dQ's columns
(FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). One warp fetches tiles, another adds dQ to global memory. While
a warpgroup waits for dQ of one tile and stores it to shared memory, the scores of the next tile are computed, so that a
product is always running.

Barriers: the bytes of a fetched tile complete `full`, and both warpgroups complete `free` once they have read the tile.
ds_full and ds_free do the same for dS, which the warpgroups write. dq_full and dq_free do it for each half of dQ, which
a warpgroup writes and the adding warp reads.
"""

# HN = BN / 2 keys per warpgroup, BM query rows; head dim D, value head dim E

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distattn.kernels.gluon.tiles import add_out, copy_in, product_layout
from distattn.kernels.triton.backward import weights_of
from distattn.kernels.triton.tiles import LOG2E, load_run, row_keys


@gluon.jit
def _fetch(
    q_, k_, v_, do_, numbers_, q_s, k_s, v_s, do_s, numbers_s, kv_full, q_full, q_free, do_full,
    start, k_col, v_col, q_head, do_head, first_head, last_head, heads, part, parts, first_, group_, run_,
    BM: gl.constexpr, HN: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Run the fetching warp: load keys and values once, then each query tile as soon as its buffer is free."""
    mbarrier.expect(kv_full, 2 * HN * (D + E) * 2)
    for half in gl.static_range(2):
        copy_in(k_, [start + half * HN, k_col], kv_full, k_s.index(half))
        copy_in(v_, [start + half * HN, v_col], kv_full, v_s.index(half))
    t = 0
    for head in range(first_head, last_head):
        at = first_ + gl.load(group_ + head) * parts + part
        for i in range(gl.load(at), gl.load(at + 1)):
            begin = gl.load(run_ + i * 6)
            end = gl.load(run_ + i * 6 + 3)
            for n in range(begin, end, BM):
                stage = t % STAGES
                odd = (t // STAGES) & 1
                mbarrier.wait(q_free.index(stage), odd ^ 1)
                # the tile, and log-sum-exp and delta of its rows
                mbarrier.expect(q_full.index(stage), BM * D * 2 + 2 * BM * 4)
                copy_in(q_, [n, head * q_head], q_full.index(stage), q_s.index(stage))
                copy_in(numbers_, [head, n], q_full.index(stage), numbers_s.index(2 * stage))
                copy_in(numbers_, [heads + head, n], q_full.index(stage), numbers_s.index(2 * stage + 1))
                mbarrier.expect(do_full.index(stage), BM * E * 2)
                copy_in(do_, [n, head * do_head], do_full.index(stage), do_s.index(stage))
                t += 1
    # the multiplying warpgroups run one product ahead: let them pass after the last tile; they discard what they compute then
    stage = t % STAGES
    mbarrier.wait(q_free.index(stage), ((t // STAGES) & 1) ^ 1)
    mbarrier.arrive(q_full.index(stage), count=1)


@gluon.jit
def _multiply(
    q_s, k_s, v_s, do_s, ds_s, dq_s, numbers_s,
    kv_full, q_full, q_free, do_full, ds_full, ds_free, dq_full, dq_free,
    dk_, dv_, parts_, slopes_, first_, run_, band_, row_band_, group_,
    start, keys, slot, first_head, last_head, part, parts, dk_row, dv_row, parts_row, scale, cap,
    HALF: gl.constexpr, BM: gl.constexpr, HN: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    CAP: gl.constexpr, ALIBI: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Run a multiplying warpgroup: keys [HALF * HN, (HALF + 1) * HN) of the tile and columns [HALF * D / 2, ...) of dQ."""
    S: gl.constexpr = product_layout(BM)
    K: gl.constexpr = product_layout(D)
    V: gl.constexpr = product_layout(E)
    Q: gl.constexpr = product_layout(D // 2)
    KEYS: gl.constexpr = gl.SliceLayout(1, S)
    WIDTH: gl.constexpr = D // 2
    i_key = gl.arange(0, HN, KEYS)
    i_row = gl.arange(0, BM, gl.SliceLayout(0, S))
    key = start + HALF * HN
    dk = gl.zeros([HN, D], gl.float32, K)
    dv = gl.zeros([HN, E], gl.float32, V)
    nothing = gl.zeros([HN, BM], gl.float32, S)
    no_dq = gl.zeros([BM, WIDTH], gl.float32, Q)
    k = k_s.index(HALF)
    v = v_s.index(HALF)
    # with a softcap the factor differs between cells and dS already contains it
    factor = 1.0 if CAP else scale
    slope2 = 0.0
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0)
    x_later = warpgroup_mma(k, q_s.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    t = 0
    for head in range(first_head, last_head):
        if ALIBI:
            slope2 = gl.load(slopes_ + head).to(gl.float32) * LOG2E
        place = first_ + gl.load(group_ + head) * parts + part
        for i in range(gl.load(place), gl.load(place + 1)):
            begin, full, rest, end, band, rows_at = load_run(run_, i)
            rows_at = gl.where(rows_at < 0, rows_at, rows_at + HALF * HN)
            low, high, distance = row_keys(band_, row_band_, band, rows_at, key, i_key)
            for n in range(begin, end, BM):
                stage = t % STAGES
                odd = (t // STAGES) & 1
                q = q_s.index(stage)
                do = do_s.index(stage)
                x = warpgroup_mma_wait(0, deps=(x_later,))
                mbarrier.wait(do_full.index(stage), odd)
                dp_later = warpgroup_mma(v, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
                lse2 = numbers_s.index(2 * stage).load(S)
                r = n + i_row
                apart = (key + i_key + distance)[:, None] - r[None, :]
                p, slope = weights_of(x, lse2, apart, slope2, scale, cap, CAP, ALIBI)
                if (n < full) | (n >= rest):
                    p = gl.where((r[None, :] >= low[:, None]) & (r[None, :] < high[:, None]), p, 0.0)
                weights = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, V, 2))
                dp = warpgroup_mma_wait(0, deps=(dp_later,))
                dv_later = warpgroup_mma(weights, do, dv, is_async=True)
                ds = p * (dp - numbers_s.index(2 * stage + 1).load(S))
                if CAP:
                    ds = ds * slope
                ds = ds.to(q.dtype)
                # wait until both warpgroups have read the previous dS
                mbarrier.wait(ds_free, (t & 1) ^ 1)
                ds_s.slice(HALF * HN, HN, 0).store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full, count=1)
                ds = gl.convert_layout(ds, gl.DotOperandLayout(0, K, 2))
                dk_later = warpgroup_mma(ds, q, dk, is_async=True)
                dv = warpgroup_mma_wait(1, deps=(dv_later,))
                mbarrier.wait(ds_full, t & 1)
                left = ds_s.slice(0, HN, 0).permute((1, 0))
                right = ds_s.slice(HN, HN, 0).permute((1, 0))
                k_left = k_s.index(0).slice(HALF * WIDTH, WIDTH, 1)
                k_right = k_s.index(1).slice(HALF * WIDTH, WIDTH, 1)
                dq_later = warpgroup_mma(left, k_left, no_dq, use_acc=False, is_async=True)
                dq_later = warpgroup_mma(right, k_right, dq_later, is_async=True)
                dk = warpgroup_mma_wait(2, deps=(dk_later,))
                # this frees dO's buffer, too: dO was read earlier
                mbarrier.arrive(q_free.index(stage), count=1)
                # start the scores of the next tile before waiting for dQ of this one
                t += 1
                ahead = t % STAGES
                mbarrier.wait(q_full.index(ahead), (t // STAGES) & 1)
                x_later = warpgroup_mma(k, q_s.index(ahead).permute((1, 0)), nothing, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(1, deps=(dq_later,))
                mbarrier.arrive(ds_free, count=1)
                # wait until the previous half of dQ has been added to global memory
                mbarrier.wait(dq_free.index(HALF), t & 1)
                dq_s.index(HALF).store(dq * factor)
                fence_async_shared()
                mbarrier.arrive(dq_full.index(HALF), count=1)
    warpgroup_mma_wait(0, deps=(x_later,))
    dk = dk * factor
    if slot < 0:
        _deposit(dk_, dk, key, keys, dk_row, HN, D, K, ACC)
        _deposit(dv_, dv, key, keys, dv_row, HN, E, V, ACC)
    else:
        _deposit(parts_, dk, HALF * HN, 2 * HN, parts_row, HN, D, K, False)
        _deposit(parts_ + D, dv, HALF * HN, 2 * HN, parts_row, HN, E, V, False)


@gluon.jit
def _add_out(
    dq_, dq_s, dq_full, dq_free, dq_head, first_head, last_head, part, parts, first_, group_, run_,
    BM: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Run the adding warp: add both halves of each dQ tile to global memory."""
    t = 0
    for head in range(first_head, last_head):
        at = first_ + gl.load(group_ + head) * parts + part
        for i in range(gl.load(at), gl.load(at + 1)):
            begin = gl.load(run_ + i * 6)
            end = gl.load(run_ + i * 6 + 3)
            for n in range(begin, end, BM):
                for half in gl.static_range(2):
                    mbarrier.wait(dq_full.index(half), t & 1)
                    add_out(dq_, [n, head * dq_head + half * WIDTH], dq_s.index(half))
                # a buffer is free once it has been read
                for half in gl.static_range(2):
                    tma.store_wait(1 - half)
                    mbarrier.arrive(dq_free.index(half), count=1)
                t += 1


@gluon.jit
def _deposit(
    x_, x, row, rows, x_row, BLOCK: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr, ACC: gl.constexpr
):  # fmt: skip
    r = row + gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    at = x_ + r.to(gl.int64)[:, None] * x_row + column[None, :]
    inside = (r < rows)[:, None]
    if ACC:
        x += gl.load(at, mask=inside, other=0.0)
    gl.store(at, x, mask=inside)


@gluon.jit(do_not_specialize=["keys", "heads", "kv_heads", "tiles", "shift"])
def backward_kernel(
    q_, k_, v_, do_, numbers_, dq_, dk_, dv_, slopes_,
    first_, run_, band_, row_band_, group_, order_, part_, parts_,
    keys, heads, kv_heads, tiles, shift,
    q_head, k_head, v_head, do_head, dq_head, dk_row, dk_head, dv_row, dv_head, scale, cap,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    CAP: gl.constexpr, ALIBI: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Compute dk (keys, kv_heads, D) and dv (keys, kv_heads, E), and add to dq (rows, heads, D), which is fp32.

    For split tiles (kernels/split_tiles.py), write dk and dv of each part to parts (slots, BN, kv_heads, D + E), in
    fp32.
    """
    HN: gl.constexpr = BN // 2
    pid = gl.program_id(0)
    kv_head = pid % kv_heads
    part = gl.load(order_ + pid // kv_heads)
    start = gl.load(part_ + 2 * part) * BN
    slot = gl.load(part_ + 2 * part + 1)
    first_head = gl.maximum(kv_head * GROUP - shift, 0)
    last_head = gl.minimum((kv_head + 1) * GROUP - shift, heads)
    k_s = gl.allocate_shared_memory(k_.dtype, [2, HN, D], k_.layout)
    v_s = gl.allocate_shared_memory(v_.dtype, [2, HN, E], v_.layout)
    q_s = gl.allocate_shared_memory(q_.dtype, [STAGES, BM, D], q_.layout)
    do_s = gl.allocate_shared_memory(do_.dtype, [STAGES, BM, E], do_.layout)
    numbers_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BM], numbers_.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BM], q_.dtype)
    ds_s = gl.allocate_shared_memory(q_.dtype, [BN, BM], DS)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, BM, D // 2], dq_.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(ds_full, count=2)
    mbarrier.init(ds_free, count=2)
    for half in gl.static_range(2):
        mbarrier.init(dq_full.index(half), count=1)
        mbarrier.init(dq_free.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_free.index(stage), count=2)
        mbarrier.init(do_full.index(stage), count=1)
    fence_async_shared()
    # a head's offset may exceed 32 bits
    far_head = gl.cast(kv_head, gl.int64)
    dk_at, dv_at = dk_ + far_head * dk_head, dv_ + far_head * dv_head
    parts_row = kv_heads * (D + E)
    parts_at = parts_ + (gl.cast(slot, gl.int64) * BN * kv_heads + kv_head) * (D + E)
    gl.warp_specialize(
        [
            (_multiply, (
                q_s, k_s, v_s, do_s, ds_s, dq_s, numbers_s,
                kv_full, q_full, q_free, do_full, ds_full, ds_free, dq_full, dq_free,
                dk_at, dv_at, parts_at, slopes_, first_, run_, band_, row_band_, group_,
                start, keys, slot, first_head, last_head, part, tiles, dk_row, dv_row, parts_row, scale, cap,
                0, BM, HN, D, E, STAGES, CAP, ALIBI, ACC,
            )),
            (_multiply, (
                q_s, k_s, v_s, do_s, ds_s, dq_s, numbers_s,
                kv_full, q_full, q_free, do_full, ds_full, ds_free, dq_full, dq_free,
                dk_at, dv_at, parts_at, slopes_, first_, run_, band_, row_band_, group_,
                start, keys, slot, first_head, last_head, part, tiles, dk_row, dv_row, parts_row, scale, cap,
                1, BM, HN, D, E, STAGES, CAP, ALIBI, ACC,
            )),
            (_fetch, (
                q_, k_, v_, do_, numbers_, q_s, k_s, v_s, do_s, numbers_s,
                kv_full, q_full, q_free, do_full,
                start, kv_head * k_head, kv_head * v_head, q_head, do_head, first_head, last_head, heads,
                part, tiles, first_, group_, run_, BM, HN, D, E, STAGES,
            )),
            (_add_out, (
                dq_, dq_s, dq_full, dq_free, dq_head, first_head, last_head, part, tiles, first_, group_, run_, BM, D // 2,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
