"""Explain the first difference by a mistake of individual ranks: in positions, attention, weights or modules."""

# T tokens on a rank, P positions, C values per position, I rotary embedding frequencies

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distattn.doctor.attention_mistakes import explain_attention
from distattn.doctor.changed_values import Change, common_change, describe_change
from distattn.doctor.comparison import Finding, RankResult, name_ranks, name_tokens
from distattn.doctor.emulated_model import EmulatedModel
from distattn.doctor.gradient_mistakes import KEY_VALUE
from distattn.doctor.logit_mistakes import positions_over_pack
from distattn.doctor.recording import lookups
from distattn.doctor.replay import LocalError, Place, Replay

_POSITIONS = "pass the part's position_ids on to the model: they are sharded with the tokens"
_SAME_MODEL = "use the same weights, buffers and settings on every rank in every step"


def describe_errors(errors: Sequence[LocalError], of_ranks: bool = True) -> str:
    """Describe the first difference: its place, tokens and size, and its ranks if `of_ranks` is set."""
    parts = [
        f"{f'on rank {error.rank} ' if of_ranks else ''}in {name_tokens(error.tokens)}, by {_percent(error.relative)}"
        for error in sorted(errors, key=lambda error: error.rank)
    ]
    return f"{errors[0].place}, {'; '.join(parts)}"


def explain_weights_in_use(ranks: Sequence[RankResult]) -> Finding | None:
    """Find a weight that was equal on all ranks at the start, but no longer when the ranks used it."""
    for micro_batch, first in enumerate(ranks[0]["parts"]):
        for name, digest in first["used_weights"].items():
            odd = [
                rank
                for rank, result in enumerate(ranks)
                if result["parts"][micro_batch]["used_weights"].get(name, digest) != digest
            ]
            if odd:
                observed = f"rank {odd[0]} computes with another {name} than rank 0, though they began with the same"
                return Finding("weights differ", observed, _SAME_MODEL)
    return None


def explain_errors(
    replay: Replay,
    errors: Sequence[LocalError],
    emulation: EmulatedModel,
    model: torch.nn.Module,
    ranks: Sequence[RankResult],
) -> Finding | None:
    """Find the mistake behind `errors` (see `Replay.first_errors`). Return None if no known mistake fits."""
    place, batch = errors[0].place, emulation.micro_batches[errors[0].place.micro_batch]
    if place.module in lookups(model) and (finding := _explain_lookup(replay, errors, batch.right(), emulation)):
        return finding
    for link in replay.calls:
        if link.place == place and (finding := explain_attention(replay, link, errors, batch.tokens)):
            return finding
    if finding := _explain_settings(place, ranks):
        return finding
    if (change := _change_of(replay, errors)) is not None:
        names = name_ranks(sorted(error.rank for error in errors))
        cause = {"rounded": "low precision", "dropped": "dropout on"}.get(change.kind, "values changed")
        tokens = name_tokens([token for error in errors for token in error.tokens])
        return Finding(cause, f"on {names}, {place} is {change.description} ({tokens})", _REMEDIES[cause])
    return None


def _change_of(replay: Replay, errors: Sequence[LocalError]) -> Change | None:
    return common_change(
        [describe_change(error.expected_T, error.got_T, replay.bound(error.rank, error.place)) for error in errors]
    )


def explain_gradient_errors(replay: Replay, errors: Sequence[LocalError]) -> Finding:
    """Explain the first gradient that differs from the one that a single process computes from the ranks' own gradients."""
    names = name_ranks(sorted(error.rank for error in errors))
    change = _change_of(replay, errors)
    lost = replay.lost_gradients()
    if change is not None and change.kind == "zero" and lost:
        modules = sorted({place.module for place in lost})
        observed = f"on {names} no gradient reaches the output{'s' * (len(modules) > 1)} of {', '.join(modules[:4])}"
        if all(any(mark in module for mark in KEY_VALUE) for module in modules):
            return Finding(
                "keys and values detached", observed, "keep detach() and no_grad() away from keys and values"
            )
        return Finding("gradient missing", observed, "look for detach() and no_grad() after it")
    if finding := _explain_lost_features(replay, errors, names):
        return finding
    observed = f"first to differ in the backward pass is {describe_errors(errors)}"
    if change is not None:
        observed += f": it is {change.description}"
    return Finding("gradient differs", observed, "look at the backward pass there, on these ranks")


def _explain_lost_features(replay: Replay, errors: Sequence[LocalError], names: str) -> Finding | None:
    """Find output features of a fused projection that receive no gradient. names: the ranks of `errors`, as text."""
    lost = []
    for error in errors:
        expected_TC, got_TC = (values.reshape(len(values), -1) for values in (error.expected_T, error.got_T))
        lost.append((~got_TC.any(0) & expected_TC.any(0)).nonzero().flatten().tolist())
    if not lost[0] or any(features != lost[0] for features in lost):
        return None
    place = errors[0].place
    observed = f"on {names} no gradient reaches {name_tokens(lost[0]).replace('token', 'feature')} of the output of {place.call}"
    sizes = {2 * link.call.k_NKD[0].numel() for link in replay.calls} | {
        link.call.k_NKD[0].numel() for link in replay.calls
    }
    if len(lost[0]) in sizes:
        return Finding(
            "keys and values detached",
            f"{observed}: as many as keys or values have",
            "keep detach() away from keys and values",
        )
    return Finding("gradient missing", observed, "look for detach() and no_grad() after it")


_REMEDIES = {
    "low precision": "compute it in the model's dtype on every rank",
    "dropout on": "set dropout to 0, or call model.eval(), in the script for the doctor",
    "values changed": "look at what this rank does differently there",
}


def _percent(relative: float) -> str:
    return f"{100 * relative:.2g} %" if relative < 10 else f"{relative:.1e} times what is right"


def _explain_lookup(
    replay: Replay, errors: Sequence[LocalError], right: Sequence[Tensor], emulation: EmulatedModel
) -> Finding | None:
    """Infer from the values that ranks looked up which positions they used. If none fit, compare rotary frequencies."""
    place = errors[0].place
    try:
        table = replay.computed(positions_over_pack())
    except Exception as failure:
        # for example, an index error for positions beyond the model's table
        emulation.note_failure(failure)
        return None
    looked_up = [(rank, computed[place]) for rank, computed in enumerate(table) if place in computed]
    if all(torch.equal(values, replay.right[rank][place]) for rank, values in looked_up):
        # the module looks up token ids, not positions
        return None
    tokens = torch.cat([replay.tokens(rank, place) for rank, _ in looked_up])
    values = torch.cat([rank_values for _, rank_values in looked_up])
    table_PC = values.double().reshape(len(values), -1)[tokens.argsort()]
    described = []
    for error in sorted(errors, key=lambda error: error.rank):
        got_TC = error.got_T.double().reshape(len(error.got_T), -1)
        nearest = torch.cdist(got_TC, table_PC).min(1)
        if float(nearest.values.norm()) > max(replay.bound(error.rank, place), 0.02 * float(got_TC.norm())):
            return _explain_frequencies(replay, error, right[error.rank])
        positions = _describe_positions(nearest.indices, right[error.rank], error.rank)
        described.append(f"rank {error.rank} {positions}")
    return Finding("positions not sharded", "; ".join(described), _POSITIONS)


def _describe_positions(used_T: Tensor, right_T: Tensor, rank: int) -> str:
    local_T = torch.arange(len(used_T))
    if torch.equal(used_T, local_T):
        return "counts positions from 0"
    if torch.equal(used_T, local_T + rank * len(used_T)):
        return f"counts positions from {rank * len(used_T)}, its number times its tokens"
    steps = (used_T - right_T).unique()
    if len(steps) == 1:
        step = int(steps)
        return f"has positions that are {abs(step)} too {'large' if step > 0 else 'small'}"
    odd = int((used_T != right_T).nonzero()[0])
    return (
        f"has wrong positions for {int((used_T != right_T).sum())} tokens; its token {odd} has position {int(used_T[odd])}, "
        f"where {int(right_T[odd])} is right"
    )


def _explain_frequencies(replay: Replay, error: LocalError, right_T: Tensor) -> Finding | None:
    """Compare rotary frequencies, which are the angles at position 1."""
    sines = error.place._replace(call=f"{error.place.call} (output 2)")
    got_TC, expected_TC = replay.got(error.rank, sines), replay.right[error.rank].get(sines)
    ones = (right_T == 1).nonzero().flatten()
    if got_TC is None or expected_TC is None or not len(ones):
        return None
    bases = []
    for cosine_TC, sine_TC in ((error.got_T, got_TC), (error.expected_T, expected_TC)):
        sine, cosine = (values[ones[0]].double().flatten() for values in (sine_TC, cosine_TC))
        angles_I = torch.atan2(sine, cosine)[: len(sine) // 2]
        bases.append(
            float((angles_I[0] / angles_I[-1].clamp(min=1e-12)) ** (len(angles_I) / max(len(angles_I) - 1, 1)))
        )
    observed = (
        f"rank {error.rank} has the rotary frequencies of base {bases[0]:.4g}, in one process it is {bases[1]:.4g}"
    )
    return Finding("RoPE base", observed, _SAME_MODEL)


def _explain_settings(place: Place, ranks: Sequence[RankResult]) -> Finding | None:
    """Find a setting that differs between ranks, in the module or in one that contains it."""
    for name, first in ranks[0]["settings"].items():
        owner = name.rpartition(".")[0]
        if owner and not place.module.startswith(owner):
            continue
        for rank, result in enumerate(ranks):
            if result["settings"].get(name, first) != first:
                observed = f"{name} is {result['settings'][name]!r} on rank {rank}, and {first!r} on rank 0"
                return Finding("RoPE base" if "theta" in name else "setting differs", observed, _SAME_MODEL)
    return None
