"""Documents are shuffled by seed and packed first-fit into packs of a bounded number of tokens. Nothing is dropped."""

from collections.abc import Sequence

import numpy as np


def pack_epoch(lengths: Sequence[int], pack_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The packs of one epoch: lists of document numbers whose lengths add up to at most `pack_tokens`.

    Every document is in exactly one pack; a pack may be shorter. The order depends on nothing but the
    arguments.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(lengths))
    packs: list[list[int]] = []
    # free tokens of the packs opened so far; most of it is never used
    free = np.full(len(lengths), pack_tokens)
    for document in order.tolist():
        first = int(np.argmax(free[: len(packs) + 1] >= lengths[document]))
        if first == len(packs):
            packs.append([])
        packs[first].append(document)
        free[first] -= lengths[document]
    return packs
