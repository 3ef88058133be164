"""A language model's loss over tiles of tokens, without the logits of all tokens in memory at once.

Losses are summed, not averaged, so tiles and ranks count in proportion to their labels. The backward pass recomputes a tile's
logits with the log-sum-exps of the forward pass, so only hidden states and log-sum-exps are kept for it.
"""

# T tokens on this rank, H width of the hidden states, V vocabulary, t tokens in a tile

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from distattn.batch.packed_batch import IGNORE_INDEX, int64_labels
from distattn.ir.arguments import check_fields
from distattn.ir.errors import DistattnError
from distattn.kernels.merge import accumulation_dtype

# the number of elements of a weight's gradient that are computed in half precision before they are added to an fp32 sum
_SLICE = 1 << 24
# the model gets this number instead of logits: large enough for a soft cap to change it, and exact in half precision
_STAND_IN = 96.0


class LogitChange(NamedTuple):
    """A model's change to its output layer's logits: logits * scale, then cap * tanh(logits / cap) unless soft_cap is 0."""

    scale: float = 1.0
    soft_cap: float = 0.0

    def of(self, logits: Tensor) -> Tensor:
        """Return the changed logits."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits


def tiled_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    *,
    tile_tokens: int,
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    logit_scale: float = 1.0,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (loss_sum, token_losses_T) of the labels under softmax(hidden @ weight^T + bias), computed tile by tile.

    loss_sum: the sum over tokens with a label, a scalar with gradients for hidden, weight and bias. token_losses_T: each
    token's cross-entropy (0 if its label is -100), detached. Both are fp32, or fp64 for fp64 inputs. At most tile_tokens x V
    logits are in memory. z_loss: adds z_loss * lse^2 for each token to loss_sum. Logits are multiplied by logit_scale, then
    become soft_cap * tanh(logits / soft_cap) unless soft_cap is 0.

    The gradient of a half-precision weight is summed over tiles in fp32. Under autocast, products have autocast's dtype. A
    DTensor weight (FSDP2's, outside the module's forward) is gathered, and its gradient is the sum over ranks.
    """
    loss_sum, token_losses_T, _ = _losses(
        hidden_TH, weight_VH, labels_T, bias_V, tile_tokens, z_loss, LogitChange(logit_scale, soft_cap or 0.0)
    )
    return loss_sum, token_losses_T


@dataclass(frozen=True)
class TiledLoss:
    """A model's loss over tiles of its tokens, for `distattn.adapters.pytorch.local_loss(model, batch, loss=TiledLoss())`.

    tile_tokens: the tokens per tile. The forward and the backward pass each hold tile_tokens x vocabulary logits, in fp32 and in
    the weight's dtype. z_loss: see `tiled_loss`.
    """

    tile_tokens: int = 1024
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_numbers(self.tile_tokens, self.z_loss, 0.0)

    @contextmanager
    def instead_of_logits(self, layer: nn.Module, labels: Tensor, change: LogitChange) -> Iterator[TiledOutput]:
        """Make the output layer compute losses instead of logits in this context, for models called by this thread.

        The layer runs inside the model's forward, where FSDP2 and ZeRO 3 have gathered its weight. labels: one per token,
        in any shape. change: the model's change to the layer's logits. Raises DistattnError if the layer is not linear.
        """
        if not isinstance(layer, nn.Linear):
            raise DistattnError(
                f"the output layer is a {type(layer).__name__}; a tiled loss needs a torch.nn.Linear, whose weight it can "
                "multiply by a tile of tokens."
            )
        if not isinstance(layer.__dict__.get("forward"), _OutputForward):
            layer.__dict__["forward"] = _OutputForward(layer.forward)
        output = TiledOutput(self, layer, labels.flatten(), change)
        before, _CURRENT.output = _CURRENT.output, output
        try:
            yield output
        finally:
            _CURRENT.output = before


class TiledOutput:
    """The losses that the output layer computed in one call of a model.

    loss_sum, token_losses_T: see `tiled_loss`; token_losses_T (T,) has the order of the flattened labels.
    """

    def __init__(self, settings: TiledLoss, layer: nn.Module, labels_T: Tensor, change: LogitChange):
        self._settings, self.layer, self._labels_T, self._change = settings, layer, labels_T, change
        self._loss_sum: Tensor | None = None
        self.token_losses_T: Tensor | None = None

    def loss_sum(self, stand_in: Tensor, model: nn.Module) -> Tensor:
        """Return the summed loss. stand_in: the tensor that the model returned as its logits.

        The gradient also flows through the stand-in, so that hooks on the model's outputs run; they tell FSDP2 and ZeRO 3 that
        the backward pass starts. Raises DistattnError if the model did not call the layer or changes logits in an unknown way.
        """
        name = type(model).__name__
        if self._loss_sum is None:
            raise DistattnError(f"{name} did not call its output layer; a tiled loss cannot be computed for it.")
        self._check_change(stand_in, name)
        joined: Tensor = _Join.apply(self._loss_sum, stand_in)
        return joined

    def compute(self, hidden: Tensor) -> Tensor:
        """Compute the losses of hidden states (..., H) instead of logits. Return a stand-in (1, 1, 1) for the logits."""
        if self._loss_sum is not None:
            raise DistattnError("the output layer is called twice in one forward pass: a tiled loss is of one output.")
        hidden_TH = hidden.flatten(0, -2)
        if len(hidden_TH) != len(self._labels_T):
            raise DistattnError(
                f"the output layer was given {len(hidden_TH)} tokens, the batch has {len(self._labels_T)}."
            )
        layer: Any = self.layer
        self._loss_sum, self.token_losses_T, stand_in = _losses(
            hidden_TH, layer.weight, self._labels_T, layer.bias, *self._numbers()
        )
        return stand_in

    def _numbers(self) -> tuple[int, float, LogitChange]:
        return self._settings.tile_tokens, self._settings.z_loss, self._change

    def _check_change(self, stand_in: Tensor, name: str) -> None:
        """Raise DistattnError if the model does not change logits as the settings say.

        Each layer is checked only once, since the host has to wait for the device.
        """
        forward: Any = self.layer.forward
        # a meta tensor has no value to check
        if forward.checked == self._change or stand_in.is_meta:
            return
        wanted = float(self._change.of(torch.tensor(_STAND_IN)))
        if stand_in.numel() != 1 or not math.isclose(float(stand_in.detach()), wanted, rel_tol=1e-2):
            raise DistattnError(
                f"{name} changes logits after its output layer in a way that a tiled loss does not know; leave loss= out."
            )
        forward.checked = self._change


class _OutputForward:
    """The forward function of an output layer: it computes losses inside `TiledLoss.instead_of_logits`, otherwise logits.

    checked: the change to the logits that the check has confirmed; None before the check.
    """

    def __init__(self, forward: Any):
        self._forward = forward
        self.checked: LogitChange | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        output = _CURRENT.output
        if output is None or output.layer.__dict__.get("forward") is not self:
            logits: Tensor = self._forward(hidden)
            return logits
        return output.compute(hidden)


class _PerThread(threading.local):
    """The `TiledOutput` that receives the losses of models called by this thread."""

    output: TiledOutput | None = None


_CURRENT = _PerThread()


def _check_numbers(tile_tokens: int, z_loss: float, soft_cap: float) -> None:
    if tile_tokens < 1:
        raise DistattnError(f"tile_tokens must be at least 1, not {tile_tokens}.")
    for name, number in (("z_loss", z_loss), ("soft_cap", soft_cap)):
        if not 0 <= number < math.inf:
            raise DistattnError(f"{name} must be a positive number, or 0 for none, not {number}.")


def _losses(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None,
    tile_tokens: int,
    z_loss: float,
    change: LogitChange,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss_sum, token_losses_T, and a stand-in (1, 1, 1) for the logits, connected to the loss in autograd's graph."""
    _check_numbers(tile_tokens, z_loss, change.soft_cap)
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise DistattnError(
            f"hidden states {tuple(hidden_TH.shape)} and weight {tuple(weight_VH.shape)} do not fit: (T, H) and (V, H) are "
            "needed."
        )
    if labels_T.shape != hidden_TH.shape[:1]:
        raise DistattnError(f"labels have shape {tuple(labels_T.shape)}, hidden states are of {len(hidden_TH)} tokens.")
    weight_VH, bias_V = _whole(weight_VH), None if bias_V is None else _whole(bias_V)
    kind = hidden_TH.device.type
    has_autocast = torch.amp.is_autocast_available(kind)
    dtype = torch.get_autocast_dtype(kind) if has_autocast and torch.is_autocast_enabled(kind) else weight_VH.dtype
    settings = _Settings(tile_tokens, z_loss, change, torch.float64 if hidden_TH.dtype == torch.float64 else dtype)
    labels_T = int64_labels(labels_T)
    # `_TiledLoss` casts the products' operands itself; everything else is in the accumulation dtype
    with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
        losses: tuple[Tensor, Tensor, Tensor] = _TiledLoss.apply(hidden_TH, weight_VH, bias_V, labels_T, settings)
    return losses


def _whole(weight: Tensor) -> Tensor:
    """Return a parameter as a plain tensor. The gradient of a sharded parameter is the sum of all ranks' gradients."""
    if not isinstance(weight, DTensor):
        return weight
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


class _Settings(NamedTuple):
    """The settings of a tiled loss. dtype: the dtype of the products' operands."""

    tile_tokens: int
    z_loss: float
    change: LogitChange
    dtype: torch.dtype


class _TiledLoss(torch.autograd.Function):
    """Losses over tiles of tokens. Logits are computed again in the backward pass, so that they need not be kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide_dtype = accumulation_dtype(settings.dtype)
        losses_T = hidden_TH.new_zeros(len(hidden_TH), dtype=wide_dtype)
        lse_T = torch.empty_like(losses_T)
        weight = weight_VH.to(settings.dtype)
        valid_T = labels_T != IGNORE_INDEX
        # tokens without a label are computed with label 0 and masked afterwards
        targets_T = labels_T.where(valid_T, 0)
        for tile in _tiles(len(hidden_TH), settings.tile_tokens):
            logits_tV = settings.change.of(_logits(hidden_TH[tile], weight, bias_V, settings.dtype))
            torch.logsumexp(logits_tV, 1, out=lse_T[tile])
            losses_T[tile] = lse_T[tile] - logits_tV.gather(1, targets_T[tile, None])[:, 0]
        losses_T.masked_fill_(~valid_T, 0.0)
        loss_sum = losses_T.sum()
        if settings.z_loss:
            loss_sum += settings.z_loss * lse_T.masked_fill(~valid_T, 0.0).square().sum()
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, targets_T, valid_T, lse_T)
        ctx.settings = settings
        ctx.mark_non_differentiable(losses_T)
        return loss_sum, losses_T, losses_T.new_full((1, 1, 1), _STAND_IN)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TH, weight_VH, bias_V, targets_T, valid_T, lse_T = ctx.saved_tensors
        settings: _Settings = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide_dtype = accumulation_dtype(settings.dtype)
        dhidden_TH = torch.empty_like(hidden_TH) if wants_hidden else None
        dweight_VH = torch.zeros_like(weight_VH, dtype=wide_dtype) if wants_weight else None
        dbias_V = torch.zeros_like(bias_V, dtype=wide_dtype) if wants_bias else None
        weight = weight_VH.to(settings.dtype)
        for tile in _tiles(len(hidden_TH), settings.tile_tokens):
            tile_hidden = hidden_TH[tile].to(settings.dtype)
            gradient_tV = _logit_gradient(tile_hidden, weight, bias_V, targets_T[tile], lse_T[tile], settings)
            gradient_tV *= (dloss * valid_T[tile])[:, None]
            if dbias_V is not None:
                dbias_V += gradient_tV.sum(0)
            narrow_tV = gradient_tV.to(settings.dtype)
            del gradient_tV
            if dhidden_TH is not None:
                dhidden_TH[tile] = narrow_tV @ weight
            if dweight_VH is not None:
                _add_product(dweight_VH, narrow_tV, tile_hidden)
        dweight_VH = None if dweight_VH is None else dweight_VH.to(weight_VH.dtype)
        return dhidden_TH, dweight_VH, None if dbias_V is None else dbias_V.to(bias_V.dtype), None, None


def _tiles(tokens: int, tile_tokens: int) -> Iterator[slice]:
    for first in range(0, tokens, tile_tokens):
        yield slice(first, min(first + tile_tokens, tokens))


def _logits(hidden_tH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the output layer's logits (t, V) for a tile, in the accumulation dtype."""
    logits_tV = (hidden_tH.to(dtype) @ weight_VH.t()).to(accumulation_dtype(dtype))
    return logits_tV if bias_V is None else logits_tV + bias_V.to(logits_tV.dtype)


def _logit_gradient(
    hidden_tH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_t: Tensor, lse_t: Tensor, settings: _Settings
) -> Tensor:
    """Return the gradient of a tile's summed losses with respect to the output layer's logits, (t, V)."""
    scale, cap = settings.change
    logits_tV = settings.change.of(_logits(hidden_tH, weight_VH, bias_V, settings.dtype))
    # d(cap * tanh(x / cap)) = 1 - tanh^2
    slope_tV = 1 - (logits_tV / cap).square_() if cap else None
    gradient_tV = logits_tV.sub_(lse_t[:, None]).exp_()
    if settings.z_loss:
        gradient_tV *= (1 + 2 * settings.z_loss * lse_t)[:, None]
    gradient_tV.scatter_add_(1, targets_t[:, None], gradient_tV.new_full((len(targets_t), 1), -1.0))
    if slope_tV is not None:
        gradient_tV *= slope_tV
    return gradient_tV.mul_(scale) if scale != 1.0 else gradient_tV


def _add_product(sum_VH: Tensor, gradient_tV: Tensor, hidden_tH: Tensor) -> None:
    """Add gradient^T @ hidden to a sum. In half precision, add it by slices, so that no product is as large as the weight."""
    if sum_VH.dtype == gradient_tV.dtype:
        sum_VH.addmm_(gradient_tV.t(), hidden_tH)
        return
    rows = max(_SLICE // max(sum_VH.shape[1], 1), 1)
    for part in _tiles(len(sum_VH), rows):
        sum_VH[part] += gradient_tV[:, part].t() @ hidden_tH


class _Join(torch.autograd.Function):
    """A function that returns the loss and connects another tensor to its graph. That tensor gets a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(other)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (other,) = ctx.saved_tensors
        return dloss, torch.zeros_like(other)
