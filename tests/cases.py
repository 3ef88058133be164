"""Masks, layouts and plans that many tests use."""

from collections.abc import Iterator

from distattn.layout import Layout
from distattn.mask import Mask
from distattn.parallel.make_plan import STRATEGIES, make_plan
from distattn.plan import Plan

LENGTHS = (1, 7, 129, 63)


def masks(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Mask]:
    n = sum(lengths)
    return {
        "causal": Mask.causal(n),
        "full": Mask.full(n),
        "documents": Mask.documents(lengths),
        "window": Mask.sliding_window(n, n // 9),
        # two-sided bands, rows without any key, blocks
        "odd": Mask.from_pieces(
            [
                [3, n // 2, 5, n - 9, -7, 20, 1, 1, 0, 0],
                [n // 2 + 5, n - 3, 0, n // 3, -(1 << 40), 1 << 40, 1, 1, 0, 0],
                [n - 3, n, 0, n, 1, 5, 2, 7, n - 3, 1],
            ],
            n,
        ),
    }


def layouts(lengths: tuple[int, ...], ranks: int) -> dict[str, Layout]:
    n = sum(lengths)
    cuts = sorted({0, n // 7, n // 3, n // 2, n})
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    # uneven shards in a shuffled local order; with more than two ranks the last one owns nothing
    owners = max(1, ranks - 1) if ranks > 2 else ranks
    return {
        "contiguous": Layout.contiguous(lengths, ranks),
        "zigzag": Layout.zigzag(lengths, ranks),
        "document_zigzag": Layout.document_zigzag(lengths, ranks, min_chunk=16),
        "from_chunks": Layout.from_chunks(
            lengths, [spans[r::owners][::-1] if r < owners else [] for r in range(ranks)]
        ),
    }


def small_plans(policies: tuple[str | None, ...] = (None,)) -> Iterator[Plan]:
    """Plans of all strategies, small enough to mutate and run many times."""
    lengths = (1, 7, 30, 2, 24)
    for mask in (Mask.causal(64), Mask.documents(lengths), Mask.documents(lengths, inner=(5, 0))):
        for ranks in (2, 3, 4):
            for layout in layouts(lengths, ranks).values():
                for strategy in STRATEGIES:
                    for policy in policies:
                        shape = dict(heads=6, kv_heads=2, head_dim=4, dtype="float64", backward=policy)
                        yield make_plan(mask, layout, strategy=strategy, **shape)
