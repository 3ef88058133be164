"""The first steps of a run again, in plain transformers: one process, sdpa, one document at a time, summed.

This file is the other side of the comparison and imports nothing of distattn. It reads a run folder (config.toml,
config.json of the model, documents.jsonl) and writes replay.jsonl with loss and gradient norm of each step.

    python -P distattn/training/reference_replay.py RUN
"""

import json
import sys
import tomllib
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel


def main(folder: Path) -> None:
    """Replay the steps the run's configuration asks for."""
    config = tomllib.loads((folder / "config.toml").read_text("utf-8"))
    torch.manual_seed(config["run"]["seed"])
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(folder), attn_implementation="sdpa")
    model = model.to(getattr(torch, config["model"]["dtype"]))
    train = config["train"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=train["learning_rate"], weight_decay=train["weight_decay"])
    rows = map(json.loads, (folder / "documents.jsonl").open())
    steps = (list(documents) for _, documents in groupby(rows, key=lambda row: row["step"]))
    with (folder / "replay.jsonl").open("w") as out:
        for step, documents in enumerate(islice(steps, min(config["reference_check"]["steps"], train["steps"])), 1):
            loss = accumulate(model, [document_tokens(row) for row in documents])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
            out.write(json.dumps({"step": step, "loss": loss, "grad_norm": float(norm)}) + "\n")
            out.flush()


def document_tokens(row: dict) -> torch.Tensor:
    """The tokens of a piece (1, L), and one more where its document goes on."""
    count = row["length"] + row["follows"]
    found = np.fromfile(row["file"], row["dtype"], count, offset=row["byte"])
    return torch.from_numpy(found.astype(np.int64))[None]


def accumulate(model: PreTrainedModel, documents: list[torch.Tensor]) -> float:
    """Backward of the mean loss over all tokens with a successor; returns that loss."""
    valid = max(sum(ids.shape[1] - 1 for ids in documents), 1)
    total = 0.0
    for ids in documents:
        if ids.shape[1] == 1:
            continue
        logits = model(ids[:, :-1], use_cache=False).logits[0]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide, ids[0, 1:], reduction="sum") / valid
        loss.backward()
        total += float(loss.detach())
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]))
