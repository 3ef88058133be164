"""Shared parts of the doctor's comparisons: findings, and helpers that order and name the ranks' results."""

# N tokens in all micro-batches

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# what `rank_run.run_on_this_rank` returns on a rank, and the part of it for one micro-batch; torch.save can store both
RankResult = dict[str, Any]
PartResult = dict[str, Any]


# the largest number of token ranges listed in a sentence
_SEGMENTS = 4


class Finding(NamedTuple):
    """A mistake that was found. cause: its short name. observed: the evidence for the mistake. remedy: how to fix it."""

    cause: str
    observed: str
    remedy: str


class Diagnosis(NamedTuple):
    """The doctor's result.

    measured: measurements, keyed by name. first_difference: the name of the first module that differs. findings: the most
    likely cause first. where: the place, ranks and tokens of the first difference, in words. not_repeated: why the
    ranks' steps could not be repeated module by module in one process; empty if they could.
    """

    measured: dict[str, float]
    first_difference: str | None
    findings: list[Finding]
    where: str | None = None
    not_repeated: str = ""


def parts_of(ranks: Sequence[RankResult]) -> Iterator[tuple[int, PartResult]]:
    """Yield (rank, micro-batch result) for every micro-batch of every rank."""
    for rank, result in enumerate(ranks):
        for part in result["parts"]:
            yield rank, part


def distance(a: Tensor, b: Tensor) -> float:
    """Compute the norm of a - b in fp64."""
    return float((a.double() - b.double()).norm())


def in_global_order(parts: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Return the values of all parts, (T, ...) each, in batch order, (N, ...), without padding.

    tokens: the indices of each part's tokens in the batch.
    """
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    whole = parts[0].new_zeros((sum(map(len, tokens)), *parts[0].shape[1:]), dtype=dtype)
    for part, part_tokens in zip(parts, tokens, strict=True):
        whole[part_tokens] = part[: len(part_tokens)].to(dtype)
    return whole


def name_ranks(ranks: Sequence[int]) -> str:
    """Format rank numbers: "rank 1", "ranks 0, 1 and 3"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def name_tokens(tokens: Sequence[int]) -> str:
    """Format token indices as ranges, listing only the first few: "token 7", "tokens 3 to 20, 41 and 60 to 72"."""
    segments: list[list[int]] = []
    for token in sorted(tokens):
        if segments and token == segments[-1][1] + 1:
            segments[-1][1] = token
        else:
            segments.append([token, token])
    names = [str(first) if first == last else f"{first} to {last}" for first, last in segments]
    if len(names) > _SEGMENTS:
        names = [*names[: _SEGMENTS - 1], f"{len(names) - _SEGMENTS + 1} more segments"]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"token{'s' * (len(tokens) > 1)} {text}"
