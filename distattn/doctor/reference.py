"""Compute the reference in one process, one document at a time, and measure how far two correct results may differ."""

# N tokens in all micro-batches, T tokens in a document, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distattn.batch.packed_batch import IGNORE_INDEX, KEYS, PackedBatch
from distattn.doctor.comparison import RankResult, distance, in_global_order, parts_of
from distattn.doctor.recording import (
    digest,
    recorded_outputs,
    recorded_returns,
    rounded_otherwise,
    same_buffers,
    unit_roundoff,
)
from distattn.doctor.target import Target
from distattn.ir.errors import DistattnError

# the permitted difference, as a multiple of the measured effect of rounding, and the number of measurements
_MARGIN, _TIMES = 6.0, 2


class ReferenceResult(NamedTuple):
    """The logits (N, V), module outputs, loss and gradients of all micro-batches.

    labels_N: each token's own label, not shifted. outputs: by module name, tokens first (N, ...). token_dims: the token dimension
    of each module's output. token_gradients: the gradients of the token losses alone; None if there is no router loss.
    """

    packs: list[PackedBatch]
    ids_N: Tensor
    labels_N: Tensor
    shifted_labels_N: Tensor
    logits_NV: Tensor
    outputs: dict[str, Tensor]
    token_dims: dict[str, int]
    loss: Tensor
    gradients: dict[str, Tensor]
    token_gradients: dict[str, Tensor] | None

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each document."""
        return [length for pack in self.packs for length in pack.lengths]

    @property
    def valid_labels(self) -> int:
        """The number of tokens with a label."""
        return sum(pack.valid_labels for pack in self.packs)


class Tolerances(NamedTuple):
    """The largest differences that rounding explains, as norms of a - b, for logits, module outputs and gradients."""

    logits: float
    outputs: dict[str, float]
    gradients: dict[str, float]
    # the relative error of rounding a module's output once, by module name
    rounding: dict[str, float]

    def coarsest(self, reference: ReferenceResult) -> float:
        """Return the larger of two relative tolerances: that of the logits and that of all gradients together."""
        gradient = torch.stack([gradient.double().norm() for gradient in reference.gradients.values()]).norm()
        moved = torch.tensor(list(self.gradients.values()), dtype=torch.float64).norm()
        return max(self.logits / max(float(reference.logits_NV.double().norm()), 1e-30), float(moved / gradient))


def reference_result(target: Target, model: torch.nn.Module, batches: Sequence[Mapping[str, Any]]) -> ReferenceResult:
    """Run the target in one process, one document at a time. The model must hold the ranks' weights.

    Raises DistattnError if no token has a label.
    """
    packs = packs_of(batches)
    ids_N = torch.cat([pack.ids_N for pack in packs])
    shifted_N = torch.cat([pack.labels_N for pack in packs])
    valid = int((shifted_N != IGNORE_INDEX).sum())
    if not valid:
        raise DistattnError("no batch has a token with a label: there is no loss to compare.")
    device = next(model.parameters()).device
    lengths = [length for pack in packs for length in pack.lengths]
    model.zero_grad()
    logits, outputs, routers = [], [], []
    # the context includes the backward pass, which may recompute attention
    with same_buffers(model), target.reference_context(model):
        for ids in ids_N.to(device).split(lengths):
            with recorded_outputs(model) as seen, recorded_returns(model) as returned:
                logits.append(target.reference(model, ids[None])[0])
            outputs.append(seen)
            routers.append(target.router_logits(returned))
        logits_NV = torch.cat(logits)
        loss = cross_entropy(logits_NV, shifted_N.to(device)).sum() / valid
        router_loss = _router_loss(target, model, packs, routers)
        loss.backward(retain_graph=router_loss is not None)
        gradients, token_gradients = gradients_of(model), None
        if router_loss is not None:
            router_loss.backward()
            loss = loss + router_loss
            gradients, token_gradients = gradients_of(model), gradients
    model.zero_grad()
    dims = _token_dims(outputs, lengths)
    return ReferenceResult(
        packs,
        ids_N,
        torch.cat([_unshifted_labels(batch) for batch in batches]),
        shifted_N,
        logits_NV.detach().cpu(),
        {
            name: torch.cat([document[name].movedim(dim, 0) for document in outputs])
            for name, dim in dims.items()
            if outputs[0][name].is_floating_point()
        },
        dims,
        loss.detach().cpu(),
        gradients,
        token_gradients,
    )


def _router_loss(
    target: Target, model: torch.nn.Module, packs: Sequence[PackedBatch], routers: Sequence[list[Tensor] | None]
) -> Tensor | None:
    """Compute the mean of the micro-batches' router losses, weighted by label counts. Return None if there is no router loss.

    routers: each document's router logits, one tensor per layer.
    """
    rest, losses = list(routers), []
    for pack in packs:
        of_pack, rest = rest[: len(pack.lengths)], rest[len(pack.lengths) :]
        if any(layers is None for layers in of_pack):
            return None
        layers = [torch.cat(documents) for documents in zip(*of_pack, strict=True)]
        losses.append(target.router_loss(model, layers) * pack.valid_labels)
    return torch.stack(losses).sum() / sum(pack.valid_labels for pack in packs)


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the gradients of all parameters that have one, keyed by name."""
    return {name: p.grad.detach().cpu().clone() for name, p in model.named_parameters() if p.grad is not None}


def measure_tolerances(
    target: Target,
    model: torch.nn.Module,
    batches: Sequence[Mapping[str, Any]],
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
) -> Tolerances:
    """Measure how much results in one process change if each module's values are perturbed by one rounding to the ranks' dtype.

    Modules whose outputs on the ranks equal the reference bit for bit are not perturbed.
    """
    rounding = _rounding(reference, ranks)
    coarsest = max(rounding.values(), default=0.0)
    logits = _one_rounding(reference.logits_NV, coarsest)
    outputs = {name: _one_rounding(output, rounding.get(name, 0.0)) for name, output in reference.outputs.items()}
    gradients = {name: _one_rounding(gradient, coarsest) for name, gradient in reference.gradients.items()}
    for seed in range(_TIMES):
        with rounded_otherwise(model, rounding, seed):
            other = reference_result(target, model, batches)
        logits = max(logits, distance(other.logits_NV, reference.logits_NV))
        for moved, there, here in (
            (outputs, other.outputs, reference.outputs),
            (gradients, other.gradients, reference.gradients),
        ):
            for name in there.keys() & here.keys():
                moved[name] = max(moved[name], distance(there[name], here[name]))
    return Tolerances(
        _MARGIN * logits,
        {name: _MARGIN * moved for name, moved in outputs.items()},
        {name: _MARGIN * moved for name, moved in gradients.items()},
        rounding,
    )


def _one_rounding(values: Tensor, error: float) -> float:
    """Return the norm of a relative error of `error`, or of one rounding to the values' dtype if that is larger."""
    return max(error, unit_roundoff(values.dtype)) * float(values.double().norm())


def packs_of(batches: Sequence[Mapping[str, Any]]) -> list[PackedBatch]:
    """Read batches as `ContextParallel.shard` does. Keys that only the script uses are ignored."""
    packs = [PackedBatch.of({name: value for name, value in batch.items() if name in KEYS}) for batch in batches]
    # results are compared on the CPU
    return [PackedBatch(pack.ids_N.cpu(), pack.labels_N.cpu(), pack.lengths) for pack in packs]


def digests_of(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return digests of each batch's tensors, keyed by name."""
    return [{name: digest(value) for name, value in batch.items() if isinstance(value, Tensor)} for batch in batches]


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Compute each token's loss (T,) in fp64. It is 0 where the target is IGNORE_INDEX."""
    return F.cross_entropy(logits_TV.double(), targets_T, ignore_index=IGNORE_INDEX, reduction="none")


def _unshifted_labels(batch: Mapping[str, Any]) -> Tensor:
    labels = batch.get("labels", batch["input_ids"])
    padding = batch.get("attention_mask")
    return (labels.flatten() if padding is None else labels[padding != 0]).cpu()


def _token_dims(outputs: Sequence[dict[str, Tensor]], lengths: Sequence[int]) -> dict[str, int]:
    """Return the token dimension of each output, keyed by name.

    It is the first dimension whose size equals the document's length in every document. Other outputs are left out.
    """
    dims: dict[str, int] = {}
    for name in outputs[0]:
        values = [document[name] for document in outputs if name in document]
        if len(values) < len(lengths) or len({value.dim() for value in values}) > 1:
            continue
        fits = (
            dim
            for dim in range(values[0].dim())
            if all(value.shape[dim] == length for value, length in zip(values, lengths, strict=True))
        )
        if (dim := next(fits, None)) is not None:
            dims[name] = dim
    # outputs are concatenated along tokens, so their other dimensions must be equal
    return {
        name: dim
        for name, dim in dims.items()
        if len({(*document[name].shape[:dim], *document[name].shape[dim + 1 :]) for document in outputs}) == 1
    }


def _rounding(reference: ReferenceResult, ranks: Sequence[RankResult]) -> dict[str, float]:
    """Return the relative error of one rounding of each module's output on the ranks; 0 if the output equals the reference."""
    errors: dict[str, float] = {}
    for _, part in parts_of(ranks):
        for name, output in part["outputs"].items():
            if not output.is_floating_point():
                continue
            errors[name] = max(errors.get(name, 0.0), unit_roundoff(output.dtype))
    for name, expected in reference.outputs.items():
        parts = outputs_of_ranks(reference, ranks, name)
        if parts is not None and torch.equal(parts, expected):
            errors[name] = 0.0
    return errors


def outputs_of_ranks(reference: ReferenceResult, ranks: Sequence[RankResult], name: str) -> Tensor | None:
    """Return the ranks' outputs of a module in batch order, (N, ...). Return None if the shapes do not fit."""
    dim, expected = reference.token_dims[name], reference.outputs[name]
    parts = [part["outputs"].get(name) for _, part in parts_of(ranks)]
    tokens = [part["tokens"] for _, part in parts_of(ranks)]
    moved = [part.movedim(dim, 0) for part in parts if part is not None and part.dim() > dim]
    if len(moved) < len(parts) or any(part.shape[1:] != expected.shape[1:] for part in moved):
        return None
    if any(len(part) < len(rank_tokens) for part, rank_tokens in zip(moved, tokens, strict=True)):
        return None
    return in_global_order(moved, tokens)
