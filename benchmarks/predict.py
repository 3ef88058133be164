"""Simulated against published times: MagiAttention's H100 table (8 to 64 GPUs, four masks, both directions; blog, 2025).

    python benchmarks/predict.py [--lengths FILE.json] [--json FILE]

Kernel speeds come from the shipped h100 table (FlashAttention 3 on one GPU), link speeds from data sheets. Nothing is
fitted to the cells predicted here. There are 8,192 tokens per GPU, 64 query heads and 8 KV heads of 128, in bf16. The
published packs were drawn from an unnamed corpus, each document at most a quarter of the axis. Here several packs are
drawn from --lengths (a JSON list of document lengths) or from a heavy-tailed distribution, and their times averaged.
The output is predicted / published for every cell, and the median error per column and overall. All predicted numbers
are simulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import distattn as da

TOKENS_PER_RANK = 8192
RANKS = (8, 16, 32, 64)
PACKS = 3
SHAPE = dict(heads=64, kv_heads=8, head_dim=128, dtype="bfloat16")
# published TFLOP/s per GPU on 8, 16, 32 and 64 GPUs
PUBLISHED = {
    ("full", "forward"): {
        "ulysses": (605, 573, 582, 620), "ring": (511, 533, 515, 512), "allgather": (606, 593, 585, 583),
        "usp": (580, 604, 594, 606),
    },
    ("full", "backward"): {
        "ulysses": (576, 574, 581, 577), "ring": (497, 515, 512, 505), "allgather": (533, 539, 538, 536),
        "usp": (571, 589, 587, 582),
    },
    ("causal", "forward"): {
        "ulysses": (601, 556, 578, 582), "ring": (421, 452, 449, 446), "allgather": (600, 590, 590, 579),
        "usp": (593, 589, 594, 586),
    },
    ("causal", "backward"): {
        "ulysses": (581, 559, 571, 584), "ring": (432, 474, 468, 456), "allgather": (516, 523, 521, 523),
        "usp": (572, 570, 575, 572),
    },
    ("documents, full", "forward"): {
        "ulysses": (390, 304, 282, 259), "ring": (159, 134, 91, 56), "allgather": (387, 386, 323, 249),
        "usp": (373, 370, 373, 293),
    },
    ("documents, full", "backward"): {
        "ulysses": (426, 398, 378, 346), "ring": (160, 161, 101, 48), "allgather": (230, 191, 123, 63),
        "usp": (420, 407, 375, 281),
    },
    ("documents", "forward"): {
        "ulysses": (278, 199, 185, 163), "ring": (88, 68, 47, 28), "allgather": (288, 293, 241, 180),
        "usp": (261, 251, 255, 193),
    },
    ("documents", "backward"): {
        "ulysses": (332, 294, 277, 249), "ring": (97, 86, 57, 29), "allgather": (179, 155, 104, 55),
        "usp": (325, 309, 285, 196),
    },
}  # fmt: skip


def main() -> int:
    """Predict every cell and print the table. Return exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pool = np.array(json.loads(arguments.lengths.read_text())) if arguments.lengths else None
    rows, errors, orders = [], {}, []
    print_line("predicted (simulated) / published TFLOP/s per GPU on 8, 16, 32, 64 H100\n")
    for (mask, direction), columns in PUBLISHED.items():
        print_line(f"{mask}, {direction}")
        guesses = {}
        for strategy, published in columns.items():
            guesses[strategy] = [predicted(mask, direction, strategy, ranks, pool) for ranks in RANKS]
            cells = [f"{guess:4.0f}/{real:<4d}" for guess, real in zip(guesses[strategy], published, strict=True)]
            off = [abs(guess / real - 1) for guess, real in zip(guesses[strategy], published, strict=True)]
            errors.setdefault(strategy, []).extend(off)
            print_line(f"  {strategy:10s} {'  '.join(cells)}   median error {np.median(off):.0%}")
            rows += [
                dict(mask=mask, direction=direction, strategy=strategy, ranks=ranks, simulated=guess, published=real)
                for ranks, guess, real in zip(RANKS, guesses[strategy], published, strict=True)
            ]
        orders += agreement(guesses, columns)
    print_line("")
    for strategy, off in errors.items():
        print_line(f"{strategy:10s} median error {np.median(off):.0%}, worst {max(off):.0%}")
    every = np.concatenate(list(errors.values()))
    print_line(
        f"all        median error {np.median(every):.0%}, {np.mean(every < 0.15):.0%} of {len(every)} cells within 15 %"
    )
    print_line(f"order: {np.mean(orders):.0%} of pairs of schemes that differ by more than 5 % are ranked as published")
    if arguments.json:
        arguments.json.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return 0


def predicted(mask: str, direction: str, strategy: str, ranks: int, pool: np.ndarray | None) -> float:
    """Return the simulated TFLOP/s per GPU of one cell. pool: document lengths to draw from, or None."""
    n, work, seconds = TOKENS_PER_RANK * ranks, 0.0, 0.0
    for pack in range(PACKS if mask.startswith("documents") else 1):
        lengths = lengths_of(n, pool, pack) if mask.startswith("documents") else [n]
        global_mask = {
            "full": lambda lengths: da.Mask.full(n),
            "causal": lambda lengths: da.Mask.causal(n),
            "documents, full": lambda lengths: da.Mask.documents(lengths, document_mask="full"),
            "documents": da.Mask.documents,
        }[mask](lengths)
        # the published ring distributes every document over all ranks
        layout = (
            da.Layout.document_zigzag(lengths, ranks, min_chunk=1)
            if strategy == "ring" and len(lengths) > 1
            else da.Layout.zigzag([n] if len(lengths) == 1 else lengths, ranks)
        )
        cluster = da.Cluster(max(ranks // 8, 1), 8)
        plan = da.make_plan(global_mask, layout, strategy=strategy, cluster=cluster, **SHAPE)
        timeline = getattr(da.simulate(plan, f"h100-{cluster.nodes}x8"), direction)
        work, seconds = work + timeline.flops, seconds + timeline.seconds
    return work / seconds / ranks / 1e12


def lengths_of(n: int, pool: np.ndarray | None, seed: int) -> list[int]:
    """Draw the lengths of documents that fill the axis, each at most a quarter of it."""
    generator = np.random.default_rng(seed)
    out: list[int] = []
    while sum(out) < n:
        length = generator.choice(pool) if pool is not None else max(16, generator.pareto(0.9) * 1024)
        out.append(int(min(length, n // 4, n - sum(out))))
    return out


def agreement(guesses: dict[str, list[float]], published: dict[str, tuple[int, ...]]) -> list[bool]:
    """Return, for each pair with published speeds that differ by more than 5 %, whether the simulator ranks the pair as
    published."""
    names = list(published)
    out = []
    for i in range(len(RANKS)):
        for a in names:
            for b in names[: names.index(a)]:
                if abs(published[a][i] / published[b][i] - 1) > 0.05:
                    out.append((guesses[a][i] > guesses[b][i]) == (published[a][i] > published[b][i]))
    return out


def print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
