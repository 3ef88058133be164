"""Masks, layouts and plans shared by many tests."""

import functools
from collections.abc import Iterator

from distattn.cluster.topology import Cluster
from distattn.ir.layout import Layout
from distattn.ir.mask import Mask
from distattn.ir.plan import Plan
from distattn.parallel.make_plan import STRATEGIES, make_plan

LENGTHS = (1, 7, 129, 63)


def masks(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Mask]:
    """Return a few very different masks, keyed by name."""
    n = sum(lengths)
    return {
        "causal": Mask.causal(n),
        "full": Mask.full(n),
        "documents": Mask.documents(lengths),
        "window": Mask.sliding_window(n, n // 9),
        # two-sided bands, rows without keys, blocks
        "odd": Mask.from_pieces(
            [
                [3, n // 2, 5, n - 9, -7, 20, 1, 1, 0, 0],
                [n // 2 + 5, n - 3, 0, n // 3, -(1 << 40), 1 << 40, 1, 1, 0, 0],
                [n - 3, n, 0, n, 1, 5, 2, 7, n - 3, 1],
            ],
            n,
        ),
    }


@functools.cache
def all_masks(heads: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Mask]:
    """Return twelve static masks of the long-context attention benchmark, plus sink tokens, odd bands and head groups."""
    n = sum(lengths)
    some = masks(lengths)
    return some | {
        "full documents": Mask.documents(lengths, "full"),
        "shared question": Mask.shared_question(lengths),
        "causal blockwise": Mask.causal_blockwise(lengths),
        "prefix": Mask.prefix_lm(n, n // 3),
        "prefix documents": Mask.prefix_lm_documents(lengths, 20),
        "two-sided window": Mask.sliding_window(n, n // 9, n // 7),
        "global window": Mask.global_sliding_window(n, n // 11, 4, 5),
        "block-causal documents": Mask.block_causal_documents(lengths, 24),
        "sink tokens": Mask.documents(lengths, (15, 0), sink_tokens=3),
        "head groups": Mask.by_head(
            [(heads // 2, some["documents"]), (1, some["window"]), (heads - heads // 2 - 1, some["full"])]
        ),
    }


def layouts(lengths: tuple[int, ...], ranks: int) -> dict[str, Layout]:
    n = sum(lengths)
    cuts = sorted({0, n // 7, n // 3, n // 2, n})
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    # uneven shards in shuffled local order. With more than two ranks, the last rank has no tokens
    owners = max(1, ranks - 1) if ranks > 2 else ranks
    return {
        "contiguous": Layout.contiguous(lengths, ranks),
        "zigzag": Layout.zigzag(lengths, ranks),
        "document_zigzag": Layout.document_zigzag(lengths, ranks, min_chunk=16),
        "block_cyclic": Layout.block_cyclic(lengths, ranks, block=13),
        "balanced": Layout.balanced(lengths, ranks),
        "from_chunks": Layout.from_chunks(
            lengths, [spans[r::owners][::-1] if r < owners else [] for r in range(ranks)]
        ),
    }


def small_plans(policies: tuple[str | None, ...] = (None,)) -> Iterator[Plan]:
    """Yield plans of all strategies, small enough to mutate and run many times."""
    lengths = (1, 7, 30, 2, 24)
    some = (
        Mask.causal(64),
        Mask.documents(lengths),
        Mask.documents(lengths, document_mask=(5, 0), sink_tokens=2),
        Mask.by_head([(2, Mask.sliding_window(64, 9)), (1, Mask.prefix_lm(64, 20)), (3, Mask.documents(lengths))]),
    )
    for mask in some:
        for ranks, cluster in ((2, None), (3, None), (4, Cluster(2, 2))):
            laid_out = layouts(lengths, ranks)
            for name, layout in laid_out.items():
                for strategy in STRATEGIES:
                    for policy in policies:
                        shape = dict(heads=6, kv_heads=2, head_dim=4, dtype="float64", backward=policy)
                        working = laid_out["zigzag"] if name == "contiguous" else None
                        shape |= dict(cluster=cluster, working_layout=working)
                        yield make_plan(mask, layout, strategy=strategy, **shape)
