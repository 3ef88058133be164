"""Forward kernel in Gluon for Hopper: each program processes tiles of 128 or 192 query rows of one head.

One warp prefetches queries, keys and values by TMA. Two or three warpgroups of 64 rows each multiply and compute the
softmax: the product with the values of one tile runs while the softmax of the next is computed (FlashAttention-3, Shah
et al. 2024, arXiv 2407.08608). A program processes either one query tile or several (see `attention.forward_programs`).
In the latter case it fetches the operands of the next while the warpgroups write their results. Run lists, log-sum-exp
and merging are those of the plain Triton kernel. Results are deterministic.

Barriers: the bytes of a fetched tile complete `full`, and all warpgroups complete `free` once they have read the tile;
each query barrier belongs to one warpgroup. Key tiles (t) and query tiles (done) are counted over the life of the
program: the count determines the buffer and the phase of its barriers. A warpgroup waits for its `turn` to start
products, so that the others compute their softmax meanwhile instead of all at the same time (section 3.1 of the paper).
"""

# HM rows per warpgroup, BN keys; head dim D, value head dim E

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from distattn.kernels.gluon.tiles import copy_in, product_layout
from distattn.kernels.triton.tiles import LN2, LOG2E, capped, load_run, merge_shares, row_keys


@gluon.jit
def _rounds(program, programs, all_tiles):
    """Return the number of query tiles that a program processes."""
    whole = all_tiles // programs
    return whole + gl.where(_number(whole, program, programs) < all_tiles, 1, 0)


@gluon.jit
def _number(round, program, programs):
    """Return the number of the tile that a program processes in a round.

    The order is reversed every other round. Otherwise the same programs would always get the longest tiles.
    """
    return round * programs + gl.where(round % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _tile(number, first_, group_, order_, heads, tiles):
    """Return (head, tile, first run, end of runs). A tile's heads are consecutive, so they share keys and values in the cache."""
    head = number % heads
    tile = gl.load(order_ + number // heads)
    at = first_ + gl.load(group_ + head) * tiles + tile
    return head, tile, gl.load(at), gl.load(at + 1)


@gluon.jit
def _fetch(
    arguments,
    GROUP: gl.constexpr, WARPGROUPS: gl.constexpr, HM: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Run the fetching warp: load each query tile, then its key and value tiles, as soon as a buffer is free."""
    (
        q_, k_, v_, q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free,
        program, programs, rounds, first_, run_, group_, order_, heads, tiles, shift, q_head, k_head, v_head,
    ) = arguments  # fmt: skip
    t = 0
    done = 0
    for round in range(rounds):
        head, tile, first, last = _tile(_number(round, program, programs), first_, group_, order_, heads, tiles)
        if first < last:
            for part in gl.static_range(WARPGROUPS):
                buffer = done % 2 * WARPGROUPS + part
                mbarrier.wait(q_free.index(buffer), (done // 2 & 1) ^ 1)
                mbarrier.expect(q_full.index(buffer), HM * D * 2)
                copy_in(q_, [(tile * WARPGROUPS + part) * HM, head * q_head], q_full.index(buffer), q_s.index(buffer))
            done += 1
        kv_head = (head + shift) // GROUP
        for i in range(first, last):
            begin = gl.load(run_ + i * 6)
            end = gl.load(run_ + i * 6 + 3)
            for n in range(begin, end, BN):
                at = t % STAGES
                odd = (t // STAGES) & 1
                mbarrier.wait(k_free.index(at), odd ^ 1)
                mbarrier.expect(k_full.index(at), BN * D * 2)
                copy_in(k_, [n, kv_head * k_head], k_full.index(at), k_s.index(at))
                mbarrier.wait(v_free.index(at), odd ^ 1)
                mbarrier.expect(v_full.index(at), BN * E * 2)
                copy_in(v_, [n, kv_head * v_head], v_full.index(at), v_s.index(at))
                t += 1


@gluon.jit
def _softmax(
    x, m, n, masked, low, high, row_shift, scale, cap, slope,
    BN: gl.constexpr, LAYOUT: gl.constexpr, CAP: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """Return (weights, factor for earlier sums, new row maxima in base 2) for the products x with keys [n, n + BN)."""
    key = n + gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))
    to_base2 = scale * LOG2E
    if CAP:
        x, _ = capped(x * scale, cap)
        to_base2 = LOG2E
    if ALIBI:
        if not CAP:
            x = x * scale
            to_base2 = LOG2E
        x = x - slope * gl.abs(key[None, :] - row_shift[:, None]).to(gl.float32)
    if masked:
        x = gl.where((key[None, :] >= low[:, None]) & (key[None, :] < high[:, None]), x, -float("inf"))
    top = gl.maximum(m, gl.max(x, 1) * to_base2)
    # a row without keys so far: avoid -inf - -inf, which is NaN
    safe = gl.where(top == -float("inf"), 0.0, top)
    return gl.exp2(x * to_base2 - safe[:, None]), gl.exp2(m - safe), top


@gluon.jit
def _multiply(
    arguments,
    PART: gl.constexpr, WARPGROUPS: gl.constexpr, HM: gl.constexpr,
    BN: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    CAP: gl.constexpr, ALIBI: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Run a multiplying warpgroup on rows [PART * HM, (PART + 1) * HM) of each tile.

    Step t multiplies by keys t and by values t - 1.
    """
    (
        q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free, turn,
        o_, lse_, slopes_, program, programs, rounds, first_, run_, band_, row_band_, group_, order_, rows, heads, tiles,
        o_row, o_head, lse_row, lse_head, scale, cap,
    ) = arguments  # fmt: skip
    S: gl.constexpr = product_layout(BN)
    O: gl.constexpr = product_layout(E)
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    i_row = gl.arange(0, HM, ROWS)
    nothing = gl.zeros([HM, BN], gl.float32, S)
    slope = 0.0
    t = 0
    done = 0
    for round in range(rounds):
        head, tile, first, last = _tile(_number(round, program, programs), first_, group_, order_, heads, tiles)
        if ALIBI:
            slope = gl.load(slopes_ + head).to(gl.float32)
        row = (tile * WARPGROUPS + PART) * HM
        m = gl.full([HM], -float("inf"), gl.float32, ROWS)
        l = gl.zeros([HM], gl.float32, ROWS)
        acc = gl.zeros([HM, E], gl.float32, O)
        if first < last:
            buffer = done % 2 * WARPGROUPS + PART
            q = q_s.index(buffer)
            mbarrier.wait(q_full.index(buffer), done // 2 & 1)
            # the first key tile: there are no values to multiply by yet
            begin, full, rest, end, band, rows_at = load_run(run_, first)
            rows_at = gl.where(rows_at < 0, rows_at, rows_at + PART * HM)
            low, high, distance = row_keys(band_, row_band_, band, rows_at, row, i_row)
            at = t % STAGES
            # only the first warpgroup waits for the keys: it passes the turn on to the others
            if PART == 0:
                mbarrier.wait(k_full.index(at), (t // STAGES) & 1)
            mbarrier.wait(turn.index(PART), (t & 1) ^ (PART == 0))
            x = warpgroup_mma(q, k_s.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.arrive(turn.index((PART + 1) % WARPGROUPS), count=1)
            x = warpgroup_mma_wait(0, deps=(x,))
            mbarrier.arrive(k_free.index(at), count=1)
            masked = (begin < full) | (begin >= rest)
            p, _, m = _softmax(
                x, m, begin, masked, low, high, row + i_row - distance, scale, cap, slope, BN, S, CAP, ALIBI
            )  # fmt: skip
            l = gl.sum(p, 1)
            weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
            t += 1
            for i in range(first, last):
                begin, full, rest, end, band, rows_at = load_run(run_, i)
                rows_at = gl.where(rows_at < 0, rows_at, rows_at + PART * HM)
                low, high, distance = row_keys(band_, row_band_, band, rows_at, row, i_row)
                row_shift = row + i_row - distance
                begin = gl.where(i == first, begin + BN, begin)
                for n in range(begin, end, BN):
                    at = t % STAGES
                    last_at = (t - 1) % STAGES
                    if PART == 0:
                        mbarrier.wait(k_full.index(at), (t // STAGES) & 1)
                    mbarrier.wait(turn.index(PART), (t & 1) ^ (PART == 0))
                    x_later = warpgroup_mma(q, k_s.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True)
                    if PART == 0:
                        mbarrier.wait(v_full.index(last_at), ((t - 1) // STAGES) & 1)
                    acc_later = warpgroup_mma(weights, v_s.index(last_at), acc, is_async=True)
                    mbarrier.arrive(turn.index((PART + 1) % WARPGROUPS), count=1)
                    x = warpgroup_mma_wait(1, deps=(x_later,))
                    mbarrier.arrive(k_free.index(at), count=1)
                    masked = (n < full) | (n >= rest)
                    p, shrink, m = _softmax(
                        x, m, n, masked, low, high, row_shift, scale, cap, slope, BN, S, CAP, ALIBI
                    )  # fmt: skip
                    l = l * shrink + gl.sum(p, 1)
                    acc = warpgroup_mma_wait(0, deps=(acc_later,))
                    mbarrier.arrive(v_free.index(last_at), count=1)
                    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
                    weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
                    t += 1
            mbarrier.arrive(q_free.index(buffer), count=1)
            done += 1
            last_at = (t - 1) % STAGES
            mbarrier.wait(v_full.index(last_at), ((t - 1) // STAGES) & 1)
            acc_later = warpgroup_mma(weights, v_s.index(last_at), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc_later,))
            mbarrier.arrive(v_free.index(last_at), count=1)
        _write(o_, lse_, acc, m, l, row, head, rows, o_row, o_head, lse_row, lse_head, HM, E, S, O, MERGE)


@gluon.jit
def _write(
    o_, lse_, acc, m, l, row, head, rows, o_row, o_head, lse_row, lse_head,
    HM: gl.constexpr, E: gl.constexpr, S: gl.constexpr, O: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Write the results of a warpgroup's rows. acc: sums of weighted values. l: sums of weights. m: maxima in base 2."""
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    some = l > 0
    inverse = gl.where(some, 1.0 / gl.where(some, l, 1.0), 0.0)
    lse = gl.where(some, (m + gl.log2(gl.where(some, l, 1.0))) * LN2, -float("inf"))
    r = row + gl.arange(0, HM, gl.SliceLayout(1, S))
    # a head's offset may exceed 32 bits
    far_head = gl.cast(head, gl.int64)
    lse_at = lse_ + r.to(gl.int64) * lse_row + far_head * lse_head
    r_out = row + gl.arange(0, HM, OUT_ROWS)
    far = r_out.to(gl.int64)
    column = gl.arange(0, E, gl.SliceLayout(0, O))
    inside = (r_out < rows)[:, None]
    at = far[:, None] * o_row + far_head * o_head + column[None, :]
    o = acc
    if MERGE:
        old, fresh, lse = merge_shares(gl.load(lse_at, mask=r < rows, other=-float("inf")), lse)
        inverse = inverse * fresh
        o = o * gl.convert_layout(inverse, OUT_ROWS)[:, None]
        o += gl.load(o_ + at, mask=inside, other=0.0) * gl.convert_layout(old, OUT_ROWS)[:, None]
    else:
        o = o * gl.convert_layout(inverse, OUT_ROWS)[:, None]
    gl.store(o_ + at, o, mask=inside)
    gl.store(lse_at, lse, mask=r < rows)


@gluon.jit(do_not_specialize=["rows", "heads", "tiles", "shift"], do_not_specialize_on_alignment=["lse_"])
def forward_kernel(
    q_, k_, v_, o_, lse_, slopes_,
    first_, run_, band_, row_band_, group_, order_,
    rows, heads, tiles, shift,
    q_head, k_head, v_head, o_row, o_head, lse_row, lse_head, scale, cap,
    GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr,
    CAP: gl.constexpr, ALIBI: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Compute o (rows, heads, E) and natural lse (rows, heads), as the plain Triton kernel of this name does."""
    HM: gl.constexpr = 64
    WARPGROUPS: gl.constexpr = BM // HM
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    rounds = _rounds(program, programs, heads * tiles)
    # two buffers for each warpgroup's queries
    q_s = gl.allocate_shared_memory(q_.dtype, [2 * WARPGROUPS, HM, D], q_.layout)
    k_s = gl.allocate_shared_memory(k_.dtype, [STAGES, BN, D], k_.layout)
    v_s = gl.allocate_shared_memory(v_.dtype, [STAGES, BN, E], v_.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2 * WARPGROUPS, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [2 * WARPGROUPS, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turn = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], BARRIER)
    for part in gl.static_range(WARPGROUPS):
        mbarrier.init(turn.index(part), count=1)
    for buffer in gl.static_range(2 * WARPGROUPS):
        mbarrier.init(q_full.index(buffer), count=1)
        mbarrier.init(q_free.index(buffer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=WARPGROUPS)
        mbarrier.init(v_free.index(stage), count=WARPGROUPS)
    fence_async_shared()
    multiply = (
        q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free, turn,
        o_, lse_, slopes_, program, programs, rounds, first_, run_, band_, row_band_, group_, order_, rows, heads, tiles,
        o_row, o_head, lse_row, lse_head, scale, cap,
    )  # fmt: skip
    fetch = (
        q_, k_, v_, q_s, k_s, v_s, q_full, q_free, k_full, k_free, v_full, v_free,
        program, programs, rounds, first_, run_, group_, order_, heads, tiles, shift, q_head, k_head, v_head,
    )  # fmt: skip
    # list the constants in each call: in a variable they would not stay compile-time constants
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (multiply, 0, WARPGROUPS, HM, BN, D, E, STAGES, CAP, ALIBI, MERGE)),
                (_multiply, (multiply, 1, WARPGROUPS, HM, BN, D, E, STAGES, CAP, ALIBI, MERGE)),
                (_fetch, (fetch, GROUP, WARPGROUPS, HM, BN, D, E, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (multiply, 0, WARPGROUPS, HM, BN, D, E, STAGES, CAP, ALIBI, MERGE)),
                (_multiply, (multiply, 1, WARPGROUPS, HM, BN, D, E, STAGES, CAP, ALIBI, MERGE)),
                (_multiply, (multiply, 2, WARPGROUPS, HM, BN, D, E, STAGES, CAP, ALIBI, MERGE)),
                (_fetch, (fetch, GROUP, WARPGROUPS, HM, BN, D, E, STAGES)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
