"""The token axis of a batch over all ranks that share attention: blocks of ranks, each with its own documents."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from distattn.ir.layout import Layout, make_layout
from distattn.ir.mask import Mask
from distattn.parallel.attention_config import AttentionConfig

# the document lengths of each block of ranks that share a batch
Documents = tuple[tuple[int, ...], ...]


class BatchBlock(NamedTuple):
    """A block of ranks that hold the same batch, and the indices of the batch's documents on the axis."""

    ranks: range
    documents: range


class BlockLayouts:
    """Layouts of batches over consecutive blocks of `block_ranks` ranks; ranks after the last block own no tokens.

    With one block over all ranks, all ranks hold the same batch. With blocks of one rank, each rank has its own batch.
    """

    def __init__(self, ranks: int, block_ranks: int, config: AttentionConfig):
        self.ranks, self.block_ranks, self.is_one_block = ranks, block_ranks, block_ranks == ranks
        self._config = config
        self.of_block = lru_cache(maxsize=8)(self._of_block)

    def of_batch(self, documents: Documents) -> tuple[Mask, Layout]:
        """Return the mask and the layout of all blocks' documents."""
        if len(documents) == 1 and self.block_ranks == self.ranks:
            return Mask.documents(documents[0], self._config.document_mask), self.of_block(documents[0])
        lengths = [length for block in documents for length in block]
        parts = []
        token = 0
        for number, block in enumerate(documents):
            if block:
                chunks = self.of_block(block).chunks
                order = np.argsort(chunks["row"], kind="stable")
                rank = chunks["rank"] + number * self.block_ranks
                parts.append(np.stack([rank, chunks["t0"] + token, chunks["t1"] + token])[:, order])
                token += sum(block)
        return Mask.documents(lengths, self._config.document_mask), Layout(
            lengths, self.ranks, *np.concatenate(parts, 1)
        )

    def block_of(self, rank: int, documents: Documents) -> BatchBlock:
        """Return a rank's block. For a rank after the last block, this is a block without documents."""
        number = rank // self.block_ranks
        ranks, first = number * self.block_ranks, sum(map(len, documents[:number]))
        num_documents = sum(map(len, documents[number : number + 1]))
        return BatchBlock(range(ranks, ranks + self.block_ranks), range(first, first + num_documents))

    def _of_block(self, lengths: tuple[int, ...]) -> Layout:
        """Return the layout of a block's tokens over its ranks."""
        if self.block_ranks == 1:
            return Layout.contiguous(lengths, 1)
        mask = Mask.documents(lengths, self._config.document_mask)
        options = self._config.layout_options or {}
        return make_layout(self._config.layout, lengths, self.block_ranks, mask, **options)
