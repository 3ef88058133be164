"""Recurrences in PyTorch on any device: chunk by chunk, forward and backward, with initial and final states.

Inside a chunk, interactions between tokens are matrix products. The state passes from chunk to chunk: both a chunk's
outputs and the state that leaves it are affine in the state that enters it (Yang et al. 2024, arXiv 2406.06484 and
2412.06464). Everything that does not depend on the state is computed for many chunks together, and a loop over the
chunks only passes the state on. Segments of any lengths are processed side by side. The backward pass recomputes the
chunks from last to first, so that only the states between chunks are kept. All tensors have the accumulation dtype.

Decays are kept as sums of logarithms, and only a later sum minus an earlier one is exponentiated, so that nothing
overflows and vanished decays become 0. The sums are fp64, because the difference between two large sums loses digits.
"""

# N segments, n of them not finished, M chunks per block, C tokens per chunk, T tokens, H heads, G heads of queries and keys,
# K key dim, V value dim; a state is S_NHKV

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.kernels.recurrence.tokens import RecurrenceTokens, Segments, bounds_of
from distattn.kernels.recurrence.transitions import diagonal_transitions, finite_decays
from distattn.kernels.spec import KernelRequirements

# the functions also accept meta tensors, and allocate as much for them as they would on a device
RUNS_ON_META = True
# tokens per chunk: fewer if each channel has its own decay, because every pair of tokens then needs one value per channel
_CHUNK, _CHUNK_OF_CHANNELS = 64, 16
# chunks computed together: as many as fit into a CPU's cache; more on GPUs, where launch overhead dominates
_BLOCK, _BLOCK_ON_GPUS = 16, 64


class Level(NamedTuple):
    """Chunks [begin, end) of a block, each from a different segment. segments: their indices; None for all, in order."""

    begin: int
    end: int
    segments: Tensor | None


class Block(NamedTuple):
    """Chunks that are computed together.

    rows: the row of each token, (M, C), or -1 for a padding token. levels: groups of chunks in the order in which states pass
    through them.
    """

    rows: Tensor
    levels: tuple[Level, ...]


class ChunkSchedule(NamedTuple):
    """The chunks of all segments, and the rows [begin, end) of each segment as a tensor (N, 2)."""

    blocks: tuple[Block, ...]
    bounds: Tensor


class Maps(NamedTuple):
    """A chunk's effect on a state S that enters it: o = read S + pairs (u - w S), and S becomes decay S + key^T (u - w S).

    read, key: (M, H, C, K). pairs: the weight of each token in each output, (M, H, C, C). u: the value that each token
    stores, (M, H, C, V). w: (M, H, C, K), where w S is the value that each token replaces, or None if there is no delta rule.
    decay: (M, H, K), or (M, H, 1) if all channels decay alike.
    """

    read: Tensor
    pairs: Tensor
    key: Tensor
    decay: Tensor
    u: Tensor
    w: Tensor | None


def unsupported_reason(requirements: KernelRequirements) -> str | None:
    """Return None: this kernel computes every recurrence on every device."""
    return None


def prepare(segments: Segments, requirements: KernelRequirements) -> ChunkSchedule:
    """Return the blocks of chunks, on the host, ordered by the index of each chunk in its segment, then by segment."""
    size = _CHUNK_OF_CHANNELS if requirements.op.decay == "channel" else _CHUNK
    longest = max((end - begin for begin, end in segments), default=0)
    size = min(size, max(longest, 1))
    at_once = _BLOCK if requirements.device.type == "cpu" else _BLOCK_ON_GPUS
    blocks: list[Block] = []
    first: list[tuple[int, int]] = []
    levels: list[Level] = []
    going, which = list(range(len(segments))), None
    for number in range(-(-longest // size)):
        still = [i for i in going if segments[i][1] - segments[i][0] > number * size]
        # levels share their list of segments until a segment ends, because each list is a tensor that must be copied to
        # the device
        if len(still) < len(going):
            going, which = still, torch.tensor(still)
        levels.append(Level(len(first), len(first) + len(going), which))
        first += [(segments[i][0] + number * size, segments[i][1]) for i in going]
        if len(first) >= at_once or (number + 1) * size >= longest:
            begin, end = torch.tensor(first).unbind(1)
            rows = begin[:, None] + torch.arange(size)
            blocks.append(Block(torch.where(rows < end[:, None], rows, -1), tuple(levels)))
            first, levels = [], []
    return ChunkSchedule(tuple(blocks), bounds_of(segments))


def forward(x: RecurrenceTokens, chunks: ChunkSchedule, state_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (o_THV, the state after each segment), in the dtype of the states. o is 0 outside the segments."""
    state = state_NHKV.clone()
    o_THV = state.new_zeros((len(x.v) + 1, *x.v.shape[1:]))
    for block in chunks.blocks:
        maps = _maps(_gathered(x, block, state.dtype))
        entering = _passed_on(maps, block, state)
        u = maps.u if maps.w is None else maps.u - maps.w @ entering
        # row -1, the extra last row, receives the outputs of padding tokens
        o_THV[block.rows] = (maps.read @ entering + maps.pairs @ u).transpose(1, 2)
    return o_THV[: len(x.v)], state


def states(
    x: RecurrenceTokens, chunks: ChunkSchedule, state_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute (the state after each segment, each segment's A), in the dtype of the states; without `transitions`, A is None.

    A is the matrix by which a segment multiplies a state: (N, H, K, K) with the delta rule. Without it, A is diagonal
    and its diagonal is returned, (N, H, K), or (N, H, 1) if it is constant.
    """
    key_dim, value_dim = state_NHKV.shape[2:]
    # append unit vectors to the state: with values of zero, the recurrence is linear in the state, so these become A
    more = key_dim if transitions and x.beta is not None else 0
    identity = torch.eye(key_dim, more, dtype=state_NHKV.dtype, device=state_NHKV.device)
    state = torch.cat([state_NHKV, identity.expand(*state_NHKV.shape[:2], -1, -1)], -1)
    for block in chunks.blocks:
        maps = _maps(_gathered(x, block, state.dtype), False)
        _passed_on(maps._replace(u=F.pad(maps.u, (0, more))), block, state)
    if not transitions:
        return state, None
    if not more:
        return state, diagonal_transitions(x, chunks.bounds, state.dtype)
    return state[..., :value_dim].contiguous(), state[..., value_dim:].contiguous()


def backward(
    x: RecurrenceTokens, chunks: ChunkSchedule, state_NHKV: Tensor, do_THV: Tensor, dstate_NHKV: Tensor
) -> tuple[RecurrenceTokens, Tensor]:
    """Compute (gradients of the tokens, gradients of the initial states), in the dtype of the states.

    dstate_NHKV: gradients of the final states. A decay that all tokens share gets no gradient.
    """
    dtype, group = state_NHKV.dtype, x.heads // x.q.shape[1]
    state, dstate = state_NHKV.clone(), dstate_NHKV.clone()
    entering = [_passed_on(_maps(_gathered(x, block, dtype), False), block, state) for block in chunks.blocks]
    totals = {
        name: torch.zeros((len(value) + 1, *value.shape[1:]), dtype=dtype, device=value.device)
        for name, value in x.by_token().items()
    }
    for block in reversed(chunks.blocks):
        part = _gathered(x, block, dtype)
        leaves = {name: value for name, value in part.present().items() if name in totals}

        def maps_of(
            *values: Tensor, part: RecurrenceTokens = part, names: tuple[str, ...] = tuple(leaves)
        ) -> tuple[Tensor, ...]:
            return tuple(y for y in _maps(part._replace(**dict(zip(names, values, strict=True)))) if y is not None)

        # use vjp: unlike autograd.grad, it works inside an operator
        pulled: Any = torch.func.vjp(maps_of, *leaves.values())
        (read, pairs, key, decay, u, *w), pull_back = pulled
        maps = Maps(read, pairs, key, decay, u, w[0] if w else None)
        dmaps = _gradients(maps, block, entering.pop(), _rows(do_THV, block, dtype), dstate)
        grads = pull_back(tuple(dy for dy in dmaps if dy is not None))
        for name, grad_MHC in zip(leaves, grads, strict=True):
            if name in ("q", "k"):
                grad_MHC = grad_MHC.unflatten(1, (-1, group)).sum(2)
            # padding tokens add to the extra last row, which is dropped below
            totals[name][block.rows] = grad_MHC.transpose(1, 2)
    return x._replace(**{name: total[: len(x.v)] for name, total in totals.items()}), dstate


def gradient_states(
    x: RecurrenceTokens, chunks: ChunkSchedule, do_THV: Tensor, dstate_NHKV: Tensor, transitions: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute (gradients of the initial states, each segment's A), in the dtype of the states. For A, see `states`.

    dstate_NHKV: gradients of the final states.
    """
    dtype, dstate = dstate_NHKV.dtype, dstate_NHKV.clone()
    for block in reversed(chunks.blocks):
        _passed_back(_maps(_gathered(x, block, dtype)), block, _rows(do_THV, block, dtype), dstate)
    return dstate, states(x, chunks, torch.zeros_like(dstate), True)[1] if transitions else None


def _gathered(x: RecurrenceTokens, block: Block, dtype: torch.dtype) -> RecurrenceTokens:
    """Gather the tokens of a block's chunks, (M, H, C, ...) each.

    Padding tokens are zeros, which leave every state unchanged.
    """
    # expand a decay shared by all tokens, so that it can be zero for padding tokens
    g = x.g if x.g is None or x.decays_by_token else x.g.expand(len(x.v), -1)
    group = x.heads // x.q.shape[1]
    tokens = {**x.present(), **({} if g is None else {"g": g})}
    return x._replace(
        **{name: _rows(y, block, dtype, group if name in ("q", "k") else 1) for name, y in tokens.items()}
    )


def _rows(y: Tensor, block: Block, dtype: torch.dtype, group: int = 1) -> Tensor:
    """Return a block's rows of a tensor (T, H, ...) as (M, H * group, C, ...): with each head repeated `group` times, and zeros
    for padding tokens."""
    heads = torch.arange(y.shape[1] * group, device=y.device) // group
    absent = block.rows < 0
    rows_MHC = y[block.rows.clamp(min=0)[:, None], heads[:, None]].to(dtype)
    return rows_MHC.masked_fill_(absent[:, None].reshape(len(absent), 1, -1, *[1] * (y.dim() - 2)), 0.0)


def _passed_on(maps: Maps, block: Block, state_NHKV: Tensor) -> Tensor:
    """Return the states that enter a block's chunks, (M, H, K, V). Update state_NHKV in place to the states after the block."""
    entering = state_NHKV.new_empty((len(block.rows), *state_NHKV.shape[1:]))
    for begin, end, which in block.levels:
        entering[begin:end] = state_NHKV if which is None else state_NHKV[which]
        state, u = entering[begin:end], maps.u[begin:end]
        if maps.w is not None:
            u = _with_product(u, maps.w[begin:end], state, -1.0)
        leaving = _with_product(maps.decay[begin:end, ..., None] * state, maps.key[begin:end].transpose(-1, -2), u)
        state_NHKV[slice(None) if which is None else which] = leaving
    return entering


def _with_product(base: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """Return base + factor * left @ right for tensors (n, H, ...), in one operator."""
    return torch.baddbmm(base.flatten(0, 1), left.flatten(0, 1), right.flatten(0, 1), alpha=factor).view(base.shape)


def _passed_back(maps: Maps, block: Block, do_MHCV: Tensor, dstate_NHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u - w S and of the states that leave a block's chunks.

    Update dstate_NHKV in place to the gradients of the states before the block.
    """
    dentering, du = maps.read.transpose(-1, -2) @ do_MHCV, maps.pairs.transpose(-1, -2) @ do_MHCV
    dleaving = torch.empty_like(dentering)
    for begin, end, which in reversed(block.levels):
        dleaving[begin:end] = dstate_NHKV if which is None else dstate_NHKV[which]
        after = dleaving[begin:end]
        # add to this part of du in place, through a view
        du[begin:end].view(-1, *du.shape[2:]).baddbmm_(maps.key[begin:end].flatten(0, 1), after.flatten(0, 1))
        before = torch.addcmul(dentering[begin:end], maps.decay[begin:end, ..., None], after)
        if maps.w is not None:
            before = _with_product(before, maps.w[begin:end].transpose(-1, -2), du[begin:end], -1.0)
        dstate_NHKV[slice(None) if which is None else which] = before
    return du, dleaving


def _gradients(maps: Maps, block: Block, state_MHKV: Tensor, do_MHCV: Tensor, dstate_NHKV: Tensor) -> Maps:
    """Return the gradients of a block's maps, given the states that enter its chunks. Update dstate_NHKV like `_passed_back`."""
    du, dleaving = _passed_back(maps, block, do_MHCV, dstate_NHKV)
    heard = maps.u if maps.w is None else maps.u - maps.w @ state_MHKV
    ddecay = (state_MHKV * dleaving).sum(-1)
    return Maps(
        do_MHCV @ state_MHKV.transpose(-1, -2),
        do_MHCV @ heard.transpose(-1, -2),
        heard @ dleaving.transpose(-1, -2),
        ddecay if maps.decay.shape[-1] > 1 else ddecay.sum(-1, keepdim=True),
        du,
        None if maps.w is None else -du @ state_MHKV.transpose(-1, -2),
    )


def _maps(part: RecurrenceTokens, outputs: bool = True) -> Maps:
    """Compute the maps of chunks whose tokens are (M, H, C, ...), differentiably. Unless `outputs` is set, `pairs` is a
    placeholder."""
    q, k, v, g, beta = part
    chunks, heads, size, _ = v.shape
    dtype = v.dtype
    # cumulative sums of log decays, including each token, (M, H, C, 1 or K)
    if g is None:
        total = v.new_zeros((chunks, heads, size, 1), dtype=torch.float64)
    else:
        total = finite_decays(g).cumsum(2).reshape(chunks, heads, size, -1)
    lower = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
    # the differences may be rounded: where their error is large, their exponential is close to 0
    later = (total[:, :, :, None] - total[:, :, None]).to(dtype).masked_fill(~lower[..., None], -torch.inf).exp()
    from_start, to_end = total.to(dtype).exp(), (total[:, :, -1:] - total).to(dtype).exp()
    read, key, decay = q * from_start, k * to_end, from_start[:, :, -1]
    pairs = _products(q, k, later) if outputs else v
    if beta is None:
        return Maps(read, pairs, key, decay, v, None)
    # solve a triangular system, because the value that a token replaces depends on the earlier tokens of its chunk
    beta = beta[..., None]
    replaced = (beta * _products(k, k, later)).tril(-1)
    # compute the inverse of the system, with a diagonal of ones: multiplying by it is faster than solving for every column
    unit = torch.eye(size, dtype=dtype, device=v.device).expand_as(replaced)
    inverse = torch.linalg.solve_triangular(replaced, unit, upper=False, unitriangular=True)
    return Maps(read, pairs, key, decay, inverse @ (beta * v), inverse @ (beta * k * from_start))


def _products(x_MHCK: Tensor, y_MHCK: Tensor, later_MHCC1: Tensor) -> Tensor:
    """Return sum_k x_tk y_ik (decay from i to t)_k for all pairs i <= t, and 0 for all others, (M, H, C, C)."""
    if later_MHCC1.shape[-1] == 1:
        return (x_MHCK @ y_MHCK.transpose(-1, -2)) * later_MHCC1[..., 0]
    return torch.einsum("mhtk,mhik,mhtik->mhti", x_MHCK, y_MHCK, later_MHCC1)
