"""Attention with prefix softmaxes (over all tokens so far) in plain modules. `batch` is a model's argument context_parallel."""

# T tokens of this rank, C channels
import torch
from torch import Tensor, nn


class Latte(nn.Module):
    """Causal latent attention (Dolga et al. 2024, arXiv 2402.17512): latents attend to all tokens so far, tokens to latents.

    With as many latents as key channels, this is a causal form of Efficient Attention (Shen et al. 2018, arXiv
    1812.01243).
    """

    def __init__(self, width: int, heads: int, latents: int, dim: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, [latents, latents, dim]
        self.project, self.out = nn.Linear(width, heads * (2 * latents + dim)), nn.Linear(heads * dim, width)

    def forward(self, x_TC: Tensor, batch) -> Tensor:  # noqa: ANN001
        q, k, v = self.project(x_TC).unflatten(1, (self.heads, -1)).split(self.parts, -1)
        return self.out(batch.prefix_softmax(q.softmax(-1), k, v).flatten(1))


class Aaren(nn.Module):
    """Attention as a recurrence (Feng et al. 2024, arXiv 2405.13956): each head's learned query attends to all tokens so far."""

    def __init__(self, width: int, heads: int, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(heads, dim))
        self.project, self.out = nn.Linear(width, 2 * heads * dim), nn.Linear(heads * dim, width)

    def forward(self, x_TC: Tensor, batch) -> Tensor:  # noqa: ANN001
        k, v = self.project(x_TC).unflatten(1, (2, *self.query.shape)).unbind(1)
        logits = (k * self.query).sum(-1, keepdim=True) * k.shape[-1] ** -0.5
        return self.out(batch.prefix_softmax(torch.ones_like(logits), logits, v).flatten(1))
