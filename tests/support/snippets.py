"""Python snippets of documents, and small objects to run them with."""

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def python_snippets(text: str) -> list[str]:
    """Return the Python code blocks of a Markdown text."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def tiny_llama() -> dict[str, Any]:
    """Return the names that snippets use: a configuration, its model class and an optimizer."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
    return dict(AutoModelForCausalLM=AutoModelForCausalLM, config=config, optimizer=_Optimizer())


def tiny_loader() -> list[Any]:
    """Return two steps with two packs each."""
    return [[tiny_batch(seed) for seed in (step, step + 1)] for step in (0, 2)]


def tiny_batch(seed: int = 0) -> dict[str, Any]:
    """Return a pack with two documents."""
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "document_lengths": [30, 10]}


class _Optimizer:
    """An optimizer that only counts its steps."""

    steps = 0

    def step(self) -> None:
        self.steps += 1

    def zero_grad(self) -> None:
        """Keep the gradients, so that they accumulate."""
