"""Ranks that are threads of one process, whose attention is dense and may have a mistake in it.

Whatever a model does with its tokens beside attention, it does here as it does on ranks: with the tokens of one rank.
"""

# N tokens of a micro-batch, T tokens on a rank, H query heads, K key/value heads, D head dim, E value head dim, V vocabulary

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.batch.planner import BatchAttention
from distattn.doctor.comparison import in_global_order

# what a layer may ask of its attention beside q, k and v
ATTENTION_OPTIONS = ("window", "softcap", "sink", "scale")
_SECONDS = 60


class Mistake(NamedTuple):
    """What attention does otherwise: dropped, of ATTENTION_OPTIONS; window_change, tokens that windows have more."""

    dropped: str | None = None
    window_change: int = 0


def emulate(
    forward: Callable[[Mapping[str, Any]], Tensor],
    ids_N: Tensor,
    positions: Sequence[Tensor],
    tokens: Sequence[Tensor],
    allowed_NN: Tensor,
    mistake: Mistake,
    device: torch.device,
) -> Tensor:
    """The logits (N, V) of ranks that have these tokens and positions, and attend to what is allowed.

    forward: a rank's part to logits (1, T, V). tokens, positions: (T,) of each rank; a rank without tokens has one of padding.
    Raises what `forward` raises.
    """
    exchange = _Exchange(tokens, allowed_NN, mistake)

    def run(rank: int) -> Tensor:
        ids = ids_N[tokens[rank]] if len(tokens[rank]) else ids_N.new_zeros(1)
        placed = positions[rank] if len(tokens[rank]) else ids.new_zeros(1)
        part: dict[str, Any] = {"input_ids": ids[None].to(device), "position_ids": placed[None].to(device)}
        part["context_parallel"] = _EmulatedRank(exchange, rank)
        try:
            # a thread has its own
            with torch.no_grad():
                return forward(part)[0].cpu()
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(len(tokens)) as threads:
        futures = [threads.submit(run, rank) for rank in range(len(tokens))]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        # the others only lost the one that failed
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return in_global_order([future.result() for future in futures], tokens)


class _Exchange:
    """Where the threads leave q, k and v of one call, and find the outcome."""

    def __init__(self, tokens: Sequence[Tensor], allowed_NN: Tensor, mistake: Mistake):
        self.tokens, self.allowed_NN, self.mistake = tokens, allowed_NN, mistake
        self.given: list[Any] = [None] * len(tokens)
        self.outcome: Tensor | None = None
        self.barrier = threading.Barrier(len(tokens), timeout=_SECONDS)

    def attend(self, options: Mapping[str, Any]) -> Tensor:
        q_NHD, k_NKD, v_NKE = (in_global_order([given[i] for given in self.given], self.tokens) for i in range(3))
        return _attention(q_NHD, k_NKD, v_NKE, self.allowed_NN.to(q_NHD.device), self.mistake, options)


class _EmulatedRank(BatchAttention):
    """Takes a sharded batch's place on one of the threads."""

    def __init__(self, exchange: _Exchange, rank: int):
        self._exchange, self._rank = exchange, rank

    def check_positions(self, given: Tensor) -> None:
        """Accept any positions: they may be wrong on purpose."""

    def attention(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, scale: float | None = None, **options: Any
    ) -> Tensor:
        """Compute attention (T, H, E) as `LocalBatch.attention` does, once all ranks are here."""
        exchange, own = self._exchange, self._exchange.tokens[self._rank]
        exchange.given[self._rank] = (q_THD, k_TKD, v_TKE)
        if exchange.barrier.wait() == 0:
            exchange.outcome = exchange.attend({"scale": scale, **options})
        exchange.barrier.wait()
        assert exchange.outcome is not None
        # padding attends to nothing
        o_THE = q_THD.new_zeros((len(q_THD), q_THD.shape[1], v_TKE.shape[2]))
        o_THE[: len(own)] = exchange.outcome[own.to(q_THD.device)]
        return o_THE


def _attention(
    q_NHD: Tensor, k_NKD: Tensor, v_NKE: Tensor, allowed_NN: Tensor, mistake: Mistake, options: Mapping[str, Any]
) -> Tensor:
    """Dense attention (N, H, E)."""
    window, softcap, sink, scale = (
        None if name == mistake.dropped else options.get(name) for name in ATTENTION_OPTIONS
    )
    # as kernels do, which round when they are done
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    group = q_NHD.shape[1] // k_NKD.shape[1]
    q_NHD, k_NHD, v_NHE = q_NHD.to(wide), *(x.to(wide).repeat_interleave(group, 1) for x in (k_NKD, v_NKE))
    scores = torch.einsum("qhd,khd->hqk", q_NHD, k_NHD) * (q_NHD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        allowed_NN = allowed_NN & torch.ones_like(allowed_NN).triu(1 - window - mistake.window_change)
    scores = scores.masked_fill(~allowed_NN, -torch.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores)[:, None, None].expand(-1, len(q_NHD), 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : len(q_NHD)]
    return torch.einsum("hqk,khe->qhe", weights, v_NHE).to(v_NKE.dtype)
