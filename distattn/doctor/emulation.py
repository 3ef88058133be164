"""Emulate ranks as threads of one process.

Layers that mix tokens are computed by definition over all tokens, with or without a mistake. Others run on one rank's tokens.
"""

# N tokens of a micro-batch, M queries among them, T tokens on a rank, V vocabulary; H query heads, K key/value heads, D head
# dim, E value head dim

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.local_batch import BatchAttention
from distattn.doctor.comparison import in_global_order
from distattn.ir.errors import DistattnError
from distattn.kernels.latent import expand_latents
from distattn.kernels.recurrence.tokens import RecurrenceTokens, token_by_token

# arguments that a layer may pass to attention besides q, k and v
ATTENTION_OPTIONS = ("window", "softcap", "sink", "scale")
_SECONDS = 60
_THREAD = threading.local()


class AttentionCall(NamedTuple):
    """One attention call: all ranks' tensors in batch order, the options, and a mask of the allowed (query, key) pairs."""

    q_NHD: Tensor
    k_NKD: Tensor
    v_NKE: Tensor
    options: Mapping[str, Any]
    allowed_NN: Tensor


# called with each attention call and its result (N, H, E)
CallObserver = Callable[[AttentionCall, Tensor], None]


class Mistake(NamedTuple):
    """A mistake in how layers are computed.

    dropped: the option in ATTENTION_OPTIONS that is ignored, or None. window_change: the number of tokens added to each window.
    coarse_decay: True if the logarithms of a recurrence's decays are rounded to bf16.
    """

    dropped: str | None = None
    window_change: int = 0
    coarse_decay: bool = False


class VisibleTokens(NamedTuple):
    """The tokens that each token sees.

    allowed_NN: a mask of the keys that each query attends to. read: the sequences of tokens that recurrent layers read.
    convolved: the sequences of tokens that convolutions read.
    """

    allowed_NN: Tensor
    read: Sequence[Tensor]
    convolved: Sequence[Tensor]


def emulate(
    forward: Callable[[Mapping[str, Any]], Tensor],
    ids_N: Tensor,
    positions: Sequence[Tensor],
    tokens: Sequence[Tensor],
    seen: VisibleTokens,
    mistake: Mistake,
    device: torch.device,
    asked: set[str],
    padding: Tensor | None = None,
    observe: CallObserver | None = None,
) -> Tensor:
    """Compute the logits (N, V) of emulated ranks. Raises the errors of `forward`.

    forward: computes logits (1, T, V) from a rank's part. tokens, positions: (T,) for each rank; a rank without tokens gets a
    padding token. seen: the tokens that layers see. asked: receives the names of the batch operations that layers call.
    padding: token ids (P,) appended to each rank's tokens; if given, gradients are kept. observe: called with every attention
    call.
    """
    exchange = _Exchange(tokens, seen, mistake, asked, observe)

    def run(rank: int) -> Tensor:
        _THREAD.rank = rank
        more = ids_N.new_zeros(int(not len(tokens[rank]))) if padding is None else padding
        ids = torch.cat([ids_N[tokens[rank]], more])
        placed = torch.cat([positions[rank], torch.zeros_like(more)])
        part: dict[str, Any] = {"input_ids": ids[None].to(device), "position_ids": placed[None].to(device)}
        part["context_parallel"] = _EmulatedRank(exchange, rank)
        try:
            # each thread has its own gradient mode
            with torch.set_grad_enabled(padding is not None):
                return forward(part)[0].cpu()
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(len(tokens)) as threads:
        futures = [threads.submit(run, rank) for rank in range(len(tokens))]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        # prefer the original error, since it is what broke the other threads' barriers
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return in_global_order([future.result() for future in futures], tokens)


def emulated_rank() -> int:
    """Return the rank that this thread emulates."""
    rank: int = _THREAD.rank
    return rank


class _Exchange:
    """The inputs that all threads pass to one call, and the call's result."""

    def __init__(
        self,
        tokens: Sequence[Tensor],
        seen: VisibleTokens,
        mistake: Mistake,
        asked: set[str],
        observe: CallObserver | None,
    ):
        self.tokens, self.seen, self.mistake, self.asked, self.observe = tokens, seen, mistake, asked, observe
        self.inputs: list[Any] = [None] * len(tokens)
        self.outcome: Tensor | None = None
        self.barrier = threading.Barrier(len(tokens), timeout=_SECONDS)

    def together(self, rank: int, name: str, inputs: Sequence[Tensor], compute: Callable[..., Tensor]) -> Tensor:
        """Wait for all ranks, call `compute` once with their joined tensors (N, ...), and return this rank's rows (T, ...)."""
        if getattr(_THREAD, "rank", None) != rank:
            raise DistattnError("a layer is computed again in the backward pass, where ranks cannot meet.")
        self.inputs[rank] = inputs
        if self.barrier.wait() == 0:
            self.asked.add(name)
            whole = [in_global_order(parts, self.tokens) for parts in zip(*self.inputs, strict=True)]
            self.outcome = compute(*whole)
        self.barrier.wait()
        assert self.outcome is not None
        # padding sees no tokens, so its rows are zero
        out = self.outcome.new_zeros((len(inputs[0]), *self.outcome.shape[1:]))
        rank_tokens = self.tokens[rank]
        out[: len(rank_tokens)] = self.outcome[rank_tokens.to(out.device)]
        return out


class _EmulatedRank(BatchAttention):
    """A stand-in for a sharded batch on one thread."""

    def __init__(self, exchange: _Exchange, rank: int):
        self._exchange, self._rank = exchange, rank

    def check_positions(self, position_ids: Tensor) -> None:
        """Accept any positions, since they may be wrong on purpose."""

    def attention(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, scale: float | None = None, **options: Any
    ) -> Tensor:
        """Compute attention (T, H, E) as `LocalBatch.attention` does, once all ranks have called it."""
        exchange = self._exchange

        def compute(q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor) -> Tensor:
            allowed_NN = exchange.seen.allowed_NN.to(q_NHD.device)
            call = AttentionCall(q_NHD, k_NKD, v_NKE, {"scale": scale, **options}, allowed_NN)
            out_NHE = dense_attention(call, exchange.mistake)
            if exchange.observe is not None:
                exchange.observe(call, out_NHE)
            return out_NHE

        return exchange.together(self._rank, "attention", (q_THD, k_TKD, v_TKE), compute)

    def latent_attention(
        self,
        q_THD: Tensor,
        rope_TR: Tensor,
        latent_TL: Tensor,
        up_HEL: Tensor,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Compute latent attention (T, H, E) as `LocalBatch.latent_attention` does."""
        k_THD, v_THE = expand_latents(rope_TR, latent_TL, up_HEL, q_THD.shape[2] - rope_TR.shape[1])
        return self.attention(q_THD, k_THD, v_THE, scale, **options)

    def recurrence(
        self,
        q_TGK: Tensor,
        k_TGK: Tensor,
        v_THV: Tensor,
        op: Any,
        *,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
    ) -> Tensor:
        """Compute a recurrence (T, H, V) as `LocalBatch.recurrence` does."""
        _check_no_states(initial_state, return_final_state)
        exchange = self._exchange
        scale = q_TGK.shape[2] ** -0.5 if scale is None else scale
        x = RecurrenceTokens(q_TGK, k_TGK, v_THV, g, beta)
        if g is not None and exchange.mistake.coarse_decay:
            x = x._replace(g=g.bfloat16().to(g.dtype))
        names = list(x.by_token())

        def compute(*whole: Tensor) -> Tensor:
            read = x._replace(**dict(zip(names, whole, strict=True)))
            # like kernels, round only the result
            return _recurrence(read, exchange.seen.read, scale).to(q_TGK.dtype)

        return exchange.together(self._rank, "recurrence", list(x.by_token().values()), compute)

    def prefix_softmax(self, weights_THL: Tensor, logits_THL: Tensor, v_THV: Tensor) -> Tensor:
        """Compute prefix softmaxes (T, H, V) as `LocalBatch.prefix_softmax` does."""
        exchange = self._exchange

        def compute(weights_NHL: Tensor, logits_NHL: Tensor, v_NHV: Tensor) -> Tensor:
            return _prefix_softmax(weights_NHL, logits_NHL, v_NHV, exchange.seen.read).to(v_THV.dtype)

        # a prefix softmax carries a state as a recurrence does, so the same mistakes are possible
        return exchange.together(self._rank, "recurrence", (weights_THL, logits_THL, v_THV), compute)

    def causal_conv1d(
        self,
        x_TC: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        activation: str | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
    ) -> Tensor:
        """Compute a convolution (T, C) as `LocalBatch.causal_conv1d` does."""
        _check_no_states(initial_state, return_final_state)
        exchange = self._exchange

        def compute(x_NC: Tensor) -> Tensor:
            return _convolution(x_NC, weight, bias, exchange.seen.convolved)

        y_TC = exchange.together(self._rank, "causal_conv1d", (x_TC,), compute)
        return F.silu(y_TC) if activation == "silu" else y_TC

    def token_shift(self, x_T: Tensor, distance: int = 1, *, fill: int = 0) -> Tensor:
        """Shift tokens (T, ...) as `LocalBatch.token_shift` does."""
        exchange = self._exchange

        def compute(x_N: Tensor) -> Tensor:
            return _shifted(x_N, distance, fill, exchange.seen.convolved)

        return exchange.together(self._rank, "token_shift", (x_T,), compute)


def _check_no_states(initial_state: Tensor | None, return_final_state: bool) -> None:
    """Raise DistattnError if a layer uses document states, since a hypothesis may read several documents as one sequence."""
    if initial_state is not None or return_final_state:
        raise DistattnError(
            "the doctor does not handle states of documents: call the layer without initial_state and return_final_state."
        )


def _recurrence(x: RecurrenceTokens, sequences: Sequence[Tensor], scale: float) -> Tensor:
    """Compute the recurrence (N, H, V) over each sequence of tokens."""
    wide = torch.promote_types(x.v.dtype, torch.float32)
    x = x._replace(**{name: value.to(wide) for name, value in x.present().items()})
    out = torch.zeros_like(x.v)
    state_HKV = x.v.new_zeros(1, x.heads, x.q.shape[2], x.v.shape[2])
    for sequence in sequences:
        rows = sequence.to(out.device)
        part = x._replace(**{name: value[rows] for name, value in x.by_token().items()})
        out[rows] = token_by_token(part._replace(q=part.q * scale), [(0, len(rows))], state_HKV)[0]
    return out


def _prefix_softmax(weights_NHL: Tensor, logits_NHL: Tensor, v_NHV: Tensor, sequences: Sequence[Tensor]) -> Tensor:
    """Average each sequence's values, up to every token, with softmax weights. Returns (N, H, V)."""
    wide = torch.promote_types(v_NHV.dtype, torch.float32)
    out = torch.zeros_like(v_NHV, dtype=wide)
    for sequence in sequences:
        rows = sequence.to(out.device)
        q, k, v = (x[rows].to(wide) for x in (weights_NHL, logits_NHL, v_NHV))
        # with keys relative to the running log-sum-exp, the states are the softmaxes themselves
        total = k.logcumsumexp(0)
        decays = -total.diff(dim=0, prepend=total[:1])
        x = RecurrenceTokens(q, (k - total).exp(), v, decays)
        out[rows] = _recurrence(x, [torch.arange(len(rows))], 1.0)
    return out


def _shifted(x_N: Tensor, distance: int, fill: int, sequences: Sequence[Tensor]) -> Tensor:
    """Shift the tokens (N, ...) within each sequence, by `distance` places."""
    out = torch.full_like(x_N, fill)
    for sequence in sequences:
        rows = sequence.to(out.device)
        kept = max(len(rows) - abs(distance), 0)
        first, last = rows[:kept], rows[len(rows) - kept :]
        if distance < 0:
            first, last = last, first
        out[last] = x_N[first]
    return out


def _convolution(x_NC: Tensor, weight: Tensor, bias: Tensor | None, sequences: Sequence[Tensor]) -> Tensor:
    """Compute the causal convolution (N, C) over each sequence. weight: filters (C, W), or (C, C / G, W) for G groups."""
    out = torch.zeros_like(x_NC)
    weight = weight if weight.dim() == 3 else weight[:, None]
    groups, taps = len(weight) // weight.shape[1], weight.shape[2]
    for sequence in sequences:
        rows = sequence.to(out.device)
        padded = F.pad(x_NC[rows].t(), (taps - 1, 0))[None]
        out[rows] = F.conv1d(padded, weight.to(padded), groups=groups)[0].t()
    return out if bias is None else out + bias.to(out.dtype)


def dense_attention(call: AttentionCall, mistake: Mistake) -> Tensor:
    """Compute attention (N, H, E) by its definition, with the mistake's changes."""
    options = {name: value for name, value in call.options.items() if name != mistake.dropped}
    allowed_NN = visible_keys(call._replace(options=options), mistake.window_change)
    return attend(call.q_NHD, call.k_NKD, call.v_NKE, allowed_NN, options)


def visible_keys(call: AttentionCall, window_change: int = 0) -> Tensor:
    """Return the mask (N, N) of the keys that each query of a call sees, windows included."""
    window = call.options.get("window")
    if window is None:
        return call.allowed_NN
    return call.allowed_NN & torch.ones_like(call.allowed_NN).triu(1 - window - window_change)


def attend(
    q_MHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, allowed_MN: Tensor, options: Mapping[str, Any], tiled: bool = False
) -> Tensor:
    """Compute attention (M, H, E) of M queries to N keys.

    tiled: emulate the mistake of repeating KV heads as 0, 1, 0, 1 instead of 0, 0, 1, 1.
    """
    softcap, sink, scale = (options.get(name) for name in ("softcap", "sink", "scale"))
    # like kernels, round only the result
    wide = torch.promote_types(q_MHD.dtype, torch.float32)
    group = q_MHD.shape[1] // k_NKD.shape[1]
    q_MHD = q_MHD.to(wide)
    k_NHD, v_NHE = (
        x.to(wide).repeat(1, group, 1) if tiled else x.to(wide).repeat_interleave(group, 1) for x in (k_NKD, v_NKE)
    )
    scores = torch.einsum("qhd,khd->hqk", q_MHD, k_NHD) * (q_MHD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed_MN, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores)[:, None, None].expand(-1, len(q_MHD), 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : len(k_NKD)]
    return torch.einsum("hqk,khe->qhe", weights, v_NHE).to(v_NKE.dtype)
