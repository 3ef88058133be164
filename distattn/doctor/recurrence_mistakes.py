"""Mistakes in recurrent layers and short convolutions: wrong resets, tokens out of order or lost, rounded decays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding
from distattn.doctor.emulation import Mistake
from distattn.doctor.logit_mistakes import RIGHT, Hypothesis, MicroBatch, Readings

_RESET = "pass the batch's document_lengths to ContextParallel.shard, and call the batch's operation, which resets at documents"
_ASK = "call the batch's recurrence(...), which passes states from segment to segment in the order of the document"
_HALO = "call the batch's causal_conv1d(...), which fetches the tokens before each segment"
_OWN_TOKENS = "each rank convolves its own tokens only: the first ones of a segment miss those before them"


def recurrence_hypotheses(asked: Collection[str]) -> Iterator[Hypothesis]:
    """Yield the mistakes that are possible in a model. asked: the names of the batch operations that its layers called."""
    if "recurrence" in asked:
        yield _reads(
            _pack, "state not reset", "a document begins with the state that the one before it has left", _RESET
        )
        observed = "recurrent layers read a document's tokens rank by rank, not in their order"
        yield _reads(_rank_by_rank, "segments out of order", observed, _ASK)
        for reading in (_local_segments, _local_documents, _local_tokens):
            observed = "each segment of tokens begins with an empty state: the state after the tokens before it is lost"
            yield _reads(reading, "state not passed on", observed, _ASK)
        observed = "the logarithms of decays are rounded to bf16: over a long document their errors add up"
        remedy = "compute g in fp32, outside of autocast"
        yield RIGHT._replace(finding=Finding("decay in bf16", observed, remedy), mistake=Mistake(coarse_decay=True))
    if "causal_conv1d" in asked:
        observed = "a convolution reads over the ends of documents"
        yield _convolves(_pack, "convolution not reset", observed, _RESET)
        for reading in (_local_segments, _local_documents, _local_tokens):
            yield _convolves(reading, "halo missing", _OWN_TOKENS, _HALO)


def explain_convolution(model: torch.nn.Module, first_difference: str | None) -> Finding | None:
    """Return a finding if the first module that differs is a plain convolution, which cannot see other ranks' tokens."""
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
    """Return each document's tokens as one sequence, first those of rank 0, then those of rank 1, and so on."""
    return [
        torch.cat([tokens[(tokens >= begin) & (tokens < end)] for tokens in batch.tokens])
        for begin, end in batch.documents()
    ]


def _local_tokens(batch: MicroBatch) -> Readings:
    return batch.tokens


def _local_documents(batch: MicroBatch) -> Readings:
    """Return the tokens that each rank has of each document as one sequence, as if they were consecutive."""
    return [tokens[(tokens >= begin) & (tokens < end)] for tokens in batch.tokens for begin, end in batch.documents()]


def _local_segments(batch: MicroBatch) -> Readings:
    """Return each run of consecutive tokens of one document on one rank as a sequence."""
    segments: list[Tensor] = []
    for tokens in _local_documents(batch):
        ends = ((tokens[1:] - tokens[:-1] != 1).nonzero().flatten() + 1).tolist()
        segments += tokens.tensor_split(ends)
    return segments
