"""Messages and glue of one layer call: a rank's sends, and the bytes that it copies, adds and merges around its kernels.

    python benchmarks/glue.py [--tokens 65536] [--ranks 8] [--heads 64] [--kv-heads 8] [--strategies ulysses usp] [--kinds]
        [--deepspeed]

`--kinds` breaks the bytes down: "pack" and "unpack" between a rank's own tensors and messages, "copy own" of own tokens
to where others' tokens arrive, "gather" into a kernel's operands, "write" and "add" of results to their tensors, and
"other": row sums of dO * O and casts of results. `--deepspeed` also counts the copies of DeepSpeed's Ulysses around its
all-to-alls, without row sums and casts; DeepSpeed must be installed.

Everything is counted on meta tensors at full size, and nothing is computed. Times are bytes read and written at 2.5
TB/s. Shares are relative to a rank's mean attention time at 600 (forward) and 450 (backward) TFLOP/s. All speeds are
assumptions.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

import distattn as da
from distattn.parallel.make_plan import STRATEGIES
from distattn.parallel.runtime.execution.buffers import Buffers

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support" / "gpus"))
from meta_run import MetaBackend, Traffic, Watch, layer_call  # noqa: E402
from waits import META  # noqa: E402

DIM = 128
BYTES_PER_SECOND = 2.5e12
# the methods of Buffers that copy rows, and the names of their kinds
KINDS = {"pack": "pack", "unpack": "unpack", "copy_own": "copy own", "gathered": "gather", "accumulate": "write"}
# floating-point operations per allowed (query, key) pair, head and element of the head dim; and operations per second
FORWARD, BACKWARD = (4, 600e12), (10, 450e12)


def main() -> None:
    """Print a line per case and strategy, forward / backward, for the rank (first, middle or last) with the most glue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--kinds", action="store_true", help="print what the bytes of glue are")
    parser.add_argument("--deepspeed", action="store_true", help="also count the copies of DeepSpeed's Ulysses")
    arguments = parser.parse_args()
    cases = {"one document": [arguments.tokens], "8 documents": [arguments.tokens // 8] * 8}
    for title, lengths in cases.items():
        cells = sum(length * (length + 1) // 2 for length in lengths) * arguments.heads * DIM / arguments.ranks
        seconds = [cells * each / speed for each, speed in (FORWARD, BACKWARD)]
        sys.stdout.write(f"{title}: attention {' / '.join(f'{value * 1e3:.2f}' for value in seconds)} ms\n")
        for strategy in arguments.strategies:
            sys.stdout.write(f"{strategy:12} {_line(strategy, lengths, arguments, seconds)}\n")
        if arguments.deepspeed:
            sys.stdout.write(f"{'deepspeed':12} {_line_of_deepspeed(arguments, seconds)}\n")


def _line(strategy: str, lengths: list[int], arguments: argparse.Namespace, seconds: list[float]) -> str:
    """Format a strategy's figures: glue, operators, all sends, and the most sends to one peer.

    seconds: the attention time of a rank, forward and backward.
    """
    # disaggregation needs contiguous packs, because it moves work, not tokens
    layout = (da.Layout.contiguous if strategy == "cad" else da.Layout.zigzag)(lengths, arguments.ranks)
    shape = dict(heads=arguments.heads, kv_heads=arguments.kv_heads, head_dim=DIM, dtype="bfloat16")
    plan = da.make_plan(da.Mask.documents(lengths), layout, strategy=strategy, **shape)
    counts = [_counts(plan, rank) for rank in sorted({0, arguments.ranks // 2, arguments.ranks - 1})]
    passes, kinds, sends = max(counts, key=lambda of_rank: sum(sum(traffic.bytes.values()) for traffic in of_rank[0]))
    glue = [traffic.seconds(BYTES_PER_SECOND) / whole for traffic, whole in zip(passes, seconds, strict=True)]
    operators = " / ".join(str(sum(traffic.launches.values())) for traffic in passes)
    line = (
        f"glue {glue[0]:.1%} / {glue[1]:.1%}, {operators} operators, "
        f"{sum(sends.values())} sends, {max(sends.values(), default=0)} to one peer"
    )
    for direction, traffic, bytes_of, whole in zip(("forward", "backward"), passes, kinds, seconds, strict=True):
        if arguments.kinds and traffic.bytes:
            bytes_of = bytes_of + Counter({"other": sum(traffic.bytes.values()) - sum(bytes_of.values())})
            shares = [f"{kind} {size / BYTES_PER_SECOND / whole:.2%}" for kind, size in bytes_of.most_common() if size]
            line += f"\n             {direction}: {', '.join(shares)}"
    return line


def _line_of_deepspeed(arguments: argparse.Namespace, seconds: list[float]) -> str:
    """Return the glue of DeepSpeed's Ulysses and its operators. seconds: the attention time of a rank in each pass."""
    from deepspeed.sequence import layer

    ranks, tokens = arguments.ranks, arguments.tokens // arguments.ranks

    def tensor(rows: int, heads: int) -> torch.Tensor:
        return torch.empty(1, rows, heads, DIM, dtype=torch.bfloat16, device=META)

    def local(heads: int) -> tuple[torch.Tensor, int, int]:
        """Return a tensor of one rank's tokens with all heads, the dim to scatter and the dim to gather."""
        return tensor(tokens, heads), 2, 1

    def gathered(heads: int) -> tuple[torch.Tensor, int, int]:
        """Return a tensor of all tokens with one rank's heads, the dim to scatter and the dim to gather."""
        return tensor(arguments.tokens, heads // ranks), 1, 2

    heads, kv_heads = arguments.heads, arguments.kv_heads
    # q, k, v and o forward; dO, dQ, dK and dV backward
    forward = local(heads), local(kv_heads), local(kv_heads), gathered(heads)
    backward = local(heads), gathered(heads), gathered(kv_heads), gathered(kv_heads)
    shares, operators = [], []
    for exchanges, whole in zip((forward, backward), seconds, strict=True):
        traffic = Traffic()
        with (
            mock.patch.object(layer.dist, "get_world_size", lambda group: ranks),
            mock.patch.object(layer.dist, "all_to_all_single", lambda *tensors, **options: None),
            Watch(traffic),
        ):
            for x, scatter_dim, gather_dim in exchanges:
                layer.single_all_to_all(x, scatter_dim, gather_dim, 0, None)
        shares.append(traffic.seconds(BYTES_PER_SECOND) / whole)
        operators.append(sum(traffic.launches.values()))
    return f"glue {shares[0]:.1%} / {shares[1]:.1%}, {operators[0]} / {operators[1]} operators"


def _counts(plan: da.Plan, rank: int):  # noqa: ANN202
    """Return a rank's traffic in each pass, its bytes by kind in each pass, and its number of sends to each peer."""
    sends: Counter[int] = Counter()
    send = MetaBackend.send

    def counted(self: MetaBackend, tensors, peer: int, tag: int) -> None:  # noqa: ANN001
        sends[peer] += 1
        send(self, tensors, peer, tag)

    with mock.patch.object(MetaBackend, "send", counted), _bytes_by_kind() as kinds:
        forward, backward, _ = layer_call(plan, rank)
    return (forward, backward), [kinds[id(traffic)] for traffic in (forward, backward)], sends


@contextmanager
def _bytes_by_kind() -> Iterator[dict[int, Counter[str]]]:
    """Count the bytes that each method in KINDS moves while in the block, keyed by the id of the pass's `Traffic`."""
    by_pass: dict[int, Counter[str]] = defaultdict(Counter)

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Buffers, *args: Any) -> Any:
            watch = _get_current_dispatch_mode()
            if not isinstance(watch, Watch):
                return method(self, *args)
            before = sum(watch.traffic.bytes.values())
            result = method(self, *args)
            adds = name == "accumulate" and not all(piece.is_first for piece in args[1].slices)
            by_pass[id(watch.traffic)]["add" if adds else KINDS[name]] += sum(watch.traffic.bytes.values()) - before
            return result

        return call

    with ExitStack() as patches:
        for name in KINDS:
            patches.enter_context(mock.patch.object(Buffers, name, counted(name, getattr(Buffers, name))))
        yield by_pass


if __name__ == "__main__":
    main()
