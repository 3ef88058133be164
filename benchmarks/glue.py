"""Messages and glue of one layer call: what a rank sends, and what it copies, adds and merges around its attention kernels.

    python benchmarks/glue.py [--tokens 65536] [--ranks 8] [--heads 64] [--kv-heads 8]

Everything is counted on meta tensors, at full size: nothing is computed. Times are bytes read and written over 2.5 TB/s, and
shares are of a rank's mean time of attention at 600 (forward) and 450 (backward) TFLOP/s; both speeds are assumed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import distattn as da
from distattn.parallel.make_plan import STRATEGIES

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from meta_run import MetaBackend, layer_call  # noqa: E402

DIM = 128
BYTES_PER_SECOND = 2.5e12
# floating-point operations of a visible (query, key) pair and head, per number of the head dim; and per second
FORWARD, BACKWARD = (4, 600e12), (10, 450e12)


def main() -> None:
    """Print one line for each case and strategy, forward / backward, of the rank with the most glue among three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    arguments = parser.parse_args()
    cases = {"one document": [arguments.tokens], "8 documents": [arguments.tokens // 8] * 8}
    for title, lengths in cases.items():
        cells = sum(length * (length + 1) // 2 for length in lengths) * arguments.heads * DIM / arguments.ranks
        seconds = [cells * each / speed for each, speed in (FORWARD, BACKWARD)]
        sys.stdout.write(f"{title}: attention {' / '.join(f'{one * 1e3:.2f}' for one in seconds)} ms\n")
        for strategy in STRATEGIES:
            sys.stdout.write(f"{strategy:12} {_line(strategy, lengths, arguments, seconds)}\n")


def _line(strategy: str, lengths: list[int], arguments: argparse.Namespace, seconds: list[float]) -> str:
    """Return the figures of a strategy: glue, operators, and sends, in all and to one peer. seconds: of attention."""
    # disaggregation moves work, not tokens
    layout = (da.Layout.contiguous if strategy == "cad" else da.Layout.zigzag)(lengths, arguments.ranks)
    shape = dict(heads=arguments.heads, kv_heads=arguments.kv_heads, head_dim=DIM, dtype="bfloat16")
    plan = da.make_plan(da.Mask.documents(lengths), layout, strategy=strategy, **shape)
    found = [_counts(plan, rank) for rank in sorted({0, arguments.ranks // 2, arguments.ranks - 1})]
    passes, sends = max(found, key=lambda one: sum(sum(traffic.bytes.values()) for traffic in one[0]))
    glue = [traffic.seconds(BYTES_PER_SECOND) / whole for traffic, whole in zip(passes, seconds, strict=True)]
    operators = " / ".join(str(sum(traffic.launches.values())) for traffic in passes)
    return (
        f"glue {glue[0]:.1%} / {glue[1]:.1%}, {operators} operators, "
        f"{sum(sends.values())} sends, {max(sends.values(), default=0)} to one peer"
    )


def _counts(plan: da.Plan, rank: int):  # noqa: ANN202
    """Return what both passes of a rank do, and its sends by peer."""
    sends: Counter[int] = Counter()
    send = MetaBackend.send

    def counted(self: MetaBackend, tensors, peer: int, tag: int) -> None:  # noqa: ANN001
        sends[peer] += 1
        send(self, tensors, peer, tag)

    with mock.patch.object(MetaBackend, "send", counted):
        forward, backward, _ = layer_call(plan, rank)
    return (forward, backward), sends


if __name__ == "__main__":
    main()
