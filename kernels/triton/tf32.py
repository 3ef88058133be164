"""The Triton kernels with float32 products in TF32: ten bits of mantissa, several times as fast."""

from functools import partial

from distattn.kernels.triton import attention as triton_attention
from distattn.kernels.triton.attention import prepare, unsupported_reason, workspace_bytes

DIFFERENTIABLE_LSE = triton_attention.DIFFERENTIABLE_LSE
ACCUMULATES, FINISHES = triton_attention.ACCUMULATES, triton_attention.FINISHES

forward = partial(triton_attention.forward, precision="tf32")
backward = partial(triton_attention.backward, precision="tf32")

__all__ = [
    "ACCUMULATES",
    "DIFFERENTIABLE_LSE",
    "FINISHES",
    "backward",
    "forward",
    "prepare",
    "unsupported_reason",
    "workspace_bytes",
]
