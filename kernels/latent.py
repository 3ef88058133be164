"""Latent attention (MLA) on one device: latents are expanded to keys and values of all heads, then attention's kernel runs.

DeepSeek-AI 2024, arXiv 2405.04434, in its training form: k_h = [W_UK,h c | k_rope] and v_h = W_UV,h c of a latent c and one
rotary key that all heads share. Gradients of keys and values are contracted to those of latents where they are made, so that
latents and their gradients are all that moves; those of the weights stay on the rank.
"""

# T query rows, S key rows, H query heads, N key dim without the rotary part, R rotary dim, L latent dim, E value head dim

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distattn.kernels.registry import Kernel
from distattn.kernels.spec import ScoreMod


class LatentScore(NamedTuple):
    """The score of attention, and the weights that keys and values are made with.

    up: (H, N + E, L), the rows of a head's keys, then those of its values; key_dim: N. dup: where gradients of them are added,
    in the accumulation dtype; None in a forward pass.
    """

    score: ScoreMod
    up: Tensor
    key_dim: int
    dup: Tensor | None = None

    def for_heads(self, heads: slice) -> LatentScore:
        """The same for a range of the heads; gradients are added to the same memory."""
        dup = None if self.dup is None else self.dup[heads]
        return LatentScore(self.score.for_heads(heads), self.up[heads], self.key_dim, dup)


class LatentKernel:
    """A kernel of attention, on latents."""

    ACCUMULATES = False
    DIFFERENTIABLE_LSE = False

    def __init__(self, inner: Kernel):
        self.inner = inner

    def forward(
        self, q_THD: Tensor, rope_S1R: Tensor, latent_S1L: Tensor, schedule: Any, score: LatentScore
    ) -> tuple[Tensor, Tensor]:
        """(o_THE, lse_TH)."""
        keys, values = expanded(rope_S1R[:, 0], latent_S1L[:, 0], score.up, score.key_dim)
        return self.inner.forward(q_THD, keys, values, schedule, score.score)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq_THD, drope_S1R, dlatent_S1L); adds to the gradient of the weights."""
        keys, values = expanded(rope_S1R[:, 0], latent_S1L[:, 0], score.up, score.key_dim)
        dq, dk, dv = self.inner.backward(do_THE, q_THD, keys, values, lse_TH, delta_TH, schedule, score.score)
        wide = dk.dtype
        # gradients of what the weights have made, (S, H, N + E)
        dmade = torch.cat([dk[..., : score.key_dim], dv.to(wide)], -1)
        dlatent = torch.einsum("she,hel->sl", dmade, score.up.to(wide))
        if score.dup is not None:
            score.dup.add_(torch.einsum("she,sl->hel", dmade, latent_S1L[:, 0].to(wide)))
        return dq, dk[..., score.key_dim :].sum(1, keepdim=True), dlatent[:, None]


def expanded(rope_SR: Tensor, latent_SL: Tensor, up_HEL: Tensor, key_dim: int) -> tuple[Tensor, Tensor]:
    """(keys_SHD, values_SHE), as a projection in the inputs' dtype makes them; key_dim: N, without the rotary part."""
    made = torch.einsum("sl,hel->she", latent_SL, up_HEL)
    rope_SHR = rope_SR[:, None].expand(-1, len(up_HEL), -1)
    return torch.cat([made[..., :key_dim], rope_SHR], -1), made[..., key_dim:].contiguous()
