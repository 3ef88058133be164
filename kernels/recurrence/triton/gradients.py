"""The kernel that ends a backward pass: gradients of the tokens of one chunk of one head."""

# C tokens of a chunk, K key dim, V value dim, PK: K as a power of two, BV columns of values at a time

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
    K: tl.constexpr, V: tl.constexpr, PK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, DELTA: tl.constexpr, DG: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of a chunk's tokens, (T, H, ...) even where heads share queries and keys; with DG dg, with DELTA dbeta.

    Let X be the inverse, y = X^T du and S the state that enters. Then y is the gradient of beta v, -y S^T that of
    beta k decay, and -y (u - w S)^T below the diagonal that of the triangular system.
    """
    program = tl.program_id(0)
    head, chunk = tl.cast(program % heads, tl.int64), program // heads
    row, inside = chunk_rows(chunks_, chunk, C)
    channel, i = tl.arange(0, PK), tl.arange(0, C)
    q = load_rows(q_ + head // group * q_head, row, q_row, inside, channel, K)
    k = load_rows(k_ + head // group * k_head, row, k_row, inside, channel, K)
    state_place = tl.cast(program, tl.int64) * (K * V)
    beta, dbeta = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    dpairs, dsystem = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dread, dkey, dscaled = tl.zeros([C, PK], tl.float32), tl.zeros([C, PK], tl.float32), tl.zeros([C, PK], tl.float32)
    # by channel: of the factor by which the state decays in the chunk
    ddecay = tl.zeros([PK], tl.float32)
    if DELTA:
        beta += tl.load(beta_ + head * beta_head + row * beta_row, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, V, BV):
        column = start + tl.arange(0, BV)
        state = load_rows(entering_ + state_place, channel, V, channel < K, column, V)
        dstate = load_rows(dleaving_ + state_place, channel, V, channel < K, column, V)
        do = load_rows(do_ + head * do_head, row, do_row, inside, column, V).to(q.dtype)
        heard = load_rows(heard_ + head * heard_head, row, heard_row, inside, column, V)
        du = load_rows(du_ + head * du_head, row, du_row, inside, column, V)
        dpairs += product(do, tl.trans(heard))
        dread += product(do, tl.trans(state))
        dkey += product(heard, tl.trans(dstate))
        if DG:
            ddecay += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        if DELTA:
            place = tl.cast(program, tl.int64) * (C * C) + i[:, None] * C + i[None, :]
            y = product(tl.trans(tl.load(inverse_ + place)), du)
            v = load_rows(v_ + head * v_head, row, v_row, inside, column, V).to(tl.float32)
            dbeta += tl.sum(y * v, 1)
            store_rows(dv_ + head * dv_head, row, dv_row, inside, column, V, y * beta[:, None])
            y = y.to(q.dtype)
            dscaled -= product(y, tl.trans(state))
            dsystem -= product(y, tl.trans(heard))
        else:
            store_rows(dv_ + head * dv_head, row, dv_row, inside, column, V, du)
    total, end = decay_sums(g_ + head * g_head, row, g_row, inside, DECAY, C)
    between = decays_between(total, C)
    from_start, to_end = tl.exp(total.to(tl.float32)), tl.exp((end - total).to(tl.float32))
    dread *= from_start[:, None]
    dkey *= to_end[:, None]
    dpairs *= between
    below = i[:, None] > i[None, :]
    # by token: gradients of the sums of decays before it, after it, and by pairs of tokens those between
    of_start = tl.sum(dread * q.to(tl.float32), 1)
    of_end = tl.sum(dkey * k.to(tl.float32), 1)
    of_pairs = tl.zeros([C], tl.float32)
    if DG:
        # the diagonal has no decay
        weights = tl.where(below, dpairs * product(q, tl.trans(k)), 0.0)
        of_pairs += tl.sum(weights, 1) - tl.sum(weights, 0)
    dq = dread + product(dpairs.to(q.dtype), k)
    dk = dkey + product(tl.trans(dpairs).to(q.dtype), q)
    if DELTA:
        dsystem = tl.where(below, dsystem * between, 0.0)
        weights = dsystem * product(k, tl.trans(k))
        of_scaled = tl.sum(dscaled * k.to(tl.float32), 1) * from_start
        dbeta += tl.sum(weights, 1) + of_scaled
        of_start += of_scaled * beta
        if DG:
            weights *= beta[:, None]
            of_pairs += tl.sum(weights, 1) - tl.sum(weights, 0)
        dsystem = (dsystem * beta[:, None]).to(q.dtype)
        dk += product(dsystem, k) + product(tl.trans(dsystem), k) + dscaled * (beta * from_start)[:, None]
        tl.store(dbeta_ + head * dbeta_head + row * dbeta_row, dbeta, mask=inside)
    store_rows(dq_ + head * dq_head, row, dq_row, inside, channel, K, dq)
    store_rows(dk_ + head * dk_head, row, dk_row, inside, channel, K, dk)
    if DG:
        # a decay acts on what was read before it and is used with it or later
        later = (of_start + of_pairs).to(tl.float64)
        earlier = of_end.to(tl.float64)
        dg = tl.sum(later, 0) - tl.cumsum(later, 0) + later + tl.cumsum(earlier, 0) - earlier
        dg += (tl.sum(ddecay, 0) * tl.exp(end.to(tl.float32))).to(tl.float64)
        # below the least decay nothing changes any more
        g = tl.load(g_ + head * g_head + row * g_row, mask=inside, other=0.0)
        dg = tl.where(g >= LEAST_DECAY, dg.to(tl.float32), 0.0)
        tl.store(dg_ + head * dg_head + row * dg_row, dg, mask=inside)
