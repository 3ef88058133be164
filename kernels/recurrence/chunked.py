"""Recurrences on any device in PyTorch: chunk by chunk, forward and backward, with states in and out.

Inside a chunk all pairs of tokens are products of matrices; from chunk to chunk the state passes on. Outputs are affine in the
state that enters, and so is the state that leaves (Yang et al. 2024, arXiv 2406.06484 and 2412.06464). Stretches of any lengths
go side by side. The backward pass makes the chunks again, from the last to the first, so that only the states between chunks
are kept. Numbers are those of the accumulation dtype throughout.

Decays are sums of logarithms, exponentiated only as differences of a later and an earlier sum: nothing overflows, and what has
decayed to nothing is 0. The sums are of double precision: the difference of two large sums would lose what matters.
"""

# N stretches, n of them still going on, C tokens of a chunk, T tokens, H heads, G heads of queries and keys, K key dim,
# V value dim; a state is S_NHKV

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.recurrence.tokens import RecurrenceTokens, Stretches

# tokens of a chunk; with a decay for each channel all pairs of a chunk have a number for each channel
_CHUNK, _CHUNK_OF_CHANNELS = 64, 16
# exp of less is 0 in fp64, too; and infinite decays leave differences of their sums finite
_LEAST_DECAY = -1000.0


class ChunkRows(NamedTuple):
    """One chunk of each stretch that is long enough: rows_nC of the tensors, the number of rows where there is no token."""

    rows: Tensor
    stretches: Tensor


class Maps(NamedTuple):
    """What a chunk does to a state S that enters it: o = base + read S, and S becomes decay S + key^T (u - w S).

    w, u: (n, H, C, K) and (n, H, C, V), what each token replaces; w is None without the delta rule. Others likewise, but
    decay_nHK (or one channel for all), pairs_nHCC: how far each token hears the corrected values.
    """

    read: Tensor
    pairs: Tensor
    key: Tensor
    decay: Tensor
    u: Tensor
    w: Tensor | None


def forward(
    x: RecurrenceTokens, stretches: Stretches, state_NHKV: Tensor, outputs: bool = True
) -> tuple[Tensor, Tensor]:
    """(o_THV, the state after each stretch), in the dtype of the states; o is empty without `outputs`, and 0 in no stretch."""
    wide = _widened(x, state_NHKV.dtype)
    o_THV = wide.v.new_zeros((len(x.v) + 1 if outputs else 0, *x.v.shape[1:]))
    state = state_NHKV.clone()
    for chunk in _chunks(wide, stretches):
        o_nHCV, state[chunk.stretches] = _step(_gathered(wide, chunk), state[chunk.stretches], outputs)
        if outputs:
            o_THV[chunk.rows] = o_nHCV.transpose(1, 2)
    return o_THV[: len(x.v)] if outputs else o_THV, state


def backward(
    x: RecurrenceTokens,
    stretches: Stretches,
    state_NHKV: Tensor,
    do_THV: Tensor,
    dstate_NHKV: Tensor,
    of_tokens: bool = True,
) -> tuple[RecurrenceTokens, Tensor]:
    """(gradients of the tokens, gradients of the states that enter), in the dtype of the states.

    dstate_NHKV: gradients of the states that leave. Without `of_tokens` only those of states are computed: `state_NHKV` is
    not read, and the first result is `x`. A decay that is the same for all tokens has no gradient here.
    """
    wide = _widened(x, state_NHKV.dtype)
    chunks = list(_chunks(wide, stretches))
    entering = []
    running = state_NHKV.clone()
    for chunk in chunks if of_tokens else ():
        entering.append(running[chunk.stretches])
        _, running[chunk.stretches] = _step(_gathered(wide, chunk), entering[-1], False)
    do = _padded(do_THV.to(running.dtype))
    dstate = dstate_NHKV.clone()
    totals = {name: torch.zeros_like(value) for name, value in wide.by_token().items()} if of_tokens else {}
    for number in reversed(range(len(chunks))):
        chunk = chunks[number]
        part = _gathered(wide, chunk)
        leaves = part.by_token() if of_tokens else {}
        state = entering[number] if of_tokens else torch.zeros_like(dstate[chunk.stretches])

        def step(*given: Tensor, part: RecurrenceTokens = part, names: tuple[str, ...] = tuple(leaves)) -> Any:
            *tokens, entering_state = given
            return _step(part._replace(**dict(zip(names, tokens, strict=True))), entering_state, True)

        # unlike autograd's own functions, this works inside an operator
        pull_back = torch.func.vjp(step, *leaves.values(), state)[1]
        *found, dstate[chunk.stretches] = pull_back((do[chunk.rows].transpose(1, 2), dstate[chunk.stretches]))
        for total, grad in zip(totals.values(), found, strict=True):
            # rows without a token are of no stretch
            total[chunk.rows] = grad
    if not of_tokens:
        return x, dstate
    return x._replace(**{name: totals[name][: len(x.v)] for name in x.by_token()}), dstate


def transitions(x: RecurrenceTokens, stretches: Stretches, dtype: torch.dtype) -> Tensor:
    """A of each stretch: its diagonal (N, H, K), (N, H, 1) where that is constant, or for the delta rule (N, H, K, K)."""
    wide = _widened(x, dtype)
    heads, key_dim = x.heads, x.k.shape[-1]
    if x.beta is not None:
        # the recurrence on values 0 carries any state on: that of all unit vectors becomes A
        identity = torch.eye(key_dim, dtype=dtype, device=x.v.device).expand(len(stretches), heads, -1, -1)
        blank = x._replace(v=x.v.new_zeros((*x.v.shape[:2], key_dim)))
        return forward(blank, stretches, identity.contiguous(), outputs=False)[1]
    if not x.decays_by_token:
        length = torch.tensor([end - begin for begin, end in stretches], dtype=torch.float64, device=x.v.device)
        return constant_transition(x.g, heads, length).to(dtype)
    g = wide.g
    assert g is not None
    out = torch.zeros((len(stretches), *g.shape[1:]), dtype=torch.float64, device=g.device)
    for chunk in _chunks(wide, stretches):
        out[chunk.stretches] += _decays(g[chunk.rows]).sum(1)
    return out.exp().to(dtype).reshape(len(stretches), heads, -1)


def constant_transition(g_H: Tensor | None, heads: int, length_N: Tensor) -> Tensor:
    """A of stretches of so many tokens where every token decays alike, (N, H, 1) in fp64."""
    if g_H is None:
        return length_N.new_ones((len(length_N), heads, 1))
    return torch.exp(_decays(g_H)[None] * length_N[:, None])[..., None]


def _widened(x: RecurrenceTokens, dtype: torch.dtype) -> RecurrenceTokens:
    """The tokens in a wider dtype, and one row of zeros behind them: it leaves every state as it is.

    A decay that is the same for all tokens becomes one of each, so that the row of zeros has none.
    """
    if x.g is not None and not x.decays_by_token:
        x = x._replace(g=x.g.expand(len(x.v), -1))
    return x._replace(**{name: _padded(value.to(dtype)) for name, value in x.by_token().items()})


def _padded(value: Tensor) -> Tensor:
    return torch.cat([value, value.new_zeros((1, *value.shape[1:]))])


def _chunks(wide: RecurrenceTokens, stretches: Stretches) -> Iterator[ChunkRows]:
    """The first chunk of each stretch, then the second, and so on."""
    size = _CHUNK_OF_CHANNELS if wide.g is not None and wide.g.dim() == 3 else _CHUNK
    device, tokens = wide.v.device, len(wide.v) - 1
    for number in range(-(-max((end - begin for begin, end in stretches), default=0) // size)):
        going = [i for i, (begin, end) in enumerate(stretches) if end - begin > number * size]
        begin, end = (torch.tensor([stretches[i][side] for i in going], device=device) for side in (0, 1))
        # no longer than the longest that is left
        most = min(size, int((end - begin).max()) - number * size)
        rows = begin[:, None] + number * size + torch.arange(most, device=device)
        yield ChunkRows(torch.where(rows < end[:, None], rows, tokens), torch.tensor(going, device=device))


def _gathered(wide: RecurrenceTokens, chunk: ChunkRows) -> RecurrenceTokens:
    """The tokens of a chunk, (n, C, ...) each."""
    return wide._replace(**{name: value[chunk.rows] for name, value in wide.by_token().items()})


def _step(part: RecurrenceTokens, state_nHKV: Tensor, outputs: bool) -> tuple[Tensor, Tensor]:
    """(o_nHCV, the state after the chunk). Differentiable."""
    maps = _maps(part, outputs)
    u = maps.u if maps.w is None else maps.u - maps.w @ state_nHKV
    leaving = maps.decay[..., None] * state_nHKV + maps.key.transpose(-1, -2) @ u
    return (maps.read @ state_nHKV + maps.pairs @ u if outputs else u), leaving


def _maps(part: RecurrenceTokens, outputs: bool) -> Maps:
    group = part.v.shape[2] // part.q.shape[2]
    q, k = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (part.q, part.k))
    v = part.v.transpose(1, 2)
    n, heads, size, _ = v.shape
    dtype = v.dtype
    # sums of logarithms up to and with each token, (n, H, C, 1 or K)
    total = v.new_zeros((1, 1, size, 1), dtype=torch.float64)
    if part.g is not None:
        total = _decays(part.g).cumsum(1).transpose(1, 2).reshape(n, heads, size, -1)
    lower = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
    later = (total[:, :, :, None] - total[:, :, None]).masked_fill(~lower[..., None], -torch.inf).exp().to(dtype)
    from_start, to_end = total.exp().to(dtype), (total[:, :, -1:] - total).exp().to(dtype)
    decay = from_start[:, :, -1].expand(n, heads, -1)
    pairs = _products(q, k, later) if outputs else v
    if part.beta is None:
        return Maps(q * from_start, pairs, k * to_end, decay, v, None)
    beta = part.beta.transpose(1, 2)[..., None]
    # what a token replaces depends on what earlier ones of the chunk have: a triangular system
    unit = torch.eye(size, dtype=dtype, device=v.device) + (beta * _products(k, k, later)).tril(-1)
    wanted = torch.cat([beta * v, beta * k * from_start], -1)
    u, w = torch.linalg.solve_triangular(unit, wanted, upper=False, unitriangular=True).split(
        [v.shape[-1], k.shape[-1]], -1
    )
    return Maps(q * from_start, pairs, k * to_end, decay, u, w)


def _decays(g: Tensor) -> Tensor:
    return g.double().clamp(min=_LEAST_DECAY)


def _products(x_nHCK: Tensor, y_nHCK: Tensor, later_nHCC1: Tensor) -> Tensor:
    """<x_t, decay from i to t, y_i> of all pairs i <= t, (n, H, C, C)."""
    if later_nHCC1.shape[-1] == 1:
        return (x_nHCK @ y_nHCK.transpose(-1, -2)) * later_nHCC1[..., 0]
    return torch.einsum("nhtk,nhik,nhtik->nhti", x_nHCK, y_nHCK, later_nHCC1)
