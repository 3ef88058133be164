"""Plain modules that need a few tokens, or one sum, from other ranks. `batch` is a model's argument context_parallel."""

# T tokens on this rank, C channels, H heads
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Canon(nn.Module):
    """A residual short convolution (Allen-Zhu 2025, "Physics of Language Models 4.1")."""

    def __init__(self, width: int, taps: int = 4) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(width, taps) / taps)

    def forward(self, x_TC: Tensor, batch) -> Tensor:  # noqa: ANN001
        return x_TC + batch.causal_conv1d(x_TC, self.filters)


class CompressedConvolutionalAttention(nn.Module):
    """Attention in narrow heads with convolved queries and keys. Half of each value comes from the previous token."""

    def __init__(self, width: int, heads: int, dim: int, taps: int = 4) -> None:
        super().__init__()
        self.heads, self.inner = heads, heads * dim
        self.project, self.out = nn.Linear(width, 3 * self.inner, bias=False), nn.Linear(self.inner, width, bias=False)
        self.over_tokens = nn.Parameter(torch.randn(2 * self.inner, taps) / taps)
        self.over_channels = nn.Parameter(torch.randn(2 * self.inner, dim, taps) / (dim * taps) ** 0.5)
        self.temperature = nn.Parameter(torch.full((heads, 1), dim**0.5))

    def forward(self, x_TC: Tensor, batch) -> Tensor:  # noqa: ANN001
        plain, v = self.project(x_TC).split([2 * self.inner, self.inner], -1)
        convolved = batch.causal_conv1d(batch.causal_conv1d(plain, self.over_tokens), self.over_channels)
        mean = plain.unflatten(1, (2, -1)).mean(1, keepdim=True)
        q, k = (convolved.unflatten(1, (2, -1)) + mean).unflatten(2, (self.heads, -1)).unbind(1)
        k = F.normalize(k, dim=-1) * self.temperature
        now, before = v.chunk(2, -1)
        v = torch.cat([now, batch.token_shift(before)], -1).unflatten(1, (self.heads, -1))
        return self.out(batch.attention(F.normalize(q, dim=-1), k, v, 1.0).flatten(1))


class MultiTokenPrediction(nn.Module):
    """A block that predicts the token `ahead` places after the next token (DeepSeek-V3, arXiv 2412.19437)."""

    def __init__(self, width: int, ahead: int, block: nn.Module) -> None:
        super().__init__()
        self.ahead, self.join, self.block = ahead, nn.Linear(2 * width, width, bias=False), block

    def forward(self, x_TC: Tensor, embed: nn.Module, ids_T: Tensor, labels_T: Tensor, batch) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        later = embed(batch.token_shift(ids_T, -self.ahead))
        joined = torch.cat([F.rms_norm(part, part.shape[-1:]) for part in (x_TC, later)], -1)
        return self.block(self.join(joined), batch), batch.token_shift(labels_T, -self.ahead, fill=-100)


def affine_scaled_attention(q: Tensor, k: Tensor, v: Tensor, scale_TH1: Tensor, bias_TH1: Tensor, batch) -> Tensor:  # noqa: ANN001
    """Return attention with weights scale * softmax + bias. The sum of values is a recurrence with unit queries and keys."""
    ones = v.new_ones(len(v), v.shape[1], 1)
    return scale_TH1 * batch.attention(q, k, v) + bias_TH1 * batch.recurrence(
        ones, ones, v, "linear_attention", scale=1.0
    )
