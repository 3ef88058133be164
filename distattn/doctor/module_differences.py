"""Buffers and settings that a model has on ranks and not in one process: what hypotheses about tokens cannot see."""

# I frequencies of rotary embeddings

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding, RankResult
from distattn.doctor.recording import buffers_of, settings_of

# whether modules are training says nothing by itself
_NO_MATTER = ("training", "use_cache", "torch_dtype", "dtype")
_REMEDY = "make the model by the same configuration, and fill buffers that no checkpoint holds, on every rank"


def explain_by_module(model: torch.nn.Module, ranks: Sequence[RankResult]) -> Finding | None:
    """Find a buffer or a setting that the model of one process has otherwise."""
    here = buffers_of(model)
    for name, there in ranks[0]["buffers"].items():
        if name in here and not _same(here[name], there):
            return _different_buffer(name, here[name], there)
    settings = settings_of(model)
    different: list[tuple[str, Any, Any]] = [
        (name, there, settings[name])
        for name, there in ranks[0]["settings"].items()
        if name in settings and settings[name] != there and name.rpartition(".")[2] not in _NO_MATTER
    ]
    if not different:
        return None
    name, there, one = min(different, key=lambda found: "theta" not in found[0])
    cause = "RoPE base" if "theta" in name else "setting differs"
    return Finding(cause, f"{name} is {there!r} on the ranks, and {one!r} in one process", _REMEDY)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other) and one.dtype == other.dtype


def _different_buffer(name: str, here_I: Tensor, there_I: Tensor) -> Finding:
    if not name.endswith("inv_freq"):
        return Finding("buffer differs", f"the buffer {name} is not that of one process", _REMEDY)
    if here_I.dtype != there_I.dtype:
        observed = f"{name} is {str(there_I.dtype)[6:]} on the ranks, and {str(here_I.dtype)[6:]} in one process"
    else:
        observed = (
            f"{name} has the frequencies of base {_base(there_I):.4g}, in one process those of {_base(here_I):.4g}"
        )
    return Finding("RoPE base", observed, _REMEDY)


def _base(frequencies_I: Tensor) -> float:
    """Of frequencies base ** (-i / I)."""
    wide, count = frequencies_I.double(), len(frequencies_I)
    return float((wide[0] / wide[-1]) ** (count / max(count - 1, 1)))
