"""The last kernel of a backward pass. Each program computes the gradients of one chunk's tokens for one head."""

# C tokens per chunk, K key dim, V value dim, BK columns of keys at a time, BV of values

import triton
import triton.language as tl

from distattn.kernels.recurrence.triton.chunks import (
    LEAST_DECAY,
    chunk_rows,
    decay_sums,
    decays_between,
    load_rows,
    product,
    store_rows,
)


@triton.jit(do_not_specialize=["heads", "group"])
def gradient_kernel(
    chunks_, q_, k_, v_, g_, beta_, inverse_, heard_, do_, du_, entering_, dleaving_,
    dq_, dk_, dv_, dg_, dbeta_, heads, group,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head,
    heard_row, heard_head, do_row, do_head, du_row, du_head,
    dq_row, dq_head, dk_row, dk_head, dv_row, dv_head, dg_row, dg_head, dbeta_row, dbeta_head,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, DG: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dv of a chunk's tokens, with DG also dg, with DELTA also dbeta.

    All are (T, H, ...), even if heads share queries and keys. Let X be the inverse, y = X^T du, and S the state that
    enters the chunk. Then the gradient of beta v is y, that of beta k decay is -y S^T, and that of the triangular
    system is -y (u - w S)^T below the diagonal. With DELTA, y overwrites du.

    The C x C matrices come first, then the matrices with a column per channel, BK columns at a time: computing all at
    once would need too many registers.
    """
    program = tl.program_id(0)
    head, chunk = tl.cast(program % heads, tl.int64), program // heads
    row, inside = chunk_rows(chunks_, chunk, C)
    i = tl.arange(0, C)
    below = i[:, None] > i[None, :]
    q_ += head // group * q_head
    k_ += head // group * k_head
    heard_ += head * heard_head
    do_ += head * do_head
    du_ += head * du_head
    entering_ += tl.cast(program, tl.int64) * (K * V)
    dleaving_ += tl.cast(program, tl.int64) * (K * V)
    dtype = q_.dtype.element_ty
    beta, dbeta = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    dpairs, dsystem = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    if DELTA:
        beta += tl.load(beta_ + head * beta_head + row * beta_row, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, V, BV):
        column = start + tl.arange(0, BV)
        heard = load_rows(heard_, row, heard_row, inside, column, V)
        du = load_rows(du_, row, du_row, inside, column, V)
        dpairs += product(load_rows(do_, row, do_row, inside, column, V).to(dtype), tl.trans(heard))
        if DELTA:
            place = tl.cast(program, tl.int64) * (C * C) + i[:, None] * C + i[None, :]
            y = product(tl.trans(tl.load(inverse_ + place)), du)
            v = load_rows(v_ + head * v_head, row, v_row, inside, column, V).to(tl.float32)
            dbeta += tl.sum(y * v, 1)
            store_rows(dv_ + head * dv_head, row, dv_row, inside, column, V, y * beta[:, None])
            dsystem -= product(y.to(dtype), tl.trans(heard))
            store_rows(du_, row, du_row, inside, column, V, y)
        else:
            store_rows(dv_ + head * dv_head, row, dv_row, inside, column, V, du)
    total, end = decay_sums(g_ + head * g_head, row, g_row, inside, DECAY, C)
    between = decays_between(total, C)
    dpairs *= between
    dsystem = tl.where(below, dsystem * between, 0.0)
    # per token, the gradient of its sum of log decays through pairs of tokens, the entering state and the leaving state
    of_pairs, of_start, of_end = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if DG or DELTA:
        qk, kk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        for start in range(0, K, BK):
            channel = start + tl.arange(0, BK)
            k = load_rows(k_, row, k_row, inside, channel, K)
            qk += product(load_rows(q_, row, q_row, inside, channel, K), tl.trans(k))
            if DELTA:
                kk += product(k, tl.trans(k))
        if DG:
            # the diagonal has no decay
            weights = tl.where(below, dpairs * qk, 0.0)
            of_pairs += tl.sum(weights, 1) - tl.sum(weights, 0)
        if DELTA:
            weights = dsystem * kk
            dbeta += tl.sum(weights, 1)
            if DG:
                weights *= beta[:, None]
                of_pairs += tl.sum(weights, 1) - tl.sum(weights, 0)
    near = dpairs.to(dtype)
    system = (dsystem * beta[:, None]).to(dtype)
    from_start, to_end = tl.exp(total.to(tl.float32)), tl.exp((end - total).to(tl.float32))
    # the gradient of the factor by which the state decays over the chunk
    ddecay = 0.0
    # with DELTA, threads read what other threads have written to du
    tl.debug_barrier()
    for first in range(0, K, BK):
        channel = first + tl.arange(0, BK)
        dread, dkey, dscaled = (
            tl.zeros([C, BK], tl.float32),
            tl.zeros([C, BK], tl.float32),
            tl.zeros([C, BK], tl.float32),
        )
        for start in range(0, V, BV):
            column = start + tl.arange(0, BV)
            state = load_rows(entering_, channel, V, channel < K, column, V)
            dstate = load_rows(dleaving_, channel, V, channel < K, column, V)
            dread += product(load_rows(do_, row, do_row, inside, column, V).to(dtype), tl.trans(state))
            dkey += product(load_rows(heard_, row, heard_row, inside, column, V), tl.trans(dstate))
            if DG:
                ddecay += tl.sum(state.to(tl.float32) * dstate.to(tl.float32))
            if DELTA:
                dscaled -= product(load_rows(du_, row, du_row, inside, column, V), tl.trans(state))
        q, k = load_rows(q_, row, q_row, inside, channel, K), load_rows(k_, row, k_row, inside, channel, K)
        dread *= from_start[:, None]
        of_start += tl.sum(dread * q.to(tl.float32), 1)
        dq = dread + product(near, k)
        store_rows(dq_ + head * dq_head, row, dq_row, inside, channel, K, dq)
        dkey *= to_end[:, None]
        of_end += tl.sum(dkey * k.to(tl.float32), 1)
        dk = dkey + product(tl.trans(near), q)
        if DELTA:
            of_scaled = tl.sum(dscaled * k.to(tl.float32), 1) * from_start
            dbeta += of_scaled
            of_start += of_scaled * beta
            dk += product(system, k) + product(tl.trans(system), k) + dscaled * (beta * from_start)[:, None]
        store_rows(dk_ + head * dk_head, row, dk_row, inside, channel, K, dk)
    if DELTA:
        tl.store(dbeta_ + head * dbeta_head + row * dbeta_row, dbeta, mask=inside)
    if DG:
        # a token's decay affects later reads of earlier writes. The exclusive sum is a cumulative sum minus its own
        # term: for compute capability 10.0, Triton 3.6 cannot compile a plain sum over tokens of results of products
        earlier = of_end.to(tl.float64)
        dg = tl.cumsum((of_start + of_pairs).to(tl.float64), 0, reverse=True) + tl.cumsum(earlier, 0) - earlier
        dg += (ddecay * tl.exp(end.to(tl.float32))).to(tl.float64)
        # clamped log decays have no gradient
        g = tl.load(g_ + head * g_head + row * g_row, mask=inside, other=0.0)
        dg = tl.where(g >= LEAST_DECAY, dg.to(tl.float32), 0.0)
        tl.store(dg_ + head * dg_head + row * dg_row, dg, mask=inside)
