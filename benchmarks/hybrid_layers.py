"""Simulated times of a hybrid model's layers, and of the two forms of latent attention, on GPU clusters. It needs no GPU.

    python benchmarks/hybrid_layers.py [--tokens 131072 ...] [--clusters h100-1x8 ...] [--documents 1]
    python benchmarks/hybrid_layers.py --choices [--documents 1 16 100]
    python benchmarks/hybrid_layers.py --latent

The hybrid has 32 layers of width 4,096, like an 8B model: of every four layers, three are Gated DeltaNet (32 heads of
128 x 128, 16 heads of queries and keys) and one is attention (32 query heads and 8 KV heads of 128). The times are
those of all layers' cores, forward and backward, in bf16. Projections, MLPs, norms and convolutions run on every rank's
own tokens and are the same in all columns.

    ours          zigzag; the fastest strategy for each kind of layer; recurrences also on contiguous slices, with a relayout
                  around each span
    all-to-all    zigzag; every layer is split by heads, as Megatron's context parallelism does for both kinds
    fla           contiguous or zigzag slices; every state goes to every rank, as in flash-linear-attention 0.6; attention by the
                  faster of ring and allgather. We planned this from its code; it was not run

--choices shows one recurrent layer with both strategies, for documents of random lengths in several layouts, and the
seconds that planning takes. It also shows the gain for spans of three layers if tokens move to contiguous slices before
them and back after.

Latent attention has DeepSeek-V3's shapes: 128 heads of 192 and 128, a latent dim of 512 plus 64 rotary dims, and one
document. Kernel times of recurrences and of expansions are estimates based on published times: see
distattn/cluster/cost.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

import distattn as da
from distattn.cluster.spec import DIRECTIONS, ClusterSpec, load
from distattn.ir.op import op_of
from distattn.ir.plan import Call, Payload, Table
from distattn.ir.text_format import align_columns, readable_bytes
from distattn.parallel.analysis.simulate import simulate_pass, simulated_seconds
from distattn.parallel.latent_plan import latent_seconds
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.span_layout import relayout_seconds

ATTENTION_LAYERS, RECURRENT_LAYERS, RUN, WIDTH = 8, 24, 3, 4096
ATTENTION = dict(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
RECURRENCE = dict(heads=32, kv_heads=16, head_dim=128, dtype="bfloat16", op="gated_delta_rule")
LATENT = dict(heads=128, head_dim=192, v_head_dim=128, dtype="bfloat16")
ROTARY_DIM, LATENT_DIM = 64, 512
CLUSTERS = ("h100-1x8", "h100-2x8", "h100-4x8", "h100-8x8")


def main() -> None:
    """Print one of the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 17, 1 << 18, 1 << 19, 1 << 20])
    parser.add_argument("--clusters", nargs="+", default=CLUSTERS)
    parser.add_argument(
        "--documents", type=int, nargs="+", default=[1], help="documents that the tokens are, equal ones"
    )
    parser.add_argument("--choices", action="store_true", help="recurrences by both strategies, and re-laid")
    parser.add_argument("--latent", action="store_true", help="latents against expanded keys and values, by strategy")
    arguments = parser.parse_args()
    table = latent_rows if arguments.latent else choice_rows if arguments.choices else hybrid_rows
    rows = table(arguments)
    for line in align_columns(rows):
        sys.stdout.write(line + "\n")
    sys.stdout.write(
        "(milliseconds forward and backward, simulated; kernel times of recurrences and expansions estimated)\n"
    )


def hybrid_rows(arguments: argparse.Namespace) -> list[list[str]]:
    """Return the rows for the hybrid: milliseconds of attention layers + recurrent layers, and their sum relative to ours."""
    head = ["tokens", "GPUs", "ours", "all-to-all", "fla, contiguous", "fla, zigzag", "ours: attention, recurrences"]
    rows = [head]
    for documents, tokens, name in itertools.product(arguments.documents, arguments.tokens, arguments.clusters):
        cluster = load(name)
        lengths = [tokens // documents] * documents
        zigzag, contiguous = (make(lengths, cluster.ranks) for make in (da.Layout.zigzag, da.Layout.contiguous))
        best_attention = fastest((key, attention(zigzag, key, cluster)) for key in STRATEGIES)
        relaid = (
            recurrence(contiguous, "scan", cluster),
            relayout_seconds(zigzag, contiguous, WIDTH, "bfloat16", cluster) / RUN,
        )
        best_recurrence = fastest(
            [
                ("scan", recurrence(zigzag, "scan", cluster)),
                ("all-to-all", recurrence(zigzag, "ulysses", cluster)),
                ("scan, re-laid", None if relaid[0] is None else sum(relaid)),
            ]
        )
        columns = [
            (best_attention[1], best_recurrence[1]),
            (attention(zigzag, "ulysses", cluster), recurrence(zigzag, "ulysses", cluster)),
            *(
                (
                    fastest((key, attention(layout, key, cluster)) for key in ("ring", "allgather"))[1],
                    fla(layout, cluster),
                )
                for layout in (contiguous, zigzag)
            ),
        ]
        ours = ATTENTION_LAYERS * best_attention[1] + RECURRENT_LAYERS * best_recurrence[1]
        rows.append([f"{tokens:,}", str(cluster.ranks), *(cell(*column, ours) for column in columns)])
        rows[-1].append(f"{best_attention[0]}, {best_recurrence[0]}")
    return rows


def choice_rows(arguments: argparse.Namespace) -> list[list[str]]:
    """Return the rows for recurrent layers: milliseconds of a layer by strategy and layout, and of a span of layers."""
    head = [
        "GPUs",
        "documents",
        "layout",
        "scan",
        "ulysses",
        "planned in",
        "chosen",
        "slices",
        "moves",
        f"{RUN} layers",
        "re-laid",
    ]
    rows, random = [head], np.random.default_rng(0)
    for tokens, name, documents in itertools.product(arguments.tokens, arguments.clusters, arguments.documents):
        cluster = load(name)
        cuts = np.sort(random.choice(np.arange(1, tokens), documents - 1, replace=False))
        lengths = np.diff([0, *cuts, tokens]).tolist()
        there = da.Layout.contiguous(lengths, cluster.ranks)
        slices = chosen_recurrence(there, cluster)
        for make in (da.Layout.zigzag, da.Layout.document_zigzag, da.Layout.balanced, da.Layout.block_cyclic):
            layout = make(lengths, cluster.ranks)
            seconds, planning = {}, []
            for strategy in ("scan", "ulysses"):
                began = time.perf_counter()
                seconds[strategy] = recurrence(layout, strategy, cluster)
                planning.append(time.perf_counter() - began)
            strategy, best = fastest(seconds.items())
            moves = relayout_seconds(layout, there, WIDTH, "bfloat16", cluster)
            run = RUN * best, RUN * slices + moves
            rows.append([str(cluster.ranks), str(documents), make.__name__, *map(milliseconds, seconds.values())])
            rows[-1] += [
                " + ".join(f"{seconds:.2f} s" for seconds in planning),
                strategy,
                milliseconds(slices),
                milliseconds(moves),
            ]
            rows[-1] += [milliseconds(min(run)), "yes" if run[1] < run[0] else "no"]
    return rows


def chosen_recurrence(layout: da.Layout, cluster: ClusterSpec) -> float:
    """Return the seconds of one recurrent layer with the faster strategy."""
    return simulated_seconds(
        da.make_recurrent_plan(da.Mask.documents(layout.lengths), layout, cluster=cluster, **RECURRENCE), cluster
    )


def milliseconds(seconds: float | None) -> str:
    """Format seconds as milliseconds. None means that the strategy refuses."""
    return "refused" if seconds is None else f"{1e3 * seconds:.2f}"


def cell(of_attention: float | None, of_recurrence: float | None, ours: float) -> str:
    """Format one contestant's cell. None means that the contestant refuses."""
    if of_attention is None or of_recurrence is None:
        return "refused"
    parts = ATTENTION_LAYERS * of_attention, RECURRENT_LAYERS * of_recurrence
    return f"{parts[0] * 1e3:,.0f} + {parts[1] * 1e3:,.0f} ({sum(parts) / ours:.2f}x)"


def fastest(seconds: Iterable[tuple[str, float | None]]) -> tuple[str, float]:
    """Return (name, seconds) of the fastest strategy that does not refuse."""
    return min(((name, time) for name, time in seconds if time is not None), key=lambda named: named[1])


def attention(layout: da.Layout, strategy: str, cluster: ClusterSpec) -> float | None:
    """Return the seconds of one attention layer, or None if the strategy refuses."""
    return planned(layout, strategy, cluster, **ATTENTION)


def recurrence(layout: da.Layout, strategy: str, cluster: ClusterSpec) -> float | None:
    """Return the seconds of one recurrent layer, or None if the strategy refuses."""
    return planned(layout, strategy, cluster, **RECURRENCE)


def planned(layout: da.Layout, strategy: str, cluster: ClusterSpec, **shape: Any) -> float | None:
    """Return the seconds of one layer, forward and backward, or None if the strategy refuses."""
    try:
        plan = da.make_plan(da.Mask.documents(layout.lengths), layout, strategy=strategy, cluster=cluster, **shape)
    except da.DistattnError:
        return None
    return simulated_seconds(plan, cluster)


def fla(layout: da.Layout, cluster: ClusterSpec) -> float:
    """Return the seconds of one recurrent layer if each rank sends the states of its slices to all ranks before it continues."""
    call = Call(
        da.Mask.documents(layout.lengths), layout, v_head_dim=128, **{**RECURRENCE, "op": op_of("gated_delta_rule")}
    )
    return sum(simulate_pass(call, cluster, name, gather_of_all(call, cluster, name)).seconds for name in DIRECTIONS)


def gather_of_all(call: Call, cluster: ClusterSpec, direction: str) -> Table:
    """Return a table that computes all slices' states in step 0, sends them to all ranks in steps 1 and 2, and ends in step 3.

    It is for simulation only. The all-gather is node-aware: a state goes to one rank of each other node, and from there
    to the other ranks of that node.
    """
    back = direction == "backward"
    chunks, ends = call.layout.chunks, call.documents
    tasks, moves = [], []
    for t0, t1, rank in zip(*(chunks[name].tolist() for name in ("t0", "t1", "rank")), strict=True):
        for piece, (d0, d1) in enumerate(ends.tolist()):
            a, b = max(t0, d0), min(t1, d1)
            if a >= b:
                continue
            tasks.append((0, rank, piece, *((a, b, b, b) if back else (a, a, a, b)), 0, call.heads))
            tasks.append((3, rank, piece, *((a, d1, d0, b) if back else (a, b, d0, b)), 0, call.heads))
        # a slice sends one state, however many documents it has
        payload = int(Payload.dS if back else Payload.S)
        for node in range(cluster.nodes):
            here = range(node * cluster.devices, (node + 1) * cluster.devices)
            enters = rank if rank in here else here[rank % cluster.devices]
            if enters != rank:
                moves.append((1, rank, enters, payload, t0, t1, 0, call.heads))
            step = 1 if enters == rank else 2
            moves += [(step, enters, to, payload, t0, t1, 0, call.heads) for to in here if to != enters]
    return Table.from_rows(tasks, moves)


def latent_rows(arguments: argparse.Namespace) -> list[list[str]]:
    """Return the rows for latent attention: bytes received per rank and milliseconds for both forms of each strategy."""
    rows = [
        ["tokens", "GPUs", "strategy", "bytes/rank: latent", "expanded", "factor", "ms: latent", "expanded", "chosen"]
    ]
    for tokens, name in itertools.product(arguments.tokens, arguments.clusters):
        cluster = load(name)
        layout, mask = da.Layout.zigzag([tokens], cluster.ranks), da.Mask.causal(tokens)
        for strategy in STRATEGIES:
            shape = dict(strategy=strategy, cluster=cluster, **LATENT)
            try:
                plans = [
                    da.make_plan(mask, layout, kv_heads=1, op=da.latent_op(ROTARY_DIM, LATENT_DIM), **shape),
                    da.make_plan(mask, layout, kv_heads=128, **shape),
                ]
            except da.DistattnError:
                rows.append([f"{tokens:,}", str(cluster.ranks), strategy, *["refused"] * 6])
                continue
            moved = [int(plan.bytes()["bytes"].sum()) / cluster.ranks for plan in plans]
            seconds = [latent_seconds(plan, cluster, ROTARY_DIM, LATENT_DIM) for plan in plans]
            rows.append(
                [f"{tokens:,}", str(cluster.ranks), strategy, *(readable_bytes(int(size)) for size in moved)]
                + [f"{moved[1] / moved[0]:.1f}", *(f"{form_seconds * 1e3:,.1f}" for form_seconds in seconds)]
                + ["latent" if seconds[0] <= seconds[1] else "expanded"]
            )
    return rows


if __name__ == "__main__":
    main()
