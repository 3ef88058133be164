"""What the examples train on: the demo's text in packs of uneven documents, and a Llama small enough for a laptop."""

import argparse
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from distattn.adapters import huggingface
from distattn.data.packing import pack_epoch
from distattn.data.text import VOCABULARY, find_corpus, read_tokens
from distattn.driver.context_parallel import ContextParallel

PACKS_PER_STEP = 2
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    torch.cuda.set_device(DEVICE := torch.device("cuda", int(os.environ["LOCAL_RANK"])))


def packs(pack_tokens: int = 1024) -> Iterator[dict[str, Any]]:
    """Batches as `ContextParallel.shard` takes them, the same on all ranks: token ids (1, N) and document lengths."""
    corpus = find_corpus("{stdlib}", suffix=".py", exclude=["test*", "idle*", "*-packages"], max_document_tokens=700)
    for pack in pack_epoch([one.length for one in corpus.documents], pack_tokens, seed=1, epoch=0):
        tokens = [read_tokens(corpus.documents[number]) for number in pack]
        ids = torch.from_numpy(np.concatenate(tokens))[None]
        yield {"input_ids": ids.to(DEVICE), "document_lengths": [len(document) for document in tokens]}


def arguments(**options: Any) -> argparse.Namespace:
    """The command line: --steps, --data (replicated, or per_rank: ranks with packs of their own), and further options."""
    parser = argparse.ArgumentParser()
    for name, default in {"steps": 20, "data": "replicated", **options}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def settings(data: str, ranks: int) -> dict[str, Any]:
    """Settings of `ContextParallel`: all ranks split every pack, or two shares of the ranks have a pack each."""
    if data == "replicated":
        return dict(strategy="ring", layout="document_zigzag", layout_options={"min_chunk": 64})
    return dict(strategy="cad", data=data, context_parallel_size=max(ranks // PACKS_PER_STEP, 1))


def steps(count: int, cp: ContextParallel) -> Iterator[list[dict[str, Any]]]:
    """Of so many steps this rank's share of the packs."""
    batches = packs()
    for _ in range(count):
        yield [next(batches) for _ in range(PACKS_PER_STEP)][cp.data_parallel_rank :: cp.data_parallel_size]


def llama(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A Llama from its configuration, seeded; nothing is downloaded."""
    huggingface.register()
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, initializer_range=0.1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="distattn").to(DEVICE, dtype)
