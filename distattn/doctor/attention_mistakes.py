"""Find the mistake in one attention call from each rank's inputs and results."""

# N tokens of a micro-batch, M of them compared, H query heads, K key/value heads, D head dim, E value head dim

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.doctor.changed_values import common_change, describe_change, search_factor
from distattn.doctor.comparison import Finding, name_ranks
from distattn.doctor.emulation import ATTENTION_OPTIONS, AttentionCall, attend, visible_keys
from distattn.doctor.replay import LinkedCall, LocalError, Replay

# compare at most this many tokens on each rank, which is enough to tell mistakes apart
_ROWS = 128
_STEPS = (-3, -2, -1, 1, 2, 3)
_ASK = "look at what is done to queries, keys, values and results around the call of attention on that rank"


class _Rows(NamedTuple):
    """A rank's results for some of its tokens.

    tokens_M: the tokens' indices in the micro-batch. bound: the norm of the largest difference that rounding explains.
    """

    rank: int
    tokens_M: Tensor
    got_MHE: Tensor
    bound: float


class _Variant(NamedTuple):
    """A possible mistake. compute: returns the results (M, H, E) that attention with this mistake gives for a rank's tokens."""

    cause: str
    observed: str
    remedy: str
    compute: Callable[[_Rows], Tensor]


def explain_attention(
    replay: Replay, link: LinkedCall, errors: Sequence[LocalError], tokens: Sequence[Tensor]
) -> Finding | None:
    """Find the mistake that ranks make in an attention call. Return None if no known mistake fits.

    errors: the differences in this call's results, one per rank that differs. tokens: the indices of each rank's tokens in the
    micro-batch.
    """
    call = link.call
    heads, dim = call.q_NHD.shape[1], call.v_NKE.shape[2]
    wrong = []
    for error in sorted(errors, key=lambda error: error.rank):
        rank_tokens = tokens[error.rank]
        odd = torch.isin(replay.tokens(error.rank, link.place), torch.tensor(error.tokens)).nonzero().flatten()[:_ROWS]
        share = (len(odd) / max(len(rank_tokens), 1)) ** 0.5
        got_MHE = error.got_T[odd].reshape(len(odd), heads, dim)
        wrong.append(
            _Rows(error.rank, rank_tokens[odd], got_MHE, replay.bound(error.rank, link.place) * max(share, 0.3))
        )
    where = f"in {link.place.module.rpartition('.')[0] or link.place.module}, on {name_ranks([rows.rank for rows in wrong])}"
    for variant in _variants(call, tokens):
        if all(_fits(variant.compute(rows), rows) for rows in wrong):
            return Finding(variant.cause, f"{where}, attention {variant.observed}", variant.remedy)
    change = common_change(
        [describe_change(_results(call)(rows).flatten(1), rows.got_MHE.flatten(1), rows.bound) for rows in wrong]
    )
    if change is not None:
        cause = "attention output rounded" if change.kind == "rounded" else "attention output changed"
        return Finding(cause, f"{where}, the results of attention are {change.description}", _ASK)
    return _explain_values(call, tokens, wrong, where) or _explain_scales(call, tokens, wrong, where)


def _fits(computed_MHE: Tensor, rows: _Rows) -> bool:
    return float((computed_MHE.double() - rows.got_MHE.double()).norm()) <= rows.bound


def _results(call: AttentionCall, tiled: bool = False) -> Callable[[_Rows], Tensor]:
    """Return a function that computes the call's results (M, H, E) for the tokens of a `_Rows`. tiled: see `attend`."""
    allowed_NN = visible_keys(call)

    def compute(rows: _Rows) -> Tensor:
        tokens_M = rows.tokens_M
        return attend(call.q_NHD[tokens_M], call.k_NKD, call.v_NKE, allowed_NN[tokens_M], call.options, tiled)

    return compute


def _variants(call: AttentionCall, tokens: Sequence[Tensor]) -> Iterator[_Variant]:
    """Yield the mistakes that need no search for a parameter, simplest first."""
    group = call.q_NHD.shape[1] // call.k_NKD.shape[1]
    if group > 1:
        yield _Variant(
            "key heads tiled",
            "repeats key/value heads as 0, 1, 0, 1, not as 0, 0, 1, 1",
            "repeat heads with repeat_interleave, or give attention the key/value heads as they are",
            _results(call, tiled=True),
        )
    for flipped in ("k_NKD", "v_NKE"):
        name = "keys" if flipped == "k_NKD" else "values"
        yield _Variant(
            f"heads of {name} in another order",
            f"has the heads of {name} in another order",
            "look at how heads are laid out around the call of attention",
            _results(call._replace(**{flipped: getattr(call, flipped).flip(1)})),
        )
    for name in ATTENTION_OPTIONS:
        if call.options.get(name) is not None:
            yield _Variant(
                f"{name} dropped",
                f"does not compute the layer's {name}",
                f"pass {name} on to the attention call",
                _results(call._replace(options={**call.options, name: None})),
            )
    yield from _mask_variants(call, tokens)
    for rank, rank_tokens in enumerate(tokens):
        k_NKD, v_NKE = call.k_NKD.clone(), call.v_NKE.clone()
        k_NKD[rank_tokens], v_NKE[rank_tokens] = 0, 0
        yield _Variant(
            "keys of a rank missing",
            f"treats the keys and values of rank {rank} as zero",
            "look at how this rank's keys and values are sent to the others",
            _results(call._replace(k_NKD=k_NKD, v_NKE=v_NKE)),
        )
    yield from _exchanged_variants(call, tokens)
    for dtype in (torch.bfloat16, torch.float16):
        if call.q_NHD.dtype in (torch.float32, torch.float64):
            q_NHD, k_NKD, v_NKE = (x.to(dtype).to(x.dtype) for x in (call.q_NHD, call.k_NKD, call.v_NKE))
            yield _Variant(
                "attention in low precision",
                f"rounds queries, keys and values to {str(dtype)[6:]} before attention",
                "leave them in the model's dtype",
                _results(call._replace(q_NHD=q_NHD, k_NKD=k_NKD, v_NKE=v_NKE)),
            )


def _exchanged_variants(call: AttentionCall, tokens: Sequence[Tensor]) -> Iterator[_Variant]:
    """Yield mistakes that swap keys or values between tokens, or use keys as values, on one rank or on all ranks."""
    everywhere = [(list(range(len(tokens))), "all ranks")] if len(tokens) > 1 else []
    for ranks, whose in [*everywhere, *(([rank], f"rank {rank}") for rank in range(len(tokens)))]:
        for field, name in (("k_NKD", "keys"), ("v_NKE", "values")):
            for step in (1, -1):
                moved = getattr(call, field).clone()
                for rank in ranks:
                    moved[tokens[rank]] = moved[tokens[rank].roll(step)]
                yield _Variant(
                    f"{name} of other tokens",
                    f"has for tokens of {whose} the {name} of the token {'before' if step > 0 else 'after'}",
                    _ASK,
                    _results(call._replace(**{field: moved})),
                )
        if call.k_NKD.shape == call.v_NKE.shape:
            v_NKE = call.v_NKE.clone()
            for rank in ranks:
                v_NKE[tokens[rank]] = call.k_NKD[tokens[rank]].to(v_NKE.dtype)
            yield _Variant(
                "keys for values",
                f"uses the keys of {whose} as values, too",
                _ASK,
                _results(call._replace(v_NKE=v_NKE)),
            )


def _mask_variants(call: AttentionCall, tokens: Sequence[Tensor]) -> Iterator[_Variant]:
    """Yield mistakes in the mask, which allow too many or too few keys."""
    allowed_NN = visible_keys(call)
    size = len(allowed_NN)
    document_NN = allowed_NN | allowed_NN.t()
    # merge overlapping windows into entire documents
    for _ in range(2):
        document_NN = (document_NN.float() @ document_NN.float()) > 0 if call.options.get("window") else document_NN
    causal_NN = torch.ones(size, size, dtype=torch.bool).tril()
    remedy = "look at the mask that this rank gives to attention, and at the first token that it treats as its own"

    def masked(cause: str, observed: str, mask_NN: Tensor) -> _Variant:
        seen = call._replace(allowed_NN=mask_NN, options={**call.options, "window": None})
        return _Variant(cause, observed, remedy, _results(seen))

    for step in _STEPS:
        seen = "more" if step > 0 else "fewer"
        observed = f"sees {abs(step)} token{'s' * (abs(step) > 1)} {seen} than its queries may"
        mask_NN = document_NN & torch.ones_like(causal_NN).tril(step)
        yield masked("causal mask shifted", observed, mask_NN)
    window = call.options.get("window")
    for step in _STEPS if window else ():
        mask_NN = visible_keys(call, step)
        observed = f"has windows of {abs(step)} token{'s' * (abs(step) > 1)} too {'many' if step > 0 else 'few'}"
        yield masked("window off by one", observed, mask_NN)
    yield masked("mask not causal", "sees tokens that come after its queries", document_NN)
    yield masked("documents not separated", "sees the documents before its own", causal_NN)
    yield masked("documents not separated", "sees all documents, and what comes after", torch.ones_like(causal_NN))
    for rank, rank_tokens in enumerate(tokens):
        lost_NN = allowed_NN.clone()
        lost_NN[:, rank_tokens] = False
        observed = f"does not see the keys of rank {rank}"
        yield masked("keys of a rank missing", observed, lost_NN)
        # a second variant: only the other ranks miss these keys
        kept_NN = lost_NN.clone()
        kept_NN[rank_tokens] = allowed_NN[rank_tokens]
        yield masked("keys of a rank missing", observed, kept_NN)
    by_rank_NN = torch.zeros_like(allowed_NN)
    for rank_tokens in tokens:
        by_rank_NN[rank_tokens[:, None], rank_tokens[None]] = True
    for observed, mask_NN in (
        ("sees its own tokens only", by_rank_NN & allowed_NN),
        ("sees its own tokens only, and all documents of them", by_rank_NN & causal_NN),
    ):
        yield masked("context parallelism off", observed, mask_NN)
    local_NN = torch.zeros_like(allowed_NN)
    for rank_tokens in tokens:
        local_NN[rank_tokens] = torch.arange(size)[None] <= torch.arange(len(rank_tokens))[:, None]
    for mask_NN in (local_NN & document_NN, local_NN):
        observed = "counts the tokens of its causal mask from 0, not from its own first one"
        yield masked("causal offset", observed, mask_NN)


def _explain_values(
    call: AttentionCall, tokens: Sequence[Tensor], wrong: Sequence[_Rows], where: str
) -> Finding | None:
    """Find ranks whose values are scaled. Results are linear in the values, so least squares gives each rank's factor."""
    terms = []
    for rank_tokens in tokens:
        part_NKE = torch.zeros_like(call.v_NKE, dtype=torch.float64)
        part_NKE[rank_tokens] = call.v_NKE[rank_tokens].double()
        terms.append(torch.cat([_results(call._replace(v_NKE=part_NKE))(rows).flatten() for rows in wrong]))
    got = torch.cat([rows.got_MHE.flatten().double() for rows in wrong])
    factors = torch.linalg.lstsq(torch.stack(terms, 1), got[:, None]).solution.flatten()
    rest = float((torch.stack(terms, 1) @ factors - got).norm())
    if rest > max(rows.bound for rows in wrong) * len(wrong) ** 0.5:
        return None
    odd = {rank: factor for rank, factor in enumerate(factors.tolist()) if abs(factor - 1) > 0.01}
    if not odd:
        return None
    rank, factor = next(iter(odd.items()))
    observed = f"{where}, the values of {name_ranks(list(odd))} count {factor:.4g} times in results of attention"
    return Finding("values scaled", observed, _ASK)


def _explain_scales(
    call: AttentionCall, tokens: Sequence[Tensor], wrong: Sequence[_Rows], where: str
) -> Finding | None:
    """Find a wrong factor on the queries of the ranks in `wrong`, or on the keys of one rank."""

    wide = call._replace(q_NHD=call.q_NHD.double(), k_NKD=call.k_NKD.double(), v_NKE=call.v_NKE.double())

    def difference(factor: float) -> float:
        return _distance(wrong, _results(wide._replace(q_NHD=factor * wide.q_NHD)))

    allowance = max(rows.bound for rows in wrong) * len(wrong) ** 0.5
    factor = search_factor(difference)
    if difference(factor) <= allowance and abs(factor - 1) > 1e-3:
        usual = call.q_NHD.shape[-1] ** -0.5 if call.options.get("scale") is None else float(call.options["scale"])
        observed = (
            f"{where}, the softmax scale, or the queries, are {factor:.4g} times the right ones (a scale of "
            f"{factor * usual:.4g} where it is {usual:.4g})"
        )
        return Finding("softmax scale", observed, "give attention the layer's scale, once, on every rank")
    for rank, rank_tokens in enumerate(tokens):

        def key_difference(factor: float, rank_tokens: Tensor = rank_tokens) -> float:
            k_NKD = wide.k_NKD.clone()
            k_NKD[rank_tokens] *= factor
            return _distance(wrong, _results(wide._replace(k_NKD=k_NKD)))

        factor = search_factor(key_difference)
        if key_difference(factor) <= allowance and abs(factor - 1) > 1e-3:
            return Finding(
                "keys scaled", f"{where}, the keys of rank {rank} are {factor:.4g} times the right ones", _ASK
            )
    return None


def _distance(wrong: Sequence[_Rows], compute: Callable[[_Rows], Tensor]) -> float:
    parts = [(compute(rows).double() - rows.got_MHE.double()).norm() for rows in wrong]
    return float(torch.stack(parts).norm())
