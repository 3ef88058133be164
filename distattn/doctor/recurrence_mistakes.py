"""Mistakes of recurrent layers and short convolutions: where they begin anew, what they read in which order, rounded decays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding
from distattn.doctor.emulation import Mistake
from distattn.doctor.logit_mistakes import RIGHT, Hypothesis, MicroBatch, Readings

_RESET = "give the batch's document_lengths to ContextParallel.shard, and ask the batch: documents reset its plans by themselves"
_ASK = "ask the batch's recurrence(...), which hands states from stretch to stretch in the order of the document"
_HALO = "ask the batch's causal_conv1d(...), which brings the tokens before each stretch"
_OWN_TOKENS = "each rank convolves its own tokens only: the first ones of a stretch miss those before them"


def recurrence_hypotheses(asked: Collection[str]) -> Iterator[Hypothesis]:
    """What may be wrong in a model whose layers have asked for these operations of a batch."""
    if "recurrence" in asked:
        yield _reads(
            _pack, "state not reset", "a document begins with the state that the one before it has left", _RESET
        )
        observed = "recurrent layers read a document's tokens rank by rank, not in their order"
        yield _reads(_rank_by_rank, "stretches out of order", observed, _ASK)
        for reading in (_stretches, _own_documents, _own):
            observed = "each stretch of tokens begins with an empty state: what the tokens before it have left is lost"
            yield _reads(reading, "state not handed on", observed, _ASK)
        observed = "the logarithms of decays are rounded to bf16: over a long document their errors add up"
        remedy = "compute g in fp32, outside of autocast"
        yield RIGHT._replace(finding=Finding("decay in bf16", observed, remedy), mistake=Mistake(coarse_decay=True))
    if "causal_conv1d" in asked:
        observed = "a convolution reads over the ends of documents"
        yield _convolves(_pack, "convolution not reset", observed, _RESET)
        for reading in (_stretches, _own_documents, _own):
            yield _convolves(reading, "halo missing", _OWN_TOKENS, _HALO)


def explain_convolution(model: torch.nn.Module, first_difference: str | None) -> Finding | None:
    """Find whether the first module to differ, of a model that is right about its batch, is a convolution of its own."""
    module = dict(model.named_modules()).get(first_difference or "")
    if not isinstance(module, torch.nn.Conv1d):
        return None
    return Finding("halo missing", f"{first_difference}: {_OWN_TOKENS}", _HALO)


def _reads(reading: Callable[[MicroBatch], Readings], cause: str, observed: str, remedy: str) -> Hypothesis:
    return RIGHT._replace(finding=Finding(cause, observed, remedy), readings=reading, convolved=RIGHT.readings)


def _convolves(reading: Callable[[MicroBatch], Readings], cause: str, observed: str, remedy: str) -> Hypothesis:
    return RIGHT._replace(finding=Finding(cause, observed, remedy), convolved=reading)


def _pack(batch: MicroBatch) -> Readings:
    return [torch.arange(len(batch.pack.ids_N))]


def _rank_by_rank(batch: MicroBatch) -> Readings:
    """Of each document the tokens of one rank after those of another."""
    return [torch.cat([own[(own >= begin) & (own < end)] for own in batch.tokens]) for begin, end in batch.documents()]


def _own(batch: MicroBatch) -> Readings:
    return batch.tokens


def _own_documents(batch: MicroBatch) -> Readings:
    """Of each rank the tokens of one document, as if they followed each other."""
    return [own[(own >= begin) & (own < end)] for own in batch.tokens for begin, end in batch.documents()]


def _stretches(batch: MicroBatch) -> Readings:
    """Of each rank the tokens of one document that follow each other."""
    found: list[Tensor] = []
    for own in _own_documents(batch):
        ends = ((own[1:] - own[:-1] != 1).nonzero().flatten() + 1).tolist()
        found += own.tensor_split(ends)
    return found
