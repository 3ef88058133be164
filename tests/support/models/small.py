"""A small model, uneven batches and the results of a single process, to which every adapter's gradients are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from one_process import loss_by_document
from transformers import AutoModelForCausalLM, LlamaConfig

from distattn.adapters import huggingface
from distattn.batch.packed_batch import IGNORE_INDEX

VOCABULARY = 64
# document lengths by replica and micro-batch. Replica 1 has no labels in the first half of each micro-batch
STEPS = [[[19, 1, 8], [30]], [[7, 25], [2, 2, 40]]]
# let replicas share attention, in blocks so small that work moves between ranks even for these short documents
CAD = dict(strategy="cad", data="per_rank", options=dict(block=8, tolerance=0.0))


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> torch.nn.Module:
    """Return a seeded model, identical on all ranks."""
    huggingface.register()
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    others = dict(
        vocab_size=VOCABULARY, initializer_range=0.2, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False
    )
    config = LlamaConfig(**{**shape, **others, **changes})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="distattn").to(dtype)


def micro_batch(lengths: Sequence[int], masked: bool = False) -> dict[str, Any]:
    """Return a micro-batch whose token ids are seeded by the lengths. masked: the first half of the tokens has no
    labels.
    """
    generator = torch.Generator().manual_seed(sum(lengths) * 31 + len(lengths))
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)), generator=generator)
    labels = ids.clone()
    if masked:
        labels[:, : sum(lengths) // 2] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels, "document_lengths": list(lengths)}


def step(replica: int, micro_batches: int) -> list[dict[str, Any]]:
    """Return a step's micro-batches. The number of labels differs between replicas."""
    return [micro_batch(lengths, masked=replica == 1) for lengths in STEPS[replica][:micro_batches]]


def shared_between_blocks(
    batches: Sequence[dict[str, Any]], block_ranks: int, dtype: str = "float64", parts: int = 1
) -> bool:
    """Return whether attention work moves between blocks of ranks with different batches.

    parts: the number of ranks among which the heads are divided.
    """
    for batch in batches:
        moves = batch["context_parallel"].plan(4 // parts, 2 // parts, 8, 8, dtype).forward.moves
        if (moves["src"] // block_ranks != moves["dst"] // block_ranks).any():
            return True
    return False


def in_one_process(
    model: torch.nn.Module, batches: Sequence[dict[str, Any]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Compute the loss, averaged over valid tokens, and the gradients of all parameters, one document at a time."""
    with huggingface.single_process_attention(model):
        loss = loss_by_document(lambda ids: model(ids, use_cache=False).logits[0], batches)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), list(gradients)


def norm_ratio(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return the norm of the gradients divided by the norm of a single process's gradients, or infinity if their
    directions differ.
    """
    flat, other = (torch.cat([x.double().flatten() for x in xs]) for xs in (got, wanted))
    if F.cosine_similarity(flat, other, dim=0) < 0.9999:
        return float("inf")
    return float(flat.norm() / other.norm())
