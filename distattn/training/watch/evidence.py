"""Evidence of refused steps in the run folder: documents, and each rank's tokens and weight digests."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from distattn.training.reporting.json_lines import json_text
from distattn.training.watch.module_observer import local_part, plain_name

if TYPE_CHECKING:
    from distattn.training.watch.numerics_watch import StepFinding, Verdict

_LOG = logging.getLogger("distattn")
_TOKENS = ("input_ids", "labels", "position_ids", "corpus_ids")


class StepEvidence(NamedTuple):
    """The evidence of one step. documents: a JSON object per document piece. batches: this rank's micro-batches."""

    verdict: Verdict
    finding: StepFinding | None
    documents: Sequence[Mapping[str, Any]]
    batches: Sequence[Mapping[str, Any]]
    model: Any


def save_evidence(evidence: StepEvidence, folder: Path, rank: int, most: int) -> None:
    """Write a step's evidence to `folder/step-N`, and keep the evidence of the newest `most` steps. Every rank calls it.

    Rank 0 writes `verdict.json` and `documents.jsonl`. Each rank R writes `tokens-R.npz` (arrays "I.input_ids" and so on
    for micro-batch I) and `weights-R.json` (xxh3 of its shard of each parameter). Older evidence of the same step is
    replaced. If a file cannot be written, logs a one-line warning: a full disk does not end a run.
    """
    step_folder = folder / f"step-{evidence.verdict.step}"
    try:
        step_folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            judgement = {"verdict": asdict(evidence.verdict), "finding": evidence.finding and asdict(evidence.finding)}
            (step_folder / "verdict.json").write_text(json_text(judgement, indent=1), "utf-8")
            lines = "".join(f"{json_text(row)}\n" for row in evidence.documents)
            (step_folder / "documents.jsonl").write_text(lines, "utf-8")
            # update the modification time, so that a folder that already existed counts as the newest
            os.utime(step_folder)
            _remove_oldest(folder, step_folder, most)
        tokens = {
            f"{number}.{name}": batch[name].cpu().numpy()
            for number, batch in enumerate(evidence.batches)
            for name in _TOKENS
            if name in batch
        }
        np.savez_compressed(step_folder / f"tokens-{rank}.npz", allow_pickle=False, **tokens)
        (step_folder / f"weights-{rank}.json").write_text(json_text(weight_digests(evidence.model), indent=1), "utf-8")
    except OSError as error:
        _LOG.warning(
            "%s: the evidence of step %d was not written: %s", step_folder, evidence.verdict.step, error.strerror
        )


def weight_digests(model: Any) -> dict[str, str]:
    """Return the xxh3 (128 bits, hexadecimal) of this rank's shard of each parameter, by parameter name."""
    return {plain_name(name): _digest(parameter) for name, parameter in model.named_parameters()}


def _digest(parameter: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(
        local_part(parameter).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    )


def _remove_oldest(folder: Path, newest: Path, most: int) -> None:
    """Remove the oldest folders by modification time, not by step number: after a rollback, step numbers repeat."""
    others = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name) and path != newest]
    others.sort(key=lambda path: (path.stat().st_mtime_ns, int(path.name[5:])))
    for path in others[: max(len(others) - (most - 1), 0)]:
        shutil.rmtree(path, ignore_errors=True)
