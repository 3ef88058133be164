"""Which mistake explains logits that differ: the model is run in one process with the mistake in it, and compared."""

# N tokens of the batch, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding, RankResult, in_global_order, relative_difference
from distattn.doctor.hypotheses import (
    ATTENTION_OPTIONS,
    HypotheticalAttention,
    causal_document_mask,
    causal_mask,
    document_mask,
    rank_local_mask,
)
from distattn.doctor.rank_run import ReferenceResult

# positions (N,) and attention in one process -> logits (N, V)
RunHypothesis = Callable[[Tensor, HypotheticalAttention], Tensor]


class Hypothesis(NamedTuple):
    """A mistake, and what the model is given in one process to make it: positions (N,) and attention."""

    finding: Finding
    positions_N: Tensor
    attention: HypotheticalAttention


def first_different_module(reference: ReferenceResult, ranks: Sequence[RankResult], tolerance: float) -> str | None:
    """Name the first module, in the order of execution, whose output is not that of one process."""
    tokens = [found["tokens"] for found in ranks]
    for name, expected in reference.outputs.items():
        parts = [found["outputs"][name] for found in ranks if name in found["outputs"]]
        if len(parts) < len(ranks) or any(part.shape[1:] != expected.shape[1:] for part in parts):
            continue
        if any(len(part) < len(own) for part, own in zip(parts, tokens, strict=True)):
            continue
        if relative_difference(in_global_order(parts, tokens), expected) > tolerance:
            return name
    return None


def explain_logits(
    reference: ReferenceResult,
    ranks: Sequence[RankResult],
    logits_NV: Tensor,
    tolerance: float,
    run_hypothesis: RunHypothesis | None,
) -> Finding:
    """Find the mistake that gives the same logits (N, V) in one process.

    run_hypothesis: None where the model cannot be run with a mistake in it.
    """
    if run_hypothesis is not None:
        for finding, positions_N, attention in _hypotheses(reference, ranks):
            if relative_difference(logits_NV, run_hypothesis(positions_N, attention)) <= tolerance:
                return finding
    observed = "logits differ, and no mistake that the doctor knows explains them"
    return Finding("unknown", observed, "look at the first module that differs; leave out what the script does there")


def _hypotheses(reference: ReferenceResult, ranks: Sequence[RankResult]) -> Iterator[Hypothesis]:
    tokens = [found["tokens"] for found in ranks]
    right_N = reference.positions_N
    local_N = in_global_order([torch.arange(len(own)) for own in tokens], tokens)
    given_N = _given_positions(reference, ranks, tokens)
    yield from _wrong_positions(reference, given_N, local_N)
    for positions_N in (right_N, given_N, local_N, torch.arange(len(right_N))):
        yield from _wrong_masks(reference, tokens, positions_N)
    yield from _dropped_options(reference)


def _given_positions(reference: ReferenceResult, ranks: Sequence[RankResult], tokens: list[Tensor]) -> Tensor:
    """The positions (N,) that ranks gave to the model, the right ones where they gave none."""
    given = [found.get("position_ids") for found in ranks]
    if all(one is not None and one.dim() == 2 for one in given):
        return in_global_order([one.flatten() for one in given if one is not None], tokens)
    return reference.positions_N


def _wrong_positions(reference: ReferenceResult, given_N: Tensor, local_N: Tensor) -> Iterator[Hypothesis]:
    counted_anew = "each rank counts positions from 0"
    mistake = counted_anew if torch.equal(given_N, local_N) else "positions are not the documents'"
    remedy = "pass the part's position_ids on to the model: they are sharded with the tokens"
    attention = HypotheticalAttention(causal_document_mask(reference.rows))
    for observed, positions_N in ((mistake, given_N), (counted_anew, local_N)):
        finding = Finding("positions not sharded", f"{observed}: rotary embeddings are wrong", remedy)
        yield Hypothesis(finding, positions_N, attention)


def _wrong_masks(reference: ReferenceResult, tokens: list[Tensor], positions_N: Tensor) -> Iterator[Hypothesis]:
    rows = reference.rows
    finding = Finding(
        "documents not separated",
        "documents attend to one another: the pack is taken for one document",
        "give document_lengths (or position_ids that begin anew) to ContextParallel.shard",
    )
    yield Hypothesis(finding, positions_N, HypotheticalAttention(causal_mask(rows)))
    finding = Finding("mask not causal", "tokens see what comes after them", 'use document_mask="causal"')
    yield Hypothesis(finding, positions_N, HypotheticalAttention(document_mask(rows)))
    finding = Finding(
        "context parallelism off",
        "each rank attends to its own tokens only: context parallelism does nothing",
        'select attn_implementation="distattn", and pass context_parallel on to the model',
    )
    for positions in (None, positions_N):
        yield Hypothesis(finding, positions_N, HypotheticalAttention(rank_local_mask(tokens, rows, positions)))


def _dropped_options(reference: ReferenceResult) -> Iterator[Hypothesis]:
    mask = causal_document_mask(reference.rows)
    for name in ATTENTION_OPTIONS:
        finding = Finding(
            f"{name} dropped", f"the layers' {name} is not computed", f"pass {name} on to the attention call"
        )
        yield Hypothesis(finding, reference.positions_N, HypotheticalAttention(mask, [name]))
