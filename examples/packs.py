"""What the examples train on: the demo's text in packs of uneven documents, and a Llama small enough for a laptop."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from distattn.adapters import huggingface
from distattn.data.packing import pack_epoch
from distattn.data.text import VOCABULARY, find_corpus, read_tokens

DEVICE = torch.device("cpu")
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(DEVICE)


def packs(pack_tokens: int = 1024) -> Iterator[dict[str, Any]]:
    """Batches as `ContextParallel.shard` takes them, the same on all ranks: token ids (1, N) and document lengths."""
    corpus = find_corpus("{stdlib}", suffix=".py", exclude=["test*", "idle*", "*-packages"], max_document_tokens=700)
    lengths = [document.length for document in corpus.documents]
    for pack in pack_epoch(lengths, pack_tokens, seed=1, epoch=0):
        tokens = [read_tokens(corpus.documents[number]) for number in pack]
        ids = torch.from_numpy(np.concatenate(tokens))[None]
        yield {"input_ids": ids.to(DEVICE), "document_lengths": [len(document) for document in tokens]}


def steps(count: int, micro_batches: int = 2) -> Iterator[list[dict[str, Any]]]:
    """So many steps of so many packs."""
    batches = packs()
    for _ in range(count):
        yield [next(batches) for _ in range(micro_batches)]


def llama(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """From a configuration, seeded; nothing is downloaded."""
    huggingface.register()
    shape = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.1, bos_token_id=None, eos_token_id=None, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="distattn").to(DEVICE, dtype)
