"""Evidence of refused steps in the run folder: which documents, which tokens each rank had, and digests of its weights."""

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
from torch.distributed.tensor import DTensor

from distattn.training.json_lines import json_text
from distattn.training.module_observer import plain_name

if TYPE_CHECKING:
    from distattn.training.numerics_watch import Finding, Verdict

_LOG = logging.getLogger("distattn")
_TOKENS = ("input_ids", "labels", "position_ids", "corpus_ids")


class Evidence(NamedTuple):
    """What is kept of a step. documents: pieces of its documents, a JSON object each; batches: this rank's micro-batches."""

    verdict: Verdict
    finding: Finding | None
    documents: Sequence[Mapping[str, Any]]
    batches: Sequence[Mapping[str, Any]]
    model: Any


def keep(found: Evidence, folder: Path, rank: int, most: int) -> None:
    """Write one step's evidence to `folder/step-N`, and remove the oldest beyond `most` steps. Every rank calls it.

    Files: `verdict.json` and `documents.jsonl` (rank 0), and of each rank R `tokens-R.npz` (arrays "I.input_ids" and so on of
    micro-batch I) and `weights-R.json` (xxh3 of the bytes that this rank has of each parameter). The same step again replaces its
    evidence. What cannot be written is warned of in one line: a run does not end because its disk is full.
    """
    place = folder / f"step-{found.verdict.step}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            said = {"verdict": asdict(found.verdict), "finding": found.finding and asdict(found.finding)}
            (place / "verdict.json").write_text(json_text(said, indent=1), "utf-8")
            lines = "".join(f"{json_text(row)}\n" for row in found.documents)
            (place / "documents.jsonl").write_text(lines, "utf-8")
            # a folder that was there already is as new as one that was not
            os.utime(place)
            _remove_oldest(folder, place, most)
        tokens = {
            f"{number}.{name}": batch[name].cpu().numpy()
            for number, batch in enumerate(found.batches)
            for name in _TOKENS
            if name in batch
        }
        np.savez_compressed(place / f"tokens-{rank}.npz", allow_pickle=False, **tokens)
        (place / f"weights-{rank}.json").write_text(json_text(weight_digests(found.model), indent=1), "utf-8")
    except OSError as error:
        _LOG.warning("%s: the evidence of step %d was not written: %s", place, found.verdict.step, error.strerror)


def weight_digests(model: Any) -> dict[str, str]:
    """The xxh3 (128 bits, hexadecimal) of the bytes that this rank has of each parameter, by name."""
    return {plain_name(name): _digest(parameter) for name, parameter in model.named_parameters()}


def _digest(parameter: Tensor) -> str:
    local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
    return xxhash.xxh3_128_hexdigest(local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _remove_oldest(folder: Path, newest: Path, most: int) -> None:
    """Other steps' folders by the time of their last change, so that a run that went back keeps what it wrote last."""
    others = [one for one in folder.iterdir() if re.fullmatch(r"step-\d+", one.name) and one != newest]
    others.sort(key=lambda one: (one.stat().st_mtime_ns, int(one.name[5:])))
    for one in others[: max(len(others) - (most - 1), 0)]:
        shutil.rmtree(one, ignore_errors=True)
