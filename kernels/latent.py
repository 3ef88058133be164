"""Latent attention (MLA) on one device: latents are expanded to keys and values of all heads, then an attention kernel runs.

DeepSeek-AI 2024, arXiv 2405.04434, in its training form: k_h = [W_UK,h c | k_rope] and v_h = W_UV,h c, for a latent c
and one rotary key that all heads share. The rank that computes gradients of keys and values contracts them to gradients
of latents, so that only latents and their gradients are sent. Gradients of the weights stay on the rank.
"""

# T query rows, S key rows, H query heads, N key dim without the rotary part, R rotary dim, L latent dim, E value head dim

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.ir.op import Op
from distattn.kernels.merge import accumulation_dtype
from distattn.kernels.registry import Kernel
from distattn.kernels.spec import LaunchShape, ScoreMod, Workspace


class LatentScore(NamedTuple):
    """An attention score, and the weights that expand latents into keys and values.

    up: (H, N + E, L), with each head's rows for keys followed by those for values. key_dim: N. dup: the tensor that
    gradients of `up` are added to, in the accumulation dtype; None in a forward pass.
    """

    score: ScoreMod
    up: Tensor
    key_dim: int
    dup: Tensor | None = None

    def for_heads(self, heads: slice) -> LatentScore:
        """Return the score for a range of heads. Its `dup` is a view, so its gradients go to the same memory."""
        dup = None if self.dup is None else self.dup[heads]
        return LatentScore(self.score.for_heads(heads), self.up[heads], self.key_dim, dup)

    def part(self, rows: slice) -> LatentScore:
        """Return the score with only `rows` of each head's weights: the rows for keys, or the rows for values."""
        return self._replace(up=self.up[:, rows], dup=None if self.dup is None else self.dup[:, rows])


class LatentKernel:
    """An attention kernel applied to latents. It supports `into`, `merge` and `add` if the attention kernel supports them."""

    DIFFERENTIABLE_LSE = False

    def __init__(self, inner: Kernel):
        self.inner, self.ACCUMULATES = inner, inner.ACCUMULATES

    def forward(
        self,
        q_THD: Tensor,
        rope_S1R: Tensor,
        latent_S1L: Tensor,
        schedule: Any,
        score: LatentScore,
        **into: Any,
    ) -> tuple[Tensor, Tensor]:
        """Compute (o_THE, lse_TH). into: see `Kernel`."""
        keys, values = expand_latents(rope_S1R[:, 0], latent_S1L[:, 0], score.up, score.key_dim)
        return self.inner.forward(q_THD, keys, values, schedule, score.score, **into)

    def backward(
        self,
        do_THE: Tensor,
        q_THD: Tensor,
        rope_S1R: Tensor,
        latent_S1L: Tensor,
        lse_TH: Tensor,
        delta_TH: Tensor,
        schedule: Any,
        score: LatentScore,
        into: tuple[Tensor, tuple[Tensor, Tensor]] | None = None,
        add: tuple[bool, bool] = (False, False),
        **final: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (dq_THD, drope_S1R, dlatent_S1L), and add the gradient of the weights to `score.dup`.

        into, add, final: see `Kernel`.
        """
        inputs = do_THE, q_THD, rope_S1R, latent_S1L, lse_TH, delta_TH
        dq, dk, dv = self._of_expanded(inputs, schedule, score, into, add[0], **final)
        wide, split = dk.dtype, score.key_dim
        latent_SL = latent_S1L[:, 0].to(wide)
        drope, dlatent = dk[..., split:].sum(1, keepdim=True), torch.zeros_like(latent_SL)
        _contract(dk[..., :split], latent_SL, score.part(slice(None, split)), dlatent)
        del dk
        _contract(dv, latent_SL, score.part(slice(split, None)), dlatent)
        if into is None:
            return dq, drope, dlatent[:, None]
        for target, result in zip(into[1], (drope, dlatent[:, None]), strict=True):
            if add[1]:
                target.add_(result)
            else:
                target.copy_(result)
        return dq, *into[1]

    def _of_expanded(
        self,
        inputs: tuple[Tensor, ...],
        schedule: Any,
        score: LatentScore,
        into: tuple[Tensor, tuple[Tensor, Tensor]] | None,
        adds: bool,
        **final: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (dq_THD, dk_SHD, dv_SHE) in the accumulation dtype. Expanded keys and values are freed on return."""
        do, q, rope, latent, lse, delta = inputs
        keys, values = expand_latents(rope[:, 0], latent[:, 0], score.up, score.key_dim)
        arguments = do, q, keys, values, lse, delta, schedule, score.score
        if into is None:
            return self.inner.backward(*arguments)
        wide = accumulation_dtype(q.dtype)
        of_keys = tuple(torch.empty_like(x, dtype=wide) for x in (keys, values))
        return self.inner.backward(*arguments, into=(into[0], of_keys), add=(adds, False), **final)


def latent_workspace(op: Op, dtype: torch.dtype, inner: Workspace | None) -> Workspace:
    """Return a function that counts the bytes that a launch on latents allocates besides its operands and results.

    inner: the attention kernel's `workspace_bytes`. If it is None, the count leaves out the kernel's workspace, and the kernel's
    results unless it accumulates.
    """
    size, wide = dtype.itemsize, accumulation_dtype(dtype).itemsize
    rotary, latent = op.rotary_dim, op.latent_dim

    def workspace(direction: str, shape: LaunchShape, schedule: Any) -> int:
        heads, cells = shape.heads, shape.keys * shape.heads
        key_dim, value_dim = shape.head_dim - rotary, shape.v_head_dim
        keys_and_values = cells * (shape.head_dim + value_dim)
        making = keys_and_values + cells * (key_dim + value_dim)
        inner_bytes = 0 if inner is None else inner(direction, shape._replace(kv_heads=heads), schedule)
        if direction == "forward":
            return max(making * size, keys_and_values * size + inner_bytes)
        # gradients of latents and rotary keys, and the latents cast to the accumulation dtype
        stays = shape.keys * (latent + rotary + (latent if wide > size else 0))
        # `_contract` allocates a copy of dk without the rotary part and, one after the other, two matrices as large as
        # the weights
        of_keys = keys_and_values + (cells if heads > 1 else 0) * key_dim + heads * latent * key_dim
        of_values = cells * value_dim + heads * latent * value_dim
        return max(
            making * size, keys_and_values * (size + wide) + inner_bytes, (stays + max(of_keys, of_values)) * wide
        )

    return workspace


def expand_latents(rope_SR: Tensor, latent_SL: Tensor, up_HEL: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    """Expand latents into (keys_SHD, values_SHE), as a projection in the inputs' dtype would. key_dim: N."""
    expanded_SHW = torch.einsum("sl,hel->she", latent_SL, up_HEL)
    rope_SHR = rope_SR[:, None].expand(-1, len(up_HEL), -1)
    return torch.cat([expanded_SHW[..., :key_dim], rope_SHR], -1), expanded_SHW[..., key_dim:].contiguous()


def _contract(dmade_SHW: Tensor, latent_SL: Tensor, score: LatentScore, dlatent_SL: Tensor) -> None:
    """Add to the gradients of latents and weights what follows from dmade, the gradient of the keys or values made from them."""
    dmade = dmade_SHW.flatten(1)
    dlatent_SL.addmm_(dmade, score.up.to(dmade.dtype).flatten(0, 1))
    if score.dup is not None:
        score.dup.add_(torch.mm(dmade.t(), latent_SL).view(score.dup.shape))
