"""What the doctor's comparisons share: findings, and how results of ranks are put beside those of one process."""

# N tokens of all micro-batches

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# what `rank_run.run_on_this_rank` returns on one rank, and that of one micro-batch among it; torch.save takes them
RankResult = dict[str, Any]
PartResult = dict[str, Any]


# the most stretches of tokens that a sentence names
_STRETCHES = 4


class Finding(NamedTuple):
    """A mistake: its short name, what was observed, and what to do."""

    cause: str
    observed: str
    remedy: str


class Diagnosis(NamedTuple):
    """The result of the doctor. measured: numbers by name. first_difference: the first module that differs. findings: the likely
    cause first. where: in words, where ranks differ first: at which place, on which ranks, for which tokens.

    not_repeated: why the ranks' steps could not be repeated module by module in one process; empty where they could.
    """

    measured: dict[str, float]
    first_difference: str | None
    findings: list[Finding]
    where: str | None = None
    not_repeated: str = ""


def parts_of(ranks: Sequence[RankResult]) -> Iterator[tuple[int, PartResult]]:
    """All micro-batches of all ranks, with the rank."""
    for rank, found in enumerate(ranks):
        for part in found["parts"]:
            yield rank, part


def distance(a: Tensor, b: Tensor) -> float:
    """Compute the norm of a - b in fp64."""
    return float((a.double() - b.double()).norm())


def in_global_order(parts: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
    """Put what ranks have for their tokens, (T, ...) each, into the order of the batch, (N, ...); padding is left out.

    tokens: the global coordinates of each part's tokens.
    """
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    whole = parts[0].new_zeros((sum(map(len, tokens)), *parts[0].shape[1:]), dtype=dtype)
    for part, own in zip(parts, tokens, strict=True):
        whole[own] = part[: len(own)].to(dtype)
    return whole


def name_ranks(ranks: Sequence[int]) -> str:
    """Name ranks: "rank 1", "ranks 0, 1 and 3"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def name_tokens(tokens: Sequence[int]) -> str:
    """Name tokens of the batch by their first stretches: "token 7", "tokens 3 to 20, 41 and 60 to 72"."""
    stretches: list[list[int]] = []
    for token in sorted(tokens):
        if stretches and token == stretches[-1][1] + 1:
            stretches[-1][1] = token
        else:
            stretches.append([token, token])
    names = [str(first) if first == last else f"{first} to {last}" for first, last in stretches]
    if len(names) > _STRETCHES:
        names = [*names[: _STRETCHES - 1], f"{len(names) - _STRETCHES + 1} more stretches"]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"token{'s' * (len(tokens) > 1)} {text}"
