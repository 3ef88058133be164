"""Find model buffers and settings that differ between the ranks and one process, which hypotheses about tokens cannot show."""

# I rotary embedding frequencies

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distattn.doctor.comparison import Finding, RankResult
from distattn.doctor.recording import settings_of

_REMEDY = "make the model with the same configuration, and fill buffers that no checkpoint holds, on every rank"


def explain_by_module(
    model: torch.nn.Module, ranks: Sequence[RankResult], explains: Callable[[], bool]
) -> Finding | None:
    """Copy the ranks' buffers and settings into the model. If that explains the results, name a buffer or setting that differed.

    explains: returns whether emulated ranks that make no mistake reproduce the ranks' results with the changed model.
    """
    buffers = dict(model.named_buffers())
    other = {
        name: there
        for name, there in ranks[0]["buffers"].items()
        if name in buffers and not _same(buffers[name].detach().cpu(), there)
    }
    settings = settings_of(model)
    changed = {
        name: there
        for name, there in ranks[0]["settings"].items()
        if not name.startswith("config.") and name in settings and settings[name] != there
    }
    if not other and not changed:
        return None
    here = {name: buffers[name].detach().cpu().clone() for name in other}
    for name, there in other.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = there.to(buffers[name].device)
    for name, there in changed.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, there)
    if not explains():
        return None
    for name in other:
        return _different_buffer(name, here[name], other[name])
    return _different_setting(changed, settings)


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)


def _different_setting(changed: dict[str, Any], here: dict[str, Any]) -> Finding:
    name = min(changed, key=lambda name: ("theta" not in name, name.endswith("training")))
    others = f", and so are {len(changed) - 1} other settings" if len(changed) > 1 else ""
    observed = f"{name} is {changed[name]!r} on the ranks, and {here[name]!r} in one process{others}"
    return Finding("RoPE base" if "theta" in name else "setting differs", observed, _REMEDY)


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
    """Compute the base from the frequencies, which are base ** (-i / I)."""
    wide, count = frequencies_I.double(), len(frequencies_I)
    return float((wide[0] / wide[-1]) ** (count / max(count - 1, 1)))
