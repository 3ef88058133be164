"""Published training lengths that would fit into memory, by counting bytes at full size.

Nothing is run, and kernels' workspaces are not counted.

python benchmarks/memory_marks.py [name ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import distattn as da
from distattn.launch.command_line import print_to_stderr
from distattn.memory.settings import MemorySettings
from distattn.training.run_memory import memory_of_run, memory_table

ALL = MemorySettings(loss_tile_tokens=4096, mlp_tile_tokens=32768, activation_checkpointing="full", offload=True)
_NO_ENDS = dict(bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
_WIDTHS = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128, **_NO_ENDS)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3-8b": ("llama", dict(vocab_size=128256, intermediate_size=14336, num_hidden_layers=32, **_WIDTHS)),
    "qwen3-8b": ("qwen3", dict(vocab_size=151936, intermediate_size=12288, num_hidden_layers=36, **_WIDTHS)),
}


@dataclass(frozen=True)
class Mark:
    """A published training length, with the number of GPUs and the bytes of memory per GPU (`limit`)."""

    by: str
    model: str
    tokens: int
    ranks: int
    limit: float
    strategy: str = "ulysses"
    state_on_host: bool = False
    max_buffer_bytes: int | None = None


MARKS = {
    "trl-1m": Mark("TRL#6846", "qwen3-8b", 1 << 20, 8, 56.2e9),
    "alst-500k": Mark("ALST", "llama-3-8b", 500_000, 1, 80e9, state_on_host=True),
    "upipe-5m": Mark("UPipe", "llama-3-8b", 5_000_000, 8, 80e9, state_on_host=True, max_buffer_bytes=12 * 10**9),
    "3m": Mark("ours", "llama-3-8b", 3_000_000, 8, 80e9),
    "4m": Mark("ours", "llama-3-8b", 4_000_000, 8, 80e9, "ring", state_on_host=True, max_buffer_bytes=4 * 10**9),
}


def build(model: str) -> Any:
    """Return a transformers model in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, shape = MODELS[model]
    config = AutoConfig.for_model(kind, **shape)
    return AutoModelForCausalLM.from_config(config, attn_implementation="distattn", dtype=torch.bfloat16)


def show(mark: Mark) -> list[str]:
    """Count the memory of one mark, with fp32 master weights. Return the lines to print."""
    mask, layout = da.Mask.causal(mark.tokens), da.Layout.zigzag([mark.tokens], mark.ranks)
    shape: dict[str, Any] = dict(heads=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    shape |= dict(strategy=mark.strategy, max_buffer_bytes=mark.max_buffer_bytes)
    plan = da.make_plan(mask, layout, **shape)
    state: dict[str, Any] = dict(master_weights=True, state_on_host=mark.state_on_host)
    memory = memory_of_run(partial(build, mark.model), plan, ALL, print_to_stderr, **state)
    most = max(rank_memory.total for rank_memory in memory)
    verdict = "fits" if most <= mark.limit else "does not fit"
    return [
        f"{mark.by}: {mark.tokens:,} tokens of {mark.model} on {mark.ranks} x {mark.limit / 1e9:.1f} GB, {mark.strategy}"
        f"{', state on the host' if mark.state_on_host else ''}: {most / 1e9:.1f} GB {verdict}",
        *memory_table(memory, mark.ranks),
    ]


def main(names: list[str]) -> None:
    """Print the marks with these names, by default all."""
    for name in names or MARKS:
        sys.stdout.write("\n".join(show(MARKS[name])) + "\n\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
