"""Data and model for the examples: packs of the demo's text with uneven documents, and a Llama small enough for a laptop."""

import argparse
import os
import tempfile
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from distattn.adapters import huggingface
from distattn.data.files.text import VOCABULARY, byte_corpus, find_corpus
from distattn.data.loader import PackLoader
from distattn.data.packing.make_pack_plan import make_pack_plan
from distattn.data.packing.pack_rule import PackRule

PACKS_PER_STEP = 2
FOLDER = tempfile.TemporaryDirectory()
DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    torch.cuda.set_device(DEVICE := torch.device("cuda", int(os.environ["LOCAL_RANK"])))


@cache
def planned(count: int) -> tuple[Any, ...]:
    """Return a plan of `count` steps and its corpora, from the standard library's bytes."""
    text = find_corpus("{stdlib}", suffix=".py", exclude=["test*", "idle*", "*-packages"], max_document_tokens=700)
    rule, corpora = PackRule(((0, 1024),), PACKS_PER_STEP * 1024), [byte_corpus(text, f"{FOLDER.name}/text")]
    return make_pack_plan(f"{FOLDER.name}/packs", corpora, seed=1, rule=rule, steps=count), corpora


def steps(count: int, cp: Any) -> PackLoader:
    """Return a loader for this rank's share of the packs. A trainer with its own loader uses a `PackDataset` instead."""
    return PackLoader(*planned(count), rank=cp.data_parallel_rank, size=cp.data_parallel_size, device=DEVICE)


def arguments(**options: Any) -> argparse.Namespace:
    """Parse the command line: --steps, --data (replicated, or per_rank for ranks with their own packs), and `options`."""
    parser = argparse.ArgumentParser()
    for name, default in {"steps": 20, "data": "replicated", **options}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def settings(data: str, ranks: int) -> dict[str, Any]:
    """Return settings for `ContextParallel`: all ranks split every pack, but with per_rank each half of the ranks has
    its own packs."""
    split = dict(strategy="ring", layout="document_zigzag", layout_options={"min_chunk": 64})
    shared = dict(strategy="cad", data=data, context_parallel_size=max(ranks // PACKS_PER_STEP, 1))
    return split if data == "replicated" else shared


def llama(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Build a Llama from its configuration, with seeded weights. Nothing is downloaded."""
    huggingface.register()
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, initializer_range=0.1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="distattn").to(DEVICE, dtype)
