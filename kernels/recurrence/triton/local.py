"""Kernels whose programs each read one chunk of one head: its effect on any state, its outputs and their gradient."""

# C tokens per chunk, K key dim, V value dim, PK: K rounded up to a power of two, BV columns of values at a time

import triton
import triton.language as tl

from distattn.kernels.recurrence.triton.chunks import (
    chunk_rows,
    decay_sums,
    decays_between,
    load_rows,
    product,
    store_rows,
)


@triton.jit
def inverse_of_unit_lower(lower, C: tl.constexpr):
    """Return (I + lower)^-1 for a strictly lower triangular matrix (C, C), by forward substitution.

    A series of matrix powers would take fewer steps, but with repeated keys its terms are large and cancel.
    """
    i = tl.arange(0, C)
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for number in range(1, C):
        at_row = (i == number)[:, None]
        factors = tl.sum(tl.where(at_row, lower, 0.0), 0)
        # `lower` is strictly triangular, so only the finished rows above have nonzero factors
        row = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(at_row, inverse - row[None, :], inverse)
    return inverse


@triton.jit(do_not_specialize=["heads", "group"])
def triangular_kernel(
    chunks_, k_, v_, g_, beta_, w_, u_, inverse_, heads, group,
    k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head, w_row, w_head, u_row, u_head,
    K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Compute u and w of a chunk: if the state S enters it, its tokens store u - w S.

    With KEEP, also write the inverse, (M, H, C, C).
    """
    program = tl.program_id(0)
    head, chunk = tl.cast(program % heads, tl.int64), program // heads
    row, inside = chunk_rows(chunks_, chunk, C)
    channel = tl.arange(0, PK)
    k = load_rows(k_ + head // group * k_head, row, k_row, inside, channel, K)
    beta = tl.load(beta_ + head * beta_head + row * beta_row, mask=inside, other=0.0).to(tl.float32)
    total, _ = decay_sums(g_ + head * g_head, row, g_row, inside, DECAY, C)
    i = tl.arange(0, C)
    replaced = beta[:, None] * product(k, tl.trans(k)) * decays_between(total, C)
    inverse = inverse_of_unit_lower(tl.where(i[:, None] > i[None, :], replaced, 0.0), C).to(k.dtype)
    if KEEP:
        place = tl.cast(program, tl.int64) * (C * C) + i[:, None] * C + i[None, :]
        tl.store(inverse_ + place, inverse)
    scaled = k.to(tl.float32) * (beta * tl.exp(total.to(tl.float32)))[:, None]
    w = product(inverse, scaled.to(k.dtype))
    store_rows(w_ + head * w_head, row, w_row, inside, channel, K, w)
    for start in range(0, V, BV):
        column = start + tl.arange(0, BV)
        v = load_rows(v_ + head * v_head, row, v_row, inside, column, V)
        u = product(inverse, (v.to(tl.float32) * beta[:, None]).to(k.dtype))
        store_rows(u_ + head * u_head, row, u_row, inside, column, V, u)


@triton.jit(do_not_specialize=["heads", "group"])
def output_kernel(
    chunks_, q_, k_, g_, heard_, entering_, o_, heads, group,
    q_row, q_head, k_row, k_head, g_row, g_head, heard_row, heard_head, o_row, o_head,
    K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Compute a chunk's outputs from the state that enters it, (M, H, K, V), and the values that its tokens store."""
    program = tl.program_id(0)
    head, chunk = tl.cast(program % heads, tl.int64), program // heads
    row, inside = chunk_rows(chunks_, chunk, C)
    channel = tl.arange(0, PK)
    q = load_rows(q_ + head // group * q_head, row, q_row, inside, channel, K)
    k = load_rows(k_ + head // group * k_head, row, k_row, inside, channel, K)
    total, _ = decay_sums(g_ + head * g_head, row, g_row, inside, DECAY, C)
    pairs = (product(q, tl.trans(k)) * decays_between(total, C)).to(q.dtype)
    from_start = tl.exp(total.to(tl.float32))
    state_ = entering_ + tl.cast(program, tl.int64) * (K * V)
    for start in range(0, V, BV):
        column = start + tl.arange(0, BV)
        state = load_rows(state_, channel, V, channel < K, column, V)
        heard = load_rows(heard_ + head * heard_head, row, heard_row, inside, column, V)
        o = product(q, state) * from_start[:, None] + product(pairs, heard)
        store_rows(o_ + head * o_head, row, o_row, inside, column, V, o)


@triton.jit(do_not_specialize=["heads", "group"])
def asked_kernel(
    chunks_, q_, k_, g_, do_, du_, heads, group,
    q_row, q_head, k_row, k_head, g_row, g_head, do_row, do_head, du_row, du_head,
    K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Compute du, the gradient of the values that a chunk's tokens store, as far as it comes from the chunk's own outputs."""
    program = tl.program_id(0)
    head, chunk = tl.cast(program % heads, tl.int64), program // heads
    row, inside = chunk_rows(chunks_, chunk, C)
    channel = tl.arange(0, PK)
    q = load_rows(q_ + head // group * q_head, row, q_row, inside, channel, K)
    k = load_rows(k_ + head // group * k_head, row, k_row, inside, channel, K)
    total, _ = decay_sums(g_ + head * g_head, row, g_row, inside, DECAY, C)
    pairs = (product(q, tl.trans(k)) * decays_between(total, C)).to(q.dtype)
    for start in range(0, V, BV):
        column = start + tl.arange(0, BV)
        do = load_rows(do_ + head * do_head, row, do_row, inside, column, V).to(q.dtype)
        du = product(tl.trans(pairs), do)
        store_rows(du_ + head * du_head, row, du_row, inside, column, V, du)
