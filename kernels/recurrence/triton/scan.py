"""Kernels that pass states forward, and gradients back, through a segment's chunks: one program per segment, head and block.

A block is BV columns of the state.
"""

# N segments, M chunks, H heads, C tokens per chunk, K key dim, V value dim, PK: K rounded up to a power of two

import triton
import triton.language as tl

from distattn.kernels.recurrence.triton.chunks import (
    chunk_rows,
    decay_sums,
    load_rows,
    product,
    state_places,
    store_rows,
)


@triton.jit(do_not_specialize=["heads", "group"])
def scan_kernel(
    chunks_, first_, k_, g_, w_, u_, state_, entering_, leaving_, heads, group,
    k_row, k_head, g_row, g_head, w_row, w_head, u_row, u_head,
    K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute the state after each segment. With KEEP, also write the states that enter chunks (M, H, K, V).

    With KEEP and DELTA, overwrite u with u - w S.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = program % blocks * BV + tl.arange(0, BV)
    owner = program // blocks
    head, segment = tl.cast(owner % heads, tl.int64), owner // heads
    channel = tl.arange(0, PK)
    place, there = state_places(owner, K, V, channel, column)
    state = tl.load(state_ + place, mask=there, other=0.0).to(tl.float32)
    for chunk in range(tl.load(first_ + segment), tl.load(first_ + segment + 1)):
        row, inside = chunk_rows(chunks_, chunk, C)
        k = load_rows(k_ + head // group * k_head, row, k_row, inside, channel, K)
        total, end = decay_sums(g_ + head * g_head, row, g_row, inside, DECAY, C)
        heard = load_rows(u_ + head * u_head, row, u_row, inside, column, V).to(tl.float32)
        if KEEP:
            of_chunk, _ = state_places(tl.cast(chunk, tl.int64) * heads + head, K, V, channel, column)
            tl.store(entering_ + of_chunk, state, mask=there)
        if DELTA:
            w = load_rows(w_ + head * w_head, row, w_row, inside, channel, K)
            heard -= product(w, state.to(k.dtype))
            if KEEP:
                store_rows(u_ + head * u_head, row, u_row, inside, column, V, heard)
        kept = heard * tl.exp((end - total).to(tl.float32))[:, None]
        state = state * tl.exp(end.to(tl.float32)) + product(tl.trans(k), kept.to(k.dtype))
    tl.store(leaving_ + place, state, mask=there)


@triton.jit(do_not_specialize=["heads", "group"])
def scan_back_kernel(
    chunks_, first_, q_, k_, g_, w_, do_, du_, dstate_, dleaving_, dentering_, heads, group,
    q_row, q_head, k_row, k_head, g_row, g_head, w_row, w_head, do_row, do_head, du_row, du_head,
    K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of each segment's initial state.

    With KEEP, also write the gradients of the states that leave chunks (M, H, K, V), and the complete du.
    """
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = program % blocks * BV + tl.arange(0, BV)
    owner = program // blocks
    head, segment = tl.cast(owner % heads, tl.int64), owner // heads
    channel = tl.arange(0, PK)
    place, there = state_places(owner, K, V, channel, column)
    dstate = tl.load(dstate_ + place, mask=there, other=0.0).to(tl.float32)
    first, after = tl.load(first_ + segment), tl.load(first_ + segment + 1)
    for number in range(after - first):
        chunk = after - 1 - number
        row, inside = chunk_rows(chunks_, chunk, C)
        q = load_rows(q_ + head // group * q_head, row, q_row, inside, channel, K)
        do = load_rows(do_ + head * do_head, row, do_row, inside, column, V).to(tl.float32)
        total, end = decay_sums(g_ + head * g_head, row, g_row, inside, DECAY, C)
        if KEEP:
            of_chunk, _ = state_places(tl.cast(chunk, tl.int64) * heads + head, K, V, channel, column)
            tl.store(dleaving_ + of_chunk, dstate, mask=there)
        before = dstate * tl.exp(end.to(tl.float32))
        before += product(tl.trans(q), (do * tl.exp(total.to(tl.float32))[:, None]).to(q.dtype))
        if DELTA or KEEP:
            k = load_rows(k_ + head // group * k_head, row, k_row, inside, channel, K)
            du = load_rows(du_ + head * du_head, row, du_row, inside, column, V).to(tl.float32)
            du += product(k, dstate.to(k.dtype)) * tl.exp((end - total).to(tl.float32))[:, None]
            if KEEP:
                store_rows(du_ + head * du_head, row, du_row, inside, column, V, du)
            if DELTA:
                w = load_rows(w_ + head * w_head, row, w_row, inside, channel, K)
                before -= product(tl.trans(w), du.to(w.dtype))
        dstate = before
    tl.store(dentering_ + place, dstate, mask=there)
