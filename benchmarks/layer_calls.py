"""Python calls and frames between transformers' call of attention and the kernel, forward, and their host time.

    python benchmarks/layer_calls.py [--rounds 2000]

There is one rank with a tiny Llama. Its second call is counted, when plan and program already exist. Calls inside the
kernel do not count. To compare two checkouts, run this file several times, alternating between them in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import distattn as da
from distattn.adapters import huggingface
from distattn.kernels.registry import load_kernel

_OURS = Path(da.__file__).resolve().parents[1]


class LayerCalls(NamedTuple):
    """The frames and calls between transformers and the kernel.

    frames, own_frames: the number of frames on the stack when the kernel is entered, and how many of them are
    distattn's. calls: the number of calls of each (file, function), not counting those inside the kernel.
    """

    frames: int
    own_frames: int
    calls: Counter[tuple[str, str]]

    @property
    def own_calls(self) -> int:
        """The number of calls to distattn's functions."""
        return sum(number for (file, _), number in self.calls.items() if _is_ours(file))

    @property
    def own_files(self) -> int:
        """The number of distattn's files that contain the called functions."""
        return len({file for file, _ in self.calls if _is_ours(file)})


class Layer:
    """One attention layer of a tiny Llama on one rank, with the named kernel."""

    def __init__(self, kernel: str = "cpu", tokens: int = 64) -> None:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            attn_implementation="eager",
        )
        huggingface.register()
        model = LlamaForCausalLM(config)
        self.module = model.model.layers[0].self_attn
        self.cp = da.ContextParallel(strategy="ring", kernel=kernel)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        self.batch = self.cp.shard({"input_ids": ids, "document_lengths": [tokens // 2, tokens - tokens // 2]})
        self.inputs = [torch.randn(1, heads, tokens, 16, requires_grad=True) for heads in (4, 2, 2)]
        self.kernel = load_kernel(kernel)

    def __call__(self) -> Any:
        """Run the layer's attention as transformers calls it."""
        local, positions = self.batch["context_parallel"], self.batch["position_ids"]
        return huggingface.attention_forward(
            *(self.module, *self.inputs, None, 0.25), position_ids=positions, context_parallel=local
        )


def count_calls(layer: Layer) -> LayerCalls:
    """Count the Python calls made by one call of the layer, and the frames on the stack when the kernel's forward is
    entered."""
    calls: Counter[tuple[str, str]] = Counter()
    code, first = layer.kernel.forward.__code__, sys._getframe()
    stacks: list[list[FrameType]] = []
    inside = [0]

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        is_kernel = frame.f_code is code
        if event == "return":
            inside[0] -= is_kernel
            return
        if is_kernel and not inside[0]:
            stacks.append(_stack(frame.f_back, first))
        inside[0] += is_kernel
        # do not count the frame of `Layer.__call__`, which stands in for transformers
        if not inside[0] and frame.f_code is not Layer.__call__.__code__:
            calls[frame.f_code.co_filename, frame.f_code.co_qualname] += 1

    layer()
    sys.setprofile(note)
    try:
        layer()
    finally:
        sys.setprofile(None)
    (stack,) = stacks
    return LayerCalls(len(stack), sum(_is_ours(frame.f_code.co_filename) for frame in stack), calls)


def host_seconds(layer: Layer, rounds: int) -> float:
    """Return the median seconds of a call of the layer."""
    seconds = []
    with torch.no_grad():
        for _ in range(rounds):
            began = time.perf_counter()
            layer()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _stack(frame: FrameType | None, end: FrameType) -> list[FrameType]:
    frames = []
    while frame is not None and frame is not end:
        if frame.f_code is not Layer.__call__.__code__:
            frames.append(frame)
        frame = frame.f_back
    return frames


def _is_ours(file: str) -> bool:
    path = Path(file).resolve()
    return path.is_relative_to(_OURS) and "site-packages" not in path.parts


def main() -> None:
    """Print the counts and the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--all", action="store_true", help="print every function that is called")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layer = Layer()
    counts = count_calls(layer)
    for (file, name), number in counts.calls.most_common() if options.all else ():
        sys.stdout.write(f"{number:5d}  {'/'.join(Path(file).parts[-3:])} {name}\n")
    sys.stdout.write(
        f"{counts.frames} frames, {counts.own_frames} of distattn; {counts.calls.total()} Python calls, {counts.own_calls} of "
        f"distattn in {counts.own_files} files; {host_seconds(layer, options.rounds) * 1e6:,.1f} us\n"
    )


if __name__ == "__main__":
    main()
