"""Replay of a run's first steps in plain transformers: one process, transformers' attention, one document at a time.

This file is the independent side of the comparison, so it imports nothing from distattn. It reads a run folder
(config.toml, the weights before the first step in initial/, documents.jsonl, and the learning rates in metrics.jsonl)
and writes replay.jsonl with the loss and gradient norm of each step.

    python -P distattn/training/watch/reference_replay.py RUN
"""

import json
import math
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel


def main(folder: Path) -> None:
    """Replay as many steps as the run's configuration asks for."""
    config = tomllib.loads((folder / "config.toml").read_text("utf-8"))
    train, dtype = config["train"], getattr(torch, config["model"]["dtype"])
    # with bfloat16, computation is in bfloat16 and the trained weights are float32
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    model = AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=wide, trust_remote_code=False)
    parameters = list(model.parameters())
    matrices, vectors = (
        [parameter for parameter in parameters if (parameter.dim() > 1) == is_matrix] for is_matrix in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": train["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    betas = train["beta1"], train["beta2"]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=train["epsilon"])
    count = min(config["reference_check"]["steps"], train["steps"])
    rates = {row["step"]: row["learning_rate"] for row in rows_of(folder / "metrics.jsonl")}
    steps = first_steps(rows_of(folder / "documents.jsonl"), count)
    with (folder / "replay.jsonl").open("w") as out:
        for step, documents in enumerate(steps, 1):
            loss = accumulate(model, dtype, [tokens_and_next(row) for row in documents], train["z_loss"])
            norm = torch.nn.utils.clip_grad_norm_(parameters, train["max_grad_norm"])
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.step()
            optimizer.zero_grad()
            numbers = {"loss": loss, "grad_norm": float(norm)}
            # JSON has no NaN: write it as a string, as in the run's own rows
            valid = {name: number if math.isfinite(number) else json.dumps(number) for name, number in numbers.items()}
            out.write(json.dumps({"step": step, **valid}) + "\n")
            out.flush()


def rows_of(file: Path) -> Iterator[dict]:
    """Yield the rows of a JSON-lines file, skipping partial rows left by a killed run."""
    for line in file.open():
        with suppress(ValueError):
            yield json.loads(line)


def first_steps(rows: Iterator[dict], count: int) -> list[list[dict]]:
    """Return the documents of the first `count` steps, each from the last attempt that trained it."""
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        if row["step"] < count:
            others = by_step.get(row["step"], [])
            by_step[row["step"]] = [earlier for earlier in others if earlier["attempt"] == row["attempt"]] + [row]
    return [by_step[step] for step in sorted(by_step)]


def tokens_and_next(row: dict) -> torch.Tensor:
    """Return the tokens of a piece (1, L), with one extra token if the document continues after it."""
    count = row["length"] + row["follows"]
    tokens = np.fromfile(row["file"], row["dtype"], count, offset=row["byte"])
    return torch.from_numpy(tokens.astype(np.int64))[None]


def accumulate(model: PreTrainedModel, dtype: torch.dtype, documents: list[torch.Tensor], z_loss: float) -> float:
    """Run the forward and backward passes of the mean loss over all tokens that have a next token. Returns that loss."""
    valid = max(sum(ids.shape[1] - 1 for ids in documents), 1)
    total = 0.0
    for ids in documents:
        if ids.shape[1] == 1:
            continue
        weights = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
        logits = functional_call(model, weights, (ids[:, :-1],), {"use_cache": False}).logits[0]
        wide_logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide_logits, ids[0, 1:], reduction="sum") / valid
        if z_loss:
            loss = loss + z_loss * (wide_logits.logsumexp(-1) ** 2).sum() / valid
        loss.backward()
        total += float(loss.detach())
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]))
